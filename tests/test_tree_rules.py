"""Rules on trees: what they emit is enumerated for every kind of children, and planted bugs are caught."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tree_texts
from helpers import usual
from tree_texts import KINDS, LEVELS, N, V, assert_exact, models, p_value

from specjax import sampling
from specjax.decoding import verify
from specjax.decoding.verify import Rule, trees
from specjax.types import Proposal, StepKeys

SAMPLED = {"rejection": verify.rejection, "traversal": verify.traversal}
RULES = {**SAMPLED, "coupled": verify.coupled}
MANY = 400_000
"""Of texts, by hand."""


@pytest.mark.parametrize(
    ("rule", "kind"),
    usual(
        [(rule, kind) for rule in RULES for kind in KINDS],
        ("rejection", "without replacement"),
        ("traversal", "without replacement"),
    ),
)
def test_texts_of_trees_are_distributed_as_the_target(rule: str, kind: str, request: pytest.FixtureRequest):
    by_hand = request.node.get_closest_marker("slow") is not None
    assert_exact(RULES[rule], KINDS[kind], texts=MANY if by_hand else tree_texts.TEXTS)


@pytest.mark.slow
def test_at_temperature_0_every_rule_takes_the_path_of_argmaxes():
    """Rows of temperature 0 share a batch with sampled ones, and then the rule itself judges one-hot distributions."""
    given, keys = models(), jax.random.split(jax.random.key(1), (2, 2_000))
    given = given._replace(target=jax.nn.one_hot(sampling.argmax(given.target), V))

    def run(rule: Rule) -> Any:
        def one(draw_key: Any, key: Any) -> Any:
            proposal = tree_texts.propose(tree_texts.without_replacement, given, draw_key)
            probs = tree_texts.target_probs(given, proposal.tokens)
            return rule(StepKeys(key, jax.random.split(key, 3)), probs, proposal)

        return jax.jit(jax.vmap(one))(*keys)

    wanted = run(verify.greedy)
    for rule in SAMPLED.values():
        jax.tree.map(np.testing.assert_array_equal, run(rule)[:2], wanted[:2])


def _on_chain(rule: Rule, as_tree: bool) -> Any:
    def one(key: Any) -> Any:
        draws, accept, own = jax.random.split(key, 3)
        target, draft = (jax.nn.softmax(jax.random.normal(k, (4, V))) for k in jax.random.split(draws))
        tokens = jax.vmap(sampling.categorical)(jax.random.split(draws, 3), draft[:3])
        parent = jnp.arange(3, dtype=jnp.int32) - 1 if as_tree else None
        proposal = Proposal(tokens, jnp.int32(3), draft[:3], parent)
        return rule(StepKeys(accept, jax.random.split(own, 4)), target, proposal)

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), 4_000))


@pytest.mark.parametrize("rule", usual(SAMPLED, "traversal"))
def test_on_a_chain_trees_are_judged_as_chains_are(rule: str):
    """Recursive rejection is speculative sampling there, and traversal verification is block verification."""
    chain = verify.block if rule == "traversal" else verify.rejection
    as_tree, wanted = _on_chain(SAMPLED[rule], True), _on_chain(chain, False)
    np.testing.assert_array_equal(as_tree.num_accepted, wanted.num_accepted)
    np.testing.assert_array_equal(as_tree.tokens, wanted.tokens)
    assert len(np.unique(wanted.num_accepted)) == 4


@functools.cache
def _jitted(rule: Rule) -> Any:
    return jax.jit(jax.vmap(rule, (0, None, None)))


def judged(rule: Rule, target: Any, proposal: Proposal, rows: int = 500) -> Any:
    keys = jax.random.split(jax.random.key(3), (rows, 4))
    return _jitted(rule)(StepKeys(keys[:, 0], keys[:, 1:]), jnp.asarray(target, jnp.float32), proposal)


def tree_of(tokens: Any, probs: Any = None, length: int = N) -> Proposal:
    stated = jnp.full((N, V), 1 / V) if probs is None else jnp.asarray(probs, jnp.float32)
    return Proposal(jnp.asarray(tokens, jnp.int32), jnp.int32(length), stated, jnp.asarray(tree_texts.PARENTS))


@pytest.mark.parametrize("rule", usual(SAMPLED, "traversal"))
def test_what_is_not_proposed_is_not_accepted(rule: str):
    """Nodes of id -1, beyond the length, outside the vocabulary, or after a token without a distribution."""
    target = np.full((N + 1, V), 1 / V)
    found = judged(SAMPLED[rule], target, tree_of([-1, 2, 0, 1, 3, 1]))
    # The first child is absent, and so are those below it; the second is as probable as the target says it is.
    assert set(np.unique(found.path[:, 1])) == {2}
    assert set(np.unique(found.path[:, 2])) == {5}
    assert (np.asarray(found.num_accepted) == 2).all()
    assert (np.asarray(found.tokens)[:, :2] == [2, 3]).all()
    short = judged(SAMPLED[rule], target, tree_of([-1, 2, 0, 1, 3, 1], length=2))
    assert (np.asarray(short.num_accepted) == 1).all()
    # The draft gives a token outside the vocabulary, of whose probability nothing is in q: what is left is the target.
    outside = judged(SAMPLED[rule], target, tree_of([V, -1, 0, 1, 3, 1], np.zeros((N, V))))
    assert (np.asarray(outside.num_accepted) == 0).all()
    assert len(np.unique(outside.tokens[:, 0])) == V
    broken = target.copy()
    broken[2] = np.nan
    found = judged(SAMPLED[rule], broken, tree_of([-1, 2, 0, 1, 3, 1]))
    assert (np.asarray(found.num_accepted) == 1).all()
    assert (np.asarray(found.path)[:, 1:] == 2).all()


@pytest.mark.slow
@pytest.mark.parametrize("rule", SAMPLED)
def test_no_distribution_stated_means_that_tokens_were_chosen(rule: str):
    target = tree_texts.target_probs(models(), jnp.asarray([1, 2, 0, 1, 3, 1]))
    tokens = [1, 2, 0, 1, 3, 1]
    stated = judged(SAMPLED[rule], target, tree_of(tokens, np.eye(V)[tokens]))
    chosen = judged(SAMPLED[rule], target, tree_of(tokens)._replace(probs=None))
    jax.tree.map(np.testing.assert_array_equal, stated, chosen)


def test_typical_acceptance_takes_the_longest_path_and_then_the_most_probable():
    # Every token of probability above .09 is typical. Nodes 0 and 1 are; below them 3, and 4 and 5.
    target = np.array([[0.6, 0.3, 0.05, 0.05]] + [[0.25, 0.25, 0.25, 0.25]] * N)
    target[1] = [0.05, 0.95, 0.0, 0.0]
    target[2] = [0.2, 0.3, 0.5, 0.0]
    found = judged(verify.typical(), target, tree_of([0, 1, 0, 1, 0, 2]), rows=4)
    # .6 * .95 along node 3 is more than .3 * .5 along node 5.
    assert (np.asarray(found.path) == [0, 1, 4]).all()
    assert (np.asarray(found.tokens)[:, :2] == [0, 1]).all()
    at_zero = dataclasses.replace(verify.typical(), function=verify.typical().at_zero)
    found = judged(at_zero, target, tree_of([0, 1, 0, -1, 0, 2]), rows=4)
    assert (np.asarray(found.path) == [0, 2, 6]).all()
    assert (np.asarray(found.tokens) == [1, 2, 0]).all()
    nothing = judged(verify.typical(), target, tree_of([2, 3, 0, 1, 0, 2]), rows=4)
    assert (np.asarray(nothing.num_accepted) == 0).all()


# Planted bugs.


def _q_of(proposal: Proposal) -> Any:
    """`[B, N, V]` the draft's distribution before each node, with all of its siblings."""
    given = models()
    above = [V if parent < 0 else proposal.tokens[:, parent] for parent in tree_texts.PARENTS]
    rows = len(proposal.tokens)
    return jnp.stack([jnp.broadcast_to(given.drafts[0, V, t], (rows, V)) for t in above], axis=1)


