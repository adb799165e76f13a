"""The acceptance rules, one step at a time, against the paper's formulas."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import usual
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax import sampling, testing
from specjax.decoding import verify
from specjax.types import Proposal, StepKeys

V = 3


def distributions(seed: int, rows: int, zeros: bool = False) -> np.ndarray:
    probs = np.random.default_rng(seed).dirichlet(np.ones(V), rows)
    if zeros:
        probs[:, seed % V] = 0.0
        probs /= probs.sum(axis=1, keepdims=True)
    return probs


def step_keys(num_draft_tokens: int) -> StepKeys:
    keys = jax.random.split(jax.random.key(0), num_draft_tokens + 2)
    return StepKeys(keys[0], keys[1:])


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
        keys = jax.random.split(jax.random.key(7), (rows, target.shape[0] + 1))
        return jax.vmap(lambda key: rule(StepKeys(key[0], key[1:]), target, proposal))(keys)

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
@pytest.mark.parametrize("k", usual([1, 2], 2))
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
    for rule in (verify.greedy, verify.rejection, verify.block, verify.coupled):
        verdict = rule(step_keys(3), target, proposal)
        assert verdict.tokens.tolist() == wanted
        assert int(verdict.num_accepted) == accepted


def test_no_rule_accepts_a_token_where_the_target_is_not_a_number():
    nan = jnp.full((1, V), jnp.nan)
    target = jnp.concatenate([jax.nn.one_hot(jnp.asarray([1]), V), nan, jax.nn.one_hot(jnp.asarray([2, 2]), V)])
    for last in range(V):
        proposal = Proposal(jnp.asarray([1, last, 2], jnp.int32), jnp.asarray(3), None)
        for rule in (verify.greedy, verify.rejection):
            assert int(rule(step_keys(3), target, proposal).num_accepted) == 1, f"{rule.name}, token {last}"


def test_overlap_is_the_chance_of_acceptance():
    target, draft = distributions(5, 3), distributions(6, 2)
    soft = Proposal(jnp.asarray([0, 1], jnp.int32), jnp.asarray(2), jnp.asarray(draft, jnp.float32))
    got = verify.overlap(jnp.asarray(target, jnp.float32), soft)
    np.testing.assert_allclose(got, np.minimum(target[:2], draft).sum(axis=1), atol=1e-6)
    hard = verify.overlap(jnp.asarray(target, jnp.float32), soft._replace(probs=None))
    np.testing.assert_allclose(hard, target[[0, 1], [0, 1]], atol=1e-6)


# Block verification.


def block_verdicts(target: np.ndarray, draft: np.ndarray, tokens: tuple[int, ...], length: int) -> np.ndarray:
    """`[K + 1, V]`: the probability of n accepted tokens followed by y, from what the rule says of its own chances."""
    k = len(tokens)
    proposal = Proposal(jnp.asarray(tokens, jnp.int32), jnp.asarray(length), jnp.asarray(draft, jnp.float32))
    p, h = (np.asarray(x, np.float64) for x in _acceptance(jnp.asarray(target, jnp.float32), proposal))
    joint, none_longer = np.zeros((k + 1, V)), 1.0
    for n in reversed(range(length + 1)):
        chance = none_longer * h[n]
        none_longer *= 1 - h[n]
        residual = target[n] if n == length else np.maximum(p[n] * target[n] - draft[n], 0)
        if chance > 1e-7:
            joint[n] = chance * residual / residual.sum()
    return joint


_acceptance = jax.jit(verify.block_acceptance)


Table = dict[tuple[int, ...], np.ndarray]
"""The distribution of the next token after each beginning of at most two."""


def step_distribution(target: Table, draft: Table, verdicts: Callable[..., np.ndarray]) -> tuple[np.ndarray, float]:
    """Of the K + 1 tokens that begin with a step, and the tokens of the step on average.

    Tokens that the step does not emit are drawn from the target afterwards, as later steps would.
    """
    k = 2
    texts, emitted = np.zeros((V,) * (k + 1)), 0.0
    for tokens in itertools.product(range(V), repeat=k):
        rows_t = np.stack([target[()], target[tokens[:1]], target[tokens]])
        rows_d = np.stack([draft[()], draft[tokens[:1]]])
        chance = rows_d[0][tokens[0]] * rows_d[1][tokens[1]]
        if chance == 0:
            continue
        joint = verdicts(rows_t, rows_d, tokens, k)
        np.testing.assert_allclose(joint.sum(), 1.0, atol=1e-5)
        for n, y in itertools.product(range(k + 1), range(V)):
            if joint[n, y] == 0:
                continue
            emitted += chance * joint[n, y] * (n + 1)
            begin = (*tokens[:n], y)
            rest = np.ones(())
            if n == 1:
                rest = target[begin]
            elif n == 0:
                rest = np.stack([target[begin][z] * target[(*begin, z)] for z in range(V)])
            texts[begin] += chance * joint[n, y] * rest
    return texts, emitted


def random_model(rng: np.random.Generator, kind: str) -> Table:
    """A distribution for every beginning of at most two tokens."""
    model = {}
    for n in range(3):
        for beginning in itertools.product(range(V), repeat=n):
            row = rng.dirichlet(np.full(V, 0.3 if kind == "sharp" else 1.0))
            if kind == "zeros":
                row[rng.integers(V)] = 0.0
                row /= row.sum()
            if kind == "one-hot":
                row = np.eye(V)[rng.integers(V)]
            model[beginning] = row.astype(np.float32).astype(np.float64)
            model[beginning] /= model[beginning].sum()
    return model


@pytest.mark.parametrize("draft_kind", ["soft", "sharp", "zeros", "one-hot", "equal", "nearly equal"])
@pytest.mark.parametrize("target_kind", ["soft", "sharp", "zeros", "one-hot"])
def test_block_and_rejection_are_exact_and_block_never_emits_fewer(target_kind: str, draft_kind: str):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        target = random_model(rng, target_kind)
        if draft_kind == "equal":
            draft = target
        elif draft_kind == "nearly equal":
            draft = {b: (row + 1e-3 * rng.dirichlet(np.ones(V))) / 1.001 for b, row in target.items()}
        else:
            draft = random_model(rng, draft_kind)
        wanted = np.zeros((V,) * 3)
        for a, b in itertools.product(range(V), repeat=2):
            wanted[a, b] = target[()][a] * target[(a,)][b] * target[(a, b)]
        by_block, block_tokens = step_distribution(target, draft, block_verdicts)
        by_rejection, tokens = step_distribution(target, draft, exact_verdict)
        np.testing.assert_allclose(by_rejection, wanted, atol=1e-9)
        np.testing.assert_allclose(by_block, wanted, atol=3e-6)
        assert block_tokens >= tokens - 1e-5


def test_block_gains_where_a_likely_token_follows_an_unlikely_one():
    # The second token is twice as likely under the target: that pays for the first, which is half as likely.
    target, draft = np.array([[0.25, 0.75, 0], [0.8, 0.2, 0], [1, 0, 0]]), np.array([[0.5, 0.5, 0], [0.4, 0.6, 0]])
    block = block_verdicts(target, draft, (0, 0), 2)
    assert block[2].sum() == pytest.approx(1.0)
    assert exact_verdict(target, draft, (0, 0), 2)[2].sum() == pytest.approx(0.5)


@pytest.mark.parametrize("k", [1, 2])
def test_block_draws_what_it_says(k: int):
    target, draft = distributions(21, k + 1), distributions(22, k)
    for tokens in itertools.product(range(V), repeat=k):
        for length in range(k + 1):
            proposal = Proposal(jnp.asarray(tokens, jnp.int32), jnp.asarray(length), jnp.asarray(draft, jnp.float32))
            exact = block_verdicts(target, draft, tokens, length)
            assert testing.g_test(judged(verify.block, target, proposal), exact / exact.sum()) > 1e-5


# Gumbel coupling.


@functools.cache
def _coupled_share(rows: int):
    def accepted(target: jax.Array, draft: jax.Array):
        keys = jax.random.split(jax.random.key(3), (rows, 3))

        def one(key):
            tokens = sampling.categorical(key[1], draft)[None]
            proposal = Proposal(tokens, jnp.asarray(1), draft[None])
            verdict = verify.coupled(StepKeys(key[0], key[1:]), jnp.stack([target, target]), proposal)
            own = sampling.categorical(key[1], target)
            return verdict.num_accepted, verdict.tokens[0] == own

        return jax.vmap(one)(keys)

    return jax.jit(accepted)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10_000))
def test_coupled_emits_the_targets_own_draw_and_accepts_as_often_as_promised(seed: int):
    rng = np.random.default_rng(seed)
    target, draft = rng.dirichlet(np.full(5, 0.5), 2).astype(np.float32)
    accepted, own = (np.asarray(x) for x in _coupled_share(20_000)(jnp.asarray(target), jnp.asarray(draft)))
    assert own.all()
    distance = 0.5 * np.abs(target - draft).sum()
    least, most = (1 - distance) / (1 + distance), 1 - distance
    assert least - 0.02 < accepted.mean() < most + 0.02


# Rules that are not exact.


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.7, 0.3, 0.1]))
def test_lenience_never_exceeds_its_bound_and_accepts_as_often_as_it_says(seed: int, lenience: float):
    rng = np.random.default_rng(seed)
    target, draft = rng.dirichlet(np.full(4, 0.5), 2)
    # One token: min(q, p / l) is accepted, the rest is drawn from the residual.
    accepted = np.minimum(draft, target / lenience)
    residual = np.maximum(target - draft, 0)
    emitted = accepted + (1 - accepted.sum()) * residual / residual.sum()
    np.testing.assert_allclose(emitted.sum(), 1.0)
    assert (emitted <= target / lenience + 1e-9).all()
    proposal = Proposal(jnp.zeros(1, jnp.int32), jnp.asarray(1), jnp.asarray(draft[None], jnp.float32))
    rows = jnp.asarray(np.stack([target, target]), jnp.float32)
    np.testing.assert_allclose(verify.overlap(rows, proposal, lenience), accepted.sum(), atol=1e-5)


@pytest.mark.parametrize("lenience", [0.5, 0.2])
def test_lenient_draws_what_it_says(lenience: float):
    target, draft = distributions(31, 2), distributions(32, 1)
    emitted, counts = np.zeros((2, V)), np.zeros((2, V))
    for token in range(V):
        proposal = Proposal(jnp.asarray([token], jnp.int32), jnp.asarray(1), jnp.asarray(draft, jnp.float32))
        accept = min(1.0, target[0, token] / (lenience * draft[0, token]))
        residual = np.maximum(target[0] - draft[0], 0)
        exact = np.stack([(1 - accept) * residual / residual.sum(), accept * target[1]])
        got = judged(verify.lenient(lenience), target, proposal)
        assert testing.g_test(got, exact) > 1e-5
        emitted += draft[0, token] * exact
        counts += got
    assert verify.lenient(lenience) is verify.lenient(lenience)


@pytest.mark.parametrize(
    ("rule", "at_zero", "accepts"),
    [
        # The target says .5, .3, .15, .05; its entropy is 1.14, so exp(-H) = .32.
        (verify.lenient(0.5), True, [True, True, False, False]),
        (verify.lenient(0.1), True, [True, True, True, True]),
        (verify.typical(0.2, 1.0), False, [True, True, False, False]),
        (verify.typical(0.9, 0.3), False, [True, True, True, False]),
        (verify.top_k(1), False, [True, False, False, False]),
        (verify.top_k(3), False, [True, True, True, False]),
        (verify.top_k(3, 1.0), False, [True, True, False, False]),
        (verify.distance(0), True, [True, False, False, False]),
        (verify.distance(2), True, [True, True, True, False]),
    ],
    ids=lambda x: x.name if isinstance(x, verify.Rule) else "",
)
def test_what_lossy_rules_accept(rule: verify.Rule, at_zero: bool, accepts: list[bool]):
    target = jnp.asarray([[0.5, 0.3, 0.15, 0.05], [0.1, 0.1, 0.7, 0.1]])
    for token, wanted in enumerate(accepts):
        proposal = Proposal(jnp.asarray([token], jnp.int32), jnp.asarray(1), None)
        for judge in (rule.at_zero,) if at_zero else (rule.at_zero, rule.function):
            assert bool(judge(step_keys(1), target, proposal).num_accepted == 1) is wanted
        verdict = rule.at_zero(step_keys(1), target, proposal)
        assert verdict.tokens.tolist() == ([token, 2] if wanted else [0, 0])


def test_typical_needs_more_than_its_threshold():
    even = jnp.full((2, 4), 0.25)
    proposal = Proposal(jnp.asarray([2], jnp.int32), jnp.asarray(1), None)
    # exp(-H) = 1/4: the draft has .25, which is not more than 1 * .25.
    assert int(verify.typical(1.0, 1.0)(step_keys(1), even, proposal).num_accepted) == 0
    assert int(verify.typical(1.0, 0.99)(step_keys(1), even, proposal).num_accepted) == 1


# Properties of every rule, on tables of every kind.

ALL_RULES = [
    verify.greedy,
    verify.rejection,
    verify.block,
    verify.coupled,
    verify.lenient(0.4),
    verify.typical(),
    verify.top_k(2),
    verify.top_k(2, 0.5),
    verify.distance(1),
]

WEIGHT = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.5, 1.0 + 1e-6, 3.0, 1e-6])


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray | None, list[int], int]:
    """Target and draft distributions with zeros, ties, one-hot and nearly equal rows, also of a single token."""
    size, k = draw(st.sampled_from([(1, 1), (1, 2), (3, 0), (3, 2), (5, 3)]))

    def row() -> np.ndarray:
        weights = np.array(draw(st.lists(WEIGHT, min_size=size, max_size=size)))
        if not weights.any():
            weights[draw(st.integers(0, size - 1))] = 1.0
        return (weights / weights.sum()).astype(np.float32)

    target = np.stack([row() for _ in range(k + 1)])
    length = draw(st.integers(0, k))
    if draw(st.booleans()):
        return target, None, [draw(st.integers(0, size - 1)) for _ in range(k)], length
    draft = np.stack([target[i] if draw(st.booleans()) else row() for i in range(k)]) if k else target[:0]
    tokens = [draw(st.sampled_from(np.flatnonzero(row).tolist())) for row in draft]
    return target, draft, tokens, length


@functools.cache
def _jitted(rule: verify.Rule):
    return jax.jit(lambda keys, target, proposal: rule(keys, target, proposal))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(tables(), st.integers(0, 2**31))
@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.name)
def test_properties_of_every_rule(rule: verify.Rule, table: tuple, seed: int):
    target, draft, tokens, length = table
    probs = None if draft is None else jnp.asarray(draft)
    proposal = Proposal(jnp.asarray(tokens, jnp.int32).reshape(len(tokens)), jnp.asarray(length), probs)
    keys = jax.random.split(jax.random.key(seed), len(tokens) + 2)
    verdict = _jitted(rule)(StepKeys(keys[0], keys[1:]), jnp.asarray(target), proposal)
    n, emitted = int(verdict.num_accepted), verdict.tokens.tolist()
    assert 0 <= n <= length
    assert emitted[:n] == tokens[:n]
    assert not any(emitted[n + 1 :])
    if rule is not verify.greedy:
        # The token that follows is one that the target allows.
        assert target[n, emitted[n]] > 0
    if rule.exact and rule is not verify.greedy:
        assert all(target[i, token] > 0 for i, token in enumerate(tokens[:n]))
    beta = np.asarray(verify.overlap(jnp.asarray(target), proposal))
    assert ((beta >= 0) & (beta <= 1 + 1e-5)).all()


# Names.


def test_rules_are_found_by_name():
    for rule in ALL_RULES:
        assert verify.parse(rule.name) is rule
    assert {rule.name for rule in ALL_RULES if rule.exact} == {"greedy", "rejection", "block", "coupled"}
    assert verify.parse("typical") is verify.typical()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("rejektion", "is not known: choose one of greedy, rejection, block, traversal, coupled, observe, lenient"),
        ("", "is not known"),
        ("Lenient:0.3", "is not known"),
        ("rejection:1", "takes no number"),
        ("rejection:", "takes no number"),
        ("lenient", "0 numbers are given; it takes lenience. Write it as lenient:0.3"),
        ("lenient:", "lenience='' is not a number. Write it as lenient:0.3"),
        ("lenient:2", r"lenience=2.0 is outside \(0, 1\]"),
        ("lenient:nan", r"lenience=nan is outside \(0, 1\]"),
        ("lenient:1e-46", "lenience=1e-46 is 0 in float32"),
        ("lenient:x", "lenience='x' is not a number. Write it as"),
        ("lenient:0.3,0.4", "2 numbers are given; it takes lenience"),
        ("typical:2,1", r"epsilon=2.0 is outside \[0, 1\]"),
        ("typical:,0.3", "epsilon='' is not a number. Write it as typical:0.09,0.3"),
        ("typical:0.1,0.2,0.3", "3 numbers are given; it takes epsilon, delta"),
        ("top_k:0", "k=0: at least 1"),
        ("top_k:2.5", "k='2.5' is not a whole number. Write it as top_k:3"),
        ("top_k:1e3", "k='1e3' is not a whole number"),
        ("top_k:99999999999", "k=99999999999 is too large"),
        ("top_k:3,-1", "gap=-1.0: at least 0"),
        ("distance:-1", "epsilon=-1 is negative"),
        ("distance:4294967296", "epsilon=4294967296 is too large"),
    ],
)
def test_names_that_make_no_sense(name: str, remedy: str):
    with pytest.raises(ValueError, match=remedy):
        verify.parse(name)


def test_a_rule_is_its_own_name():
    for rule in ALL_RULES:
        assert verify.parse(rule) is rule
    assert verify.parse("top_k:3,inf") is verify.top_k(3)
    assert verify.parse(" lenient:1e-3 ") is verify.lenient(0.001)


@pytest.mark.parametrize(
    ("rule", "remedy"),
    [
        (verify.lenient, r"verify=verify.lenient is not called: write verify.lenient\(0.3\), or 'lenient:0.3'"),
        (verify.typical, r"write verify.typical\(0.09, 0.3\), or 'typical:0.09,0.3'"),
        (verify.top_k, r"write verify.top_k\(3\)"),
        (verify.distance, r"write verify.distance\(2\)"),
        (verify.overlap, r"verify=overlap is a function, not a rule: write verify.Rule\(overlap, name='overlap'"),
        (verify.Rule, "is not a rule: give a verify.Rule"),
        (None, "verify=None is not a rule: give a verify.Rule, or one of the names greedy, rejection"),
        (0.3, "verify=0.3 is not a rule"),
        (b"rejection", "is not a rule"),
    ],
)
def test_what_is_no_rule_is_told_what_to_write(rule, remedy: str):
    with pytest.raises(TypeError, match=remedy):
        verify.parse(rule)
