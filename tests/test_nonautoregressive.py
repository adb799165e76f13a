"""SpecDec's drafter: masks that see each other are read in one call, leave nothing behind, and change no text."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Group, Pair, assert_exact, compiled, right_pad, sample, usual

from specjax import decoding, drafters, testing
from specjax.api.pretrained import Pretrained
from specjax.decoding import step as step_lib
from specjax.decoding import verify
from specjax.models import families, layers
from specjax.models.config import DecoderConfig, ModelConfig, T5Config
from specjax.types import Block, Drafter, Inputs, Params

OURS, ONE_CALL = (importlib.import_module(f"specjax.drafters.{name}") for name in ("nonautoregressive", "one_call"))
V, MASK, K = 13, 12, 3
CONFIGS: dict[str, ModelConfig] = {
    "t5": T5Config(V, 16, 8, 32, 2, 1, 2),
    "decoder": DecoderConfig(V, 16, 32, 2, 2, 1, 8, max_position=64),
    "windowed": DecoderConfig(V, 16, 32, 2, 2, 1, 8, max_position=64, sliding_window=4),
}
SOURCES = ([1, 2, 3, 4], [5, 6])


@functools.cache
def side(name: str, seed: int) -> Pretrained:
    """A random model in which attention matters."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), families.abstract_params(CONFIGS[name])
    )
    return Pretrained(families.model(CONFIGS[name]), params, None, CONFIGS[name])


def inputs(name: str) -> Inputs:
    if name != "t5":
        return right_pad(SOURCES, 4)
    source = right_pad(SOURCES, 4)
    one = jnp.ones(len(SOURCES), jnp.int32)
    return Inputs(jnp.zeros((len(SOURCES), 1), jnp.int32), one, source.tokens, source.length)


# Tokens that see both ways.


def sees_both_ways(name: str) -> None:
    """What is said at a token of such a block depends on those after it and on its own place."""
    one = side(name, 0)
    given = jax.tree.map(lambda x: x[:1], inputs(name))
    _, cache = compiled(one.model).prefill(one.params, given, one.model.init_cache(1, 16, 4))
    size = K
    whole = jnp.ones((1, size, size), bool)

    def logits(tokens: list[int]) -> np.ndarray:
        return np.asarray(
            compiled(one.model).apply(one.params, Block(jnp.asarray([tokens]), sees=whole), cache)[0].logits[0]
        )

    before = logits([MASK, MASK, MASK])
    assert np.abs(before[0] - before[1]).max() > 1e-3, "the places are alike"
    assert np.abs(before[1] - before[2]).max() > 1e-3, "the places are alike"
    assert np.abs(logits([MASK, MASK, 5])[0] - before[0]).max() > 1e-3, "a mask does not see those after it"
    # The last one sees what it would causally, if those before it saw no more: with one layer, exactly that.
    causal = compiled(one.model).apply(one.params, Block(jnp.asarray([[MASK] * size])), cache)[0].logits[0]
    if CONFIGS[name].num_layers == 1:
        np.testing.assert_allclose(before[-1], causal[-1], atol=2e-4)


def test_distances_are_those_of_the_text():
    """Two tokens of the text, then two masks that see both ways: later ones are at negative distances."""
    sees = jnp.asarray([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]], bool)
    length = jnp.asarray([2])
    mask, distance = layers.visible(8, 2 + jnp.arange(4)[None], length, sees)
    wanted = np.arange(2, 6)[:, None] - np.arange(8)
    known = np.concatenate([np.ones((4, 2), bool), np.asarray(sees[0]), np.zeros((4, 2), bool)], axis=1)
    np.testing.assert_array_equal(mask[0], known)
    np.testing.assert_array_equal(np.where(known, distance[0], 0), np.where(known, wanted, 0))
    # A branch of a tree, whose entries are further apart than its positions.
    branch = jnp.asarray([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], bool)
    depth = jnp.asarray([[0, 1, 1]])
    mask, distance = layers.visible(8, 2 + depth, length, branch)
    assert distance[0, 2, jnp.asarray([0, 1, 2, 4])].tolist() == [3, 2, 1, 0]
    assert mask[0, 2].tolist() == [True, True, True, False, True, False, False, False]


@pytest.mark.parametrize("name", usual(CONFIGS, "t5"))
def test_masks_see_each_other_both_ways(name: str):
    sees_both_ways(name)


# What is drafted.


