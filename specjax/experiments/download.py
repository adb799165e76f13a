"""Downloads a file: an interrupted download is continued, and the file gets its name once complete and checked."""

import hashlib
import http.client
import os
import pathlib
import urllib.error
import urllib.request
from typing import Any

from specjax.experiments.reports.display import View

_CHUNK = 1 << 18
_SECONDS = 30.0
"""Seconds without a byte after which a download has failed."""


def _open(url: str, begin: int) -> tuple[Any, int]:
    """The response of a server, and the byte at which it begins: 0 where the server cannot resume."""
    headers = {"User-Agent": "specjax", "Range": f"bytes={begin}-"} if begin else {"User-Agent": "specjax"}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not begin:  # 416: the partial file is at least as long as the whole.
            raise
        return _open(url, 0)
    return answer, begin if getattr(answer, "status", None) == 206 else 0


def _receive(url: str, partial: pathlib.Path, view: View) -> None:
    answer, begin = _open(url, partial.stat().st_size if partial.exists() else 0)
    with answer, partial.open("ab" if begin else "wb") as file:
        left = int(answer.headers.get("Content-Length") or 0)
        with view.progress(begin + left, begin, what=f"bytes of {url.rpartition('/')[2]}") as bar:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                left -= len(chunk)
                bar.advance(bar.task_ids[0], len(chunk))
    if left > 0:
        raise http.client.IncompleteRead(b"", left)


def download(url: str, path: pathlib.Path, view: View, sha256: str = "") -> None:
    """Downloads a file from http, https or file, unless it exists.

    Until then, a file `.part` next to it holds what has arrived. `sha256` is the checksum that it must have, empty
    where none is known.

    Raises:
      OSError: where the server does not give the file, naming the URL and the remedy.
      ValueError: for a file with another checksum, which is deleted.
    """
    if path.exists():
        return
    if url.partition(":")[0] not in ("http", "https", "file"):
        raise ValueError(f"{url!r} is not the URL of a file: give http://, https:// or file://.")
    partial = path.with_name(path.name + ".part")
    view.line(f"Downloading {url}")
    try:
        _receive(url, partial, view)
    except (OSError, http.client.HTTPException) as error:
        # urllib's errors are OSErrors.
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise OSError(
            f"{url} could not be downloaded ({reason}): check the network; the same command goes on where it stopped. "
            f"Or download it elsewhere, and save it as {path}."
        ) from error
    found = hashlib.sha256(partial.read_bytes()).hexdigest()
    if sha256 and found != sha256:
        partial.unlink()
        raise ValueError(
            f"{url} has the SHA-256 {found}, not {sha256}: the file has changed, or was damaged. Try again, or save "
            f"a file that you trust as {path}."
        )
    os.replace(partial, path)
    view.line(f"{path}: {path.stat().st_size} bytes, SHA-256 {found}")
