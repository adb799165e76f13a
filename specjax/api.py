"""The front door: texts in, texts out. Below it lies `decode`, over pytrees."""

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from specjax import automaton, decode, distributed, drafters, metrics, sampling, sharding, verify
from specjax.drafters import contract
from specjax.pretrained import Pretrained
from specjax.text import Tokenizer
from specjax.types import Automaton, DecodeState, Drafter, Inputs, Params
from specjax.verify import Rule, replaced_at_zero
from specjax.verify import parse as parse_rule


class Generation(NamedTuple):
    """What `generate` returns. Lists have one entry a text; the texts of a prompt stand side by side.

    Attributes:
      text: the new text, special tokens left out; None where the target has no tokenizer.
      tokens: the new token ids, the stop token among them.
      from_draft: whether each new token was an accepted draft token.
      finish_reason: "stop", "length", or "unfinished" while streaming.
      logprobs: the log-probability of each new token under the target, before any option; None where not asked for.
      top_logprobs: for each new token the most probable tokens of its place and their log-probabilities, likewise.
      stats: the counters of all rows added up.
      row_stats: those of each row.
    """

    text: list[str] | None
    tokens: list[list[int]]
    from_draft: list[list[bool]]
    finish_reason: list[str]
    logprobs: list[list[float]] | None
    top_logprobs: list[list[dict[int, float]]] | None
    stats: metrics.Summary
    row_stats: list[metrics.Summary]


class Request(NamedTuple):
    """A call of `generate`, checked and brought to the device: what `decode` needs.

    Attributes:
      target: the target.
      drafter: the drafter, without its source.
      rule: the acceptance rule.
      params: the parameters of both.
      state: after the prefill.
      mesh: the mesh that the parameters lie on, or None.
      fixed_shape: whether every target call scores K + 1 tokens.
    """

    target: Pretrained
    drafter: Drafter
    rule: Rule
    params: Params
    state: DecodeState
    mesh: Mesh | None
    fixed_shape: bool


