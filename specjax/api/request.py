"""A call of `generate`: checked, tokenised and moved to the device."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from specjax import decoding, drafters, sampling
from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.decoding.verify import Rule, greedy, replaced_at_zero
from specjax.decoding.verify import check as check_rule
from specjax.decoding.verify import parse as parse_rule
from specjax.drafters import contract
from specjax.parallel import sharding
from specjax.sampling import automaton
from specjax.state import DecodeState
from specjax.text.tokenizer import Tokenizer
from specjax.types import Automaton, Drafter, Inputs, Model, Params, SamplingOptions


class Request(NamedTuple):
    """A call of `generate`, checked and moved to the device: what `decode` needs.

    Attributes:
      target: the target.
      drafter: the drafter.
      rule: the acceptance rule.
      params: the parameters of both.
      state: after the prefill.
      mesh: the mesh that the parameters lie on, or None.
      fixed_shape: whether every target call scores K + 1 tokens.
      compiler_options: options of XLA for the loop.
    """

    target: Pretrained
    drafter: Drafter
    rule: Rule
    params: Params
    state: DecodeState
    mesh: Mesh | None
    fixed_shape: bool
    compiler_options: decoding.CompilerOptions = ()


def encode(target: Pretrained, prompts: Sequence[str | Sequence[int]], *, chat: bool = False) -> list[list[int]]:
    """Prompts as token ids.

    Args:
      target: whose tokenizer is used.
      prompts: texts, or lists of token ids, which are taken as they are.
      chat: put each text into the model's chat template, as a message of the user.

    Raises:
      ValueError: for a text without a tokenizer, or a chat without a template, or an empty prompt.
      TypeError: for a single text instead of a list of texts.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts is a single string, {prompts[:40]!r}: give a list of strings.")
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
    """Cached: a large vocabulary takes a second or two."""
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


def place(mesh: Mesh | None, params: Params, inputs: Inputs) -> tuple[Params, Inputs]:
    """Parameters and prompts, placed on the target's mesh.

    The prompts are split over the mesh by rows; draft parameters on other devices are copied to all of the mesh.
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
    step_cost: float | Sequence[float] = decoding.DEFAULT_STEP_COST,
    max_len: int | None = None,
    prompt_width: int | None = None,
    fixed_shape: bool = False,
    chat: bool = False,
    compiler_options: Mapping[str, str | bool | int | float] | None = None,
    **sampling_options: Any,
) -> Request:
    """Checks a request and reads the prompts into the caches. The arguments are those of `generate`.

    Arguments annotated as Any may be anything that a user passes, and are checked here.
    """
    draft = contract.check(drafter if drafter is not None else drafters.none())
    encoded = encode(target, prompts, chat=chat)
    options = sampling.options(len(encoded), **sampling_options)
    rule = _rule_for(parse_rule(verify), draft.drafter, options, sampling_options)
    if num_return_sequences < 1:
        raise ValueError(f"num_return_sequences={num_return_sequences}: at least 1.")
    inputs = decoding.read_inputs(target.model, encoded, prompt_width)
    check_vocabularies(target, draft)
    longest = int(inputs.length.max()) + (0 if draft.max_len is None else int(np.max(max_new_tokens)))
    if draft.max_len is not None and longest > draft.max_len:
        raise ValueError(
            f"The draft knows {draft.max_len} positions, but prompt and new tokens make {longest}: shorten the prompt, "
            "lower max_new_tokens, or choose another draft."
        )
    target = target._replace(model=with_taps(target, draft.drafter))
    if stop_tokens is None:
        stop_tokens = target.tokenizer.eos_token_ids if target.tokenizer is not None else ()
    seeds = decoding.spread_seeds(seed, len(encoded) * num_return_sequences)
    mesh = sharding.mesh_of(target.params)
    params, inputs = place(mesh, Params(target.params, draft.params), inputs)
    with sharding.on_mesh(mesh):
        state = decoding.prefill(
            target.model,
            draft.drafter,
            params,
            inputs,
            max_new_tokens=max_new_tokens,
            options=options,
            seeds=seeds[::num_return_sequences],
            stop_tokens=stop_tokens,
            stop_strings=_stopping_of(target, stop_strings),
            grammar=grammar,
            top_logprobs=logprobs,
            step_cost=step_cost,
            max_len=max_len,
        )
        if num_return_sequences > 1:
            state = decoding.repeat(state, num_return_sequences, jnp.asarray(seeds, jnp.uint32))
    return Request(target, draft.drafter, rule, params, state, mesh, fixed_shape, decoding.as_options(compiler_options))


def _rule_for(rule: Rule, drafter: Drafter, options: SamplingOptions, given: Mapping[str, Any]) -> Rule:
    """The rule that judges this drafter's proposals at these temperatures; warns where the text is not exact.

    Raises:
      ValueError: for a rule that does not fit.
    """
    is_sampled, is_greedy = (bool(jnp.any(x)) for x in (options.temperature > 0, options.temperature == 0))
    try:
        check_rule(rule, drafter.topology)
    except ValueError:
        if is_sampled or not rule.exact:
            raise
        rule = greedy  # Every exact rule is, at temperature 0, and it judges all trees.
    if rule.name == "greedy" and is_sampled:
        raise ValueError(
            f"verify=greedy decodes at temperature 0, not {given['temperature']}: choose verify.rejection."
        )
    if (replaced := replaced_at_zero(rule)) and is_greedy:
        warnings.warn(replaced, stacklevel=4)
    if not rule.exact:
        warnings.warn(f"verify={rule.name} is not exact: the text is not distributed as the target's.", stacklevel=4)
    return rule


def _stopping_of(target: Pretrained, stop_strings: str | Sequence[str]) -> Automaton | None:
    """The automaton of the stop strings, where there are any."""
    if not stop_strings:
        return None
    if target.tokenizer is None:
        raise ValueError(f"stop_strings={stop_strings!r} need a tokenizer, which the target lacks: give stop_tokens.")
    strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
    return _stopping(tuple(strings), target.tokenizer, target.model.vocab_size)


def with_taps(target: Pretrained, drafter: Drafter) -> Model:
    """The target's model with the features that the drafter reads."""
    if not drafter.taps:
        return target.model
    if target.model.with_taps is None:
        raise ValueError(f"The drafter reads hidden states of the target (taps={drafter.taps}), which has no taps.")
    return target.model.with_taps(drafter.taps)
