"""Tables of automata over tokens, built on the host.

Grammars and strings are automata over bytes; a token is the composition of the steps of its bytes, a function from
states to states, and tokens with equal functions share a class. So a table has a column for each class instead of each
token, and a table of states by tokens is never built: prefixes share compositions, and equal ones are kept once.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from specjax.types import Automaton

DEAD = -1
"""The state that a forbidden token leads to. It stays dead and allows every token, since nothing after it counts."""

MAX_ENTRIES = 2**28
"""The most states times classes of a table: 1 GiB of int32. A larger one is refused, even while it is being built."""


class _Columns:
    """The distinct columns of a table, numbered in order of appearance."""

    def __init__(self, num_states: int):
        self.num_states = num_states
        self.numbers: dict[bytes, int] = {}
        self.columns: list[np.ndarray] = []

    def number(self, column: Int[np.ndarray, " S"]) -> int:
        data = column.astype(np.int32, copy=False).tobytes()
        found = self.numbers.setdefault(data, len(self.columns))
        if found == len(self.columns):
            check_size(self.num_states, found + 1)
            self.columns.append(np.frombuffer(data, np.int32))
        return found

    def table(self, numbers: Int[np.ndarray, " C"]) -> Int[np.ndarray, "S C"]:
        return np.stack([self.columns[i] for i in numbers], axis=1)


def check_size(num_states: int, num_classes: int) -> None:
    """Refuses a table of more than `MAX_ENTRIES`."""
    if num_states * num_classes > MAX_ENTRIES:
        raise ValueError(
            f"The automaton has {num_states} states and {num_classes} or more classes of tokens; a table may have "
            f"{MAX_ENTRIES} entries. Lower the bounds of repetitions ({{m,n}}, maxLength, maxItems), or simplify it."
        )


def compress(next_state: Int[np.ndarray, "S C"], token_class: Int[np.ndarray, " V"]) -> Automaton:
    """Merges classes of equal columns and drops those without a token."""
    columns = _Columns(len(next_state))
    number = np.empty(next_state.shape[1], np.int32)
    for begin in range(0, len(number), 4096):
        block = np.ascontiguousarray(next_state[:, begin : begin + 4096].T)
        number[begin : begin + len(block)] = [columns.number(column) for column in block]
    used, classes = np.unique(number[token_class], return_inverse=True)
    return Automaton(jnp.asarray(classes, jnp.int32), jnp.asarray(columns.table(used)))


def over_tokens(
    by_byte: Int[np.ndarray, "S 256"],
    tokens: Mapping[int, bytes],
    vocab_size: int,
    otherwise: Int[np.ndarray, " S"],
) -> tuple[Int[np.ndarray, " V"], Int[np.ndarray, "S C"]]:
    """An automaton over bytes as one over tokens.

    Args:
      by_byte: `[S, 256]` the successors, -1: none.
      tokens: the bytes of tokens by id; ids from `vocab_size` on are left out.
      vocab_size: V.
      otherwise: `[S]` the successors under all other ids.

    Returns:
      `[V]` the class of each token, `[S, C]` the successors under each class.
    """
    # One more state, which leads only to itself, stands for the missing successors.
    num_states = len(by_byte)
    steps = np.full((num_states + 1, 256), num_states, np.int32)
    steps[:-1] = np.where(by_byte < 0, num_states, by_byte)
    steps, byte_class = np.unique(steps.T, axis=0, return_inverse=True)
    byte_class = byte_class.reshape(-1).tolist()

    columns = _Columns(num_states)
    token_class = np.full(vocab_size, columns.number(np.where(otherwise < 0, num_states, otherwise)))
    composed: dict[tuple[int, int], int] = {}
    # The classes of the prefixes of the previous token, the empty one first: in sorted order they are shared most.
    path, before = [columns.number(np.arange(num_states))], b""
    for text, token in sorted((text, token) for token, text in tokens.items() if token < vocab_size):
        shared = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(before))
        del path[shared + 1 :]
        for byte in text[shared:]:
            key = path[-1], byte_class[byte]
            if key not in composed:
                composed[key] = columns.number(steps[key[1]][columns.columns[key[0]]])
            path.append(composed[key])
        token_class[token] = path[-1]
        before = text
    used, token_class = np.unique(token_class, return_inverse=True)
    table = columns.table(used)
    return token_class, np.where(table == num_states, DEAD, table)


def _reached(source: Int[np.ndarray, " E"], target: Int[np.ndarray, " E"], start: int, size: int) -> np.ndarray:
    """`[size]`: whether each node can be reached from the start."""
    found = np.arange(size) == start
    while True:
        further = target[found[source]]
        if found[further].all():
            return found
        found[further] = True


def only_useful(table: Int[np.ndarray, "S C"]) -> Int[np.ndarray, "R C"] | None:
    """The table of the states that can be reached from the first state and from which the last can be reached.

    Their order is kept. None: the last state cannot be reached from the first.
    """
    size = len(table)
    successors = [np.unique(row[row >= 0]) for row in table]
    source = np.repeat(np.arange(size), [len(targets) for targets in successors])
    target = np.concatenate(successors)
    alive = _reached(target, source, size - 1, size)
    inner = alive[source] & alive[target]
    useful = alive & _reached(source[inner], target[inner], 0, size)
    if not useful[0]:
        return None
    # The last entry is the one at index -1.
    number = np.full(size + 1, DEAD, np.int32)
    number[np.flatnonzero(useful)] = np.arange(useful.sum())
    return number[table[useful]]