def _with_q(proposal: Proposal) -> Proposal:
    return proposal._replace(probs=_q_of(proposal))


def _without_elder_siblings(proposal: Proposal) -> Proposal:
    q = _q_of(proposal)
    for _, (elder, younger) in LEVELS:
        left = q[:, younger] * (1 - jnp.eye(V)[proposal.tokens[:, elder]])
        q = q.at[:, younger].set(left / jnp.sum(left, axis=-1, keepdims=True))
    return proposal._replace(probs=q)


def _pruned(proposal: Proposal) -> Proposal:
    of_token = jnp.take_along_axis(_q_of(proposal), proposal.tokens[..., None], axis=-1)[..., 0]
    return proposal._replace(tokens=jnp.where(of_token < 0.2, -1, proposal.tokens))


def re_sorted(key: Any, q: Any, number: int) -> tuple[Any, Any]:
    """Draws without replacement, then put in order of q and stated as if they had been drawn so."""
    tokens, _ = tree_texts.without_replacement(key, q, number)
    tokens = tokens[jnp.argsort(-q[0][tokens])]
    probs = [q[0]]
    for token in tokens[:-1]:
        left = probs[-1].at[token].set(0.0)
        probs.append(left / jnp.sum(left))
    return tokens, jnp.stack(probs)


