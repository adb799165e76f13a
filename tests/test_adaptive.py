"""A row drafts as many tokens as pay, pauses while its drafts lose, and recovers; rows alone, and rows together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.decoding import adaptive
from specjax.state import Adaptation

K = 4


def costs(step_cost: float | list[float], k: int = K) -> jax.Array:
    """`[K + 1]` the time of a step by the number of its draft tokens."""
    return jnp.asarray(np.append(1.0, np.broadcast_to(step_cost, (k,))), jnp.float32)


@jax.jit
def _step(state: Adaptation, got: jax.Array, step_costs: jax.Array) -> tuple[jax.Array, Adaptation]:
    """The numbers of tokens that rows draft, and the state where `got` of them would be accepted."""
    k = adaptive.num_drafts(state, step_costs)
    accepted = jnp.minimum(got, k)
    is_judged = jnp.arange(state.judged.shape[1]) < jnp.minimum(accepted + 1, k)[:, None]
    return k, adaptive.update(state, k, k, is_judged, accepted, step_costs)


def follow(
    accepted: list[list[int]], step_cost: float | list[float], k: int = K, steps: int = 400
) -> tuple[np.ndarray, Adaptation]:
    """`[steps, B]` how many tokens each row drafted; each attempt has the next of the row's list accepted."""
    state, rows = adaptive.init(len(accepted), k), len(accepted)
    attempts, drafted = [0] * rows, []
    for _ in range(steps):
        got = [a[min(attempts[i], len(a) - 1)] for i, a in enumerate(accepted)]
        drafts, state = _step(state, jnp.asarray(got, jnp.int32), costs(step_cost, k))
        drafted.append(np.asarray(drafts))
        attempts = [n + int(d > 0) for n, d in zip(attempts, drafted[-1], strict=True)]
    return np.array(drafted), state


def pauses(drafted: np.ndarray) -> list[int]:
    """Lengths of the plain runs between drafting steps."""
    return [int(gap) - 1 for gap in np.diff(np.flatnonzero(drafted)) if gap > 1]


def test_a_row_whose_drafts_are_accepted_always_drafts_them_all():
    drafted, _ = follow([[4]], 1.2)
    assert (drafted == K).all()


def test_a_row_drafts_as_far_as_its_drafts_are_accepted_where_each_token_costs():
    # Two tokens are accepted, never a third; a step costs a plain one and a tenth for each draft token.
    drafted, _ = follow([[2]], [1.1, 1.2, 1.3, 1.4])
    assert (drafted[-200:] == 2).mean() > 0.9
    # Where more tokens cost nothing more, nothing is gained by drafting fewer.
    drafted, _ = follow([[2]], 1.2)
    assert (drafted[-200:] >= 2).all()


def test_the_number_of_tokens_follows_the_cost_of_scoring_them():
    # Scoring up to three costs little, four costs as much again as a plain step.
    drafted, _ = follow([[4, 3, 4]], [1.1, 1.1, 1.1, 2.0])
    assert (drafted[-200:] == 3).mean() > 0.9


def test_the_number_is_the_one_with_the_most_expected_tokens_per_time():
    rng = np.random.default_rng(0)
    judged = rng.uniform(0, 10, (64, K))
    accepted = judged * rng.uniform(0, 1, (64, K))
    state = adaptive.init(64, K)._replace(judged=jnp.asarray(judged), accepted=jnp.asarray(accepted))
    step_costs = np.append(1.0, np.sort(rng.uniform(1.0, 2.5, K))).astype(np.float32)
    got = np.asarray(adaptive.num_drafts(state, jnp.asarray(step_costs)))

    def values(row: int, least: float = 0.0) -> list[float]:
        """Expected tokens per time, by the number of draft tokens."""
        chance, found, expected, along = adaptive.HOPE, [1.0], 1.0, 1.0
        for k in range(K):
            chance = (accepted[row, k] + adaptive.PRIOR * chance) / (judged[row, k] + adaptive.PRIOR)
            along *= max(chance, least)
            expected += along
            found.append(expected / step_costs[k + 1])
        return found

    for row in range(64):
        value = values(row)
        if max(value) == 1.0:  # Nothing is expected to pay, so the row, which does not pause, hopes.
            value = values(row, adaptive.FIRST_HOPE)
        assert value[got[row]] == pytest.approx(max(value), rel=1e-5)
    assert len(set(got.tolist())) > 2


def test_a_row_that_never_wins_pauses_longer_each_time_up_to_the_last():
    drafted, _ = follow([[0]], 1.2, steps=800)
    first = int(np.flatnonzero(drafted[:, 0] == 0)[0])
    assert 1 <= first <= 12
    got = pauses(drafted[:, 0])
    assert got[0] >= adaptive.FIRST_PAUSE
    assert got == sorted(got)
    assert got[-1] == adaptive.LAST_PAUSE
    # In the long run losing costs few drafting steps.
    assert (drafted[200:] > 0).mean() < 0.06


@pytest.mark.parametrize("step_cost", [1.5, 2.2, 4.0])
def test_expensive_attempts_that_lose_cost_little_of_the_time(step_cost):
    drafted, _ = follow([[0]], step_cost, steps=800)
    lost = (drafted > 0).sum() * (step_cost - 1)
    assert lost < adaptive.TRIAL_SHARE * len(drafted) + 4 * (step_cost - 1)


def test_expensive_drafts_are_tried_and_kept_where_they_are_good():
    # What is expected at first would not pay for such a step, if it were not tried.
    for step_cost in (3.2, 4.0):
        drafted, _ = follow([[4]], step_cost)
        assert (drafted == K).all()


def test_a_single_rejection_does_not_pause_a_winning_row():
    drafted, _ = follow([[3, 3, 0, 3, 0, 3, 3]], 1.5)
    assert (drafted > 0).all()


