"""Reads the tensors of a file of `torch.save` (.bin, .pt, .pth) without torch, and without running what it pickles.

Such a file is a zip archive: `NAME/data.pkl` is a pickle that says how tensors are put together, `NAME/data/KEY` are
their bytes. A pickle is a program that may call any function. The reader here allows three things in it: ordered
dictionaries, storages, and views of storages as tensors. Everything else is refused by its name.
"""

import io
import math
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

MAX_PICKLE = 64 * 2**20
"""The largest `data.pkl` that is read, in bytes: published ones, which hold names and shapes alone, are below 1 MB."""

_DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}

_REMEDY = "save its tensors as safetensors instead, on a machine that trusts the file"


class _Known:
    """What stands for one of torch's own functions or types while a pickle is read; nothing can be set on it."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        object.__setattr__(self, "value", value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it sets {name!r} of a function")

    def __call__(self, *arguments: Any) -> Any:
        if not callable(self.value) or isinstance(self.value, type):
            raise pickle.UnpicklingError("it calls a type of storages")
        return self.value(*arguments)


def _whole(values: Any, what: str) -> tuple[int, ...]:
    """A tuple of whole numbers that are not negative."""
    if not isinstance(values, tuple) or not all(type(n) is int and n >= 0 for n in values):
        raise pickle.UnpicklingError(f"a tensor has {what} {str(values)[:60]}")
    return values


def _view(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> np.ndarray:
    """A tensor as a view of its storage; what `rest` says (gradients, hooks) is no part of its values."""
    del rest
    if not isinstance(storage, np.ndarray):
        raise pickle.UnpicklingError("a tensor's storage is no storage")
    (begin,), size, stride = _whole((offset,), "offset"), _whole(size, "size"), _whole(stride, "stride")
    if len(size) != len(stride) or len(size) > 16:
        raise pickle.UnpicklingError(f"a tensor has the size {size} and the stride {stride}")
    last = begin + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= len(storage):
        raise pickle.UnpicklingError(f"a tensor of size {size} lies outside its storage of {len(storage)} numbers")
    if not math.prod(size):
        return np.zeros(size, storage.dtype)
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[begin:], size, steps, writeable=False)


def _parameter(tensor: Any, *rest: Any) -> Any:
    """A parameter is its tensor."""
    del rest
    if not isinstance(tensor, np.ndarray):
        raise pickle.UnpicklingError("a parameter is no tensor")
    return tensor


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _view,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


class _Archive:
    """The zip archive: its pickle and its storages, which stay on disk until they are used."""

    def __init__(self, path: pathlib.Path):
        try:
            self.zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(
                f"{path} is no zip archive ({error}): it is cut off, or was written by a torch older than 1.6. Copy it "
                f"again, or {_REMEDY}."
            ) from error
        self.path = path
        names = [name for name in self.zip.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError(f"{path} has {len(names)} members data.pkl, not one: it was not written by torch.save.")
        self.prefix = names[0].removesuffix("data.pkl")
        order = self.prefix + "byteorder"
        if order in self.zip.namelist() and self._bytes(order, 16) != b"little":
            raise ValueError(f"{path} has numbers of another byte order than little: {_REMEDY}.")

    def _bytes(self, name: str, most: int) -> bytes:
        info = self.zip.getinfo(name)
        if info.file_size > most:
            raise ValueError(f"{self.path}: {name} has {info.file_size} bytes, more than {most}: {_REMEDY}.")
        try:
            return self.zip.read(name)
        except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError) as error:
            raise ValueError(f"{self.path} is damaged at {name} ({error}): download or copy it again.") from error

    def pickle(self) -> bytes:
        """The pickle."""
        return self._bytes(self.prefix + "data.pkl", MAX_PICKLE)

    def storage(self, kind: Any, key: Any, count: Any) -> np.ndarray:
        """A storage, one-dimensional, mapped from the file."""
        dtype = kind.value if isinstance(kind, _Known) and isinstance(kind.value, np.dtype) else None
        name = f"{self.prefix}data/{key}"
        if dtype is None or type(count) is not int or name not in self.zip.namelist():
            raise pickle.UnpicklingError(f"it has no storage {str(key)[:60]!r} of a known type")
        info, size = self.zip.getinfo(name), count * dtype.itemsize
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != size:
            raise pickle.UnpicklingError(f"storage {key!r} has {info.file_size} bytes, not {size}, or is compressed")
        if not count:
            return np.zeros(0, dtype)
        # What a member's own header says of its length stands before its bytes.
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(30)
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise pickle.UnpicklingError(f"storage {key!r} is not where the archive says")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if begin + size > self.path.stat().st_size:
            raise pickle.UnpicklingError(f"storage {key!r} ends beyond the file")
        return np.memmap(self.path, dtype, mode="r", offset=begin, shape=(count,))


class _Unpickler(pickle.Unpickler):
    """Allows what the module's docstring says."""

    def __init__(self, file: Any, archive: _Archive):
        super().__init__(file, encoding="utf-8")
        self.archive = archive
        # A class of its own for every file, since a pickle may set attributes of what it makes.
        self.dictionary = type("OrderedDict", (dict,), {})

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a global name, if it is one of those that are allowed."""
        if (module, name) == ("collections", "OrderedDict"):
            return self.dictionary
        if function := _FUNCTIONS.get((module, name)):
            return _Known(function)
        if module == "torch" and name in _DTYPES:
            return _Known(np.dtype(_DTYPES[name]))
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a tensor")

    def persistent_load(self, pid: Any) -> np.ndarray:
        """A storage."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise pickle.UnpicklingError(f"it refers to {str(pid)[:60]!r}")
        _, kind, key, _, count = pid
        return self.archive.storage(kind, key, count)


def _flat(value: Any, path: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The tensors of nested dictionaries, by their keys joined by dots."""
    if isinstance(value, np.ndarray):
        return {".".join(path): value}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value) or len(path) > 8:
        where = ".".join(path) or "its content"
        raise pickle.UnpicklingError(f"{where} is a {type(value).__name__}, not a tensor or a dictionary of them")
    found: dict[str, np.ndarray] = {}
    for key, part in value.items():
        found |= _flat(part, (*path, key))
    return found


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file, by name; those of nested dictionaries by names joined by dots.

    Nothing that the file holds is run, and torch is not needed. The arrays are read-only views of the file, whose bytes
    are read when they are used.

    Args:
      path: a file that `torch.save` of torch 1.6 or newer wrote, which holds a dictionary of tensors.

    Raises:
      FileNotFoundError: where it does not exist.
      ValueError: for a file that is damaged, or holds anything but tensors.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    archive = _Archive(path)
    try:
        return _flat(_Unpickler(io.BytesIO(archive.pickle()), archive).load())
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, LookupError, RecursionError) as error:
        raise ValueError(f"{path} is not read, because {error}: {_REMEDY}.") from error
    except (TypeError, ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is not read, because its pickle is broken ({error}): {_REMEDY}.") from error
    finally:
        archive.zip.close()
