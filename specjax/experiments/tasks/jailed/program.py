"""The program's side: defines its function, and answers calls. It has no part in the verdict."""

import os
from typing import Any

import protocol
from confine import confine


def _streams() -> tuple[int, int]:
    """The descriptors of requests and answers, which are no longer the standard streams."""
    found = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    return found


def _raised(error: BaseException) -> list[Any]:
    """An error as it is sent: the names of its types, the nearest first, and its text."""
    try:
        text = str(error)[:500]
    except BaseException:
        text = ""
    return ["raised", [kind.__name__ for kind in type(error).__mro__], text]


def main() -> None:
    """Defines the program's function, then answers calls until there are no more."""
    requests, answers = _streams()
    source, name, seconds, memory = protocol.receive(requests)
    confine(seconds, memory)
    protocol.send(answers, ["ready"])
    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(source, "program.py", "exec"), namespace)
        function = namespace[name]
        answer = ["returned", None]
    except BaseException as error:
        function, answer = None, _raised(error)
    while True:
        try:
            protocol.send(answers, answer)
        except OSError:
            break
        except BaseException as error:  # A value that cannot be sent.
            protocol.send(answers, _raised(error))
        arguments, options = protocol.receive(requests)
        assert function is not None
        try:
            answer = ["returned", function(*arguments, **options)]
        except BaseException as error:
            answer = _raised(error)


if __name__ == "__main__":
    main()