def encode(target: Pretrained, prompts: Sequence[str | Sequence[int]], *, chat: bool = False) -> list[list[int]]:
    """Prompts as token ids.

    Args:
      target: whose tokenizer is used.
      prompts: texts, or lists of token ids, which are taken as they are.
      chat: put each text into the model's chat template, as what a user says.

    Raises:
      ValueError: for a text without a tokenizer, or a chat without a template, or an empty prompt.
      TypeError: for one text in the place of a list of texts.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts is the text {prompts[:40]!r}: give a list of texts.")
    encoded = []
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            encoded.append([int(t) for t in prompt])
            continue
        if target.tokenizer is None:
            raise ValueError(f"Prompt {i} is a text, but the target has no tokenizer: give lists of token ids.")
        if chat and not target.tokenizer.has_chat_template:
            raise ValueError("chat=True, but the target's tokenizer has no chat template: set chat=False.")
        if chat:
            encoded.append(target.tokenizer.chat([{"role": "user", "content": prompt}]))
        else:
            encoded.append(target.tokenizer.encode(prompt))
    for i, tokens in enumerate(encoded):
        if not tokens:
            raise ValueError(f"Prompt {i} is empty: give at least one token, such as the beginning-of-text token.")
        worst = max(tokens)
        if worst >= target.model.vocab_size or min(tokens) < 0:
            raise ValueError(f"Prompt {i} has token {worst}, but the vocabulary has {target.model.vocab_size} entries.")
    return encoded


def check_vocabularies(target: Pretrained, draft: Any) -> None:
    """Makes sure that a token id means the same to both sides. Padding of the vocabulary may differ.

    Raises:
      ValueError: naming the first token that differs.
    """
    if target.tokenizer is None or draft.tokenizer is None:
        return
    conflict = _vocabulary_conflict(target.tokenizer, draft.tokenizer)
    if conflict:
        raise ValueError(f"The vocabularies do not match: {conflict}. Choose a draft with the target's tokenizer.")


@functools.lru_cache(maxsize=16)
def _stopping(strings: tuple[str, ...], tokenizer: Tokenizer, vocab_size: int) -> Automaton:
    """Kept, for a large vocabulary takes a second or two."""
    return automaton.stop_strings(strings, tokenizer, vocab_size=vocab_size)


@functools.lru_cache(maxsize=16)
def _vocabulary_conflict(target: Tokenizer, draft: Tokenizer) -> str:
    ours, theirs = target.vocab(), draft.vocab()
    names = {i: token for token, i in ours.items()}
    for token, i in sorted(theirs.items(), key=lambda item: item[1]):
        if ours.get(token, i) != i or names.get(i, token) != token:
            sizes = f"{len(ours)} and {len(theirs)} tokens"
            return f"({sizes}) id {i} is {token!r} for the draft and {names.get(i)!r} for the target"
    return ""


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that parameters lie on; None where they lie on one device."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            mesh = leaf.sharding.mesh
            return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None
    return None


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The context in which programs are traced for that mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def place(mesh: Mesh | None, params: Params, inputs: Inputs) -> tuple[Params, Inputs]:
    """Parameters and prompts where a program of the target's mesh reads them.

    The prompts are split over the mesh by rows, and what the draft has on other devices is copied to all of the mesh.
    """
    if mesh is None:
        return params, inputs
    axes = ("batch", "tokens")
    inputs = jax.tree.map(lambda x: jax.device_put(x, sharding.named_sharding(mesh, x.shape, axes[: x.ndim])), inputs)
    return params._replace(draft=sharding.replicate_rest(params.draft, mesh)), inputs


def prepare(
    target: Pretrained,
    prompts: Sequence[str | Sequence[int]],
    *,
    drafter: Any = None,
    verify: Any = verify.rejection,
    max_new_tokens: Any = 128,
    seed: Any = 0,
    num_return_sequences: int = 1,
    stop_tokens: Sequence[int] | None = None,
    stop_strings: str | Sequence[str] = (),
    grammar: Automaton | Sequence[Automaton | None] | None = None,
    logprobs: int | None = None,
    step_cost: float = decode.DEFAULT_STEP_COST,
    max_len: int | None = None,
    prompt_width: int | None = None,
    fixed_shape: bool = False,
    chat: bool = False,
    **sampling_options: Any,
) -> Request:
    """Checks a request and reads the prompts into the caches. The arguments are those of `generate`.

    Those annotated as Any may be anything that a user writes, and are checked here.
    """
    drafter = contract.check(drafter if drafter is not None else drafters.none())
    verify = parse_rule(verify)
    encoded = encode(target, prompts, chat=chat)
    rows = len(encoded)
    options = sampling.options(rows, **sampling_options)
    if verify.name == "greedy" and bool(jnp.any(options.temperature > 0)):
        temperature = sampling_options["temperature"]
        raise ValueError(f"verify=greedy decodes at temperature 0, not {temperature}: choose verify.rejection.")
    if (replaced := replaced_at_zero(verify)) and bool(jnp.any(options.temperature == 0)):
        warnings.warn(replaced, stacklevel=3)
    if not verify.exact:
        warnings.warn(f"verify={verify.name} is not exact: the text is not distributed as the target's.", stacklevel=3)
    if num_return_sequences < 1:
        raise ValueError(f"num_return_sequences={num_return_sequences}: at least 1.")
    inputs = decode.read_inputs(target.model, encoded, prompt_width)
    if drafter.source is not None:
        check_vocabularies(target, drafter.source)
        longest = int(inputs.length.max()) + int(np.max(max_new_tokens))
        if drafter.source.model is not None and longest > drafter.source.model.max_len:
            raise ValueError(
                f"The draft knows {drafter.source.model.max_len} positions, but prompt and new tokens make {longest}: "
                "shorten the prompt, lower max_new_tokens, or choose another draft."
            )
    if stop_tokens is None:
        stop_tokens = target.tokenizer.eos_token_ids if target.tokenizer is not None else ()
    stopping = None
    if stop_strings:
        if target.tokenizer is None:
            raise ValueError(f"stop_strings={stop_strings!r} need a tokenizer, which the target lacks: give tokens.")
        vocab_size = target.model.vocab_size
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        stopping = _stopping(tuple(strings), target.tokenizer, vocab_size)
    num_texts = rows * num_return_sequences
    seeds = decode.spread_seeds(seed, num_texts)
    params = Params(target.params, drafter.source.params if drafter.source is not None else ())
    mesh = mesh_of(target.params)
    params, inputs = place(mesh, params, inputs)
    drafter = drafter._replace(source=None)
    with on_mesh(mesh):
        state = decode.prefill(
            target.model,
            drafter,
            params,
            inputs,
            max_new_tokens=max_new_tokens,
            options=options,
            seeds=seeds[::num_return_sequences],
            stop_tokens=stop_tokens,
            stop_strings=stopping,
            grammar=grammar,
            top_logprobs=logprobs,
            step_cost=step_cost,
            max_len=max_len,
        )
        if num_return_sequences > 1:
            state = decode.repeat(state, num_return_sequences, jnp.asarray(seeds, jnp.uint32))
    return Request(target, drafter, verify, params, state, mesh, fixed_shape)


def finish(request: Request, state: DecodeState) -> Generation:
    """Reads the texts of a state."""
    tokens, from_draft, begin, end = (
        np.asarray(x) for x in (state.tokens, state.from_draft, state.prompt_length, state.length)
    )
    rows = [(i, slice(*bounds)) for i, bounds in enumerate(zip(begin, end, strict=True))]
    new = [tokens[row].tolist() for row in rows]
    stops, done = set(np.asarray(state.stop_tokens).tolist()), np.asarray(state.done)
    found = np.zeros(len(rows), bool)
    if state.stop_strings is not None:
        found = np.asarray(state.stop_state) == state.stop_strings.next_state.shape[0] - 1

    def reason(row: int) -> str:
        if not done[row]:
            return "unfinished"
        return "stop" if found[row] or (new[row] and new[row][-1] in stops) else "length"

    logprobs = top_logprobs = None
    if state.logprobs is not None:
        chosen, top_tokens, top = (np.asarray(x) for x in state.logprobs)
        logprobs = [chosen[row].tolist() for row in rows]
        top_logprobs = [
            [dict(zip(*place, strict=True)) for place in zip(top_tokens[row].tolist(), top[row].tolist(), strict=True)]
            for row in rows
        ]
    total, each = metrics.summarise(state.stats, end - begin)
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


def generate(target: Pretrained, prompts: Sequence[str | Sequence[int]], **options: Any) -> Generation:
    """Generates text with speculative decoding.

    Args:
      target: the model whose distribution the text has (`specjax.load`).
      prompts: texts, or lists of token ids.
      **options: all have defaults:
        drafter: what proposes (`specjax.drafters`); None decodes plainly.
        verify: the acceptance rule (`specjax.verify`) or its name, such as "lenient:0.3"; `rejection` by default, which
          is exact at any temperature.
        max_new_tokens: 128; one number, or one a prompt.
        temperature: 0 (greedy); top_k, top_p, min_p, typical_p, epsilon_cutoff: off. Each one number, or one a prompt;
          `sampling.options` says what they mean.
        repetition_penalty, presence_penalty, frequency_penalty, no_repeat_ngram_size, min_new_tokens, logit_bias,
          suppress_tokens: off; see `processors.penalties`.
        seed: 0, a whole number in [0, 2^32); text i uses `seed + i`. Or one a text: a text depends on its own seed, not
          on its neighbours. With `verify.coupled` it does not depend on the drafter either.
        num_return_sequences: 1; how many texts of each prompt, from one prefill.
        stop_tokens: ids that end a text; by default what the tokenizer ends a text with.
        stop_strings: one string or several that end a text, wherever in it they end; they are part of it, as in
          transformers.
        grammar: what the text may be (`automaton.regex`, `automaton.json_schema`), one for all or one (or None) a
          prompt.
        logprobs: None; a number n keeps the log-probability of every new token, and of the n most probable ones.
        step_cost: time of a drafting step over that of a plain step, which drafts have to win back, or a row stops
          drafting for a while (`adaptive`); 0 always drafts. `metrics.measure_costs` measures it.
        max_len: the length of the text buffer; by default the smallest that holds prompts and new tokens.
        prompt_width: the length that prompts are padded to; by default the next of few lengths.
        fixed_shape: False; True has every target call score K + 1 tokens, so that the text does not depend on rounding
          (`docs/exactness.md`). Plain decoding then needs `drafters.none(num_draft_tokens=K)` with the same K.
        chat: False; True puts each text into the model's chat template.

    Returns:
      The texts and the counters.

    Raises:
      ValueError: for options that make no sense, texts that do not fit, vocabularies that do not match.
      TypeError: for options that do not exist or are of another type.
      FloatingPointError: for logits that are not numbers, or options that forbid every token.
    """
    request = prepare(target, prompts, **options)
    return finish(request, run(request))


def run(request: Request) -> DecodeState:
    """Decodes a prepared request to its end. Its state is donated."""
    with on_mesh(request.mesh):
        state = decode.generate(
            request.target.model,
            request.drafter,
            request.rule,
            request.params,
            request.state,
            fixed_shape=request.fixed_shape,
        )
    return readable(request, state)


def readable(request: Request, state: DecodeState) -> DecodeState:
    """The state with all but the caches on every process, where there are several."""
    large = {"cache": state.cache, "drafter": state.drafter}
    return distributed.replicate(state._replace(**dict.fromkeys(large)), request.mesh)._replace(**large)


def stream(
    target: Pretrained, prompts: Sequence[str | Sequence[int]], *, steps: int = 4, **options: Any
) -> Iterator[Generation]:
    """Generates like `generate`, and yields what there is every few steps.

    Args:
      target: the model whose distribution the text has.
      prompts: texts, or lists of token ids.
      steps: how many steps lie between two yields.
      **options: those of `generate`.

    Yields:
      the texts so far, whole; the last is what `generate` returns.
    """
    request = prepare(target, prompts, **options)
    for state in run_in_steps(request, steps):
        yield finish(request, state)


def run_in_steps(request: Request, steps: int) -> Iterator[DecodeState]:
    """Decodes a prepared request, pausing every few steps. Its state is donated, and so is each that is yielded."""
    with on_mesh(request.mesh):
        states = decode.stream(
            request.target.model,
            request.drafter,
            request.rule,
            request.params,
            request.state,
            steps=steps,
            fixed_shape=request.fixed_shape,
        )
        for state in states:
            yield readable(request, state)
