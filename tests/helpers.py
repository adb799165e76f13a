"""Cases and checks that the tests share; `test_mutants` holds the same checks against planted bugs."""

import functools
import importlib.metadata
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import specjax
from specjax import decoding, sampling, testing
from specjax.decoding import verify
from specjax.decoding.loop import check
from specjax.decoding.verify import Rule
from specjax.drafters import contract
from specjax.models import families
from specjax.sampling import automaton
from specjax.state import DecodeState
from specjax.text.tokenizer import Tokenizer
from specjax.types import Automaton, Block, Context, Drafter, History, Inputs, Model, Params, SamplingOptions

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "and", "then", "it", "ran", "to", "see", "who", "was", "there"]
"""The vocabulary of `save_tiny_decoder`."""

SIGNIFICANCE = 1e-5
"""Seeds are fixed: a sound sampler passes always or never, and a few hundred tests at this level hardly ever fail."""

Step = Callable[[Model, Drafter, Rule, Params, DecodeState], DecodeState]


class Group(NamedTuple):
    """Rows of a ragged batch that make one statistical test together."""

    prompt: tuple[int, ...]
    rows: int
    budget: int = 4
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: tuple[tuple[int, ...], ...] | None = None
    """Successor states by state and token, -1 where a token is forbidden."""

    @property
    def options(self) -> dict[str, Any]:
        """Those that differ from the defaults, and the temperature."""
        fields = {name: getattr(self, name) for name in self._fields[3:]}
        return {k: v for k, v in fields.items() if k == "temperature" or v != self._field_defaults[k]}


class Pair(NamedTuple):
    """A target and what drafts for it."""

    target: Model
    table: Any
    drafter: Drafter
    draft_params: Any = None

    @property
    def params(self) -> Params:
        return Params(self.table, self.draft_params)


def with_rows(state: DecodeState, **changes: Any) -> DecodeState:
    """The state with other values of some of its rows' fields."""
    return state._replace(rows=state.rows._replace(**changes))


def feed(model: Model) -> Callable[..., Any]:
    """Reads and commits more tokens of each row: `(params, tokens, cache) -> (output, cache)`."""

    def read(params: Any, tokens: Any, cache: Any) -> Any:
        output, cache = model.apply(params, Block(tokens), cache)
        return output, model.commit(cache, None, jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32))

    return read


class Sample(NamedTuple):
    """What was decoded for some groups, on the host; row `r` belongs to group `owner[r]`."""

    pair: Pair
    groups: Sequence[Group]
    owner: np.ndarray
    state: DecodeState
    stop_tokens: tuple[int, ...] = ()

    def new_tokens(self, group: int) -> np.ndarray:
        """`[rows, budget]`; a text that a stop token has ended goes on with it."""
        rows, start = self.owner == group, len(self.groups[group].prompt)
        new = np.array(self.state.rows.tokens)[rows, start : start + self.groups[group].budget]
        end = np.asarray(self.state.rows.length)[rows] - start
        last = np.take_along_axis(new, np.maximum(end - 1, 0)[:, None], axis=1)
        return np.where(np.arange(new.shape[1]) < end[:, None], new, last)


def usual(cells: Iterable[Any], *chosen: Any) -> list[Any]:
    """For `parametrize`: the chosen ones in every run, the others by hand (`pytest -m slow`)."""
    listed = list(cells)
    assert set(chosen) <= set(listed), set(chosen) - set(listed)
    by_hand = pytest.mark.slow
    return [
        cell if cell in chosen else pytest.param(*(cell if isinstance(cell, tuple) else (cell,)), marks=by_hand)
        for cell in listed
    ]


def virtual_devices(number: int) -> dict[str, str]:
    """The environment of a process that sees so many devices of a CPU, and else compiles as this one does."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={number}"
    return os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}


def right_pad(prompts: Sequence[Sequence[int]], width: int) -> Inputs:
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return Inputs(jnp.asarray(tokens), jnp.asarray([len(p) for p in prompts], jnp.int32))


EMITTERS_OF_USERS: dict[str, str | bool] = (
    {"xla_cpu_use_fusion_emitters": True} if importlib.metadata.version("jaxlib").startswith("0.10.") else {}
)
"""For programs whose instructions a test reads; the default run compiles all others with XLA's older emitters."""

OPTIMISED = {"xla_backend_optimization_level": 2}
"""For programs that take longer to run than to compile; the default run compiles all others at level 0."""


@functools.cache
def compiled(model: Model) -> Model:
    """The model with jitted functions: called eagerly, each of its operations would be compiled alone."""
    return model._replace(prefill=jax.jit(model.prefill), apply=jax.jit(model.apply), commit=jax.jit(model.commit))


