"""Attention that reads a cache by blocks, as on CPUs, against attention that reads it whole."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import usual

from specjax.models import attention

BLOCK, ROWS, TIME, HEADS, GROUP, SIZE = 16, 3, 4, 2, 3, 8


def arrays(entries: int, dtype: str) -> tuple[Any, Any, Any]:
    """Queries, keys and values."""
    rng = np.random.default_rng(entries)
    shapes = (ROWS, TIME, HEADS, GROUP, SIZE), (ROWS, HEADS, entries, SIZE), (ROWS, HEADS, entries, SIZE)
    query, keys, values = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return query, keys, values


def mask_of(entries: int, lengths: tuple[int, ...], window: int | None = None) -> Any:
    """Which entries the tokens attend to that begin at each row's length."""
    positions = np.asarray(lengths)[:, None] + np.arange(TIME)
    distance = positions[:, :, None] - np.arange(entries)
    return jnp.asarray((distance >= 0) & (distance < (window or entries)))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", BLOCK)


def both(query: Any, keys: Any, values: Any, mask: Any, bias: Any = None, cap: float | None = None) -> list[np.ndarray]:
    """By blocks, and whole."""
    return [
        np.asarray(
            jax.jit(functools.partial(attention.attend, cap=cap, in_cache=in_cache))(query, keys, values, mask, bias)
        )
        for in_cache in (True, False)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("entries", usual([17, 48, 50], 50))
@pytest.mark.parametrize("window", [None, 6])
def test_blocks_are_the_whole(entries: int, window: int | None, dtype: str):
    mask = mask_of(entries, (0, 9, 12), window)
    bias = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, HEADS, TIME, entries)), jnp.float32)
    got, wanted = both(*arrays(entries, dtype), mask, bias if window else None, 3.0)
    np.testing.assert_allclose(got, wanted, atol=1e-6 if dtype == "float32" else 2e-2)


def test_every_entry_counts_once_though_the_last_block_begins_within_the_one_before():
    mask = jnp.ones((ROWS, TIME, 2 * BLOCK + 3), bool)
    got, wanted = both(*arrays(2 * BLOCK + 3, "float32"), mask)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_blocks_that_no_query_attends_to_are_not_read():
    """Here NaN tells whether they were: 0 * NaN is NaN."""
    query, keys, values = arrays(6 * BLOCK, "float32")
    lengths = (BLOCK + 3, 2 * BLOCK - TIME, BLOCK)
    mask = mask_of(6 * BLOCK, lengths, window=3)
    spoiled = values.at[:, :, 2 * BLOCK :].set(jnp.nan).at[:, :, : BLOCK - 2 - TIME].set(jnp.nan)
    got, whole = both(query, keys, spoiled, mask)
    assert np.isnan(whole).any()
    # The window of the third row begins in the first block, which is read.
    assert np.isnan(got).any()
    spoiled = values.at[:, :, 2 * BLOCK :].set(jnp.nan)
    got, _ = both(query, keys, spoiled, mask)
    np.testing.assert_allclose(got, both(query, keys, values, mask)[1], atol=1e-6)
    mask = mask_of(6 * BLOCK, (2 * BLOCK + 3, 3 * BLOCK - TIME, 2 * BLOCK + 2), window=3)
    spoiled = values.at[:, :, 3 * BLOCK :].set(jnp.nan).at[:, :, :BLOCK].set(jnp.nan)
    assert np.isfinite(both(query, keys, spoiled, mask)[0]).all()


def test_a_row_does_not_depend_on_the_longest_row():
    query, keys, values = arrays(4 * BLOCK, "float32")
    short, _ = both(query, keys, values, mask_of(4 * BLOCK, (5, 3, 0)))
    beside_a_long_one, _ = both(query, keys, values, mask_of(4 * BLOCK, (5, 3 * BLOCK, 0)))
    np.testing.assert_array_equal(short[[0, 2]], beside_a_long_one[[0, 2]])


def test_nan_stays_with_the_query_that_has_it_and_with_those_that_see_it():
    query, keys, values = arrays(3 * BLOCK, "float32")
    mask = mask_of(3 * BLOCK, (BLOCK + 2, 5, BLOCK))
    # The key of the second token of the first row, and the query of the third token of the second row.
    spoiled = query.at[1, 2].set(jnp.nan), keys.at[0, :, BLOCK + 3].set(jnp.nan), values
    broken = np.zeros((ROWS, TIME), bool)
    broken[0, 1:] = broken[1, 2] = True
    for found in both(*spoiled, mask):
        np.testing.assert_array_equal(np.isnan(found).all(axis=(2, 3, 4)), broken)
        np.testing.assert_array_equal(np.isnan(found).any(axis=(2, 3, 4)), broken)


def test_a_query_that_attends_to_nothing_is_finite():
    mask = mask_of(3 * BLOCK, (BLOCK + 2, 5, BLOCK)).at[1, 2].set(False)
    assert all(np.isfinite(found).all() for found in both(*arrays(3 * BLOCK, "float32"), mask))
