"""Files that are written whole or not at all."""

import errno
import os
import pathlib

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


def write(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file so that a reader sees the old one or the new one, never half of it.

    Args:
      path: the file. What is written first has its name between a dot and the number of the process, and does not
        stay where the write fails.
      text: in UTF-8.

    Raises:
      OSError: where it cannot be written, naming the file and the remedy.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        partial.unlink(missing_ok=True)
