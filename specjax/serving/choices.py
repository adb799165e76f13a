"""What a request has chosen, checked, and laid out as the arrays of one row in host memory."""

from typing import Any

import numpy as np

from specjax.sampling import processors, warp
from specjax.serving.programs import Choices, Sizes
from specjax.serving.requests import Options
from specjax.types import Penalties, SamplingOptions

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff")
_PENALTIES = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "logit_bias",
)


def _no_penalties() -> Penalties:
    number: Any = np.zeros(1, np.float32)
    count: Any = np.zeros(1, np.int32)
    return Penalties(number + 1, number, number, count, count, count[:, None][:, :0], number[:, None][:, :0])


def sampling_of(options: Options, sizes: Sizes, vocab_size: int) -> SamplingOptions:
    """The sampling options of one row, always with penalties, and always with room for `sizes.num_biases` biases.

    Args:
      options: of the request.
      sizes: of the engine.
      vocab_size: of the target.

    Raises:
      ValueError: for values that `sampling.options` refuses, too many biases, or tokens beyond the vocabulary.
    """
    given = {name: getattr(options, name) for name in (*_SAMPLING, *_PENALTIES)}
    biases = options.logit_bias or {}
    if len(biases) > sizes.num_biases:
        raise ValueError(f"logit_bias names {len(biases)} tokens: at most {sizes.num_biases}.")
    beyond = [token for token in biases if token >= vocab_size]
    if beyond:
        raise ValueError(f"logit_bias names token {beyond[0]}, but the vocabulary has {vocab_size}.")
    checked = warp.host_options(1, **given)
    penalties = checked.penalties or _no_penalties()
    room = sizes.num_biases - len(biases)
    # What pads the list already is a token beyond every vocabulary.
    tokens = np.pad(penalties.bias_tokens[:, : len(biases)], ((0, 0), (0, room)), constant_values=processors.NO_TOKEN)
    bias = np.pad(penalties.bias[:, : len(biases)], ((0, 0), (0, room)))
    return checked._replace(penalties=penalties._replace(bias_tokens=tokens, bias=bias))


def choices_of(
    options: Options,
    sizes: Sizes,
    sampling: SamplingOptions,
    stop_tokens: tuple[int, ...],
    *,
    limit: int,
    index: int = 0,
    grammar_state: int = -1,
) -> Choices:
    """The arrays of one sequence of a request.

    Args:
      options: of the request.
      sizes: of the engine.
      sampling: from `sampling_of`.
      stop_tokens: at most `sizes.num_stop_tokens` ids.
      limit: the length at which the sequence ends.
      index: which of the request's sequences it is.
      grammar_state: where its grammar begins in the shared table, or -1.
    """
    stops: Any = np.full((1, sizes.num_stop_tokens), -1, np.int32)
    stops[0, : len(stop_tokens)] = stop_tokens

    def one(value: int, dtype: Any) -> Any:
        return np.full(1, value, dtype)

    return Choices(
        one(limit, np.int32),
        one((options.seed + index) % 2**32, np.uint32),
        sampling,
        stops,
        one(grammar_state, np.int32),
        one(options.logprobs is not None, bool),
    )
