"""The test's side: it has the assertions, calls the program's function through pipes, and gives the verdict."""

import builtins
import os
import sys
from typing import Any

import protocol
from confine import confine


class Ended(BaseException):
    """The program has ended, or gives an invalid answer: no test may go on after that."""


class Raised(Exception):
    """The program raised an error for which there is no built-in type."""


def _error(names: list[str], text: str) -> BaseException:
    """The error that a program raised, as the built-in type that is nearest to it."""
    for name in names:
        kind = getattr(builtins, name, None)
        # These end a loop, and would end a loop of the test.
        if name in ("StopIteration", "StopAsyncIteration") or not isinstance(kind, type):
            continue
        if issubclass(kind, Exception) and kind is not Exception:
            try:
                return kind(text) if name == names[0] else kind(f"{names[0]}: {text}")
            except TypeError:  # Subclasses of UnicodeError need more.
                continue
    return Raised(f"{names[0]}: {text}")


class Remote:
    """The program's function, which runs elsewhere."""

    def __init__(self, requests: int, answers: int):
        self._requests, self._answers = requests, answers

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Calls it.

        Raises:
          Ended: where no answer comes.
          Exception: what the function raised.
        """
        self.send([arguments, options])
        return self.answer()

    def send(self, value: Any) -> None:
        """Asks."""
        try:
            protocol.send(self._requests, value)
        except OSError:
            raise Ended("ended early") from None

    def answer(self) -> Any:
        """What the next answer returns."""
        try:
            kind, *held = protocol.receive(self._answers)
            if kind == "ready":
                return None
            if kind == "returned":
                return held[0]
            names, text = held
            error = _error([str(name) for name in names], str(text))
        except EOFError:
            raise Ended("ended early") from None
        except (protocol.Refused, ValueError, TypeError, IndexError) as error:
            raise Ended(f"answered {error}") from None
        raise error


def _described(error: BaseException) -> str:
    if isinstance(error, (Ended, Raised)):
        return str(error)
    return f"{type(error).__name__}: {error}"


def main() -> None:
    """Starts the program, runs the test, and sends its verdict."""
    verdicts = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    remote = Remote(int(sys.argv[1]), int(sys.argv[2]))
    program, name, test, seconds, memory = protocol.receive(0)
    confine(seconds, memory)
    passed, said = False, ""
    try:
        remote.send([program, name, seconds, memory])
        remote.answer()
        protocol.send(verdicts, "ready")
        remote.answer()
        exec(compile(test, "test.py", "exec"), {"__name__": "__main__", "candidate": remote})
        passed = True
    except BaseException as error:
        said = _described(error)[:500]
    protocol.send(verdicts, [passed, said])


if __name__ == "__main__":
    main()
