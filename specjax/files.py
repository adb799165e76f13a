"""Writes files whole or not at all, and reads users' JSON and lines of text or JSON, compressed by xz or not.

The readers take no more memory than a file's size justifies. Their errors say in one sentence what is wrong with a file
and what to do.
"""

import contextlib
import errno
import io
import itertools
import json
import lzma
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

MAX_LINE = 2**24
"""The longest line that is read, in characters."""

MAX_JSON = 2**28
"""The largest file that is read as one JSON object, in bytes."""

MAX_RATIO = 1000
"""How many times its size a packed file may unpack to; text gives 3 to 10, and repetitive logs about a hundred."""

_FREE = 2**26  # bytes that any packed file may unpack to
_MEMORY = 2**29  # bytes that unpacking may take; `xz -9` needs 65 MiB
_BLOCK = 2**18
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _Unpacked(io.RawIOBase):
    """The content of an .xz file, whose size is bounded while it is read."""

    def __init__(self, path: pathlib.Path):
        self._file = path.open("rb")
        self._most = _FREE + MAX_RATIO * path.stat().st_size
        self._path, self._size, self._rest = path, 0, b""
        self._decompressor: lzma.LZMADecompressor | None = None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def _next_stream(self) -> bool:
        """Begins the next stream of the file, after any zeros between the two; False where there is none."""
        rest = b"" if self._decompressor is None else self._decompressor.unused_data.lstrip(b"\0")
        while not rest and (block := self._file.read(_BLOCK)):
            rest = block.lstrip(b"\0")
        if not rest and self._decompressor is not None:
            return False
        self._rest, self._decompressor = rest, lzma.LZMADecompressor(memlimit=_MEMORY)
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if (self._decompressor is None or self._decompressor.eof) and not self._next_stream():
                return 0
            assert self._decompressor is not None
            block, self._rest = self._rest, b""
            if not block and self._decompressor.needs_input and not (block := self._file.read(_BLOCK)):
                raise EOFError("it ends too early")
            found = self._decompressor.decompress(block, len(buffer))
            buffer[: len(found)] = found
            self._size += len(found)
            if self._size > self._most:
                raise ValueError(
                    f"{self._path} unpacks to more than {MAX_RATIO} times its size: unpack it first if it is meant."
                )
            if found:
                return len(found)


def cache_directory() -> pathlib.Path:
    """Where downloads are kept: `$SPECJAX_CACHE`, or `~/.cache/specjax`."""
    return pathlib.Path(os.environ.get("SPECJAX_CACHE") or "~/.cache/specjax").expanduser()


def check_file(path: pathlib.Path, what: str, remedy: str) -> None:
    """Checks that a path is a file.

    Args:
      path: the path.
      what: what to call it, as in "The data file".
      remedy: what to give instead, as in "give a JSONL file".

    Raises:
      FileNotFoundError: for a path that does not exist.
      IsADirectoryError: for a directory.
      OSError: for a device, a pipe or a socket, which may never end.
    """
    if not path.exists():
        raise FileNotFoundError(f"{what} {path} does not exist: {remedy}.")
    if path.is_dir():
        raise IsADirectoryError(f"{what} {path} is a directory: {remedy}.")
    if not path.is_file():
        raise OSError(f"{what} {path} is a device or a pipe: {remedy}.")


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Puts the name of a file before the message of a ValueError about its content."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def shorten(error: BaseException) -> str:
    """The message of an error, or the name of its type if it has none, in one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def listed(names: Iterable[object]) -> str:
    """The first few of the names in a file, formatted for an error message."""
    first = list(itertools.islice(names, 9))
    shown = [text if len(text := repr(name)) <= 40 else f"{text[:40]}..." for name in first[:8]]
    return ", ".join([*shown, "..."] if len(first) > 8 else shown) or "nothing"


def read_lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers, from 1; one that ends in `.xz` is unpacked.

    A byte order mark at the beginning is skipped.

    Args:
      path: a file that has passed `check_file`.

    Raises:
      OSError: where it cannot be read.
      ValueError: for a file that is damaged or not UTF-8, a line longer than `MAX_LINE`, or a packed file that unpacks
        to more than `MAX_RATIO` times its size.
    """
    raw: io.RawIOBase = _Unpacked(path) if path.suffix == ".xz" else io.FileIO(path)
    number = 0
    try:
        with io.TextIOWrapper(io.BufferedReader(raw, _BLOCK), encoding="utf-8-sig") as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise ValueError(f"{path}, line {number}, is longer than {MAX_LINE} characters: split it.")
                yield number, line
    except lzma.LZMAError as error:
        raise ValueError(f"{path} cannot be read as an .xz file ({error}): copy or pack it again.") from error
    except EOFError as error:
        raise ValueError(f"{path} cannot be read to its end ({error}): copy or pack it again.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} cannot be read as UTF-8 text ({error.reason} after line {number}): save it as UTF-8."
        ) from error


