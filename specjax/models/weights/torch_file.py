"""Reads the tensors of a file that `torch.save` wrote, without torch and without running the code that a pickle names.

Such a file is a zip archive: `data.pkl` says which tensors there are, and an entry below `data/` holds the bytes of
each storage. A pickle may name any function to be called. Here it may name those that rebuild tensors and dictionaries,
for which functions of this module stand; anything else is refused.
"""

import collections
"""Reads the tensors of a file of `torch.save` (.bin, .pt, .pth) without torch, and without running what it pickles.

Such a file is a zip archive: `NAME/data.pkl` is a pickle that says how tensors are put together, `NAME/data/KEY` are
their bytes. A pickle is a program that may call any function. The reader here allows three things in it: ordered
dictionaries, storages, and views of storages as tensors. Everything else is refused by its name.
"""

import io
import math
import pathlib
import pickle
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

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