def _as_they_are(proposal: Proposal) -> Proposal:
    return proposal


DRAWS: dict[str, tuple[Any, Callable[[Proposal], Proposal]]] = {
    "soft q stated for chosen children": (tree_texts.deterministic, _with_q),
    "children without replacement judged as if drawn with it": (tree_texts.without_replacement, _with_q),
    "children with replacement judged as if drawn without it": (tree_texts.with_replacement, _without_elder_siblings),
    "children put in order of their probability": (re_sorted, _as_they_are),
    "children left out for their own probability": (tree_texts.without_replacement, _pruned),
}


@pytest.mark.parametrize(
    ("rule", "bug"),
    usual(
        [(rule, bug) for rule in SAMPLED for bug in DRAWS],
        ("rejection", "children without replacement judged as if drawn with it"),
        ("traversal", "children without replacement judged as if drawn with it"),
    ),
)
def test_enumeration_catches_draws(rule: str, bug: str, catches: Any):
    draw, change = DRAWS[bug]
    with catches(f"{bug} ({rule})", "texts of trees", "not distributed"):
        assert_exact(SAMPLED[rule], draw, change)


@pytest.mark.slow
def test_enumeration_catches_one_draw_for_a_depth_under_traversal(catches: Any):
    draw = tree_texts.without_replacement
    assert_exact(verify.rejection, draw, shared=True, texts=MANY)
    with catches("one draw for all nodes of a depth (traversal)", "texts of trees", "not distributed"):
        assert_exact(verify.traversal, draw, shared=True, texts=MANY)


@pytest.mark.slow
def test_traversal_accepts_more_than_rejection():
    for draw in (tree_texts.without_replacement, tree_texts.with_replacement, tree_texts.merged):
        accepted = [p_value(rule, draw)[1] for rule in (verify.rejection, verify.traversal)]
        assert accepted[1] > accepted[0] + 0.01


def assert_nothing_impossible(rule: Rule) -> None:
    """At a coin of 0, a token to which the target gives probability 0 is not accepted."""
    target = np.tile([0.0, 1.0, 0.0, 0.0], (N + 1, 1))
    keys = StepKeys(jax.random.key(0), jax.random.split(jax.random.key(1), 3))
    verdict = rule(keys, jnp.asarray(target, jnp.float32), tree_of([0, 2, 0, 2, 3, 0]))
    assert verdict.num_accepted == 0, "an impossible token was accepted"


@pytest.mark.parametrize("rule", usual(SAMPLED, "rejection"))
def test_a_coin_of_0_catches_less_or_equal(rule: str, monkeypatch: pytest.MonkeyPatch, catches: Any):
    monkeypatch.setattr(sampling, "uniform", lambda key, shape: jnp.zeros(shape))
    assert_nothing_impossible(SAMPLED[rule])
    monkeypatch.setattr(trees, "passes", lambda coin, draft, target: coin * draft <= target)
    with catches(f"<= in the place of < ({rule})", "coin of 0", "impossible"):
        assert_nothing_impossible(SAMPLED[rule])
