"""The public API: prompts in, generated text out. It is built on `decode`, which works on pytrees."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from specjax import decoding, metrics
from specjax.api.pretrained import Pretrained
from specjax.api.request import Request, prepare
from specjax.decoding.prefill import DEFAULT_STEP_COST
from specjax.decoding.verify import rejection
from specjax.parallel import distributed, sharding
from specjax.state import DecodeState


class Generation(NamedTuple):
    """What `generate` returns. Lists have one entry per sequence; the sequences of a prompt are adjacent.

    Attributes:
      text: the new text, special tokens left out; None where the target has no tokenizer.
      tokens: the new token ids, the stop token included.
      from_draft: whether each new token was an accepted draft token.
      finish_reason: "stop", "length", or "unfinished" while streaming.
      logprobs: the log-probability of each new token under the target, before any option; None where not asked for.
      top_logprobs: for each new token, the most probable tokens at its position and their log-probabilities; None where
        not asked for.
      stats: the counters, summed over all rows.
      row_stats: the counters of each row.
    """

    text: list[str] | None
    tokens: list[list[int]]
    from_draft: list[list[bool]]
    finish_reason: list[str]
    logprobs: list[list[float]] | None
    top_logprobs: list[list[dict[int, float]]] | None
    stats: metrics.Summary
    row_stats: list[metrics.Summary]


def finish(request: Request, state: DecodeState) -> Generation:
    """Reads the sequences out of a state."""
    tokens, from_draft, begin, end = (
        np.asarray(x) for x in (state.rows.tokens, state.rows.from_draft, state.rows.prompt_length, state.rows.length)
    )
    rows = [(i, slice(*bounds)) for i, bounds in enumerate(zip(begin, end, strict=True))]
    new = [tokens[row].tolist() for row in rows]
    stops, done = np.asarray(state.rows.stop_tokens).tolist(), np.asarray(state.rows.done)
    found = np.zeros(len(rows), bool)
    if state.shared.stop_strings is not None:
        found = np.asarray(state.rows.stop_state) == state.shared.stop_strings.next_state.shape[0] - 1

    def reason(row: int) -> str:
        if not done[row]:
            return "unfinished"
        return "stop" if found[row] or (new[row] and new[row][-1] in stops[row]) else "length"

    logprobs = top_logprobs = None
    if state.rows.logprobs is not None:
        chosen, top_tokens, top = (np.asarray(x) for x in state.rows.logprobs)
        logprobs = [chosen[row].tolist() for row in rows]
        top_logprobs = [
            [dict(zip(*place, strict=True)) for place in zip(top_tokens[row].tolist(), top[row].tolist(), strict=True)]
            for row in rows
        ]
    total, each = metrics.summarise(state.rows.stats, end - begin)
    tokenizer = request.target.tokenizer
    return Generation(
        text=None if tokenizer is None else [tokenizer.decode(row) for row in new],
        tokens=new,
        from_draft=[from_draft[row].tolist() for row in rows],
        finish_reason=[reason(i) for i, _ in rows],
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        stats=total,
        row_stats=each,
    )


def generate(
    target: Pretrained,
    prompts: Sequence[str | Sequence[int]],
    *,
    drafter: Any = None,
    verify: Any = rejection,
    max_new_tokens: Any = 128,
    temperature: Any = 0.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    typical_p: Any = 1.0,
    epsilon_cutoff: Any = 0.0,
    repetition_penalty: Any = 1.0,
    presence_penalty: Any = 0.0,
    frequency_penalty: Any = 0.0,
    no_repeat_ngram_size: Any = 0,
    min_new_tokens: Any = 0,
    logit_bias: Any = None,
    suppress_tokens: Any = None,
    seed: Any = 0,
    num_return_sequences: int = 1,
    stop_tokens: Any = None,
    stop_strings: Any = (),
    grammar: Any = None,
    logprobs: int | None = None,
    step_cost: float | Sequence[float] = DEFAULT_STEP_COST,
    max_len: int | None = None,
    prompt_width: int | None = None,
    fixed_shape: bool = False,
    chat: bool = False,
    compiler_options: Mapping[str, str | bool | int | float] | None = None,
) -> Generation:
    """Generates text with speculative decoding.

    Args:
      target: the model whose distribution the text has (`specjax.load`).
      prompts: texts, or lists of token ids.
      drafter: the drafter (`specjax.drafters`); None decodes plainly.
      verify: the acceptance rule (`specjax.verify`) or its name, such as "lenient:0.3"; `rejection` by default, which
        is exact at any temperature.
      max_new_tokens: 128; one number, or one per prompt.
      temperature: 0 (greedy); top_k, top_p, min_p, typical_p, epsilon_cutoff: off. Each takes one number, or one per
        prompt; `sampling.options` says what they mean.
      repetition_penalty: off; so are presence_penalty, frequency_penalty, no_repeat_ngram_size, min_new_tokens,
        logit_bias and suppress_tokens. See `processors.penalties`.
      seed: 0, an integer in [0, 2^32); sequence i uses `seed + i`. Or one per sequence: a sequence depends on its own
        seed, not on its neighbours in the batch. With `verify.coupled` it does not depend on the drafter either.
      num_return_sequences: 1; how many sequences to generate for each prompt, from one prefill.
      stop_tokens: ids that end a sequence; by default the tokenizer's end-of-sequence tokens.
      stop_strings: one string or several that end a sequence, at whatever position they end; the sequence includes
        them, as in transformers.
      grammar: restricts the text (`automaton.regex`, `automaton.json_schema`), one for all or one (or None) per prompt.
      logprobs: None; a number n keeps the log-probability of every new token, and of the n most probable ones.
      step_cost: the time of a drafting step divided by that of a plain step, or a list of it by the number of draft
        tokens, from 1 on. Each row drafts as many tokens as pay for it, by what it has had accepted so far, or none for
        a while (`adaptive`); 0 always drafts as many as possible. `metrics.measure_costs` measures it. Where all rows
        are greedy, or the rule is `coupled`, the rows of a batch draft what pays for all of them.
      max_len: the length of the text buffer; by default the smallest that holds prompts and new tokens.
      prompt_width: the length that prompts are padded to; by default the next of a few fixed lengths.
      fixed_shape: False; True has every target call score K + 1 tokens, so that the text does not depend on rounding
        (`docs/exactness.md`). Plain decoding then needs `drafters.none(num_draft_tokens=K)` with the same K.
      chat: False; True puts each text into the model's chat template.
      compiler_options: options of XLA for the program of the decoding loop, names and values; by default those that XLA
        has. `docs/plans.md` has one that puts most of a GPU's step into one CUDA graph.

    Returns:
      The texts and the counters.

    Raises:
      ValueError: for options that make no sense, sequences that do not fit, vocabularies that do not match.
      TypeError: for options that do not exist or have the wrong type.
      FloatingPointError: for NaN logits, or options that forbid every token.
    """
    options = {name: value for name, value in locals().items() if name not in ("target", "prompts")}
    request = prepare(target, prompts, **options)
    return finish(request, run(request))


def run(request: Request) -> DecodeState:
    """Decodes a prepared request to its end. Its state is donated."""
    with sharding.on_mesh(request.mesh):
        state = decoding.generate(
            request.target.model,
            request.drafter,
            request.rule,
            request.params,
            request.state,
            fixed_shape=request.fixed_shape,
            compiler_options=request.compiler_options,
        )
    return readable(request, state)


def readable(request: Request, state: DecodeState) -> DecodeState:
    """The state with everything but the caches on every process, if there are several."""
    large = {"cache": state.rows.cache, "drafter": state.rows.drafter}
    small = state._replace(rows=state.rows._replace(**dict.fromkeys(large)))
    small = distributed.replicate(small, request.mesh)
    return small._replace(rows=small.rows._replace(**large))


def stream(
    target: Pretrained, prompts: Sequence[str | Sequence[int]], *, steps: int = 4, **options: Any
) -> Iterator[Generation]:
    """Generates like `generate`, and yields the text so far every few steps.

    Args:
      target: the model whose distribution the text has.
      prompts: texts, or lists of token ids.
      steps: the number of decoding steps between two yields.
      **options: those of `generate`.

    Yields:
      the whole sequences so far; the last is what `generate` returns.
    """
    request = prepare(target, prompts, **options)
    for state in run_in_steps(request, steps):
        yield finish(request, state)


def run_in_steps(request: Request, steps: int) -> Iterator[DecodeState]:
    """Decodes a prepared request, pausing every few steps. Its state is donated, and so is each that is yielded."""
    with sharding.on_mesh(request.mesh):
        states = decoding.stream(
            request.target.model,
            request.drafter,
            request.rule,
            request.params,
            request.state,
            steps=steps,
            fixed_shape=request.fixed_shape,
            compiler_options=request.compiler_options,
        )
        for state in states:
            yield readable(request, state)