def follows_the_text(name: str, drafter: Drafter, calls: int = 2) -> None:
    """In some steps the slots are filled as by a call behind a prefill of the text, and leave nothing behind."""
    target, draft = side(name, 0), side(name, 1)
    both = Params(target.params, draft.params)
    state = decoding.prefill(target.model, drafter, both, inputs(name), max_new_tokens=20, step_cost=0.0, max_len=64)

    @jax.jit
    def proposed(state: Any) -> Any:
        keys = step_lib.step_keys(state.rows.seed, state.rows.length, K)
        room = jnp.full(len(SOURCES), K)
        context = step_lib.context_of(target.model, drafter, verify.greedy, state, room, *keys)
        return drafter.propose(both, state.rows.drafter, state.rows.cache, context)

    @jax.jit
    def fresh(tokens: Any, length: Any) -> tuple[Any, Any]:
        given = inputs(name)._replace(tokens=tokens, length=length)
        cache = draft.model.init_cache(len(SOURCES), 64, 4)
        _, cache = draft.model.prefill(draft.params, given, cache)
        masks = Block(jnp.full((len(SOURCES), K), MASK), sees=jnp.ones((len(SOURCES), K, K), bool))
        return draft.model.apply(draft.params, masks, cache)[0].logits, cache

    advance = jax.jit(functools.partial(decoding.advance, target.model, drafter, verify.greedy))
    for _ in range(calls):
        proposal, cache, _ = proposed(state)
        assert cache.length.tolist() == state.rows.length.tolist(), "the draft's cache is not that of the text"
        logits, prefilled = fresh(state.rows.tokens[:, :32], state.rows.length)
        for row, size in enumerate(state.rows.length.tolist()):
            for ours, theirs in zip(cache.keys, prefilled.keys, strict=True):
                close = np.allclose(ours[row, :, :size], theirs[row, :, :size], atol=1e-4)
                assert close, "a mask is left in the draft's cache"
            wanted = np.argmax(logits[row], axis=-1).tolist()
            assert proposal.tokens[row].tolist() == wanted, "another draft than in the slots"
        state = advance(both, state, np.int32(1))


def made(name: str, **options: Any) -> Drafter:
    return drafters.nonautoregressive(side(name, 1).model, mask_token=MASK, **options)


@pytest.mark.parametrize("name", usual(CONFIGS, "t5"))
def test_the_slots_are_filled_behind_the_text(name: str):
    follows_the_text(name, made(name, num_draft_tokens=K))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "decoder"])
def test_text_is_plain_decodings(name: str):
    target, draft = side(name, 0), side(name, 1)
    texts = []
    for drafter, params in ((drafters.none(), ()), (made(name, num_draft_tokens=K), draft.params)):
        both = Params(target.params, params)
        state = decoding.prefill(
            target.model, drafter, both, inputs(name), max_new_tokens=[20, 9], step_cost=0.0, max_len=64
        )
        state = decoding.generate(target.model, drafter, verify.rejection, both, state)
        texts.append(np.asarray(state.rows.tokens)[:, :24])
    np.testing.assert_array_equal(*texts)


def _late(reader: Any, history: Any) -> Any:
    asked = OURS.block_of(reader, history)
    return asked._replace(at=asked.at - 1)


def _causal(reader: Any, history: Any) -> Any:
    asked = OURS.block_of(reader, history)
    return asked._replace(block=Block(asked.block.tokens))


def _all(reader: Any, history: Any) -> Any:
    """Lets the text see the masks, which are gone in the next step."""
    asked = OURS.block_of(reader, history)
    return asked._replace(block=Block(asked.block.tokens, sees=jnp.ones_like(asked.block.sees)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "read", "message"),
    [
        ("the slots are read one place off", _late, "another draft than in the slots"),
        ("the slots see no later ones", _causal, "another draft than in the slots"),
        ("the text's keys depend on masks", _all, "left in the draft's cache"),
    ],
)
def test_prefills_catch(bug: str, read: Any, message: str, catches: Any):
    with catches(bug, "prefills", message):
        follows_the_text("decoder", ONE_CALL.chain(ONE_CALL.Reader(side("decoder", 1).model, MASK, K, read)))


# Distributions.

TABULAR, TABLE = testing.tabular(0)
OTHER, OTHER_TABLE = testing.tabular(1)
SHAPES: dict[str, dict[str, Any]] = {"chain": {"num_draft_tokens": 3}, "tree": {"topology": (2, 2)}}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SHAPES))
def test_text_is_distributed_as_the_targets(name: str):
    drafter = drafters.nonautoregressive(OTHER, mask_token=1, **SHAPES[name])
    groups = [Group((0, 1, 2), 6_000), Group((2, 1), 6_000, temperature=0.7, repetition_penalty=1.5)]
    result = sample(Pair(TABULAR, TABLE, drafter, OTHER_TABLE), groups)
    assert_exact(result)
    assert np.asarray(result.state.rows.stats.accepted).sum(axis=0).min() > 50


def test_a_draft_without_a_mask_is_named():
    with pytest.raises(ValueError, match=r"names no mask token: .*configs/specdec\.py"):
        drafters.nonautoregressive(side("t5", 1))
