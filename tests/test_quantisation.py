"""Matrices in eight and four bits: rounded as numpy would, multiplied as what they stand for, row by row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import save_tiny_decoder

import specjax
from specjax.models import cpu_products, families, linear, quantisation, quantised
from specjax.models.config import DecoderConfig
from specjax.models.quantisation import Quantisation, Rounded

TINY = DecoderConfig(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    max_position=64,
)  # fmt: skip
WAYS = ["int8", "int4", "int8:32", "int4:32", "int4:64", "int4:32:offset", "int8:64:offset"]


def of_layers(way: str) -> Quantisation:
    how, _ = quantisation.parse(way)
    assert how is not None
    return how


def rounded_by_numpy(matrix: np.ndarray, how: Quantisation) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Values, scales, offsets and what they stand for of a matrix `[outputs, inputs]`, group by group."""
    low, high, size = -(2 ** (how.bits - 1)), 2 ** (how.bits - 1) - 1, how.group or matrix.shape[1]
    values, scales, offsets = np.zeros(matrix.shape, int), [], []
    for row, integers in zip(matrix, values, strict=True):
        for start in range(0, len(row), size):
            group, offset = row[start : start + size], 0.0
            if how.offset:
                scale = (group.max() - group.min()) / (high - low)
                offset = group.min() - low * scale
            elif how.bits == 8:
                scale = abs(group).max() / 127
            else:
                whole = -group[abs(group).argmax()] / 8
                tried = [whole * factor for factor in np.linspace(1, 0.5, 12)]
                errors = [((group - s * np.clip(np.round(group / s), low, high)) ** 2).sum() for s in tried]
                scale = tried[int(np.argmin(errors))]
            integers[start : start + size] = np.clip(np.round((group - offset) / scale), low, high)
            scales.append(scale)
            offsets.append(offset)
    shape = len(matrix), -1, 1
    stands = values.reshape(*shape[:1], -1, size) * np.reshape(scales, shape) + np.reshape(offsets, shape)
    return values, np.array(scales), np.array(offsets), stands.reshape(matrix.shape)


@pytest.mark.parametrize("way", WAYS)
def test_a_matrix_is_rounded_as_by_numpy(way):
    how, rng = of_layers(way), np.random.default_rng(0)
    matrix = (rng.standard_normal((6, 128)) * np.exp(rng.standard_normal((6, 1)))).astype(np.float32)
    found = quantisation.quantise(jnp.asarray(matrix), 1, how)
    values, scale, offset, stands = rounded_by_numpy(matrix.astype(np.float64), how)
    assert found.values.dtype == (jnp.int8 if how.bits == 8 else jnp.int4)
    # Numbers in the middle between two may be rounded either way.
    different = np.asarray(found.values, int) != values
    assert different.mean() < 0.01
    np.testing.assert_allclose(found.scale.ravel(), scale, rtol=1e-5)
    if how.offset:
        assert found.offset is not None
        np.testing.assert_allclose(found.offset.ravel(), offset, rtol=1e-4, atol=1e-5)
    got = np.asarray(quantisation.dequantise(found, 1))
    np.testing.assert_allclose(got[~different], stands[~different], atol=1e-5)
    assert abs(got - matrix).max() <= (0.6 if how.bits == 8 else 5) * abs(scale).max()


def test_scales_are_shared_along_the_last_inputs():
    # 2 x 3 x 64 inputs: groups of 32 lie within the last axis, those of 128 hold two of the middle one.
    assert quantisation.num_groups((2, 4, 64), Quantisation(4, 32)) == (2, 4, 2)
    assert quantisation.num_groups((2, 4, 64), Quantisation(4, 128)) == (2, 2, 1)
    assert quantisation.num_groups((2, 4, 64), Quantisation(4)) == (1, 1, 1)
    rng, how = np.random.default_rng(1), Quantisation(4, 32)
    matrix = jnp.asarray(rng.standard_normal((5, 2, 4, 16)), jnp.float32)
    found = quantisation.quantise(matrix, 3, dataclasses.replace(how, offset=True))
    flat = quantisation.quantise(matrix.reshape(5, 128), 1, dataclasses.replace(how, offset=True))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.reshape(y.shape), y), found, flat)
    np.testing.assert_array_equal(quantisation.dequantise(found, 3).reshape(5, 128), quantisation.dequantise(flat, 1))


