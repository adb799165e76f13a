"""Lazily read arrays: numpy's results from numpy's own calls, and no number read that nobody asked for."""

import math

import jax
import numpy as np
import pytest

from specjax.models import families
from specjax.models.config import DecoderConfig
from specjax.models.weights import mapping
from specjax.models.weights.lazy import LazyArray
from specjax.parallel import sharding


class File:
    """An array on disk, so to speak, that counts what is read."""

    def __init__(self, array: np.ndarray):
        self.array, self.numbers, self.largest = array, 0, 0

    def lazy(self) -> LazyArray:
        def read(region):
            part = self.array[region]
            self.numbers, self.largest = self.numbers + part.size, max(self.largest, part.size)
            return part

        return LazyArray(self.array.shape, self.array.dtype, read)


def halves(a):
    heads = a.reshape(4, 6, 6)
    return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(a.shape)


CHANGES = {
    "transpose": lambda a: a.T,
    "split an axis": lambda a: a.reshape(2, -1, 3, 6),
    "split and move": lambda a: a.reshape(2, 3, 4, 6).transpose((3, 0, 1, 2)),
    "slices": lambda a: a[2:20, 1:5][::2],
    "a number": lambda a: a[3],
    "a number behind": lambda a: a.reshape(2, 12, 6)[:, -2, 1:],
    "rotary halves": halves,
    "fuse": lambda a: np.moveaxis(np.concatenate([a.reshape(2, -1, 4, 6), a.reshape(2, -1, 4, 6)], axis=1), -1, 0),
    "stack": lambda a: np.stack([a.T, a.T], axis=1),
    "part of a split": lambda a: np.split(a, [5], axis=0)[1],
    "third of a split": lambda a: np.split(a, 3, axis=1)[2],
    "flat": lambda a: a.reshape(144),
    "other axes": lambda a: a.reshape(8, 18),
    "axes of one": lambda a: a.reshape(1, 24, 1, 6, 1),
    "split, cut, merge": lambda a: np.split(a.T.reshape(6, 2, 12), [4], axis=2)[0].reshape(6, 8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_region_is_numpys(change):
    array = np.arange(144.0).reshape(24, 6)
    wanted, lazy = CHANGES[change](array), CHANGES[change](File(array).lazy())
    assert lazy.shape == wanted.shape
    np.testing.assert_array_equal(np.asarray(lazy), wanted)
    rng = np.random.default_rng(0)
    for _ in range(40):
        bounds = [sorted(rng.choice(size + 1, 2, replace=False).tolist()) for size in wanted.shape]
        region = tuple(slice(*pair) for pair in bounds)
        np.testing.assert_array_equal(np.asarray(lazy[region]), wanted[region])


def test_what_cannot_be_lazy_is_an_error():
    lazy = File(np.zeros((4, 6))).lazy()
    with pytest.raises(ValueError, match=r"\(4, 6\) cannot have the shape \(5, 5\)"):
        lazy.reshape(5, 5)
    with pytest.raises(TypeError, match="slices of a positive step"):
        lazy[::-1]
    with pytest.raises(TypeError, match="no implementation"):
        np.sum(lazy)


def test_a_device_reads_its_own_part():
    """Of every matrix that a mesh of four would split, a quarter is read for one of its devices."""
    config = DecoderConfig(64, 32, 64, 2, 8, 4, 8, 64, qkv_bias=True)
    shapes = mapping.tensor_shapes(config)
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    files = {name: File(array) for name, array in arrays.items()}
    whole = mapping.from_huggingface(config, arrays)
    mesh = jax.sharding.AbstractMesh((1, 4), ("data", "model"))
    read: dict[str, np.ndarray] = {}

    def place(array, axes, contracted):
        if isinstance(axes, dict):
            return {"values": place(array, axes["values"], contracted["values"])}
        shape = sharding.named_sharding(mesh, array.shape, axes).shard_shape(array.shape)
        region = tuple(slice(size - part, size) for size, part in zip(array.shape, shape, strict=True))
        read[str(len(read))] = np.asarray(array[region])
        return read[str(len(read) - 1)]

    get = {name: file.lazy() for name, file in files.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "placer", lambda *_: place)
        parts = mapping.from_huggingface(config, get)
    axes = families.param_axes(config)
    leaves, treedef = jax.tree.flatten(whole)
    for x, part, names in zip(leaves, treedef.flatten_up_to(parts), treedef.flatten_up_to(axes), strict=True):
        shape = sharding.named_sharding(mesh, x.shape, names).shard_shape(x.shape)
        last = tuple(slice(size - size_of_part, size) for size, size_of_part in zip(x.shape, shape, strict=True))
        np.testing.assert_array_equal(part, np.asarray(x)[last])
    split = [name for name in shapes if "norm" not in name and "bias" not in name]
    assert len(split) > 10
    for name in split:
        assert files[name].numbers == math.prod(shapes[name]) // 4, name