def parse_json(text: str, what: str, remedy: str) -> Any:
    """A JSON value, whose strings can all be encoded.

    Args:
      text: JSON.
      what: what to call it in an error message, as in "FILE, line 3,".
      remedy: what to do about an error, as in "write one object a line".

    Raises:
      ValueError: for text that is not JSON, is nested too deeply, or has half of a surrogate pair in a string.
    """
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is not JSON ({error.msg}): {remedy}.") from error
    except RecursionError as error:
        raise ValueError(f"{what} is not JSON (brackets are nested too deeply): {remedy}.") from error
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise ValueError(
            f"{what} has \\u{code:04x}, half of a surrogate pair, which is no character: remove it."
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{what} is not JSON ({error}): {remedy}.") from error
    return value


def read_json_lines(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """The values of a JSONL file with their locations, as in "FILE, line 3,"; empty lines are skipped.

    Args:
      path: a file that has passed `check_file`; one that ends in `.xz` is unpacked.

    Raises:
      OSError: where it cannot be read.
      ValueError: as `read_lines` and `parse_json`.
    """
    for number, line in read_lines(path):
        if line.strip():
            where = f"{path}, line {number},"
            yield where, parse_json(line, where, "write one object a line")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file of its own.

    Raises:
      FileNotFoundError: where there is no such file.
      OSError: where it cannot be read.
      ValueError: where it holds no JSON object, or more than `MAX_JSON` bytes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the directory is incomplete, copy or download it again.")
    if (size := path.stat().st_size) > MAX_JSON:
        raise ValueError(f"{path} has {size} bytes, and at most {MAX_JSON} are read: copy or download it again.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error.reason}): copy or download it again.") from error
    value = parse_json(text, str(path), "copy or download it again")
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object: copy or download it again.")
    return value


_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space, and give the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space, and give the same command again",
    errno.EROFS: "the file system is read-only: choose a directory elsewhere",
    errno.EACCES: "permission is denied: choose a directory that you may write to",
    errno.EPERM: "permission is denied: choose a directory that you may write to",
}


def cannot_write(path: str | os.PathLike[str], error: OSError) -> OSError:
    """The error of a failed write with the file's name and the remedy, of the same type and `errno`."""
    reason = _REMEDIES.get(error.errno or 0) or error.strerror or str(error)
    return type(error)(error.errno, f"{os.fspath(path)} cannot be written: {reason}.") if error.errno else error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Gives the name of a temporary file to write, which replaces `path` at the end.

    It is the file's name between a dot and the process id. Where the write fails, the temporary file is removed.

    Args:
      path: the file.

    Raises:
      OSError: where it cannot be written, naming the file and the remedy.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        # The directory itself may be missing, or not a directory.
        with contextlib.suppress(OSError):
            partial.unlink()


def write(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file in UTF-8, so that a reader sees the old one or the new one, never half of it.

    Raises:
      OSError: where it cannot be written, naming the file and the remedy.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
