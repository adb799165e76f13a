"""Dropout: what it does to numbers, that training has it and nothing else, and that runs with it resume."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import MODELS, SHORTER, Crash, _after, _at, _crash, copies, losses, make_dataset, make_run

from specjax.models import dropout, families
from specjax.training import fit, train
from specjax.training.config import TrainConfig
from specjax.types import Batch, Dropout

CONFIGS = MODELS | {"decoder": dataclasses.replace(MODELS["decoder"], num_layers=2)}
DROPPING = dataclasses.replace(SHORTER, dropout=0.2)


def of(rate: float, number: int, seed: int = 0) -> Dropout:
    return Dropout(rate, jax.random.split(jax.random.key(seed), number))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_numbers_keep_their_expectation(rate):
    x = jnp.broadcast_to(jnp.asarray([1.0, -3.0]), (4, 5000, 2))
    dropped = np.asarray(dropout.drop(x, of(rate, 4), "here"))
    gone = dropped == 0
    np.testing.assert_allclose(dropped[~gone], np.asarray(x)[~gone] / (1 - rate), rtol=1e-6)
    deviation = (rate * (1 - rate) / gone.size) ** 0.5
    assert abs(gone.mean() - rate) < 5 * deviation
    np.testing.assert_allclose(dropped.mean((0, 1)), [1, -3], atol=5 * 3 * (rate / (1 - rate) / 20000) ** 0.5)
    # Rows, and places of a model, have masks of their own.
    elsewhere = np.asarray(dropout.drop(x, of(rate, 4), "there")) == 0
    for other in (gone[::-1], elsewhere):
        assert (gone == other).mean() == pytest.approx((1 - rate) ** 2 + rate**2, abs=0.02)


def rows(kind: str, number: int = 4) -> Batch:
    return make_dataset(copies(60), kind).batch(0, number)


@functools.partial(jax.jit, static_argnums=0)
def _scored(config: Any, params: Any, batch: Batch, dropout: Dropout | None) -> jax.Array:
    score = families.model(config).score
    assert score is not None
    return score(params, batch, dropout=dropout)


@functools.cache
def params_of(kind: str) -> Any:
    return families.init_params(CONFIGS[kind], jax.random.key(0))


def scored(kind: str, batch: Batch, dropout: Dropout | None = None, params: Any = None) -> np.ndarray:
    return np.asarray(_scored(CONFIGS[kind], params_of(kind) if params is None else params, batch, dropout))


@pytest.mark.parametrize("kind", MODELS)
def test_a_row_is_dropped_by_its_own_key(kind):
    """Whatever is in the other rows, so that batches may be split; and another key drops other numbers."""
    batch, whole = rows(kind), of(0.2, 4)
    plain, all_rows = scored(kind, batch), scored(kind, batch, whole)
    used = np.asarray(batch.segments) > 0
    assert np.abs(plain - all_rows)[used].max() > 1e-2
    swapped = jax.tree.map(lambda x: x[::-1], batch)
    again = scored(kind, swapped, whole._replace(keys=whole.keys[::-1]))
    np.testing.assert_allclose(again[::-1], all_rows, atol=1e-5)
    other = scored(kind, batch, of(0.2, 4, seed=1))
    assert np.abs(other - all_rows)[used].max() > 1e-2
    np.testing.assert_allclose(scored(kind, batch, of(0.0, 4)), plain, atol=1e-5)


def test_layers_drop_what_attention_and_feed_forward_add():
    """Without what they add there is nothing to drop; without one of them, the other alone is dropped."""
    params, batch = params_of("decoder"), rows("decoder")
    ends = {"attention": "out", "mlp": "down"}

    def without(*names: str) -> Any:
        def of_layer(layer: Any) -> Any:
            zeros = {n: layer[n] | {ends[n]: jax.tree.map(jnp.zeros_like, layer[n][ends[n]])} for n in names}
            return layer | zeros

        return params | {"layers": {i: of_layer(layer) for i, layer in params["layers"].items()}}

    for names, changes in {(): True, ("attention",): True, ("mlp",): True, ("attention", "mlp"): False}.items():
        own = without(*names)
        change = scored("decoder", batch, of(0.2, 4), own) - scored("decoder", batch, None, own)
        assert (np.abs(change).max() > 1e-3) == changes


def test_scanned_layers_drop_the_same():
    config, params = families.stack_layers(CONFIGS["decoder"], params_of("decoder"))
    batch = rows("decoder")
    scanned = _scored(config, params, batch, of(0.2, 4))
    np.testing.assert_allclose(scanned, scored("decoder", batch, of(0.2, 4)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_rematerialised_layers_drop_the_same(kind):
    batch = rows(kind)

    def gradient(remat: bool) -> Any:
        def loss(params: Any, keys: Any) -> Any:
            return train.sums(CONFIGS[kind], params, batch, remat=remat, dropout=Dropout(0.2, keys)).loss

        return jax.jit(jax.value_and_grad(loss))(params_of(kind), of(0.2, 4).keys)

    (loss, found), (again, recomputed) = gradient(False), gradient(True)
    assert float(loss) == pytest.approx(float(again), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, recomputed)


# Training


@pytest.mark.slow
def test_microbatches_drop_what_the_whole_batch_does():
    config = dataclasses.replace(DROPPING, batch_size=6)
    _, whole = _after(config)
    _, split = _after(dataclasses.replace(config, num_microbatches=3))
    np.testing.assert_allclose(whole, split, rtol=1e-5)


def test_every_step_row_and_seed_has_a_key_of_its_own():
    found = set()
    for seed, step in itertools.product((0, 1), (0, 1)):
        keys = train._dropout_keys(dataclasses.replace(DROPPING, seed=seed), jnp.asarray(step), 3)
        assert keys is not None
        found |= {tuple(key) for key in jax.random.key_data(keys).tolist()}
    assert len(found) == 12
    assert train._dropout_keys(SHORTER, jnp.asarray(0), 3) is None


def test_resumed_runs_drop_what_uninterrupted_ones_do_and_validation_drops_nothing(tmp_path):
    run = make_run("decoder", DROPPING, initial=families.init_params(MODELS["decoder"], jax.random.key(0)))
    fit.fit(run, tmp_path / "whole")
    with pytest.raises(Crash):
        fit.fit(run, tmp_path / "parts", _at(3, _crash))
    fit.fit(run, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    valid = losses(tmp_path / "whole", "valid_loss")
    assert losses(tmp_path / "parts", "valid_loss") == valid
    assert run.valid is not None
    plain = fit.evaluate(run._replace(config=SHORTER), run.valid, run.initial)
    assert valid[0] == plain["valid_loss"]
    # The first step begins with the same parameters.
    fit.fit(run._replace(config=dataclasses.replace(SHORTER, num_steps=1)), tmp_path / "plain")
    assert abs(losses(tmp_path / "plain")[1] - losses(tmp_path / "whole")[1]) > 1e-3
    with pytest.raises(ValueError, match="dropout"):
        fit.fit(run._replace(config=dataclasses.replace(DROPPING, dropout=0.1)), tmp_path / "whole")


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rates_that_are_none_are_refused(rate):
    with pytest.raises(ValueError, match=f"dropout={rate}: "):
        TrainConfig(num_steps=1, batch_size=1, dropout=rate)
