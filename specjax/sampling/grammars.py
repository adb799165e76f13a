"""Automata for the texts that a regular expression or a JSON schema describes, and for finding stop strings."""

import importlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from specjax.sampling.tables import DEAD, compress, only_useful, over_tokens
from specjax.text.tokenizer import Tokenizer
from specjax.types import Automaton

# Keywords of JSON Schema that outlines-core ignores.
_UNHEEDED = {
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems"),
    *("minProperties", "maxProperties", "patternProperties", "propertyNames", "unevaluatedProperties"),
    *("dependentRequired", "dependentSchemas", "dependencies", "if", "then", "else", "not"),
}

_JSON_STRING = r'"([^"\\\x00-\x1F]|\\["\\/bfnrt]|\\u[0-9A-Fa-f]{4})*"'


def _vocab_size(tokenizer: Tokenizer, vocab_size: int | None) -> int:
    """The width of the model's logits where it is given, else one more than the tokenizer's largest id."""
    return max(tokenizer.vocab().values()) + 1 if vocab_size is None else vocab_size


def _outlines_core(module: str = "outlines_core") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError("Grammars are compiled with outlines-core: pip install outlines-core.") from error


def _index(pattern: str, before: str = "", after: str = "") -> Any:
    """The automaton over bytes that outlines-core makes from a pattern and a vocabulary of single bytes."""
    core = _outlines_core()
    vocabulary = core.Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
    try:
        return core.Index(before + pattern + after, vocabulary)
    except ValueError as error:
        raise ValueError(
            f"The pattern {pattern!r} cannot be compiled, or matches nothing ({error}). It has the syntax of Rust's "
            "regex crate, without \\b: change what that does not support, such as look-around and back references."
        ) from error


def _byte_automaton(pattern: str) -> tuple[Int[np.ndarray, "S 256"], Bool[np.ndarray, " S"]]:
    """The automaton over bytes of a regular expression: `[S, 256]` successors, `[S]` whether a text may end there."""
    # The package prefers earlier alternatives to longer ones: for "a|ab" it allows only "a". An end that has to be
    # reached makes it keep all. It also refuses patterns that look around at their beginning (^, or an immediate end);
    # so the pattern begins with a line break, which the text does not have.
    index = _index(pattern, "\n(?m:", r")\z")
    transitions = index.get_transitions()
    start = transitions[index.get_initial_state()][ord("\n")]
    number = {state: i for i, state in enumerate(dict.fromkeys([start, *transitions]))}
    by_byte = np.full((len(number), 256), DEAD, np.int32)
    for state, successors in transitions.items():
        seen = [byte for byte in successors if byte < 256]
        by_byte[number[state], seen] = [number.get(successors[byte], DEAD) for byte in seen]
    return by_byte, np.array([index.is_final_state(state) for state in number])


def _grammar(
    pattern: str, tokenizer: Tokenizer, vocab_size: int | None, stop_tokens: Sequence[int] | None
) -> Automaton:
    vocab_size = _vocab_size(tokenizer, vocab_size)
    stops = list(tokenizer.eos_token_ids if stop_tokens is None else stop_tokens)
    if not stops or not all(0 <= token < vocab_size for token in stops):
        raise ValueError(f"stop_tokens={stops}: a text needs at least one to end, of the ids 0 to {vocab_size - 1}.")
    by_byte, final = _byte_automaton(pattern)
    tokens = {i: text for i, text in tokenizer.token_bytes().items() if text}
    token_class, table = over_tokens(by_byte, tokens, vocab_size, np.full(len(by_byte), DEAD))
    ended, stop = table.shape
    token_class[stops] = stop
    table = np.pad(table, (0, 1), constant_values=DEAD)
    table[np.append(final, True), stop] = ended
    table = only_useful(table)
    if table is None:
        raise ValueError(f"No tokens of this tokenizer write a text that matches {pattern!r}: allow other characters.")
    return compress(table, token_class)


