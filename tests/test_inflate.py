"""Inflated models: the logits and texts of the small one, in the shape of the large one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compiled, usual

import specjax
from specjax import decoding
from specjax.models import families, inflate
from specjax.models.config import T5Config
from specjax.types import Block

SMALL = T5Config(67, 24, 8, 36, 1, 2, 4, norm_eps=1e-2)
LARGER = {
    "hidden_size": 56,
    "head_dim": 12,
    "intermediate_size": 50,
    "num_encoder_layers": 2,
    "num_layers": 3,
    "num_heads": 6,
}

CASES: dict[str, dict[str, Any]] = {
    "t5": {},
    "t5-v1.1": {"gated": True, "activation": "gelu_new", "tie_embeddings": False, "scale_outputs": False},
    "tied, unscaled": {"scale_outputs": False},
    "untied, scaled": {"tie_embeddings": False},
    "umt5": {"gated": True, "bias_per_layer": True},
    "half the tokens": {"tie_embeddings": False, "head_tokens": tuple(range(0, 67, 2))},
}

SOURCES = [[5, 9, 33, 2, 60, 7, 41], [12]]


def make(**changes: Any) -> specjax.Pretrained:
    """A random model, whose norms and positions matter."""
    config = dataclasses.replace(SMALL, **changes)
    params = families.init_params(config, jax.random.key(1))
    noise = iter(np.random.default_rng(0).standard_normal((100, config.hidden_size)).astype(np.float32))
    params = jax.tree.map(lambda x: x + 0.3 * next(noise) if x.ndim == 1 else x, params)
    return specjax.Pretrained(families.model(config), params, None, config)


def inflated(small: specjax.Pretrained, **sizes: int) -> specjax.Pretrained:
    config, params = inflate.inflate(small.config, small.params, sizes or LARGER)
    return specjax.Pretrained(families.model(config), params, None, config)


def logits(pretrained: specjax.Pretrained) -> np.ndarray:
    """Those of two texts after sources of two lengths: of the first token, and of five more."""
    model, params = compiled(pretrained.model), pretrained.params
    inputs = decoding.read_inputs(pretrained.model, SOURCES)
    first, cache = model.prefill(params, inputs, model.init_cache(2, 16))
    tokens = np.random.default_rng(2).integers(0, 67, (2, 5)).astype(np.int32)
    more, _ = model.apply(params, Block(jnp.asarray(tokens)), cache)
    return np.concatenate([first.logits, more.logits], axis=1)


@pytest.mark.parametrize("name", usual(CASES, "t5", "t5-v1.1"))
def test_the_logits_are_those_of_the_small_model(name):
    small = make(**CASES[name])
    large = inflated(small)
    wanted, found = logits(small), logits(large)
    tokens = list(CASES[name].get("head_tokens", range(67)))
    assert np.std(wanted[..., tokens]) > 0.3
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    for size, value in LARGER.items():
        assert getattr(large.config, size) == value
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), families.abstract_params(large.config))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), large.params) == shapes


@pytest.mark.slow
def test_greedy_text_and_the_encoder_are_the_same():
    small = make(**CASES["t5-v1.1"])
    large = inflated(small)
    options = {"max_new_tokens": 12, "stop_tokens": [], "max_len": 32}
    wanted = specjax.generate(small, SOURCES, **options)
    assert len(set(wanted.tokens[0])) > 3
    assert specjax.generate(large, SOURCES, **options).tokens == wanted.tokens
    # The small model's keys of the source are the first heads' of the large one.
    caches = []
    for each in (small, large):
        inputs = decoding.read_inputs(each.model, SOURCES)
        caches.append(compiled(each.model).prefill(each.params, inputs, each.model.init_cache(2, 16))[1])
    a, b = (np.asarray(cache.source_keys[1]) for cache in caches)
    np.testing.assert_allclose(b[:, :4, :, :8], a, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_agrees_within_its_rounding():
    small = make()
    config, params = families.cast(small.config, small.params, "bfloat16")
    small = specjax.Pretrained(families.model(config), params, None, config)
    # The root of 24 / 96 is exact.
    large = inflated(small, **LARGER | {"hidden_size": 96})
    assert large.params["decoder"][2]["mlp"]["down"]["values"].dtype == jnp.bfloat16
    wanted, found = logits(small), logits(large)
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()
    assert np.abs(found - wanted).mean() < 0.01 * np.std(wanted)


BUGS = {
    "a layer that writes": ("_WRITES", ("out",)),
    "heads that write": ("_WRITES", ("down",)),
    "keys of new dimensions": ("_KEYS", {}),
    "scales of norms": ("_norm_factor", lambda path, config, larger: 1.0),
}


@pytest.mark.parametrize("bug", BUGS)
def test_what_is_not_zero_is_seen_in_the_logits(bug, monkeypatch):
    small = make()
    monkeypatch.setattr(inflate, *BUGS[bug])
    assert np.abs(logits(inflated(small)) - logits(small)).max() > 1e-3


@pytest.mark.slow
def test_what_norms_add_to_the_variance_is_rescaled():
    small = make()
    large = inflated(small)
    config = dataclasses.replace(large.config, norm_eps=small.config.norm_eps)
    other = specjax.Pretrained(families.model(config), large.params, None, config)
    assert np.abs(logits(other) - logits(small)).max() > 1e-3


@pytest.mark.parametrize("part", ["attention out", "cross query", "mlp up", "mlp down"])
def test_the_new_weights_are_multiplied(part):
    """Not a number times zero is not a number: a product that were left out would not show it."""
    large = inflated(make())
    module, matrix = part.split()
    weights = large.params["decoder"][2][module][matrix]
    spoilt = weights | {"values": weights["values"].at[(-1,) * weights["values"].ndim].set(jnp.nan)}
    layer = large.params["decoder"][2]
    decoder = large.params["decoder"] | {2: layer | {module: layer[module] | {matrix: spoilt}}}
    found = logits(large._replace(params=large.params | {"decoder": decoder}))
    assert np.isnan(found).all()
    for values in (layer["attention"]["qkv"], layer["cross"]["query"], layer["mlp"]["up"]):
        assert np.mean(np.asarray(values["values"]) != 0) > 0.8


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 20}, r"inflate\.hidden_size=20: the model has 24; give more, or 0"),
        ({"num_layers": 1}, r"inflate\.num_layers=1: the model has 2"),
        ({"vocab_size": 100}, r"inflate\.vocab_size=100 cannot grow: choose among hidden_size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    small = make()
    with pytest.raises(ValueError, match=message):
        inflate.inflate(small.config, small.params, sizes)


def test_only_float_encoder_decoders_are_inflated():
    small = make()
    with pytest.raises(ValueError, match=r"quantised \(int8\); load it in float32 or bfloat16"):
        inflate.shape(families.with_quantisation(small.config, "int8"), LARGER)
    with pytest.raises(ValueError, match="this model is a decoder, and only encoder-decoders"):
        inflate.shape(specjax.DecoderConfig(67, 16, 24, 1, 2, 1, 8, 256), LARGER)
    assert inflate.shape(small.config, dict.fromkeys(LARGER, 0)) == small.config