@pytest.mark.parametrize("by_xla", [False, True])
@pytest.mark.parametrize("way", [*WAYS, "int4:32+int8", "int8+int8"])
def test_a_product_is_that_of_what_the_matrix_stands_for_row_by_row(way, by_xla, monkeypatch):
    if by_xla:
        monkeypatch.setattr(cpu_products, "is_supported", lambda rows, dtype: False)
    how, rng = of_layers(way), np.random.default_rng(2)
    matrix = jnp.asarray(rng.standard_normal((3, 7, 2, 64)), jnp.float32)
    sizes = (10.0 ** np.arange(-1, 2))[:, None, None]
    x = jnp.asarray(rng.standard_normal((2, 3, 2, 64)) * sizes, jnp.float32).at[0, 0].set(0.0)
    weight = quantisation.quantise(matrix, 2, how)
    run = jax.jit(functools.partial(quantised.product, num_contracted=2, how=how))
    got = run(x, weight)
    rows = np.asarray(x, np.float64).reshape(6, -1)
    if how.activations:
        step = np.maximum(abs(rows).max(1, keepdims=True), 1e-30) / 127
        rows = np.round(rows / step) * step
    wanted = rows @ np.asarray(quantisation.dequantise(weight, 2), np.float64).reshape(21, -1).T
    tolerance = 128 * 2.0**-14 if way == "int8" else 1e-5  # 15 bits of each input
    assert got.shape == (2, 3, 3, 7)
    assert (abs(got.reshape(6, -1) - wanted) <= tolerance * abs(wanted).max(1, keepdims=True) + 1e-12).all()
    np.testing.assert_array_equal(got[1], run(x.at[0].set(9.0), weight)[1])
    if not by_xla or way == "int8":  # Sums in another order, if there are more or fewer rows, are XLA's for floats too.
        for rows in (x[1:, 2:], jnp.concatenate([x[1:, 2:]] * 2, axis=1)):
            np.testing.assert_array_equal(got[1, 2], run(rows, weight)[0, 0])


@pytest.mark.parametrize("num_rows", [3, quantised.MAX_ROWS + 1])
@pytest.mark.parametrize("way", ["int8", "int4:32", "int4:32:offset"])
def test_accelerators_multiply_what_the_matrix_stands_for(way, num_rows, monkeypatch):
    # What GPUs run, and TPUs for many rows, is run here, in bfloat16.
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, cuda, default: cuda(*args))
    how, rng = of_layers(way), np.random.default_rng(3)
    for activations in (None, 8):
        how = dataclasses.replace(how, activations=activations)
        matrix = jnp.asarray(rng.standard_normal((5, 3, 2, 64)), jnp.float32)
        x, weight = (
            jnp.asarray(rng.standard_normal((1, num_rows, 2, 64)), jnp.float32),
            quantisation.quantise(matrix, 2, how),
        )
        wanted = jnp.einsum("btij,opij->btop", x, quantisation.dequantise(weight, 2))
        got = quantised.product(x, weight, 2, how)
        np.testing.assert_allclose(got, wanted, atol=0.3)
        assert float(jnp.corrcoef(got.ravel(), wanted.ravel())[0, 1]) > 0.999


