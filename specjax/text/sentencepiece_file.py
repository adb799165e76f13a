"""SentencePiece model files, read and extended without the library that trains them.

Such a file is a protocol buffer (`sentencepiece_model.proto`); only the fields that say how a text is encoded are read.
"""

import pathlib
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Kinds of pieces.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

UNIGRAM = 1
"""The only kind of model that is read (Kudo 2018, arXiv 1804.10959), which is T5's."""

MAX_BYTES = 2**28
"""The largest file that is read; umT5's has 4.5 MB."""

# Field numbers of `ModelProto` and its parts.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_ROLES = {"unk_token": (45, "<unk>"), "bos_token": (46, "<s>"), "eos_token": (47, "</s>"), "pad_token": (48, "<pad>")}
_CHARSMAP, _DUMMY_PREFIX, _STRIP, _ESCAPE = 2, 3, 4, 5

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Piece(NamedTuple):
    """One entry of the vocabulary; its index is its id.

    Attributes:
      text: the text, with "▁" for a space.
      score: its log-probability.
      kind: `NORMAL`, ...
    """

    text: str
    score: float
    kind: int


class Model(NamedTuple):
    """The content of a file.

    Attributes:
      pieces: the vocabulary.
      roles: the special pieces by role, "eos_token" and the like, of those that the vocabulary has.
      byte_fallback: whether a character without a piece is spelt in bytes.
      charsmap: the normalisation of characters, in SentencePiece's own format; empty for none.
      add_prefix: whether a space is put in front of a text.
      strip: whether spaces are removed from both ends, and runs of them become one.
    """

    pieces: list[Piece]
    roles: dict[str, str]
    byte_fallback: bool
    charsmap: bytes
    add_prefix: bool
    strip: bool


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of variable length, and the offset after it."""
    value = shift = 0
    while True:
        byte = data[place]
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
        value, shift, place = value | (byte & 0x7F) << shift, shift + 7, place + 1
        if byte < 0x80:
            return value, place


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: number and value."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        wire = tag & 7
        if wire == _VARINT:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        if wire == _BYTES:
            size, place = _varint(data, place)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if place + size > len(data):
            raise ValueError("it ends too early")
        yield tag >> 3, data[place : place + size]
        place += size


def _message(value: int | bytes) -> dict[int, int | bytes]:
    """A message whose fields occur once."""
    if isinstance(value, int):
        raise ValueError("a number instead of a message")
    return dict(_fields(value))


def _text(value: int | bytes) -> str:
    if isinstance(value, int):
        raise ValueError("a number instead of a string")
    return value.decode()


def _piece(value: int | bytes) -> Piece:
    fields = _message(value)
    score = fields.get(_SCORE, bytes(4))
    if not isinstance(score, bytes):
        raise ValueError("a score that is not a number")
    if not isinstance(fields.get(_KIND, NORMAL), int):
        raise ValueError("a kind that is not a number")
    return Piece(_text(fields.get(_TEXT, b"")), struct.unpack("<f", score)[0], int(fields.get(_KIND, NORMAL)))


def read(path: str | pathlib.Path) -> Model:
    """Reads a unigram model.

    Args:
      path: a `spiece.model` such as T5's, or another file that SentencePiece wrote.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for a file that is broken, or a kind of model that is not unigram.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The SentencePiece model {path} does not exist: give the path of a spiece.model.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes, and at most {MAX_BYTES} are read: copy or download it again.")
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [_piece(value) for number, value in fields if number == _PIECES]
        trainer = _message(dict(fields).get(_TRAINER, b""))
        normalizer = _message(dict(fields).get(_NORMALIZER, b""))
        kinds = {piece.text: piece.kind for piece in pieces}
        names = {role: _text(trainer.get(number, default.encode())) for role, (number, default) in _ROLES.items()}
        if UNKNOWN not in kinds.values():
            raise ValueError("it has no piece for unknown characters")
        if kinds.get(names["unk_token"]) not in (CONTROL, UNKNOWN):
            raise ValueError(f"its piece for unknown characters is not {names['unk_token']!r:.80}, as it says")
    except (ValueError, IndexError, struct.error) as error:
        raise ValueError(f"{path} is not a SentencePiece model ({error}): copy or download it again.") from error
    if trainer.get(_MODEL_TYPE, UNIGRAM) != UNIGRAM or trainer.get(_SUFFIX, 0) or not normalizer.get(_ESCAPE, 1):
        raise ValueError(
            f"{path} is not a unigram model with spaces before words, the only kind that specjax reads: use the "
            "tokenizer.json of the model, or make one with transformers' AutoTokenizer.from_pretrained(...)."
        )
    charsmap = normalizer.get(_CHARSMAP, b"")
    return Model(
        pieces,
        {role: name for role, name in names.items() if kinds.get(name) in (CONTROL, UNKNOWN)},
        bool(trainer.get(_BYTE_FALLBACK, 0)),
        charsmap if isinstance(charsmap, bytes) else b"",
        bool(normalizer.get(_DUMMY_PREFIX, 1)),
        bool(normalizer.get(_STRIP, 1)),
    )


def _encoded(number: int) -> bytes:
    """A number of variable length."""
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def _entry(number: int, value: bytes) -> bytes:
    return _encoded(number << 3 | _BYTES) + _encoded(len(value)) + value


def append(model: bytes, texts: Sequence[str]) -> bytes:
    """A model with further pieces at its vocabulary's end, which are found in a text before anything else.

    Args:
      model: the content of a file.
      texts: the pieces.
    """
    # Concatenated messages append to a repeated field.
    kind = _encoded(_KIND << 3 | _VARINT) + _encoded(USER_DEFINED)
    score = _encoded(_SCORE << 3 | _FIXED32) + struct.pack("<f", 0.0)
    return model + b"".join(_entry(_PIECES, _entry(_TEXT, text.encode()) + score + kind) for text in texts)
