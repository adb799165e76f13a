"""Chat templates, rendered by a separate process within bounds on time, memory and output.

The process (`chat_worker`) is started at the first template, waits for more, and ends with this process. A worker that
exceeds a bound is killed, and the next template starts another.
"""

import atexit
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from specjax.text import chat_worker

MAX_SECONDS = 10.0
"""How long a conversation may take to render."""

MAX_MEMORY = 2**30
"""How many bytes rendering may take."""

MAX_TEMPLATE = 2**20
"""The longest template, in characters; the longest that are published have some ten thousand."""

MAX_LENGTH = 2**24
"""The longest text that a template may render, in characters."""

_START_SECONDS = 120.0


class _Worker:
    """The running process; one request at a time."""

    def __init__(self):
        # The worker finds packages where this process does. It has a session of its own, since Ctrl-C is not meant
        # for it.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(pathlib.Path(chat_worker.__file__)), str(MAX_MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
        if "ready" not in self._wait(_START_SECONDS, None):
            raise OSError("The process that renders chat templates cannot be started: decode without the template.")

    def _wait(self, seconds: float, request: bytes | None) -> dict[str, Any]:
        """The answer to a request; an empty one where the process ends, {"seconds": ...} where it takes too long."""
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            if request is not None:
                self._process.stdin.write(request)
                self._process.stdin.flush()
            line = self._process.stdout.readline()
            answer = json.loads(line) if line.endswith(b"\n") else {}
        except (OSError, ValueError):  # It ended while the request was written.
            answer = {}
        except BaseException:  # An interrupt: the answer would be taken for that of the next request.
            self.close()
            raise
        finally:
            timer.cancel()
        if late.is_set():
            return {"seconds": seconds}
        return answer

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        return self._wait(seconds, json.dumps({**request, "seconds": seconds}).encode() + b"\n")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # What was not written yet can no longer be.
                    pipe.close()


_lock = threading.Lock()
_workers: dict[int, _Worker] = {}  # by process: one that is forked has its own


def _ask(request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    with _lock:
        own = os.getpid()
        if own not in _workers:
            _workers.clear()
            _workers[own] = _Worker()
        try:
            answer = _workers[own].ask(request, seconds)
        except BaseException:
            _workers.pop(own).close()
            raise
        if not answer or "seconds" in answer:
            _workers.pop(own).close()
        return answer


def _close() -> None:
    worker = _workers.pop(os.getpid(), None)
    if worker is not None:
        worker.close()


atexit.register(_close)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    name: str,
    variables: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None = None,
    continue_final: bool = False,
    add_generation_prompt: bool = True,
    max_seconds: float | None = None,
) -> str:
    """Renders a conversation with a chat template, up to where the assistant's answer begins.

    The result is that of transformers' `apply_chat_template`.

    Args:
      template: a Jinja template in the style of transformers.
      messages: dictionaries with "role" and "content", whose values are JSON values.
      name: what to call the template in an error.
      variables: what the template may name, such as "bos_token"; JSON values.
      tools: what the assistant may call, as JSON values in OpenAI's form.
      continue_final: whether the text ends within the last message, which the answer then continues.
      add_generation_prompt: whether the text ends with the beginning of an answer; not together with `continue_final`.
      max_seconds: how long it may take; `MAX_SECONDS` where it is None.

    Raises:
      OSError: where no process can be started.
      ValueError: for a template that refuses the messages, fails, or exceeds `MAX_SECONDS`, `MAX_MEMORY`,
        `MAX_TEMPLATE` or `MAX_LENGTH`, and for messages that are not JSON.
    """
    remedy = "decode without the template, or give another one"
    if len(template) > MAX_TEMPLATE:
        raise ValueError(f"{name} has {len(template)} characters, and at most {MAX_TEMPLATE} are read: {remedy}.")
    request = {
        "template": template,
        "messages": [dict(message) for message in messages],
        "tools": [dict(tool) for tool in tools] if tools else None,
        "continue_final_message": continue_final,
        "add_generation_prompt": add_generation_prompt and not continue_final,
        "variables": dict(variables),
        "max_length": MAX_LENGTH,
    }
    try:
        answer = _ask(request, MAX_SECONDS if max_seconds is None else max_seconds)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"The messages are not JSON values ({error}): give strings.") from error
    if "text" in answer:
        return answer["text"]
    if "error" in answer:
        raise ValueError(f"{name} does not take these messages ({answer['error']}): {remedy}.")
    if "seconds" in answer:
        reason = f"takes more than {answer['seconds']:g} seconds"
    elif "length" in answer:
        reason = f"makes a text of {answer['length']} characters, more than {MAX_LENGTH}"
    else:
        # A process that runs out of memory says so, or crashes.
        reason = f"takes more than {MAX_MEMORY >> 20} MiB of memory, or too much time"
    raise ValueError(f"{name} {reason}: {remedy}.")
