"""Finite automata over tokens, as tables that a jitted loop advances on the device.

They constrain a text to a grammar (a regular expression, a JSON schema: which tokens are allowed next) and find stop
strings that straddle tokens. Grammars and strings are automata over bytes; a token is the composition of the steps of
its bytes, a function from states to states, and tokens with equal functions share a class. So a table has a column for
each class instead of each token, and states times tokens is never held: prefixes share their compositions, and equal
compositions are kept once.
"""

import importlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from specjax.text.tokenizer import Tokenizer
from specjax.types import Automaton

DEAD = -1
"""The state that a forbidden token leads to. It stays dead and allows every token, since nothing after it counts."""

MAX_ENTRIES = 2**28
"""The most states times classes of a table: 1 GiB of int32. What is larger is refused, also while it is built."""

# Keywords of JSON Schema that outlines-core reads over.
_UNHEEDED = {
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems"),
    *("minProperties", "maxProperties", "patternProperties", "propertyNames", "unevaluatedProperties"),
    *("dependentRequired", "dependentSchemas", "dependencies", "if", "then", "else", "not"),
}

_JSON_STRING = r'"([^"\\\x00-\x1F]|\\["\\/bfnrt]|\\u[0-9A-Fa-f]{4})*"'


# ---- on the device


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


# ---- tables


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
            _check_size(self.num_states, found + 1)
            self.columns.append(np.frombuffer(data, np.int32))
        return found

    def table(self, numbers: Int[np.ndarray, " C"]) -> Int[np.ndarray, "S C"]:
        return np.stack([self.columns[i] for i in numbers], axis=1)


def _check_size(num_states: int, num_classes: int) -> None:
    if num_states * num_classes > MAX_ENTRIES:
        raise ValueError(
            f"The automaton has {num_states} states and {num_classes} or more classes of tokens; a table may have "
            f"{MAX_ENTRIES} entries. Lower the bounds of repetitions ({{m,n}}, maxLength, maxItems), or ask for less."
        )


def _compress(next_state: Int[np.ndarray, "S C"], token_class: Int[np.ndarray, " V"]) -> Automaton:
    """Merges classes of equal columns and drops those without a token."""
    columns = _Columns(len(next_state))
    number = np.empty(next_state.shape[1], np.int32)
    for begin in range(0, len(number), 4096):
        block = np.ascontiguousarray(next_state[:, begin : begin + 4096].T)
        number[begin : begin + len(block)] = [columns.number(column) for column in block]
    used, classes = np.unique(number[token_class], return_inverse=True)
    return Automaton(jnp.asarray(classes, jnp.int32), jnp.asarray(columns.table(used)))


def from_table(next_state: Int[np.ndarray, "S V"]) -> Automaton:
    """An automaton from its whole table, such as another grammar library gives.

    Args:
      next_state: `[S, V]`, the state after each token in each state, -1 where the token is forbidden. State 0 is the
        start. Every state allows a token: the one after a stop token, say, again the stop tokens.

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
    return _compress(next_state, np.arange(next_state.shape[1]))


def combine(
    automata: Sequence[Automaton | None], *, vocab_size: int | None = None
) -> tuple[Automaton, Int[np.ndarray, " N"]]:
    """One table that holds several automata, so that the rows of a batch may follow different ones.

    An automaton that occurs several times (the same object) is held once.

    Args:
      automata: N automata over the same vocabulary; None allows everything, in a single state.
      vocab_size: V, needed only where all are None.

    Returns:
      the table, and `[N]` int32: where each one's states begin in it. State s of the i-th is `start[i] + s`, so that
      its start is `start[i]`.

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
        # Numbered anew each time, the product of the class counts does not overflow.
        joint = np.unique(joint * table.shape[1] + token_class, return_inverse=True)[1]
    _, example = np.unique(joint, return_index=True)
    offsets = np.cumsum([0, *(len(table) for table in tables)])
    _check_size(int(offsets[-1]), len(example))
    rows = [
        np.where(table < 0, DEAD, table + offset)[:, token_class[example]]
        for table, token_class, offset in zip(tables, classes, offsets, strict=False)
    ]
    start = dict(zip(parts, offsets, strict=False))
    combined = Automaton(jnp.asarray(joint, jnp.int32), jnp.asarray(np.concatenate(rows), jnp.int32))
    return combined, np.array([start[id(automaton)] for automaton in automata], np.int32)