@functools.cache
def _advance(target: Model, drafter: Drafter, rule: Rule) -> Callable[[Params, DecodeState], DecodeState]:
    """`decoding.advance` to the end, compiled for many rows."""
    steps = np.int32(2**31 - 1)
    loop = functools.partial(decoding.advance, target, drafter, rule)
    return jax.jit(lambda params, state: loop(params, state, steps), compiler_options=OPTIMISED)


def run(pair: Pair, rule: Rule, state: DecodeState, step: Step | None = None) -> DecodeState:
    """`generate`, or the same loop around another step, traced anew so that what a test has patched is seen."""
    if step is None:
        state = _advance(pair.target, pair.drafter, rule)(pair.params, state)
        check(state)
        return state

    def loop(params: Params, state: DecodeState) -> DecodeState:
        # A broken step may never end a row.
        def unfinished(carry: Any) -> Any:
            return (carry[0] < 128) & ~jnp.all(carry[1].rows.done)

        def body(carry: Any) -> Any:
            return carry[0] + 1, step(pair.target, pair.drafter, rule, params, carry[1])

        return jax.lax.while_loop(unfinished, body, (0, state))[1]

    return jax.jit(loop, compiler_options=OPTIMISED)(pair.params, state)


@functools.lru_cache(maxsize=4)
def _requests(
    groups: tuple[Group, ...], width: int
) -> tuple[np.ndarray, Inputs, np.ndarray, SamplingOptions, list[Automaton | None] | None]:
    """The owner of each row, and its prompt, budget, options and grammar."""
    owner = np.repeat(np.arange(len(groups)), [group.rows for group in groups])
    np.random.default_rng(0).shuffle(owner)
    inputs = right_pad([group.prompt for group in groups], width)
    used = {name for group in groups for name in group.options} - {"grammar", "logit_bias"}
    options: dict[str, Any] = {name: np.array([getattr(group, name) for group in groups])[owner] for name in used}
    if any(group.logit_bias for group in groups):
        each = [dict(group.logit_bias) for group in groups]
        options["logit_bias"] = [each[i] for i in owner]
    tables = [None if g.grammar is None else automaton.from_table(np.array(g.grammar)) for g in groups]
    return (
        owner,
        Inputs(inputs.tokens[owner], inputs.length[owner]),
        np.array([group.budget for group in groups])[owner],
        sampling.options(len(owner), **options),
        [tables[i] for i in owner] if any(tables) else None,
    )


def sample(
    pair: Pair,
    groups: Sequence[Group],
    *,
    rule: Rule = verify.rejection,
    step: Step | None = None,
    step_cost: Any = 0.0,
    stop_tokens: Sequence[int] = (),
    width: int = 8,
    max_len: int = 24,
) -> Sample:
    """Decodes all groups in one batch, their rows shuffled."""
    owner, inputs, budgets, options, grammar = _requests(tuple(groups), width)
    state = decoding.prefill(
        pair.target,
        pair.drafter,
        pair.params,
        inputs,
        max_new_tokens=budgets,
        options=options,
        grammar=grammar,
        step_cost=step_cost,
        stop_tokens=stop_tokens,
        max_len=max_len,
    )
    return Sample(pair, groups, owner, run(pair, rule, state, step), tuple(stop_tokens))


@functools.cache
def _exact(table: bytes, shape: tuple[int, int], group: Group, stop_tokens: tuple[int, ...]) -> np.ndarray:
    values = np.frombuffer(table, np.float32).reshape(shape)
    return testing.enumerate_texts(values, group.prompt, group.budget, stop_tokens, **group.options)


def p_value(result: Sample, group: int) -> float:
    """Of the group's texts, against their exact distribution."""
    table, g = np.asarray(result.pair.table), result.groups[group]
    probs = _exact(table.tobytes(), table.shape, g._replace(rows=0), result.stop_tokens)
    texts = result.new_tokens(group)
    if not np.isin(texts, np.arange(table.shape[1])).all():
        return 0.0
    index = np.ravel_multi_index(tuple(texts.T), probs.shape)
    return testing.g_test(np.bincount(index, minlength=probs.size), probs)


def assert_exact(result: Sample) -> None:
    """Every group's texts are distributed as the target says, jointly over all their tokens."""
    if result.stop_tokens:
        assert_stops(result)
    else:
        length = np.array([len(g.prompt) + g.budget for g in result.groups])[result.owner]
        assert (np.asarray(result.state.rows.length) == length).all(), "some rows did not use their budget"
    for i, group in enumerate(result.groups):
        p = p_value(result, i)
        assert p > SIGNIFICANCE, f"{group} is not distributed as the target: p = {p:.1e}"


def assert_drafts_accepted(result: Sample) -> None:
    """Runs of 0, 1 and, for a longer draft, 2 tokens were accepted, so that the test is not vacuous."""
    histogram = np.asarray(result.state.rows.stats.histogram).sum(axis=0)
    assert (histogram[:3] > 100).all(), f"histogram of accepted drafts: {histogram}"


