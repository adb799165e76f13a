"""Grammars that requests ask for, compiled once: JSON objects and schemas, regular expressions, choices, token sets."""

import collections
import json
import re
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from specjax.sampling import grammars
from specjax.sampling.tables import DEAD
from specjax.serving.errors import ApiError, wrong
from specjax.serving.openai import Common
from specjax.text.tokenizer import Tokenizer
from specjax.types import Automaton

_STRING = r'"([^"\\\x00-\x1F]|\\["\\/bfnrt])*"'
_SCALAR = rf"({_STRING}|-?(0|[1-9][0-9]*)(\.[0-9]+)?|true|false|null)"
_GAP = r"[ \n]?"


def any_object() -> str:
    """A regular expression of JSON objects, for requests that say nothing of their form.

    Since a finite automaton has a bound on nesting, values are scalars, objects of scalars, and lists of both. Between
    the parts is at most one space or line break. The bound keeps the automaton at some hundred states.
    """

    def between(left: str, part: str, right: str) -> str:
        return rf"{left}({_GAP}{part}(,{_GAP}{part})*)?{_GAP}{right}"

    def table(value: str) -> str:
        return between(r"\{", f"{_STRING}:{_GAP}{value}", r"\}")

    item = f"({_SCALAR}|{table(_SCALAR)})"
    items = between(r"\[", item, r"\]")
    return table(f"({item}|{items})")


def choices(texts: Sequence[str]) -> str:
    """A regular expression of exactly these texts."""
    return "|".join(f"({_quote(text)})" for text in texts)


def _quote(text: str) -> str:
    """A text as an expression of Rust's regex crate, which has fewer escapes than Python's."""
    return re.sub(r"([\\.+*?()|\[\]{}^$#&~-])", r"\\\1", text)


def token_set(tokens: Sequence[int], vocab_size: int) -> Automaton:
    """Allows these tokens and no others, for ever."""
    forbidden = np.ones(vocab_size, np.int32)
    forbidden[list(tokens)] = 0
    return Automaton(jnp.asarray(forbidden), jnp.asarray([[0, DEAD]], jnp.int32))


class Grammars:
    """Compiles grammars and keeps the last ones, by their text. Thread-safe; one is compiled at a time."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, keep: int = 32, max_bytes: int = 2**16):
        """Prepares nothing.

        Args:
          tokenizer: of the target.
          vocab_size: of the target.
          keep: how many compiled grammars are kept.
          max_bytes: the longest schema, expression or list of choices, in bytes.
        """
        self._tokenizer, self._vocab_size, self._keep, self._max_bytes = tokenizer, vocab_size, keep, max_bytes
        self._lock = threading.Lock()
        self._known: collections.OrderedDict[tuple[str, str], Automaton] = collections.OrderedDict()

    def _compiled(self, kind: str, text: str, param: str, make: Callable[[], Automaton]) -> Automaton:
        if len(text.encode("utf-8", "replace")) > self._max_bytes:
            raise wrong(param, f"{param} has {len(text)} characters, more than {self._max_bytes} bytes: shorten it.")
        with self._lock:
            key = kind, text
            if key not in self._known:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        self._known[key] = make()
                except ImportError as error:
                    raise ApiError(501, f"This server has no grammars: {error}", param=param) from error
                except (ValueError, RecursionError, OverflowError, MemoryError) as error:
                    raise wrong(param, f"{param}: {error}", "invalid_grammar") from error
            self._known.move_to_end(key)
            while len(self._known) > self._keep:
                self._known.popitem(last=False)
            return self._known[key]

    def regex(self, pattern: str, param: str) -> Automaton:
        """The texts that match an expression.

        Raises:
          ApiError: for an expression that is too long or cannot be compiled.
        """
        make = lambda: grammars.regex(pattern, self._tokenizer, vocab_size=self._vocab_size)  # noqa: E731
        return self._compiled("regex", pattern, param, make)

    def schema(self, schema: Any, param: str) -> Automaton:
        """The JSON texts that a schema describes; any object for one that says no more than that.

        Raises:
          ApiError: for a schema that is too long, no JSON, or cannot be made a grammar.
        """
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise wrong(param, f"{param} is not JSON ({error}): send a JSON schema.") from error
        if not isinstance(schema, Mapping):
            raise wrong(param, f"{param} is no JSON object: send a JSON schema.")
        try:
            text = json.dumps(schema)
        except RecursionError as error:
            raise wrong(param, f"{param} is nested too deeply: simplify the schema.") from error
        if not set(schema) - {"type", "title", "description", "$schema"} and schema.get("type") == "object":
            return self.regex(any_object(), param)
        make = lambda: grammars.json_schema(text, self._tokenizer, vocab_size=self._vocab_size)  # noqa: E731
        return self._compiled("schema", text, param, make)

    def of(self, request: Common) -> Automaton | None:
        """The grammar that a request asks for, or None.

        Raises:
          ApiError: for more than one, or one that cannot be compiled.
        """
        asked: dict[str, Callable[[], Automaton]] = {}
        form, vllm = request.response_format, request.structured_outputs
        if form is not None and form.type == "json_object":
            asked["response_format"] = lambda: self.regex(any_object(), "response_format")
        elif form is not None and form.type == "json_schema":
            schema = form.json_schema and form.json_schema.schema_
            if schema is None:
                raise wrong("response_format.json_schema", "response_format.json_schema.schema is missing: give one.")
            asked["response_format"] = lambda: self.schema(schema, "response_format.json_schema.schema")
        of_vllm = {} if vllm is None else {name: getattr(vllm, name) for name in ("json_", "regex", "choice")}
        for prefix, found in (
            ("structured_outputs.", of_vllm),
            ("guided_", {name: getattr(request, f"guided_{name}") for name in ("json", "regex", "choice")}),
        ):
            self._named(prefix, found, asked)
        if vllm is not None and vllm.json_object:
            asked["structured_outputs.json_object"] = lambda: self.regex(any_object(), "structured_outputs")
        if vllm is not None and (vllm.grammar is not None or vllm.structural_tag is not None):
            raise wrong(
                "structured_outputs", "grammar and structural_tag are not supported: give json, regex or choice."
            )
        if request.allowed_token_ids is not None:
            asked["allowed_token_ids"] = lambda: self._token_set(request.allowed_token_ids or [])
        if len(asked) > 1:
            raise wrong(next(iter(asked)), f"{' and '.join(asked)} exclude each other: give one of them.")
        return next(iter(asked.values()))() if asked else None

    def _named(self, prefix: str, found: Mapping[str, Any], asked: dict[str, Callable[[], Automaton]]) -> None:
        """Adds what vllm's names ask for."""
        for name, value in found.items():
            if value is None:
                continue
            param = f"{prefix}{name.rstrip('_')}"
            if name == "regex":
                asked[param] = lambda value=value, param=param: self.regex(value, param)
            elif name == "choice":
                if not value or not all(value):
                    raise wrong(param, f"{param} is {value!r}: give at least one text, none of them empty.")
                asked[param] = lambda value=value, param=param: self.regex(choices(value), param)
            else:
                asked[param] = lambda value=value, param=param: self.schema(value, param)

    def _token_set(self, tokens: Sequence[int]) -> Automaton:
        if not tokens or max(tokens) >= self._vocab_size:
            raise wrong(
                "allowed_token_ids", f"allowed_token_ids: give at least one id, of 0 to {self._vocab_size - 1}."
            )
        return token_set(tokens, self._vocab_size)
