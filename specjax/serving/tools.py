"""Tools: what a template is told of them, and how calls are found in the text that a model writes.

Calls are read in the form that Hermes and Qwen write: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from specjax.serving.errors import wrong
from specjax.serving.openai import MAX_NAME

OPEN, CLOSE = "<tool_call>", "</tool_call>"

MAX_TOOLS = 128
"""The most tools of a request (OpenAI's bound)."""

_NAME = re.compile(r"[a-zA-Z0-9_.-]+")


class Tools(NamedTuple):
    """The tools of a request.

    Attributes:
      listed: what the template is told; empty: nothing.
      form: "none", "auto", "required" (an answer that is calls) or "named" (an answer that is the arguments of one).
      name: of the tool that has to be called, where form is "named".
    """

    listed: tuple[dict[str, Any], ...] = ()
    form: str = "none"
    name: str = ""

    def schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer has to have, or None where it is free."""
        functions = {tool["function"]["name"]: tool["function"] for tool in self.listed}
        if self.form == "named":
            return _parameters(functions[self.name])
        if self.form != "required":
            return None
        calls = [_call_schema(name, _parameters(function)) for name, function in functions.items()]
        return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    return function.get("parameters") or {"type": "object", "properties": {}}


def _call_schema(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": parameters},
        "required": ["name", "arguments"],
    }


def _check(tool: Mapping[str, Any], place: str) -> str:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping):
        raise wrong(place, f'{place} is not a function: give {{"type": "function", "function": {{"name": ...}}}}.')
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise wrong(
            f"{place}.function.name", f"{place}.function.name: give letters, digits, _ and -, at most {MAX_NAME}."
        )
    if not isinstance(function.get("parameters") or {}, Mapping):
        raise wrong(f"{place}.function.parameters", f"{place}.function.parameters: give a JSON schema.")
    return name


def read(tools: Sequence[Mapping[str, Any]] | None, choice: Any) -> Tools:
    """The tools of a request and its `tool_choice`.

    Raises:
      ApiError: for tools of another kind, a wrong name, or a choice of a tool that is not there.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise wrong("tool_choice", f"tool_choice is {choice!r}, but there are no tools: give tools.")
        return NO_TOOLS
    if len(tools) > MAX_TOOLS:
        raise wrong("tools", f"There are {len(tools)} tools, and at most {MAX_TOOLS} are taken: give fewer.")
    names = [_check(tool, f"tools.{i}") for i, tool in enumerate(tools)]
    listed = tuple(dict(tool) for tool in tools)
    if choice is None or choice == "auto":
        return Tools(listed, "auto")
    if choice == "none":
        return NO_TOOLS
    if choice == "required":
        return Tools(listed, "required")
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name not in names:
        raise wrong("tool_choice", f"tool_choice names {name!r}: choose one of the tools, {', '.join(names)}.")
    return Tools(listed, "named", str(name))


NO_TOOLS = Tools()


class Call(NamedTuple):
    """A call, or in a stream a piece of one.

    Attributes:
      place: which call of the answer.
      name: the tool; None in later pieces.
      arguments: their JSON, as text.
      id: of the call; None in later pieces.
    """

    place: int
    name: str | None
    arguments: str
    id: str | None

    def json(self, streamed: bool = False) -> dict[str, Any]:
        """OpenAI's form."""
        out: dict[str, Any] = {"index": self.place} if streamed else {}
        if self.id is not None:
            out |= {"id": self.id, "type": "function"}
        function = (
            {"arguments": self.arguments} if self.name is None else {"name": self.name, "arguments": self.arguments}
        )
        return out | {"function": function}


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _parse(text: str, place: int) -> Call | None:
    """The call that a text is, or None where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return Call(place, found["name"], arguments, _new_id())


class Reader:
    """Separates the text of one sequence into content and calls, piece by piece.

    Text that may turn out to be a call is held back until it is known; what is no call after all is content.
    """

    def __init__(self, tools: Tools):
        self._tools, self._held, self.num_calls, self._after_call = tools, "", 0, False

    def read(self, text: str, last: bool) -> tuple[str, list[Call]]:
        """The content and the calls that a further piece of text completes; `last` says that none follows."""
        if self._tools.form == "none":
            return text, []
        if self._tools.form == "named":
            return "", self._named(text)
        self._held += text
        if self._tools.form == "required":
            return self._required() if last else ("", [])
        content, calls = "", []
        while OPEN in self._held:
            before, _, rest = self._held.partition(OPEN)
            # Without its end, a call is complete only if its JSON is: some models stop there.
            inside, closed, after = rest.partition(CLOSE)
            content += self._outside(before)
            if not closed and not last:
                self._held = OPEN + rest
                return content, calls
            call = _parse(inside, self.num_calls)
            if call is None:
                content += self._outside(OPEN + inside + closed)
            else:
                calls.append(call)
                self.num_calls, self._after_call = self.num_calls + 1, True
            self._held = after
        cut = len(self._held) - (0 if last else _overlap(self._held))
        content, self._held = content + self._outside(self._held[:cut]), self._held[cut:]
        return content, calls

    def _outside(self, text: str) -> str:
        """Text outside of calls, without the line breaks that follow a call."""
        text = text.lstrip() if self._after_call else text
        self._after_call = self._after_call and not text
        return text

    def _named(self, text: str) -> list[Call]:
        if not text and self.num_calls:
            return []
        first = not self.num_calls
        self.num_calls = 1
        return [Call(0, self._tools.name if first else None, text, _new_id() if first else None)]

    def _required(self) -> tuple[str, list[Call]]:
        call = _parse(self._held, 0)
        self.num_calls = int(call is not None)
        return ("", [call]) if call else (self._held, [])

    def reason(self, finish_reason: str) -> str:
        """The reason that is told: "tool_calls" where the model chose to call."""
        chose = self.num_calls and self._tools.form in ("auto", "required")
        return "tool_calls" if chose and finish_reason == "stop" else finish_reason


def _overlap(text: str) -> int:
    """How many characters at the end of a text may begin a call."""
    return next((size for size in range(min(len(OPEN) - 1, len(text)), 0, -1) if OPEN.startswith(text[-size:])), 0)
