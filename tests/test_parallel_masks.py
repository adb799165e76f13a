"""Masks that read embeddings of their own, and those that are read in a call of their own.

What is drafted is held against prefills of whole texts, and its text against enumerations.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Group, Pair, assert_exact, compiled, right_pad, sample, usual

from specjax import decoding, drafters, testing
from specjax.decoding import step as step_lib
from specjax.decoding import verify
from specjax.models import families
from specjax.models.config import DecoderConfig, T5Config
from specjax.types import Block, Drafter, Inputs, ModelOutput, Params, Probes

PARALLEL, MERGED = (importlib.import_module(f"specjax.drafters.{name}") for name in ("parallel_masks", "merged"))
V, MASK = 7, 6
TARGET, PARAMS = testing.tiny_decoder(3, vocab_size=V, num_layers=1)
TEXTS = ([0, 1, 2, 3, 0, 1, 2, 4], [3, 1, 4, 1, 5])

CONFIGS = {
    "tied": DecoderConfig(11, 16, 32, 1, 2, 1, 8, max_position=64, scale_embeddings=True, positions="learned"),
    "untied": DecoderConfig(11, 16, 32, 1, 2, 1, 8, max_position=64, tie_embeddings=False),
    "t5": T5Config(11, 16, 8, 32, 1, 1, 2),
    "t5, untied": T5Config(11, 16, 8, 32, 1, 1, 2, tie_embeddings=False),
}


def table_of(params: Any) -> Any:
    return params["embedding"] if "embedding" in params else params["head"]["values"].T


@pytest.mark.parametrize("name", usual(CONFIGS, "tied", "t5, untied"))
def test_an_embedding_is_read_in_the_place_of_a_token(name: str):
    """Rows of the table, given as embeddings, are read as their tokens are; the other ids read the table."""
    model, params = families.model(CONFIGS[name]), families.init_params(CONFIGS[name], jax.random.key(0))
    size = model.vocab_size
    source = (jnp.asarray([[1, 2]]), jnp.asarray([2])) if model.start_token is not None else (None, None)
    cache = model.init_cache(1, 16, 2)
    _, cache = compiled(model).prefill(params, Inputs(jnp.asarray([[3]]), jnp.asarray([1]), *source), cache)
    apply = compiled(model).apply

    def read(tokens: list[int], embeddings: Any = None) -> ModelOutput:
        return apply(params, Block(jnp.asarray([tokens]), embeddings=embeddings), cache)[0]

    own = table_of(params)[jnp.asarray([9, 4])]
    found = read([5, size + 1, size, size - 1], own)
    np.testing.assert_allclose(found.logits, read([5, 4, 9, size - 1]).logits, atol=1e-5)
    assert np.abs(np.asarray(found.logits - read([5, 9, 4, size - 1]).logits)).max() > 1e-3
    with pytest.raises(ValueError, match=r"embeddings of shape \[2, 3\]: this model's have 16 entries each"):
        jax.eval_shape(lambda: model.apply(params, Block(jnp.asarray([[1]]), embeddings=jnp.ones((2, 3))), cache))


def test_parts_of_a_merged_draft_keep_their_own_embeddings():
    def probes(tokens: list[int], embeddings: Any) -> Probes:
        return Probes(jnp.asarray([tokens]), jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2, 5), bool), embeddings)

    tables = [jnp.zeros((2, 3)), jnp.ones((1, 3))]
    given = [probes([7, 8], tables[0]), probes([1, 2], None), probes([7, 5], tables[1])]
    tokens, joined = MERGED._join_embeddings(given, V)
    assert tokens.tolist() == [[7, 8, 1, 2, 9, 5]]
    assert joined is not None
    assert joined.tolist() == [[0.0] * 3, [0.0] * 3, [1.0] * 3]
    assert MERGED._join_embeddings(given[1:2], V)[1] is None


def decode(drafter: Any, **options: Any) -> Any:
    """The state after a ragged batch, of temperature 0."""
    draft = options.pop("params", None)
    both = Params(PARAMS, draft)
    prompts = right_pad(TEXTS, 16)
    state = decoding.prefill(TARGET, drafter, both, prompts, max_new_tokens=24, step_cost=0.0, max_len=64)
    return decoding.generate(TARGET, drafter, verify.greedy, both, state)


@pytest.mark.slow
def test_masks_with_embeddings_draft_as_tokens_with_these_embeddings_do():
    plain = decode(drafters.none())
    rows = table_of(PARAMS)[jnp.asarray([MASK, 2])]
    for make in (drafters.mask_tokens, functools.partial(drafters.parallel_masks, TARGET)):
        number = 2 if make is drafters.mask_tokens else 3
        embedded = make(embeddings=rows, num_draft_tokens=number)
        assert embedded.params["embeddings"].shape == rows.shape
        ours = decode(embedded.drafter, params=embedded.params)
        tokens = decode(make(mask_token=(MASK, 2), num_draft_tokens=number))
        np.testing.assert_array_equal(ours.rows.tokens, plain.rows.tokens)
        np.testing.assert_array_equal(ours.rows.stats.accepted, tokens.rows.stats.accepted)
        assert np.asarray(ours.rows.stats.accepted).sum() > 0


# What the drafting call reads.


@jax.jit
def _logits(tokens: Any, length: Any) -> Any:
    cache = TARGET.init_cache(*tokens.shape)
    return TARGET.prefill(PARAMS, Inputs(tokens, length), cache)[0].logits[:, 0]


def logits_after(texts: list[list[int]]) -> np.ndarray:
    inputs = right_pad(texts, 16)
    return np.asarray(_logits(inputs.tokens, inputs.length))


def drafts_behind_the_text(drafter: Drafter, depth: int) -> None:
    """Before the first step: the logits of each depth are those behind the text and so many masks."""
    both = Params(PARAMS, None)
    state = decoding.prefill(TARGET, drafter, both, right_pad(TEXTS, 16), max_new_tokens=20, max_len=64)
    keys = step_lib.step_keys(state.rows.seed, state.rows.length, drafter.topology.depth)
    room = jnp.asarray([depth, depth])
    context = step_lib.context_of(TARGET, drafter, verify.greedy, state, room, *keys)
    before = state.rows.cache
    propose = jax.jit(lambda params, cache: drafter.propose(params, (), cache, context))
    proposal, _, cache = propose(both, before)
    assert cache.length.tolist() == before.length.tolist(), "the masks were committed"
    for row, text in enumerate(TEXTS):
        size = int(before.length[row])
        np.testing.assert_array_equal(cache.keys[0][row, :, :size], before.keys[0][row, :, :size])
        first = int(state.rows.tokens[row, len(text)]) if state.rows.length[row] > len(text) else None
        whole = text if first is None else [*text, first]
        ranked = np.argsort(-logits_after([whole + [MASK] * j for j in range(depth)]), axis=1)
        if drafter.topology.parents is None:
            assert proposal.tokens[row].tolist() == ranked[:, 0].tolist(), "another draft than behind the masks"
            continue
        begin = 0
        for best, width, copies in zip(ranked, (2, 2, 1), (1, 2, 4), strict=True):
            wanted = best[:width].tolist() * copies
            found = proposal.tokens[row, begin : begin + len(wanted)].tolist()
            assert found == wanted, "another draft than behind the masks"
            begin += len(wanted)


def test_each_depth_is_drafted_behind_the_text_and_masks():
    drafts_behind_the_text(drafters.parallel_masks(TARGET, mask_token=MASK, num_draft_tokens=3), 3)


@pytest.mark.slow
def test_a_tree_is_the_product_of_the_best_tokens_of_each_depth():
    drafter = drafters.parallel_masks(TARGET, mask_token=MASK, topology=(2, 2, 1))
    assert drafter.topology.num_nodes == 10
    drafts_behind_the_text(drafter, 3)


# What is committed.

TABULAR, TABLE = testing.tabular(0)
GROUPS = [Group((0, 1, 2), 6_000), Group((2, 1), 6_000, temperature=0.7, repetition_penalty=1.5)]


def is_exact(drafter: Drafter, rule: Any = verify.rejection) -> None:
    result = sample(Pair(TABULAR, TABLE, drafter), GROUPS, rule=rule)
    assert_exact(result)
    assert np.asarray(result.state.rows.stats.accepted).sum(axis=0).min() > 100


def make(**shape: Any) -> Drafter:
    return drafters.parallel_masks(TABULAR, mask_token=1, **shape)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [verify.rejection, verify.traversal])
@pytest.mark.parametrize("children", ["without_replacement", "with_replacement", "most_probable"])
def test_every_kind_of_children_is_exact(children: str, rule: Any):
    is_exact(make(topology=(2, 2), children=getattr(drafters.children, children)), rule)


def _committed(look_ahead: Any) -> Any:
    def changed(target, ids, params, cache, context):
        logits, cache = look_ahead(target, ids, params, cache, context)
        return logits, target.commit(cache, None, jnp.ones_like(cache.length))

    return changed


def _other_masks(propose: Any) -> Any:
    def changed(params, state, cache, context):
        proposal, *rest = propose(params, state, cache, context)
        return proposal._replace(probs=jnp.roll(proposal.probs, 1, axis=1)), *rest

    return changed


@pytest.mark.slow
def test_prefills_catch_a_mask_that_is_committed(monkeypatch: pytest.MonkeyPatch, catches: Any):
    monkeypatch.setattr(PARALLEL, "look_ahead", _committed(PARALLEL.look_ahead))
    with catches("a mask's key stays in the cache", "prefills", "were committed"):
        drafts_behind_the_text(PARALLEL._chain.__wrapped__(TARGET, PARALLEL.Ids((MASK, MASK))), 3)


@pytest.mark.slow
def test_enumeration_catches_the_distribution_of_another_mask(catches: Any):
    with catches("the distribution of another mask is stated", "enumeration", "is not distributed"):
        drafter = make(num_draft_tokens=3)
        is_exact(drafter._replace(propose=_other_masks(drafter.propose)))