def regex(
    pattern: str, tokenizer: Tokenizer, *, vocab_size: int | None = None, stop_tokens: Sequence[int] | None = None
) -> Automaton:
    """The texts that match a regular expression as a whole.

    Where a match is complete, the stop tokens are allowed; they lead to the last state (S - 1), which allows nothing
    else. Other special tokens, tokens without text and ids that the tokenizer lacks are never allowed, nor is a token
    after which the vocabulary could not complete a match.

    Args:
      pattern: a regular expression in the syntax of Rust's regex crate, without `\\b`; `^` and `$` match at the ends of
        lines, and are not needed around it.
      tokenizer: gives the bytes of each token.
      vocab_size: V, the width of the model's logits, where it is not the tokenizer's.
      stop_tokens: the ids that end a text; the tokenizer's `eos_token_ids` where it is None.

    Raises:
      ImportError: without outlines-core.
      ValueError: for a pattern that cannot be compiled or that no tokens can write, for stop tokens that are missing or
        beyond the vocabulary, and for a table that is too large (`MAX_ENTRIES`).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        # Unknown to Python, or wrong everywhere: "a)(b" would be valid within the parentheses that are added to it.
        _index(pattern, "\n")
    return _grammar(pattern, tokenizer, vocab_size, stop_tokens)


def _subschemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all of its subschemas."""
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
    """Whether every text that matches is a JSON string, by a walk through both automata at once."""
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
    """Refuses schemas that would give texts other than they describe, and warns of keywords that are ignored."""
    parts = list(_subschemas(schema))
    for part in parts:
        if len(part.get("allOf", ())) > 1:
            raise ValueError(f"The parts of allOf in {json.dumps(part)} cannot be joined: merge them into one schema.")
        form = {key: part[key] for key in ("pattern", "format") if key in part}
        if not form or "string" not in part.get("type", ()):
            continue
        if "minLength" in part or "maxLength" in part:
            raise ValueError(f"Lengths in addition to {form} would replace it: put them into a pattern, as {{m,n}}.")
        if not _writes_strings(build(json.dumps({"type": "string"} | form))):
            raise ValueError(
                f"Some texts of {form} are no JSON strings, since they may have unescaped quotation marks, backslashes "
                r'or control characters: give a pattern that leaves those out, with [^"\\\x00-\x1F] for any character '
                "and parentheses around alternatives."
            )
    if unheeded := sorted(_UNHEEDED.intersection(key for part in parts for key in part)):
        warnings.warn(f"The grammar does not enforce {', '.join(unheeded)}: check the text afterwards.", stacklevel=3)


def json_schema(
    schema: str | Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None = None,
    stop_tokens: Sequence[int] | None = None,
    whitespace: str | None = None,
) -> Automaton:
    """The JSON texts that a schema describes: `regex` of the expression that outlines-core makes from it.

    A subset of JSON Schema is supported: properties in the order of the schema and no others, references up to three
    levels deep, no bounds on numbers (such keywords warn).

    Args:
      schema: the schema, as text or parsed.
      tokenizer: gives the bytes of each token.
      vocab_size: V, the width of the model's logits, where it is not the tokenizer's.
      stop_tokens: the ids that end a text; the tokenizer's `eos_token_ids` where it is None.
      whitespace: the pattern of the text allowed between the parts; at most one space where it is None.

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


def _matcher(strings: Sequence[str]) -> tuple[Int[np.ndarray, "N 256"], Bool[np.ndarray, " N"]]:
    """The automaton of Aho and Corasick (1975): the successors of its nodes, and at which of them a string ends."""
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
    return by_byte, np.array(found)


def stop_strings(strings: Sequence[str], tokenizer: Tokenizer, *, vocab_size: int | None = None) -> Automaton:
    """Finds the first of some strings in a text, wherever it falls among the tokens (Aho and Corasick, 1975).

    No token is forbidden. The last state (S - 1) means that one of the strings has occurred, and is never left. Special
    tokens and ids that the tokenizer lacks add no text, and do not change the state.

    Args:
      strings: at least one, none of them empty.
      tokenizer: gives the bytes of each token.
      vocab_size: V, the width of the model's logits, where it is not the tokenizer's.

    Raises:
      ValueError: for no strings or an empty one, and for a table that is too large (`MAX_ENTRIES`).
    """
    if isinstance(strings, str) or not strings or not all(strings):
        raise ValueError(f"strings={strings!r}: give a list of at least one string, none of them empty.")
    by_byte, found = _matcher(strings)
    # The nodes at which a string has been found become one, the last.
    open_nodes = np.flatnonzero(~found)
    number = np.full(len(by_byte), len(open_nodes), np.int32)
    number[open_nodes] = np.arange(len(open_nodes))
    states = np.full((len(open_nodes) + 1, 256), len(open_nodes), np.int32)
    states[:-1] = number[by_byte[open_nodes]]
    vocab_size = _vocab_size(tokenizer, vocab_size)
    token_class, table = over_tokens(states, tokenizer.token_bytes(), vocab_size, np.arange(len(states)))
    return compress(table, token_class)
