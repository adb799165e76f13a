"""Reads the tensors of a file that `torch.save` wrote, without torch and without running the code that a pickle names.

Such a file is a zip archive: `data.pkl` says which tensors there are, and an entry below `data/` holds the bytes of
each storage. A pickle may name any function to be called. Here it may name those that rebuild tensors and dictionaries,
for which functions of this module stand; anything else is refused.
"""

import collections
import io
import math
import pathlib
import pickle
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}

_LONGEST_PICKLE = 64 * 2**20
"""The names, shapes and places of tensors take some hundred bytes each."""


class _StorageType(NamedTuple):
    """What a name such as torch.FloatStorage stands for."""

    dtype: str


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> np.ndarray:
    """The tensor of these elements of a storage, copied.

    Raises:
      ValueError: for elements that the storage does not have.
    """
    del rest
    places = [offset, *size, *stride]
    is_known = isinstance(storage, np.ndarray) and storage.ndim == 1 and len(size) == len(stride)
    if not is_known or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in places):
        raise ValueError(f"a tensor has size {size}, stride {stride} and offset {offset}")
    if math.prod(size) > storage.size:
        raise ValueError(f"a tensor of size {tuple(size)} is in a storage of {storage.size} elements")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= storage.size:
        raise ValueError(f"a tensor has elements up to {last}, but its storage has {storage.size}")
    begin = storage[offset:] if math.prod(size) else storage[:0]
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(begin, tuple(size), steps, writeable=False).copy()


def _parameter(tensor: Any, *rest: Any) -> Any:
    """A parameter is its tensor."""
    del rest
    return tensor


class _Reader(pickle.Unpickler):
    """An unpickler that knows tensors, dictionaries and plain values alone."""

    def __init__(self, pickled: bytes, archive: zipfile.ZipFile, prefix: str):
        super().__init__(io.BytesIO(pickled))
        self.archive, self.prefix = archive, prefix
        self.storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for.

        Raises:
          ValueError: for any name that is not one of those that tensors need.
        """
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _rebuild
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if module == "torch" and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        raise ValueError(f"it names {module}.{name}, which is not part of a tensor and is not run")

    def persistent_load(self, pid: Any) -> np.ndarray:
        """The elements of a storage.

        Raises:
          ValueError: for one that the archive does not hold whole.
        """
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType)):
            raise ValueError("it refers to something that is no storage of a tensor")
        _, kind, key, _, number = pid
        if key not in self.storages:
            dtype = jnp.dtype(kind.dtype)
            content = _entry(self.archive, f"{self.prefix}/data/{key}")
            if not isinstance(number, int) or len(content) != number * dtype.itemsize:
                raise ValueError(f"storage {key} has {len(content)} bytes, not {number} of {kind.dtype}")
            self.storages[key] = np.frombuffer(content, dtype)
        return self.storages[key]


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """An entry of the archive, which torch does not compress."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which torch.save does not do")
    return archive.read(info)


def _content(path: pathlib.Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} entries data.pkl")
        prefix = pickles[0].removesuffix("/data.pkl")
        if archive.getinfo(pickles[0]).file_size > _LONGEST_PICKLE:
            raise ValueError("its data.pkl is too long for names and shapes")
        order = f"{prefix}/byteorder"
        if order in archive.namelist() and _entry(archive, order) != b"little":
            raise ValueError("its numbers are not little-endian")
        return _Reader(_entry(archive, pickles[0]), archive, prefix).load()


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file by name.

    Args:
      path: a file of `torch.save` since torch 1.6, which holds a dictionary of tensors.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for a file that is broken, of an older format, or holds anything but tensors.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a file that torch.save wrote.")
    remedy = "Download it again, or save its tensors as .safetensors."
    try:
        found = _content(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no whole file of torch.save since torch 1.6 ({error}). {remedy}") from error
    except Exception as error:  # A damaged pickle raises whatever its instructions raise.
        raise ValueError(f"{path} cannot be read: {error}. {remedy}") from error
    if not isinstance(found, dict) or not _are_tensors(list(found.items())):
        raise ValueError(f"{path} holds {type(found).__name__}, not a dictionary of tensors by name. {remedy}")
    return dict(found)


def _are_tensors(items: Sequence[tuple[Any, Any]]) -> bool:
    return all(isinstance(name, str) and isinstance(value, np.ndarray) for name, value in items)
