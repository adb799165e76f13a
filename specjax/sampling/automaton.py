"""Finite automata over tokens, as tables that a jitted loop advances on the device.

They constrain a text to a grammar (a regular expression, a JSON schema: which tokens are allowed next) and find stop
strings that straddle tokens. `grammars` makes them from text, `tables` says how they are stored; all that a user needs
is exported here.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from specjax.sampling.grammars import json_schema, regex, stop_strings
from specjax.sampling.tables import DEAD, MAX_ENTRIES, check_size, compress
from specjax.types import Automaton

__all__ = [
    "DEAD",
    "MAX_ENTRIES",
    "advance",
    "allowed",
    "combine",
    "from_table",
    "json_schema",
    "regex",
    "stop_strings",
    "trace",
]


def advance(automaton: Automaton, state: Int[Array, "*B"], token: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """The states after one more token each.

    Args:
      automaton: the automaton.
      state: `[*B]` int32.
      token: `[*B]` token ids in [0, V).
    """
    successor = automaton.next_state[jnp.maximum(state, 0), automaton.token_class[token]]
    return jnp.where(state < 0, DEAD, successor)


def trace(automaton: Automaton, state: Int[Array, " B"], tokens: Int[Array, "B T"]) -> Int[Array, "B T+1"]:
    """The states before each token and after the last.

    Args:
      automaton: the automaton.
      state: `[B]` int32, the states before the first token.
      tokens: `[B, T]` token ids in [0, V).
    """

    def step(state: Array, token: Array) -> tuple[Array, Array]:
        state = advance(automaton, state, token)
        return state, state

    _, states = jax.lax.scan(step, state, tokens.T)
    return jnp.concatenate([state[None], states]).T


def allowed(automaton: Automaton, state: Int[Array, "*B"]) -> Bool[Array, "*B V"]:
    """Whether each token may come next; in a dead state all may.

    Args:
      automaton: the automaton.
      state: `[*B]` int32.
    """
    classes = automaton.next_state[jnp.maximum(state, 0)] >= 0
    return (state < 0)[..., None] | jnp.take(classes, automaton.token_class, axis=-1)


def from_table(next_state: Int[np.ndarray, "S V"]) -> Automaton:
    """An automaton from its whole table, such as one from another grammar library.

    Args:
      next_state: `[S, V]`, the state after each token in each state, -1 where the token is forbidden. State 0 is the
        start. Every state allows at least one token: the state after a stop token, for example, the stop tokens again.

    Raises:
      ValueError: for a table that does not have this form, or is too large (`MAX_ENTRIES`) with equal columns merged.
    """
    if next_state.ndim != 2 or not next_state.size:
        raise ValueError(f"A table of shape {next_state.shape} is not states by tokens, [S, V].")
    low, high = int(next_state.min()), int(next_state.max())
    if low < DEAD or high >= len(next_state):
        wrong = low if low < DEAD else high
        raise ValueError(f"The table leads to {wrong}: its states are 0 to {len(next_state) - 1}, and -1 for none.")
    stuck = np.flatnonzero((next_state < 0).all(axis=1))
    if len(stuck):
        raise ValueError(f"State {stuck[0]} allows no token: let a text stop there, with stop tokens that lead to it.")
    return compress(next_state, np.arange(next_state.shape[1]))


def combine(
    automata: Sequence[Automaton | None], *, vocab_size: int | None = None
) -> tuple[Automaton, Int[np.ndarray, " N"]]:
    """One table that holds several automata, so that the rows of a batch may follow different ones.

    An automaton that occurs several times (the same object) is held once.

    Args:
      automata: N automata over the same vocabulary; None allows everything, in a single state.
      vocab_size: V, needed only where all are None.

    Returns:
      the table, and `[N]` int32: where the states of each automaton begin in it. State s of the i-th is `start[i] + s`,
      so that its start is `start[i]`.

    Raises:
      ValueError: for no automata, different vocabularies, or a table that is too large (`MAX_ENTRIES`).
    """
    parts = {id(automaton): automaton for automaton in automata}
    sizes = {len(part.token_class) for part in parts.values() if part is not None}
    if vocab_size is not None:
        sizes.add(vocab_size)
    if not parts or len(sizes) != 1:
        what = f"vocabularies of {sorted(sizes)} tokens" if sizes else "none: pass an automaton, or vocab_size"
        raise ValueError(f"{len(automata)} automata are combined over one vocabulary; here are {what}.")
    (size,) = sizes
    tables, classes, joint = [], [], np.zeros(size, np.int64)
    for part in parts.values():
        anything = np.zeros(size, np.int32), np.zeros((1, 1), np.int32)
        token_class, table = anything if part is None else map(np.asarray, part)
        tables.append(table)
        classes.append(token_class)
        # Renumbered each time, so that the product of the class counts does not overflow.
        joint = np.unique(joint * table.shape[1] + token_class, return_inverse=True)[1]
    _, example = np.unique(joint, return_index=True)
    offsets = np.cumsum([0, *(len(table) for table in tables)])
    check_size(int(offsets[-1]), len(example))
    rows = [
        np.where(table < 0, DEAD, table + offset)[:, token_class[example]]
        for table, token_class, offset in zip(tables, classes, offsets, strict=False)
    ]
    start = dict(zip(parts, offsets, strict=False))
    combined = Automaton(jnp.asarray(joint, jnp.int32), jnp.asarray(np.concatenate(rows), jnp.int32))
    return combined, np.array([start[id(automaton)] for automaton in automata], np.int32)