def test_a_quantised_head_is_looked_up_as_what_it_stands_for():
    how = Quantisation(4, 32)
    matrix = linear.Matrix(nnx.Rngs(4), (64, 61), ("embed", "vocab"), "float32", how=how)
    assert matrix.scale is not None
    stands = quantisation.dequantise(Rounded(matrix.values[...], matrix.scale[...], None), 1)
    np.testing.assert_array_equal(matrix.look_up(jnp.array([[3, 60, 99]])), stands[jnp.array([[3, 60, 60]])])
    np.testing.assert_array_equal(matrix.look_up(jnp.array([[3]])), stands[jnp.array([[3]])])


@pytest.mark.parametrize(
    "text",
    [
        "int8",
        "int4:64",
        "int4:32:offset+int8",
        "int4:64,head=int8",
        "int8:128+int8,head=int4:32",
        "floats,head=int8",
        "int8,head=floats",
    ],
)
def test_a_spelling_is_read_and_written(text):
    assert quantisation.spell(*quantisation.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "int2", "int4:48", "int4:", "int8+int4", "int4:offset:32", "int4,int8", "8", "keep", "floats"]
)
def test_another_spelling_is_refused_with_those_that_are_known(text):
    with pytest.raises(ValueError, match=r"quantise=.*int4:64"):
        quantisation.parse(text)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"bits": 2}, "8 or 4|4 or 8"),
        ({"group": 48}, "32, 64, 128"),
        ({"activations": 4}, "activations 8"),
        ({"offset": True}, "only groups have offsets"),
    ],
)
def test_what_is_not_computed_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        Quantisation(**how)


def test_matrices_that_do_not_divide_are_refused():
    params = families.init_params(TINY, jax.random.key(0))
    with pytest.raises(ValueError, match=r"int4:128: a matrix of 64 inputs .* choose groups of 32 or 64"):
        families.quantise(TINY, params, "int4:128")
    odd = dataclasses.replace(TINY, intermediate_size=40)
    with pytest.raises(ValueError, match=r"a matrix of 40 inputs .* choose int4, without groups"):
        families.with_quantisation(odd, "int4:32")


def test_memory_and_parameters_are_counted():
    config, params = families.quantise(TINY, families.init_params(TINY, jax.random.key(0)), "int4:32,head=int8")
    assert families.num_params(config) == families.num_params(TINY)
    # In int4, with scales of 4 bytes: qkv, out, gate and up, and down; the head in int8; the rest in float32.
    weights = 2 * (64 * 128 + 64 * 64 + 64 * 192 + 96 * 64)
    expected = weights // 2 + weights // 32 * 4 + 61 * 64 + 61 * 4 + (61 * 64 + 5 * 64) * 4
    assert families.num_bytes(params) == families.num_bytes(families.abstract_params(config)) == expected


@pytest.mark.parametrize("way", ["int8", "int4:32,head=int8"])
def test_a_quantised_model_is_saved_and_loaded_and_stays_what_it_is(way, tmp_path):
    source = save_tiny_decoder(tmp_path / "source", 0)
    small = specjax.load(source, dtype="bfloat16", quantise=way)
    specjax.save(small, tmp_path / "saved")
    again = specjax.load(tmp_path / "saved", dtype="bfloat16")
    assert again.config == small.config
    jax.tree.map(np.testing.assert_array_equal, again.params, small.params)
    assert jax.tree.map(lambda x: x.dtype, again.params) == jax.tree.map(lambda x: x.dtype, small.params)
    for name, options in {"dtype": {}, "quantise": {"dtype": "bfloat16", "quantise": "int8"}}.items():
        with pytest.raises(ValueError, match=f"{name}=.*this model is {way}"):
            specjax.load(tmp_path / "saved", **options)
    with pytest.raises(ValueError, match=r"quantise='keep': only GGUF files"):
        specjax.load(source, quantise="keep")


def test_scanned_layers_are_not_quantised():
    config, params = families.stack_layers(TINY, families.init_params(TINY, jax.random.key(0)))
    with pytest.raises(ValueError, match=r"quantise='int8'.*scanned already"):
        families.quantise(config, params, "int8")
