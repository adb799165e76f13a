"""Arrays that are read from disk when they are needed, and only the part that is.

A `LazyArray` supports numpy's functions that rearrange axes (numpy's enhancement proposal 18), so the code that fuses
projections works on it as on an array: nothing is read until a slice of the result is read, and then only the slices of
the files that make it up. So each device's part of a model is read by the process that the device belongs to, and no
process ever holds a whole matrix.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Region = tuple[slice, ...]
"""One slice per axis, with start and stop, of step 1."""


class LazyArray:
    """An array whose regions are read by a function."""

    def __init__(self, shape: Sequence[int], dtype: np.dtype, read: Callable[[Region], np.ndarray]):
        """Keeps the function; reads nothing."""
        self.shape, self.dtype, self._read = tuple(shape), dtype, read

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return len(self.shape)

    @property
    def T(self) -> "LazyArray":
        """The array with its axes in reverse order."""
        return self.transpose(range(self.ndim)[::-1])

    def read(self, region: Region) -> np.ndarray:
        """The values of a region."""
        return self._read(region)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All values."""
        del copy  # read from disk: nothing else refers to them
        return np.asarray(self.read(tuple(slice(0, size) for size in self.shape)), dtype)

    def __getitem__(self, index: Any) -> "LazyArray":
        """The part that integers and slices of positive step select; as in numpy, an integer removes its axis.

        Raises:
          TypeError: for anything else.
        """
        index = index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (self.ndim - len(index))
        if any(isinstance(i, int) for i in index):
            # For an index of -1, i + 1 would be 0, which does not end a slice after the last element.
            places = [i % size if isinstance(i, int) else i for i, size in zip(index, self.shape, strict=True)]
            part = self[tuple(slice(i, i + 1) if isinstance(i, int) else i for i in places)]
            kept = [size for i, size in zip(index, part.shape, strict=True) if not isinstance(i, int)]
            return part.reshape(tuple(kept))
        if not all(isinstance(i, slice) and (i.step is None or i.step > 0) for i in index):
            raise TypeError(f"A lazy array takes numbers and slices of a positive step, not {index}.")
        ranges = [range(size)[i] for i, size in zip(index, self.shape, strict=True)]

        def read(region: Region) -> np.ndarray:
            chosen = [r[i] for r, i in zip(ranges, region, strict=True)]
            # An empty range has no last element.
            whole = tuple(slice(r[0], r[-1] + 1) if r else slice(0, 0) for r in chosen)
            return self.read(whole)[tuple(slice(None, None, r.step) for r in chosen)]

        return LazyArray([len(r) for r in ranges], self.dtype, read)

    def transpose(self, order: Sequence[int]) -> "LazyArray":
        """The array whose axis i is axis `order[i]` of this one."""
        order = [axis % self.ndim for axis in order]
        places = np.argsort(order)

        def read(region: Region) -> np.ndarray:
            return np.transpose(self.read(tuple(region[i] for i in places)), order)

        return LazyArray([self.shape[axis] for axis in order], self.dtype, read)

    def reshape(self, *sizes: Any) -> "LazyArray":
        """The same values in another shape, given as sizes or as a tuple of them, of which one may be -1.

        Raises:
          ValueError: where the sizes do not divide.
        """
        shape = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple) else sizes
        known = math.prod(size for size in shape if size != -1)
        new = [math.prod(self.shape) // known if size == -1 else size for size in shape]
        groups = _groups(self.shape, new)

        def read(region: Region) -> np.ndarray:
            whole: list[slice] = []  # what is read of the old axes
            middle: list[int] = []  # its shape, once the old axes of each group are one
            cuts: list[slice] = []  # the part of it that the outermost new axis selects
            sizes: list[int] = []  # its shape with the new axes
            inner: list[slice] = []  # the parts of those that the other new axes select
            for old, fresh in groups:
                if not fresh:
                    whole += [slice(0, 1)] * len(old)
                    continue
                row = math.prod(new[i] for i in fresh[1:])
                begin, end = region[fresh[0]].start * row, region[fresh[0]].stop * row
                line = math.prod(self.shape[i] for i in old[1:])
                first = begin // line
                last = -(-end // line)
                if old:
                    whole += [slice(first, last), *(slice(0, self.shape[i]) for i in old[1:])]
                middle.append((last - first) * line)
                cuts.append(slice(begin - first * line, end - first * line))
                sizes += [region[fresh[0]].stop - region[fresh[0]].start, *(new[i] for i in fresh[1:])]
                inner += [slice(None), *(region[i] for i in fresh[1:])]
            return self.read(tuple(whole)).reshape(middle)[tuple(cuts)].reshape(sizes)[tuple(inner)]

        return LazyArray(new, self.dtype, read)

    def __array_function__(self, func: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        """numpy's functions that only rearrange values."""
        del types
        if func not in _FUNCTIONS:
            return NotImplemented
        return _FUNCTIONS[func](*args, **kwargs)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of axes of both shapes that hold the same values: `[([axes of old], [axes of new]), ...]`."""
    if math.prod(old) != math.prod(new):
        raise ValueError(f"An array of shape {tuple(old)} cannot have the shape {tuple(new)}.")
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        # An axis of size 1 is its own group: before another axis, it would be outermost, and all of that be read.
        lone_old, lone_new = (i < len(old) and old[i] == 1), (j < len(new) and new[j] == 1)
        if lone_old != lone_new:
            groups.append(([i], []) if lone_old else ([], [j]))
            i, j = i + lone_old, j + lone_new
            continue
        left, right, size, wanted = [], [], 1, 1
        while not (left and right and size == wanted):
            if i < len(old) and (size <= wanted or j == len(new)):
                left, size, i = [*left, i], size * old[i], i + 1
            elif j < len(new):
                right, wanted, j = [*right, j], wanted * new[j], j + 1
            else:
                break
        groups.append((left, right))
    return groups


def _concatenate(arrays: Sequence[LazyArray], axis: int = 0) -> LazyArray:
    first = arrays[0]
    ends = np.cumsum([array.shape[axis] for array in arrays])
    shape = list(first.shape)
    shape[axis] = int(ends[-1])

    def read(region: Region) -> np.ndarray:
        parts, wanted = [], region[axis]
        for array, end in zip(arrays, ends.tolist(), strict=True):
            begin = end - array.shape[axis]
            start, stop = max(wanted.start, begin) - begin, min(wanted.stop, end) - begin
            if start < stop:
                part = list(region)
                part[axis] = slice(start, stop)
                parts.append(array.read(tuple(part)))
        return np.concatenate(parts, axis=axis)

    return LazyArray(shape, first.dtype, read)


def _stack(arrays: Sequence[LazyArray], axis: int = 0) -> LazyArray:
    widened = [a.reshape(*a.shape[:axis], 1, *a.shape[axis:]) for a in arrays]
    return _concatenate(widened, axis=axis)


def _moveaxis(array: LazyArray, source: int, destination: int) -> LazyArray:
    order = [axis for axis in range(array.ndim) if axis != source % array.ndim]
    order.insert(destination % array.ndim, source % array.ndim)
    return array.transpose(order)


def _split(array: LazyArray, indices: Sequence[int] | int, axis: int = 0) -> list[LazyArray]:
    size = array.shape[axis]
    if isinstance(indices, int):
        indices = [size // indices * i for i in range(1, indices)]
    bounds = [0, *indices, size]
    lead = (slice(None),) * (axis % array.ndim)
    return [array[(*lead, slice(a, b))] for a, b in itertools.pairwise(bounds)]


_FUNCTIONS: dict[Callable, Callable] = {
    np.concatenate: _concatenate,
    np.stack: _stack,
    np.moveaxis: _moveaxis,
    np.transpose: LazyArray.transpose,
    np.split: _split,
}

Tensor = Any
"""A numpy array, or a `LazyArray` in its place (numpy's stubs know no other arrays)."""
