"""Values between a test and the program that it tests, which is not trusted: frames of JSON, each value with its type.

A frame is its length in four bytes and JSON. None, bool and str stand for themselves, everything else is a pair of a
tag and what it holds. Nothing that arrives is executed, and objects of the other side arrive as `Foreign`.
"""

import collections
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, KeysView
from typing import Any

MAX_FRAME = 4 << 20
"""The longest frame that is read, in bytes."""

MAX_ITEMS = 1 << 17
"""The most items that are taken from an iterator."""

_LISTED: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_WRITTEN = {"decimal": "Decimal", "fractions": "Fraction"}
"""By module, the types of numbers that are sent as strings."""


class Refused(Exception):
    """A frame that is too long, or holds what no frame may hold."""


class Foreign:
    """An object of the other side that is not a plain value: it equals nothing but itself.

    Attributes:
      name: the name of its type.
      truth: its truth value.
      items: what it yields, None where it is not iterable.
    """

    def __init__(self, name: str, truth: bool, items: list[Any] | None):
        self.name, self.truth, self.items = name, truth, items

    def __bool__(self) -> bool:
        return self.truth

    def __iter__(self) -> Iterator[Any]:
        if self.items is None:
            raise TypeError(f"{self.name!r} object is not iterable")
        return iter(self.items)


def _encode_object(value: Any) -> Any:
    """A value that is not plain."""
    kind = type(value)
    if _WRITTEN.get(kind.__module__) == kind.__name__:
        return [kind.__module__, str(value)]
    if kind.__module__ == "numpy" and hasattr(value, "dtype") and not getattr(value, "shape", None):
        item = value.item()
        # `numpy.True_` equals True, but is not True; 1 has both properties too.
        return encode(int(item) if isinstance(item, bool) else item)
    if isinstance(value, KeysView):
        return ["keys", _encode_items(value)]
    try:
        truth = bool(value)
    except Exception:
        truth = True
    yields = isinstance(value, (Iterator, collections.deque, type({}.values()), type({}.items())))
    return ["object", [kind.__name__, truth, _encode_items(value) if yields else None]]


def _encode_items(values: Iterable[Any]) -> list[Any]:
    items = [encode(item) for item in itertools.islice(values, MAX_ITEMS + 1)]
    if len(items) > MAX_ITEMS:
        raise ValueError(f"more than {MAX_ITEMS} items")
    return items


def encode(value: Any) -> Any:
    """A value as JSON; instances of subclasses of a plain type are sent as that type, which they equal."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return ["int", hex(value)]
    if isinstance(value, float):
        return ["float", float(value).hex()]
    if isinstance(value, complex):
        return ["complex", [value.real.hex(), value.imag.hex()]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    for tag, kind in _LISTED.items():
        if isinstance(value, kind):
            return [tag, [encode(item) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in dict.items(value)]]
    if isinstance(value, range):
        return ["range", [hex(x) for x in (value.start, value.stop, value.step)]]
    return _encode_object(value)


def _written(tag: str, text: str) -> Any:
    import decimal
    import fractions

    return decimal.Decimal(text) if tag == "decimal" else fractions.Fraction(text)


_DECODE: dict[str, Callable[[Any], Any]] = {
    "int": lambda held: int(held, 16),
    "float": float.fromhex,
    "complex": lambda held: complex(*map(float.fromhex, held)),
    "bytes": bytes.fromhex,
    "dict": lambda held: {decode(key): decode(item) for key, item in held},
    "range": lambda held: range(*(int(x, 16) for x in held)),
    "keys": lambda held: dict.fromkeys(map(decode, held)).keys(),
    "object": lambda held: Foreign(
        str(held[0]), bool(held[1]), None if held[2] is None else [decode(item) for item in held[2]]
    ),
    "decimal": lambda held: _written("decimal", held),
    "fractions": lambda held: _written("fractions", held),
} | {tag: (lambda held, kind=kind: kind([decode(item) for item in held])) for tag, kind in _LISTED.items()}


def decode(tree: Any) -> Any:
    """The value of a parsed frame.

    Raises:
      Exception: of any kind, for what `encode` never makes.
    """
    if tree is None or isinstance(tree, (bool, str)):
        return tree
    tag, held = tree
    return _DECODE[tag](held)


def send(fd: int, value: Any) -> None:
    """Writes a frame.

    Raises:
      Refused: for a value that is too long to be read.
      OSError: where the other side does not read.
    """
    content = json.dumps(encode(value)).encode("ascii")
    if len(content) > MAX_FRAME:
        raise Refused(f"a value of {len(content)} bytes, of which at most {MAX_FRAME} are read")
    content = len(content).to_bytes(4, "big") + content
    while content:
        content = content[os.write(fd, content) :]


def receive(fd: int, wait: Callable[[int], Any] | None = None) -> Any:
    """Reads a frame, and never more than its longest length.

    Args:
      fd: the file descriptor.
      wait: called before each read; it may raise.

    Raises:
      Refused: for what is not a frame.
      EOFError: where the other side has ended.
    """
    length = int.from_bytes(_exactly(fd, 4, wait), "big")
    if length > MAX_FRAME:
        raise Refused(f"a frame of {length} bytes, of which at most {MAX_FRAME} are read")
    content = _exactly(fd, length, wait)
    try:
        return decode(json.loads(content))
    except Exception as error:
        raise Refused(f"a frame that holds no value ({type(error).__name__})") from None


def _exactly(fd: int, number: int, wait: Callable[[int], Any] | None) -> bytes:
    parts, missing = [], number
    while missing:
        if wait is not None:
            wait(fd)
        part = os.read(fd, min(missing, 1 << 16))
        if not part:
            raise EOFError
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
