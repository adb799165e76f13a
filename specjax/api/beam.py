"""Beam search: prompts in, texts out (`decoding.beam`)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from specjax import decoding
from specjax.api.pretrained import Pretrained
from specjax.api.request import check_vocabularies, encode, place
from specjax.decoding.beam import Beams, search
from specjax.parallel import distributed, sharding
from specjax.types import Params


class BeamGeneration(NamedTuple):
    """What `beam_search` returns. Lists have one entry per prompt, and in it one per text, best first.

    Attributes:
      text: the new text, special tokens left out; None where the target has no tokenizer.
      tokens: the new token ids, the stop token included.
      scores: see `Beams.score`.
      finish_reason: "stop" or "length".
      target_calls: calls of the target for each prompt, the prefill not counted.
      histogram: those calls by the number of draft steps accepted, from 0 to K.
      steps_per_call: steps of beam search per call of the target, over all prompts; 1 is plain beam search.
    """

    text: list[list[str]] | None
    tokens: list[list[list[int]]]
    scores: list[list[float]]
    finish_reason: list[list[str]]
    target_calls: list[int]
    histogram: list[list[int]]
    steps_per_call: float


def beam_search(
    target: Pretrained,
    prompts: Sequence[str | Sequence[int]],
    *,
    draft: Pretrained | None = None,
    num_beams: int = 4,
    draft_beams: int | None = None,
    num_draft_tokens: int = 4,
    max_new_tokens: int | Sequence[int] = 128,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    stop_tokens: Sequence[int] | None = None,
    num_return_sequences: int = 1,
    chat: bool = False,
) -> BeamGeneration:
    """Finds the most probable texts by beam search, speculatively if there is a draft.

    Args:
      target: the model whose texts are sought (`specjax.load`).
      prompts: texts, or lists of token ids.
      draft: a smaller model with the target's tokenizer; None searches plainly.
      num_beams: w.
      draft_beams: u, the width of the draft's search; by default w.
      num_draft_tokens: K, how many steps the draft searches ahead; unused without a draft.
      max_new_tokens: one number, or one per prompt.
      length_penalty: above 0, long texts gain (see `search`).
      early_stopping: when to stop looking for better texts (see `search`).
      stop_tokens: ids that end a text; by default the tokenizer's end-of-sequence tokens.
      num_return_sequences: how many of the w texts to return for each prompt; fewer where fewer have a probability
        above 0.
      chat: put each text into the model's chat template.

    Returns:
      The texts and the counters.

    Raises:
      ValueError: for options that make no sense, texts that do not fit, vocabularies that do not match.
      FloatingPointError: for NaN logits.
    """
    if not 1 <= num_return_sequences <= max(num_beams, 1):
        raise ValueError(
            f"num_return_sequences={num_return_sequences}, but num_beams={num_beams} finds that many texts: "
            "choose between 1 and num_beams."
        )
    encoded = encode(target, prompts, chat=chat)
    if draft is not None:
        check_vocabularies(target, draft)
    if stop_tokens is None:
        stop_tokens = target.tokenizer.eos_token_ids if target.tokenizer is not None else ()
    mesh = sharding.mesh_of(target.params)
    params = Params(target.params, draft.params if draft is not None else ())
    params, inputs = place(mesh, params, decoding.read_inputs(target.model, encoded))
    with sharding.on_mesh(mesh):
        beams = search(
            target.model,
            draft.model if draft is not None else None,
            params,
            inputs,
            num_beams=num_beams,
            num_draft_tokens=num_draft_tokens if draft is not None else 0,
            draft_beams=draft_beams,
            max_new_tokens=max_new_tokens,
            stop_tokens=stop_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
    host = Beams(*(distributed.to_host(x) for x in beams))  # pyright: ignore[reportArgumentType]
    tokens: list[list[list[int]]] = []
    scores: list[list[float]] = []
    for i, begin in enumerate(distributed.to_host(inputs.length)):
        found = [b for b in range(num_return_sequences) if host.score[i, b] > -np.inf]
        tokens.append([host.tokens[i, b, begin : host.length[i, b]].tolist() for b in found])
        scores.append([float(host.score[i, b]) for b in found])
    stops, tokenizer, calls = set(stop_tokens), target.tokenizer, int(host.target_calls.sum())
    steps = int((host.histogram * np.arange(1, host.histogram.shape[1] + 1)).sum())
    return BeamGeneration(
        text=None if tokenizer is None else [[tokenizer.decode(text) for text in texts] for texts in tokens],
        tokens=tokens,
        scores=scores,
        finish_reason=[["stop" if text and text[-1] in stops else "length" for text in texts] for texts in tokens],
        target_calls=host.target_calls.tolist(),
        histogram=host.histogram.tolist(),
        steps_per_call=steps / calls if calls else 0.0,
    )
