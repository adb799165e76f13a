"""Reads compiled XLA programs: what they copy, what they send between devices, and where.

XLA prints one instruction a line, `%name = TYPE opcode(operands), ..., metadata={op_name="..."}`. A type may end in its
memory space: `{...S(1)}` and higher are on-chip memories, none is the device's main memory.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
"""The operations that move data between devices."""

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (?P<type>.*?) (?P<opcode>[a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[(?P<shape>[0-9,]*)\](?P<layout>\{[^}]*\})?")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_SPACE = re.compile(r"S\((\d+)\)")


class Array(NamedTuple):
    """An array that an instruction makes.

    Attributes:
      dtype: as XLA writes it, such as "bf16".
      shape: on one device.
      space: the number of its memory space; 0 is the main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def size_in_bytes(self) -> int:
        """Without padding; elements smaller than a byte count as a byte."""
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        return math.prod(self.shape) * max(int(bits[1]) // 8, 1) if bits else math.prod(self.shape)


class Instruction(NamedTuple):
    """A line of a program.

    Attributes:
      opcode: such as "dot" or "all-reduce-start".
      arrays: what it makes; several where it makes a tuple.
      op_name: the path of the JAX operation that it stems from; empty where XLA names none.
      text: the line.
    """

    opcode: str
    arrays: tuple[Array, ...]
    op_name: str
    text: str


class Collective(NamedTuple):
    """A collective of a program, counted once, however often it runs.

    Attributes:
      kind: one of `COLLECTIVES`.
      size_in_bytes: the size of its result on one device.
      op_name: the path of the JAX operation that it stems from.
    """

    kind: str
    size_in_bytes: int
    op_name: str


def instructions(program: str) -> Iterator[Instruction]:
    """The instructions of a program, of all its computations, in order.

    Args:
      program: as `compiled.as_text()` gives it.
    """
    for line in program.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        arrays = tuple(
            Array(
                found["dtype"],
                tuple(int(n) for n in found["shape"].split(",") if n),
                int(space[1]) if (space := _SPACE.search(found["layout"] or "")) else 0,
            )
            for found in _ARRAY.finditer(match["type"])
        )
        name = _OP_NAME.search(line)
        yield Instruction(match["opcode"], arrays, name[1] if name else "", line.strip())


class Kernels(NamedTuple):
    """The kernels of a program, each once, however often it runs.

    Attributes:
      fusions: kernels that XLA writes.
      library_calls: custom calls, such as matrix products of a library.
      others: instructions that are neither, such as copies.
      host_predicates: loops and conditions for which the host reads a predicate from the device.
    """

    fusions: int
    library_calls: int
    others: int
    host_predicates: int


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_INSIDE = re.compile(r"\b(?:calls|to_apply)=%?([\w.-]+)")
# These are not kernels: they name, or wait for, what others make.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "call", "opt-barrier"}
_FREE |= {"partition-id", "replica-id"}


def kernels(program: str) -> Kernels:
    """The kernels of a GPU program, outside of the computations that fusions and reductions are made of.

    Args:
      program: as `compiled.as_text()` gives it.
    """
    inside = set()
    for instruction in instructions(program):
        if instruction.opcode != "call" and not instruction.opcode.startswith("async"):
            inside.update(_INSIDE.findall(instruction.text))
    counts = dict.fromkeys(Kernels._fields, 0)
    counted = False
    for line in program.splitlines():
        if begin := _COMPUTATION.match(line):
            counted = begin["name"] not in inside
        match = _INSTRUCTION.match(line)
        if match is None or not counted:
            continue
        opcode = match["opcode"]
        if opcode in _FREE or opcode.endswith("-done"):
            continue
        if opcode in ("while", "conditional"):
            # A loop whose number of rounds XLA knows needs no predicate.
            counts["host_predicates"] += "known_trip_count" not in line
        elif opcode == "fusion":
            counts["fusions"] += 1
        elif opcode == "custom-call":
            counts["library_calls"] += 1
        else:
            counts["others"] += 1
    return Kernels(**counts)


def collectives(program: str) -> list[Collective]:
    """What a program sends between devices.

    Args:
      program: as `compiled.as_text()` gives it.
    """
    found = []
    for instruction in instructions(program):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        sizes = [array.size_in_bytes for array in instruction.arrays]
        # What starts anything but an all-reduce makes a tuple of its operand, its result and bookkeeping.
        asynchronous = instruction.opcode != kind and kind != "all-reduce"
        found.append(Collective(kind, max(sizes) if asynchronous else sum(sizes), instruction.op_name))
    return found


def copies(program: str, shapes: Sequence[Sequence[int]]) -> list[str]:
    """The instructions that copy an array of one of these shapes within the main memory.

    A move into an on-chip memory, or back from it, does not count: the data is read and written there anyway.

    Args:
      program: as `compiled.as_text()` gives it.
      shapes: on one device.

    Raises:
      ValueError: where the program has no array of one of the shapes, so that no copy could be found.
    """
    wanted = {tuple(shape) for shape in shapes}
    seen: set[tuple[int, ...]] = set()
    found = []
    for instruction in instructions(program):
        here = [array for array in instruction.arrays if array.shape in wanted]
        seen.update(array.shape for array in here)
        if instruction.opcode in ("copy", "copy-start") and here and all(array.space == 0 for array in here):
            found.append(instruction.text)
    if missing := sorted(wanted - seen):
        raise ValueError(f"The program has no array of shape {missing[0]}: give the shapes of one device's part.")
    return found