def test_a_row_recovers_and_forgets_its_long_pauses():
    # Loses 15 times, of which some lead to pauses, then wins for ever.
    drafted, state = follow([[0] * 15 + [4]], 1.2)
    last_pause = np.flatnonzero(drafted[:, 0] == 0)[-1]
    assert (drafted[last_pause + 1 :, 0] > 0).all()
    assert last_pause < 200
    assert int(state.backoff[0]) == adaptive.FIRST_PAUSE


def test_steps_that_cost_no_more_are_never_left_out():
    drafted, _ = follow([[1, 0], [0]], 1.0)
    assert (drafted > 0).all()


def test_step_cost_0_always_drafts_as_much_as_possible():
    for k in (K, 24):
        drafted, _ = follow([[0], [4]], 0.0, k)
        assert (drafted == k).all()


def test_rows_are_independent():
    lists = [[0], [4], [0, 3, 0], [1, 0, 0, 0, 0, 0, 0, 2]]
    together, _ = follow(lists, [1.2, 1.3, 1.4, 1.9])
    for row, accepted in enumerate(lists):
        alone, _ = follow([accepted], [1.2, 1.3, 1.4, 1.9])
        assert (together[:, row] == alone[:, 0]).all()


def test_a_step_without_a_proposal_teaches_nothing():
    state = adaptive.init(2, K)._replace(judged=jnp.ones((2, K)), accepted=jnp.ones((2, K)))
    none = jnp.zeros(2, jnp.int32)
    after = adaptive.update(state, none + K, none, jnp.zeros((2, K), bool), none, costs(5.0))
    assert all(np.array_equal(a, b) for a, b in zip(after, state, strict=True))


def test_a_step_that_reads_probes_and_proposes_nothing_counts_as_a_rejection():
    state, none = adaptive.init(1, K), jnp.zeros(1, jnp.int32)
    for _ in range(12):
        state = adaptive.update(state, none + K, none + K, jnp.zeros((1, K), bool), none, costs(1.5))
    assert int(state.pause[0]) > 0


def seen(accepted: list[float], pause: int | list[int] = 0) -> Adaptation:
    """Rows that have often been judged: each position is accepted as often as its row's number says."""
    rows = jnp.asarray(accepted, jnp.float32)
    none = jnp.zeros(len(accepted), jnp.int32)
    counts = jnp.full((len(accepted), K), 50.0)
    return Adaptation(counts, counts * rows[:, None], none + jnp.asarray(pause), none + adaptive.FIRST_PAUSE)


EVERYONE = jnp.ones(4, bool)


def test_rows_together_draft_what_pays_for_all_of_them():
    """One row's drafts are good; the others, whose are not, would wait for them."""
    state = seen([0.95, 0.05, 0.05, 0.05], pause=[0, 9, 9, 9])
    assert adaptive.num_drafts(state, costs(2.0))[0] == K
    assert adaptive.num_drafts_together(state, costs(2.2), EVERYONE).tolist() == [0] * 4
    # A step that hardly costs more pays for all, so that even the others draft along: their drafts are free.
    assert adaptive.num_drafts_together(state, costs(1.05), EVERYONE).tolist() == [K] * 4
    # Those who are done neither count nor draft.
    one = jnp.asarray([True, False, False, False])
    assert adaptive.num_drafts_together(state, costs(2.0), one).tolist() == [K, 0, 0, 0]


def test_rows_together_choose_the_length_with_the_most_tokens_per_time():
    state = seen([0.8, 0.6, 0.7, 0.9])
    step_costs = costs([1.2, 1.3, 2.6, 2.7])
    chance = np.asarray(adaptive.acceptance(state))
    tokens = 4 + np.append(0.0, np.cumsum(np.cumprod(chance, axis=1), axis=1).sum(axis=0))
    best = int(np.argmax(tokens / np.asarray(step_costs)))
    assert 0 < best < K
    assert adaptive.num_drafts_together(state, step_costs, EVERYONE).tolist() == [best] * 4


def test_rows_together_cut_what_too_few_propose():
    state = seen([0.9, 0.9, 0.9, 0.9])
    lengths = jnp.asarray([K, 0, 0, 0], jnp.int32)
    assert adaptive.kept_together(state, costs(2.0), lengths, EVERYONE).tolist() == [0] * 4
    assert adaptive.kept_together(state, costs(1.3), lengths, EVERYONE).tolist() == [K, 0, 0, 0]
    # A short program serves short proposals.
    short = costs([1.1, 1.1, 3.0, 3.0])
    assert adaptive.kept_together(state, short, jnp.asarray([K, 2, 2, 2], jnp.int32), EVERYONE).tolist() == [2] * 4
    # Rows that are done gain nothing from a plain step either.
    one = jnp.asarray([True, False, False, False])
    assert adaptive.kept_together(state, costs(2.0), lengths, one).tolist() == [K, 0, 0, 0]


def test_new_rows_are_hoped_to_be_good_and_paused_rows_are_not():
    new = adaptive.init(4, K)
    assert adaptive.num_drafts_together(new, costs(2.0), EVERYONE).tolist() == [K] * 4
    paused = seen([0.95] * 4, pause=3)
    assert adaptive.num_drafts_together(paused, costs(2.0), EVERYONE).tolist() == [0] * 4


def test_a_row_that_the_others_keep_from_drafting_does_not_pause():
    state = seen([0.95, 0.05, 0.05, 0.05])
    own = adaptive.num_drafts(state, costs(2.0))
    none = jnp.zeros(4, jnp.int32)
    after = adaptive.update(state, own, none, jnp.zeros((4, K), bool), none, costs(2.0))
    assert after.pause[0] == 0
