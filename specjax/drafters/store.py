"""Texts of token ids in, files out: shared on the host by the drafters that are counted or indexed from a corpus.

directory/
  draft.safetensors   the arrays; its metadata hold kind, format version, what was counted, the vocabulary's
                      fingerprint and the CRC-32 of every array
  tokenizer.json ...  the tokenizer, where there is one (`Tokenizer.save`)
"""

import hashlib
import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from specjax import files
from specjax.text.tokenizer import Tokenizer

FILE = "draft.safetensors"
FORMAT = 1
"""The version that this code writes, and the only one that it reads."""

_KEY = "specjax"


class Texts(NamedTuple):
    """Many texts, concatenated.

    Attributes:
      tokens: `[N]` the tokens of all texts.
      place: `[N]` the position of each in its own text, from 0.
    """

    tokens: Int[np.ndarray, " N"]
    place: Int[np.ndarray, " N"]


def join(texts: Sequence[Sequence[int] | np.ndarray], vocab_size: int) -> Texts:
    """Concatenates texts of token ids.

    Raises:
      ValueError: for no tokens at all, or a token outside the vocabulary.
    """
    length = np.asarray([len(text) for text in texts], np.int64)
    size = int(length.sum())
    if not size:
        raise ValueError(f"{len(texts)} texts hold no tokens: give texts to count.")
    if size >= 2**31:
        raise ValueError(f"{size} tokens are more than 32 bits can number: give fewer texts.")
    tokens = np.concatenate([np.asarray(text, np.int32) for text in texts])
    wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(wrong):
        text = int(np.searchsorted(np.cumsum(length), wrong[0], side="right"))
        raise ValueError(f"Text {text} has token {tokens[wrong[0]]}, but the vocabulary has {vocab_size} entries.")
    return Texts(tokens, np.arange(size) - np.repeat(np.cumsum(length) - length, length))


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of which token has which id."""
    pairs = sorted((i, token) for token, i in tokenizer.vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def write(
    directory: str | pathlib.Path,
    kind: str,
    arrays: Mapping[str, Any],
    info: Mapping[str, Any],
    tokenizer: Tokenizer | None,
) -> None:
    """Writes a draft, in place of the one that the directory held before.

    Args:
      directory: made if it does not exist.
      kind: what `read` will ask for.
      arrays: by name.
      info: JSON values that go with them.
      tokenizer: the tokenizer of the ids, saved with them, or None.
    """
    from safetensors.numpy import save_file

    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    host = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    content = {
        "kind": kind,
        "format": FORMAT,
        "info": dict(info),
        "vocabulary": None if tokenizer is None else fingerprint(tokenizer),
        "crc32": {name: zlib.crc32(array.tobytes()) for name, array in host.items()},
    }
    if tokenizer is not None:
        tokenizer.save(directory)
    with files.replacing(directory / FILE) as partial:
        save_file(host, partial, metadata={_KEY: json.dumps(content)})


def _tokenizer(path: pathlib.Path, expected: str | None, tokenizer: Tokenizer | None) -> Tokenizer | None:
    """The tokenizer given, or the one in the file's directory, checked to be the one that the file was made with."""
    source = "the tokenizer given"
    if tokenizer is None and expected is not None and (path.parent / "tokenizer.json").is_file():
        source, tokenizer = str(path.parent / "tokenizer.json"), Tokenizer.from_directory(path.parent)
    if tokenizer is not None and expected is not None and fingerprint(tokenizer) != expected:
        raise ValueError(
            f"The vocabularies do not match: {path} was made with another tokenizer than {source}. Make the draft "
            "again with the target's tokenizer."
        )
    return tokenizer


def read(
    path: str | pathlib.Path, kind: str, names: Sequence[str] | None, tokenizer: Tokenizer | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any], Tokenizer | None]:
    """Reads what `write` wrote.

    Args:
      path: the directory, or the file in it.
      kind: the kind that it has to be.
      names: the arrays that it has to hold; None: those that its metadata name.
      tokenizer: the tokenizer that the ids must have; by default the one in the directory.

    Returns:
      the arrays, the info and the tokenizer.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for another kind or format, a truncated or damaged file, or another vocabulary.
    """
    from safetensors import SafetensorError, safe_open

    path = pathlib.Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: make a draft with configs/count.py, and give its workdir.")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated, or no safetensors file ({error}): copy or make it again.") from error
    try:
        content = json.loads(metadata[_KEY])
        found, version, info, crcs = content["kind"], content["format"], dict(content["info"]), dict(content["crc32"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a draft of specjax: its metadata do not describe one ({error!r}).") from error
    if version != FORMAT:
        raise ValueError(f"{path} is of format {version}, this specjax reads {FORMAT}: use a matching release.")
    if found != kind:
        raise ValueError(f"{path} holds a draft of kind {found!r}, not {kind!r}: use the loader of its kind.")
    names = list(crcs) if names is None else names
    damaged = [n for n in names if n not in arrays or zlib.crc32(arrays[n].tobytes()) != crcs.get(n)]
    if damaged:
        raise ValueError(f"{path} is damaged: array {damaged[0]!r} is not what was written. Copy or make it again.")
    return {name: arrays[name] for name in names}, info, _tokenizer(path, content.get("vocabulary"), tokenizer)