def assert_stops(result: Sample) -> None:
    """A row ends at its first stop token, wherever in a block that falls."""
    tokens, length = np.asarray(result.state.rows.tokens), np.asarray(result.state.rows.length)
    start = np.array([len(g.prompt) for g in result.groups])[result.owner]
    budget = np.array([g.budget for g in result.groups])[result.owner]
    place = np.arange(tokens.shape[1])
    is_stop = np.isin(tokens, result.stop_tokens) & (place >= start[:, None]) & (place < length[:, None])
    first = np.where(is_stop.any(axis=1), is_stop.argmax(axis=1) + 1, start + budget)
    wrong = np.flatnonzero(first != length)
    assert not len(wrong), f"row {wrong[0]} has {tokens[wrong[0], start[wrong[0]] : length[wrong[0]]]}"


def assert_always_accepted(state: DecodeState) -> None:
    """A draft equal to the target is never rejected."""
    proposed, accepted = (np.asarray(x).sum() for x in (state.rows.stats.proposed, state.rows.stats.accepted))
    assert proposed > 0
    assert proposed == accepted, f"{accepted} of {proposed} drafts were accepted"


def texts(state: DecodeState) -> list[list[int]]:
    """Every row's tokens."""
    tokens, length = np.asarray(state.rows.tokens), np.asarray(state.rows.length)
    return [row[:n].tolist() for row, n in zip(tokens, length, strict=True)]


def random_prompts(count: int, vocab_size: int, seed: int = 0, longest: int = 12) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def random_corpus(seed: int = 0, vocab_size: int = 5, count: int = 40, longest: int = 12) -> list[list[int]]:
    """Texts in which a token often follows the one before it by one, so that contexts matter."""
    rng = np.random.default_rng(seed)
    corpus = []
    for _ in range(count):
        text = [int(rng.integers(vocab_size))]
        for _ in range(int(rng.integers(longest))):
            text.append(int(rng.integers(vocab_size)) if rng.random() < 0.5 else (text[-1] + 1) % vocab_size)
        corpus.append(text)
    return corpus


def tokenizer_of(words: str | Sequence[str]) -> Tokenizer:
    """A tokenizer whose tokens are those words, in this order; "▁" begins a word of a text."""
    listed = words.split() if isinstance(words, str) else words
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(listed)}, "[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend)


def save_tiny_decoder(directory: pathlib.Path, seed: int, more_words: Sequence[str] = (), num_layers: int = 1) -> str:
    """Saves a random model that knows `WORDS`, and returns its source."""
    tokenizer = tokenizer_of([*(f"\u2581{word}" for word in [*WORDS, *more_words]), "[unk]"])
    config = specjax.DecoderConfig(
        vocab_size=len(WORDS) + len(more_words) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position=256,
    )
    # The default deviation of .02 would leave the logits almost constant.
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, families.init_params(config, jax.random.key(seed)))
    specjax.save(specjax.Pretrained(families.model(config), params, tokenizer, config), directory)
    return str(directory)


def context_of(rows: Sequence[Sequence[int]], k: int, vocab_size: int, max_draft: Any = None, **options) -> Context:
    """What a drafter sees of some texts."""
    length = np.asarray([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), length.max() + k + 2), np.int32)
    for row, text in zip(tokens, rows, strict=True):
        row[: len(text)] = text
    # What lies behind a text is stale.
    tokens[np.arange(tokens.shape[1]) >= length[:, None]] = 1
    size = len(rows)
    history = History(
        jnp.asarray(tokens),
        jnp.asarray(length),
        jnp.asarray(length),
        jnp.full((size, 8), -1, jnp.int32),
        None,
        jnp.zeros((size, 1), jnp.int32),
    )
    keys = jax.random.split(jax.random.key(0), (size, k))
    room = jnp.asarray(np.broadcast_to(k if max_draft is None else max_draft, size), jnp.int32)
    return Context(history, keys, room, sampling.options(size, **options), vocab_size)


def greedy_text(drafter, draft_params: Any) -> tuple[list[list[int]], int]:
    """Texts of the tiny decoder, and how many draft tokens were accepted."""
    model, params = testing.tiny_decoder(0)
    drafter = contract.check(drafter).drafter
    both = Params(params, draft_params)
    state = decoding.prefill(
        model,
        drafter,
        both,
        decoding.pad_prompts(random_prompts(6, 61)),
        max_new_tokens=[30, 3, 0, 17, 40, 1],
        step_cost=0.0,
        max_len=64,
    )
    rule = verify.rejection if drafter.topology.is_chain else verify.greedy
    state = decoding.generate(model, drafter, rule, both, state)
    return texts(state), int(np.asarray(state.rows.stats.accepted).sum())
