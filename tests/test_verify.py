"""The acceptance rules, one step at a time, against the paper's formulas."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import testing, verify
from specjax.types import Proposal

V = 3


def distributions(seed: int, rows: int, zeros: bool = False) -> np.ndarray:
    probs = np.random.default_rng(seed).dirichlet(np.ones(V), rows)
    if zeros:
        probs[:, seed % V] = 0.0
        probs /= probs.sum(axis=1, keepdims=True)
    return probs


def exact_verdict(target: np.ndarray, draft: np.ndarray, tokens: tuple[int, ...], length: int) -> np.ndarray:
    """`[K + 1, V]`: the probability of n accepted tokens followed by token y (Leviathan et al. 2022, Algorithm 1)."""
    k = len(tokens)
    joint, reach = np.zeros((k + 1, V)), 1.0
    for n in range(length):
        accept = min(1.0, target[n, tokens[n]] / draft[n, tokens[n]])
        residual = np.maximum(target[n] - draft[n], 0)
        if accept < 1:
            joint[n] = reach * (1 - accept) * residual / residual.sum()
        reach *= accept
    joint[length] = reach * target[length]
    return joint


@functools.cache
def _compiled(rule: verify.Rule, rows: int):
    def judge(target: jax.Array, proposal: Proposal):
        keys = jax.random.split(jax.random.key(7), rows)
        return jax.vmap(lambda key: rule(key, target, proposal))(keys)

    return jax.jit(judge)


def judged(rule: verify.Rule, target: np.ndarray, proposal: Proposal, rows: int = 40_000) -> np.ndarray:
    """`[K + 1, V]` counts of verdicts on one proposal; checks that the accepted tokens are the proposed."""
    verdict = _compiled(rule, rows)(jnp.asarray(target, jnp.float32), proposal)
    n, tokens = np.asarray(verdict.num_accepted), np.asarray(verdict.tokens)
    drafts = np.asarray(proposal.tokens)
    for row in range(0, rows, 97):
        assert (tokens[row, : n[row]] == drafts[: n[row]]).all()
        assert (tokens[row, n[row] + 1 :] == 0).all()
    counts = np.zeros((len(drafts) + 1, V))
    np.add.at(counts, (n, tokens[np.arange(rows), n]), 1)
    return counts


@pytest.mark.parametrize(("target_zeros", "draft_zeros"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("k", [1, 2])
def test_rejection_gives_every_verdict_its_exact_probability(k: int, target_zeros: bool, draft_zeros: bool):
    target, draft = distributions(1, k + 1, target_zeros), distributions(2, k, draft_zeros)
    emitted = np.zeros(V)
    for tokens in itertools.product(range(V), repeat=k):
        chance = np.prod(draft[np.arange(k), tokens])
        if chance == 0:
            continue
        for length in range(k + 1):
            proposal = Proposal(jnp.asarray(tokens, jnp.int32), jnp.asarray(length), jnp.asarray(draft, jnp.float32))
            exact = exact_verdict(target, draft, tokens, length)
            assert testing.g_test(judged(verify.rejection, target, proposal), exact) > 1e-5
        exact = exact_verdict(target, draft, tokens, k)
        # The first token of the step: of a draft, where one was accepted, else the residual's.
        emitted += chance * (exact[0] + np.eye(V)[tokens[0]] * exact[1:].sum())
    # Appendix A.1: over the drafts, the first token has the target's distribution.
    np.testing.assert_allclose(emitted, target[0], atol=1e-12)


@pytest.mark.parametrize("k", [1, 2])
def test_rejection_of_deterministic_drafts_takes_their_distribution_as_one_hot(k: int):
    target = distributions(3, k + 1)
    for tokens in itertools.product(range(V), repeat=k):
        proposal = Proposal(jnp.asarray(tokens, jnp.int32), jnp.asarray(k), None)
        exact = exact_verdict(target, np.eye(V)[list(tokens)], tokens, k)
        assert testing.g_test(judged(verify.rejection, target, proposal), exact) > 1e-5


def test_rejection_without_drafts_samples_the_target():
    target = distributions(4, 1)
    proposal = Proposal(jnp.zeros(0, jnp.int32), jnp.asarray(0), None)
    assert testing.g_test(judged(verify.rejection, target, proposal), target) > 1e-5


def test_rejection_never_emits_a_forbidden_token_even_where_the_draft_equals_the_target():
    # Rounding may empty the residual of two equal distributions: the target is the limit, not token 0.
    target = np.array([[0.0, 0.5, 0.5], [0.0, 0.5, 0.5]])
    proposal = Proposal(jnp.asarray([1], jnp.int32), jnp.asarray(1), jnp.asarray(target[:1], jnp.float32))
    counts = judged(verify.rejection, target, proposal)
    assert counts[:, 0].sum() == 0
    assert counts[0].sum() == 0


def test_a_draft_that_the_target_forbids_is_never_accepted():
    target, draft = np.array([[0.0, 1.0, 0.0]] * 2), np.array([[1.0, 0.0, 0.0]])
    proposal = Proposal(jnp.asarray([0], jnp.int32), jnp.asarray(1), jnp.asarray(draft, jnp.float32))
    assert judged(verify.rejection, target, proposal).tolist() == [[0, 40_000, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("tokens", "length", "wanted", "accepted"),
    [
        ([2, 0, 1], 3, [2, 0, 1, 2], 3),
        ([2, 0, 1], 2, [2, 0, 1, 0], 2),
        ([2, 1, 1], 3, [2, 0, 0, 0], 1),
        ([0, 0, 1], 3, [2, 0, 0, 0], 0),
        ([2, 0, 1], 0, [2, 0, 0, 0], 0),
    ],
)
def test_greedy_accepts_the_run_of_argmaxes_and_adds_one(tokens, length, wanted, accepted):
    target = jax.nn.one_hot(jnp.asarray([2, 0, 1, 2]), V)
    proposal = Proposal(jnp.asarray(tokens, jnp.int32), jnp.asarray(length), None)
    for rule in (verify.greedy, verify.rejection):
        verdict = rule(jax.random.key(0), target, proposal)
        assert verdict.tokens.tolist() == wanted
        assert int(verdict.num_accepted) == accepted


def test_no_rule_accepts_a_token_where_the_target_is_not_a_number():
    nan = jnp.full((1, V), jnp.nan)
    target = jnp.concatenate([jax.nn.one_hot(jnp.asarray([1]), V), nan, jax.nn.one_hot(jnp.asarray([2, 2]), V)])
    for last in range(V):
        proposal = Proposal(jnp.asarray([1, last, 2], jnp.int32), jnp.asarray(3), None)
        for rule in (verify.greedy, verify.rejection):
            assert int(rule(jax.random.key(0), target, proposal).num_accepted) == 1, f"{rule.name}, token {last}"


def test_overlap_is_the_chance_of_acceptance():
    target, draft = distributions(5, 3), distributions(6, 2)
    soft = Proposal(jnp.asarray([0, 1], jnp.int32), jnp.asarray(2), jnp.asarray(draft, jnp.float32))
    got = verify.overlap(jnp.asarray(target, jnp.float32), soft)
    np.testing.assert_allclose(got, np.minimum(target[:2], draft).sum(axis=1), atol=1e-6)
    hard = verify.overlap(jnp.asarray(target, jnp.float32), soft._replace(probs=None))
    np.testing.assert_allclose(hard, target[[0, 1], [0, 1]], atol=1e-6)


def test_rules_are_found_by_name_and_say_whether_they_are_exact():
    assert all(rule.name == name for name, rule in verify.RULES.items())
    assert verify.greedy.exact
    assert verify.rejection.exact