# ---- from bytes to tokens


def _vocab_size(tokenizer: Tokenizer, vocab_size: int | None) -> int:
    """The width of the model's logits where it is given, else what the tokenizer's ids need."""
    return max(tokenizer.vocab().values()) + 1 if vocab_size is None else vocab_size


def _over_tokens(
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
    # One more state, which leads to itself alone, stands for the successors that are missing.
    num_states = len(by_byte)
    steps = np.full((num_states + 1, 256), num_states, np.int32)
    steps[:-1] = np.where(by_byte < 0, num_states, by_byte)
    steps, byte_class = np.unique(steps.T, axis=0, return_inverse=True)
    byte_class = byte_class.reshape(-1).tolist()

    columns = _Columns(num_states)
    token_class = np.full(vocab_size, columns.number(np.where(otherwise < 0, num_states, otherwise)))
    composed: dict[tuple[int, int], int] = {}
    # The classes of the prefixes of the token before, the empty one first: in sorted order they are shared most.
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


# ---- grammars


def _outlines_core(module: str = "outlines_core") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError("Grammars are compiled with outlines-core: pip install outlines-core.") from error


def _index(pattern: str, before: str = "", after: str = "") -> Any:
    """What outlines-core makes of a pattern and a vocabulary of single bytes: its automaton over bytes."""
    core = _outlines_core()
    vocabulary = core.Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
    try:
        return core.Index(before + pattern + after, vocabulary)
    except ValueError as error:
        raise ValueError(
            f"The pattern {pattern!r} cannot be compiled, or matches nothing ({error}). It is read as by Rust's regex "
            "crate, without \\b: change what that does not know, such as look-around and back references."
        ) from error


def _byte_automaton(pattern: str) -> tuple[Int[np.ndarray, "S 256"], Bool[np.ndarray, " S"]]:
    """The automaton over bytes of a regular expression: `[S, 256]` successors, `[S]` whether a text may end there."""
    # The package prefers earlier alternatives to longer ones: of "a|ab" it allows only "a". An end that has to be
    # reached makes it keep all. It also refuses what looks around at its beginning (^, or an end that comes at once);
    # so the beginning is a line break, which the text does not have.
    index = _index(pattern, "\n(?m:", r")\z")
    transitions = index.get_transitions()
    start = transitions[index.get_initial_state()][ord("\n")]
    number = {state: i for i, state in enumerate(dict.fromkeys([start, *transitions]))}
    by_byte = np.full((len(number), 256), DEAD, np.int32)
    for state, successors in transitions.items():
        seen = [byte for byte in successors if byte < 256]
        by_byte[number[state], seen] = [number.get(successors[byte], DEAD) for byte in seen]
    return by_byte, np.array([index.is_final_state(state) for state in number])


def _reached(source: Int[np.ndarray, " E"], target: Int[np.ndarray, " E"], start: int, size: int) -> np.ndarray:
    """`[size]`: whether edges lead from the start to a node."""
    found = np.arange(size) == start
    while True:
        further = target[found[source]]
        if found[further].all():
            return found
        found[further] = True


def _only_useful(table: Int[np.ndarray, "S C"]) -> Int[np.ndarray, "R C"] | None:
    """The table of the states that tokens lead to from the first and from which they lead to the last.

    Their order stays. None: no tokens lead from the first to the last.
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
    # The last entry is what -1 finds.
    number = np.full(size + 1, DEAD, np.int32)
    number[np.flatnonzero(useful)] = np.arange(useful.sum())
    return number[table[useful]]


def _grammar(
    pattern: str, tokenizer: Tokenizer, vocab_size: int | None, stop_tokens: Sequence[int] | None
) -> Automaton:
    vocab_size = _vocab_size(tokenizer, vocab_size)
    stops = list(tokenizer.eos_token_ids if stop_tokens is None else stop_tokens)
    if not stops or not all(0 <= token < vocab_size for token in stops):
        raise ValueError(f"stop_tokens={stops}: a text needs at least one to end, of the ids 0 to {vocab_size - 1}.")
    by_byte, final = _byte_automaton(pattern)
    tokens = {i: text for i, text in tokenizer.token_bytes().items() if text}
    token_class, table = _over_tokens(by_byte, tokens, vocab_size, np.full(len(by_byte), DEAD))
    ended, stop = table.shape
    token_class[stops] = stop
    table = np.pad(table, (0, 1), constant_values=DEAD)
    table[np.append(final, True), stop] = ended
    table = _only_useful(table)
    if table is None:
        raise ValueError(f"No tokens of this tokenizer write a text that matches {pattern!r}: allow other characters.")
    return _compress(table, token_class)


def regex(
    pattern: str, tokenizer: Tokenizer, *, vocab_size: int | None = None, stop_tokens: Sequence[int] | None = None
) -> Automaton:
    """The texts that match a regular expression as a whole.

    Where a match is complete, the stop tokens are allowed; they lead to the last state (S - 1), which allows nothing
    but them. Other special tokens, tokens that add nothing and ids that the tokenizer lacks are never allowed, nor is
    a token after which the vocabulary could not complete a match.

    Args:
      pattern: a regular expression in the syntax of Rust's regex crate, without `\\b`; `^` and `$` match at the ends of
        lines, and are not needed around it.
      tokenizer: tells the bytes of each token.
      vocab_size: V, the width of the model's logits, where it is not the tokenizer's.
      stop_tokens: the ids that end a text; the tokenizer's `eos_token_ids` where it is None.

    Raises:
      ImportError: without outlines-core.
      ValueError: for a pattern that cannot be compiled or that no tokens can write, for no stop tokens or such beyond
        the vocabulary, and for a table that is too large (`MAX_ENTRIES`).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        # Unknown to Python, or wrong everywhere: "a)(b" would be right within the parentheses that it gets.
        _index(pattern, "\n")
    return _grammar(pattern, tokenizer, vocab_size, stop_tokens)


def _subschemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all that it is made of."""
    if not isinstance(schema, Mapping):
        return
    yield schema
    for key, value in schema.items():
        if key in ("items", "additionalProperties"):
            yield from _subschemas(value)
        elif key in ("properties", "$defs", "definitions"):
            for part in value.values():
                yield from _subschemas(part)
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            for part in value:
                yield from _subschemas(part)


def _writes_strings(pattern: str) -> bool:
    """Whether every text that matches is a string of JSON: a walk through both automata at once."""
    table, final = _byte_automaton(pattern)
    json_table, json_final = _byte_automaton(_JSON_STRING)
    pending, seen = [(0, 0)], {(0, 0)}
    while pending:
        state, json_state = pending.pop()
        if final[state] and not json_final[json_state]:
            return False
        possible = table[state] >= 0
        pairs = set(zip(table[state][possible].tolist(), json_table[json_state][possible].tolist(), strict=True))
        if any(json_state < 0 for _, json_state in pairs):
            return False
        pending += pairs - seen
        seen |= pairs
    return True


def _check_schema(schema: Any, build: Callable[[str], str]) -> None:
    """Refuses what would give other texts than the schema asks for, and warns of what it cannot ask for."""
    parts = list(_subschemas(schema))
    for part in parts:
        if len(part.get("allOf", ())) > 1:
            raise ValueError(f"The parts of allOf in {json.dumps(part)} cannot be joined: merge them into one schema.")
        form = {key: part[key] for key in ("pattern", "format") if key in part}
        if not form or "string" not in part.get("type", ()):
            continue
        if "minLength" in part or "maxLength" in part:
            raise ValueError(f"Lengths beside {form} would replace it: write them into a pattern, as {{m,n}}.")
        if not _writes_strings(build(json.dumps({"type": "string"} | form))):
            raise ValueError(
                f"Some texts of {form} are no JSON strings, for a quotation mark, backslash or control character may "
                r'stand bare in them: give a pattern that leaves those out, with [^"\\\x00-\x1F] for any character '
                "and parentheses around alternatives."
            )
    if unheeded := sorted(_UNHEEDED.intersection(key for part in parts for key in part)):
        warnings.warn(f"The grammar does not hold texts to {', '.join(unheeded)}: check afterwards.", stacklevel=3)


def json_schema(
    schema: str | Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None = None,
    stop_tokens: Sequence[int] | None = None,
    whitespace: str | None = None,
) -> Automaton:
    """The JSON texts that a schema describes: `regex` of the expression that outlines-core makes of it.

    That is a subset of JSON Schema: properties in the order of the schema and none beside them, references up to three
    levels deep, no bounds on numbers (such keywords warn).

    Args:
      schema: the schema, as text or parsed.
      tokenizer: tells the bytes of each token.
      vocab_size: V, the width of the model's logits, where it is not the tokenizer's.
      stop_tokens: the ids that end a text; the tokenizer's `eos_token_ids` where it is None.
      whitespace: the pattern of what may stand between the parts; at most one space where it is None.

    Raises:
      ImportError: without outlines-core.
      ValueError: for a schema that cannot be made an expression, or whose strings need not be JSON; and as `regex`.
    """
    build = _outlines_core("outlines_core.json_schema").build_regex_from_schema
    text = schema if isinstance(schema, str) else json.dumps(schema)
    try:
        pattern = build(text, whitespace)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The schema {text} cannot be made a grammar ({error}).") from error
    _check_schema(json.loads(text), build)
    return _grammar(pattern, tokenizer, vocab_size, stop_tokens)


# ---- stop strings


def stop_strings(strings: Sequence[str], tokenizer: Tokenizer, *, vocab_size: int | None = None) -> Automaton:
    """Finds the first of some strings in a text, wherever tokens cut it (Aho and Corasick, 1975).

    No token is forbidden. The last state (S - 1) means that one of the strings has occurred, and is never left. Special
    tokens and ids that the tokenizer lacks add no text, and change nothing.

    Args:
      strings: at least one, none of them empty.
      tokenizer: tells the bytes of each token.
      vocab_size: V, the width of the model's logits, where it is not the tokenizer's.

    Raises:
      ValueError: for no strings or an empty one, and for a table that is too large (`MAX_ENTRIES`).
    """
    if isinstance(strings, str) or not strings or not all(strings):
        raise ValueError(f"strings={strings!r}: give a list of at least one string, none of them empty.")
    children: list[dict[int, int]] = [{}]
    found = [False]
    for string in strings:
        node = 0
        for byte in string.encode():
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
                found.append(False)
            node = children[node][byte]
        found[node] = True

    # A node has the successors of its fallback, the longest other node that it ends with, where it has no child.
    by_byte = np.zeros((len(children), 256), np.int32)
    fallback, queue = [0] * len(children), [0]
    for node in queue:
        by_byte[node] = by_byte[fallback[node]]
        found[node] |= found[fallback[node]]
        for byte, child in children[node].items():
            fallback[child] = int(by_byte[node, byte]) if node else 0
            by_byte[node, byte] = child
            queue.append(child)

    # The nodes at which a string has been found become one, the last.
    open_nodes = np.flatnonzero(~np.array(found))
    number = np.full(len(children), len(open_nodes), np.int32)
    number[open_nodes] = np.arange(len(open_nodes))
    states = np.full((len(open_nodes) + 1, 256), len(open_nodes), np.int32)
    states[:-1] = number[by_byte[open_nodes]]
    vocab_size = _vocab_size(tokenizer, vocab_size)
    token_class, table = _over_tokens(states, tokenizer.token_bytes(), vocab_size, np.arange(len(states)))
    return _compress(table, token_class)
