"""Files that are written whole or not at all."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator

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
    """Gives the name of a file to write, which takes the place of `path` at the end.

    That name is the file's between a dot and the number of the process. It does not stay where the write fails.

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
        # The folder itself may be what is missing, or no folder.
        with contextlib.suppress(OSError):
            partial.unlink()


def write(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file in UTF-8, so that a reader sees the old one or the new one, never half of it.

    Raises:
      OSError: where it cannot be written, naming the file and the remedy.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
