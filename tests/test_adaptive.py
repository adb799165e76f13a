"""A row pauses while its drafts lose, longer each time, and recovers; rows do not see each other."""

import jax.numpy as jnp
import numpy as np

from specjax.decoding import adaptive
from specjax.state import Adaptation


def follow(accepted: list[list[int]], step_cost: float, k: int = 4) -> tuple[np.ndarray, Adaptation]:
    """`[steps, B]` whether each row drafted; each attempt has the next of the row's list accepted."""
    state, rows = adaptive.init(len(accepted)), len(accepted)
    attempts, drafted = [0] * rows, []
    for _ in range(400):
        drafts = np.asarray(adaptive.drafts(state))
        got = [a[min(attempts[i], len(a) - 1)] if drafts[i] else 0 for i, a in enumerate(accepted)]
        attempts = [n + bool(d) for n, d in zip(attempts, drafts, strict=True)]
        state = adaptive.update(
            state,
            jnp.where(jnp.asarray(drafts), k, 0),
            jnp.asarray(got, jnp.int32),
            jnp.asarray(step_cost, jnp.float32),
        )
        drafted.append(drafts)
    return np.array(drafted), state


def pauses(drafted: np.ndarray) -> list[int]:
    """Lengths of the plain runs between drafting steps."""
    return [int(gap) - 1 for gap in np.diff(np.flatnonzero(drafted)) if gap > 1]


def test_a_row_that_always_wins_always_drafts():
    drafted, _ = follow([[4], [1]], 1.2)
    assert drafted.all()


def test_a_row_that_never_wins_pauses_twice_as_long_each_time_up_to_the_last():
    drafted, _ = follow([[0]], 1.2)
    first = int(np.flatnonzero(~drafted[:, 0])[0])
    assert 1 <= first <= 10
    got = pauses(drafted[:, 0])
    assert got[:5] == [8, 16, 32, 64, 128]
    assert set(got[4:]) == {adaptive.LAST_PAUSE}
    # In the long run losing costs one drafting step in 129.
    assert drafted[120:].mean() < 0.02


def test_dear_attempts_that_lose_cost_little_of_the_time():
    for step_cost in (1.5, 2.2, 4.0):
        drafted, _ = follow([[0]], step_cost)
        lost = drafted.sum() * (step_cost - 1)
        assert lost < adaptive.TRIAL_SHARE * len(drafted) + 2 * (step_cost - 1)


def test_a_single_rejection_does_not_pause_a_winning_row():
    drafted, _ = follow([[3, 3, 0, 3, 0, 0, 3]], 1.5)
    assert drafted.all()


def test_a_row_recovers_at_its_first_winning_attempt_and_forgets_its_long_pauses():
    # Loses 9 times, of which some lead to pauses, then wins for ever.
    drafted, state = follow([[0] * 9 + [3]], 1.2)
    last_pause = np.flatnonzero(~drafted[:, 0])[-1]
    assert drafted[last_pause + 1 :, 0].all()
    assert last_pause < 200
    assert int(state.backoff[0]) == adaptive.FIRST_PAUSE
    assert float(state.gain[0]) > 2.9


def test_break_even_is_at_step_cost_minus_one():
    above, _ = follow([[1, 0]], 1.0)  # Nothing to win back.
    assert above.all()
    exactly, _ = follow([[1]], 2.0)
    assert exactly.all()
    below, _ = follow([[1]], 2.01)
    assert not below[1:9].any()


def test_step_cost_0_never_pauses():
    drafted, _ = follow([[0]], 0.0)
    assert drafted.all()


def test_rows_are_independent():
    lists = [[0], [4], [0, 3, 0], [1, 0, 0, 0, 0, 0, 0, 2]]
    together, _ = follow(lists, 1.4)
    for row, accepted in enumerate(lists):
        alone, _ = follow([accepted], 1.4)
        assert (together[:, row] == alone[:, 0]).all()


def test_a_step_without_a_proposal_teaches_nothing():
    state = adaptive.init(2)
    after = adaptive.update(state, jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32), jnp.asarray(5.0))
    assert np.array_equal(after.gain, state.gain)
    assert np.array_equal(after.pause, state.pause)
    assert np.array_equal(after.backoff, state.backoff)
