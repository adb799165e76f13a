"""How the children of a node are found: drawn as stated, chosen, or absent where no token is left."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import usual

from specjax import sampling, testing
from specjax.drafters import children

V, NODES = 4, 20_000
LOGITS = np.array([0.3, -0.8, 1.1, 0.2], np.float32)
Q = np.exp(LOGITS) / np.exp(LOGITS).sum()


@functools.cache
def _jitted(kind: Any, number: int, coupled: bool) -> Any:
    def run(logits: Any, key: Any, options: Any) -> Any:
        return children.find(kind, logits, number, key, options, coupled)

    return jax.jit(run)


def found(
    kind: Any, logits: Any, number: int = 2, *, temperature: Any = 1.0, coupled: bool = False, **more: Any
) -> Any:
    logits = jnp.asarray(logits, jnp.float32)
    options = sampling.options(len(logits), temperature=temperature, **more)
    keys = jax.random.split(jax.random.key(0), len(logits))
    tokens, probs = _jitted(kind, number, coupled)(logits, keys, options)
    return np.asarray(tokens), None if probs is None else np.asarray(probs)


@pytest.mark.parametrize(
    "kind", usual([children.without_replacement, children.with_replacement], children.without_replacement)
)
def test_children_are_drawn_from_what_is_stated(kind: Any):
    (tokens,), (probs,) = found(kind, np.broadcast_to(LOGITS, (1, NODES, V)))
    twice = kind is children.with_replacement
    exact = np.outer(Q, Q)
    if not twice:
        np.fill_diagonal(exact, 0.0)
        exact /= 1 - Q[:, None]
    counts = np.zeros((V, V))
    np.add.at(counts, tuple(tokens.T), 1)
    assert testing.g_test(counts, exact) > 1e-5
    np.testing.assert_allclose(probs[:, 0], np.broadcast_to(Q, (NODES, V)), rtol=1e-5)
    left = np.where(np.arange(V) == tokens[:, :1], float(twice), 1.0) * Q
    np.testing.assert_allclose(probs[:, 1], left / left.sum(axis=1, keepdims=True), rtol=1e-5)


def test_at_temperature_0_the_most_probable_are_chosen_and_stated_one_hot():
    logits = np.stack([np.tile(LOGITS, (3, 1)), np.full((3, V), np.nan), np.full((3, V), -np.inf)])
    logits[0, 1] = [0.0, -np.inf, -np.inf, -np.inf]
    for temperature in (0.0, 1.0):
        tokens, probs = found(children.without_replacement, logits, temperature=[temperature] * 3)
        # One token is left: the younger child is absent. Without a token, or a distribution: see below.
        assert tokens[0, 1].tolist() == [0, -1]
        np.testing.assert_array_equal(probs[0, 1], [[1, 0, 0, 0], [0, 0, 0, 0]])
        # NaN is proposed, so that it is reported; where the options leave nothing, nothing is proposed.
        assert (tokens[1] == 0).all()
        assert np.isnan(probs[1]).all()
        assert (tokens[2] == -1).all()
        assert not probs[2].any()
        if temperature == 0:
            assert tokens[0, [0, 2]].tolist() == [[2, 0], [2, 0]]
            np.testing.assert_array_equal(probs[0, 0], np.eye(V)[[2, 0]])


@pytest.mark.slow
def test_chosen_children_are_those_that_the_options_leave_in_order():
    tokens, probs = found(children.most_probable, np.tile(LOGITS, (2, 1, 1)), 3, temperature=[1.0, 0.0], top_k=2)
    assert probs is None
    assert tokens.tolist() == [[[2, 0, -1]], [[2, 0, 3]]]


@pytest.mark.slow
def test_under_coupled_all_nodes_of_a_depth_share_the_noise_of_the_position():
    logits = np.broadcast_to(LOGITS, (64, 2, V))
    tokens, probs = found(children.without_replacement, logits, coupled=True)
    assert probs is None
    np.testing.assert_array_equal(tokens[:, 0], tokens[:, 1])
    own = jax.vmap(sampling.categorical, (0, None))(jax.random.split(jax.random.key(0), 64), jnp.asarray(Q))
    np.testing.assert_array_equal(tokens[:, 0, 0], own)
    apart, _ = found(children.without_replacement, logits)
    assert (apart[:, 0] != apart[:, 1]).any()
