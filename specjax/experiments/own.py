"""Drafters and rules of a user's own, which flags name as FILE.py:NAME.

A drafter is a function that returns a `specjax.Drafter`. It is called with those of these arguments that it names:
`num_draft_tokens` (K), `target` (the loaded `Pretrained`) and `draft` (the text of config.draft). A rule is a
`verify.Rule`, or a function without arguments that returns one. A relative FILE is looked up in the current directory.
"""

import functools
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.decoding.verify import Rule
from specjax.drafters import contract
from specjax.types import AnyDrafter, Draft, Drafter

_ARGUMENTS = ("num_draft_tokens", "target", "draft")


def is_own(text: str) -> bool:
    """Whether a string names an object in a user's file."""
    head = text.partition(":")[0]
    return head.endswith(".py") or "/" in head


@functools.cache
def _module(path: pathlib.Path) -> Any:
    """Runs a file once. It can import modules next to it."""
    name = f"specjax_own_{path.stem}_{abs(hash(path)):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"{path} cannot be run ({_words(error)}): --debug shows where it fails.") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _own(key: str, text: str) -> Any:
    """The object that FILE.py:NAME names.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for a file that cannot be run, or has no such name.
    """
    file, _, name = text.partition(":")
    path = pathlib.Path(file).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"config.{key}={text!r}: the file {file} does not exist (seen from {pathlib.Path.cwd()})."
        )
    if path.is_dir() or path.suffix != ".py":
        what = "is a directory" if path.is_dir() else "is not a Python file"
        raise ValueError(f"config.{key}={text!r}: {file} {what}: write FILE.py:NAME.")
    if not name:
        raise ValueError(f"config.{key}={text!r} names a file, but nothing in it: write {file}:NAME.")
    module = _module(path.resolve())
    if not hasattr(module, name):
        defined = [
            n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__ or _is_rule(v)
        ]
        found = ", ".join(n for n in defined if not n.startswith("_")) or "nothing"
        raise ValueError(f"config.{key}={text!r}: {file} defines no {name!r}; it defines {found}.")
    return getattr(module, name)


def _is_rule(value: Any) -> bool:
    return isinstance(value, Rule)


def _guard(text: str, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose errors name the file that it comes from."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # Whatever the code of the file raises.
            raise ValueError(f"{text} fails in its {part} ({_words(error)}): --debug shows where.") from error

    return guarded


@functools.cache
def rule(text: str) -> Rule:
    """A user's rule.

    Raises:
      ValueError: for a file without one.
      FileNotFoundError: where the file does not exist.
    """
    found = _own("verify", text)
    if not _is_rule(found) and inspect.isfunction(found):
        needed = [p.name for p in inspect.signature(found).parameters.values() if p.default is p.empty]
        if needed:
            raise ValueError(
                f"config.verify={text!r} takes {', '.join(needed)}: give a specjax.verify.Rule, or a function without "
                f"arguments that returns one; a judge becomes one by verify.Rule({found.__name__}, "
                f"name={found.__name__!r}, exact=False)."
            )
        found = _guard(text, "function", found)()
    if not isinstance(found, Rule):
        raise ValueError(f"config.verify={text!r} is a {type(found).__name__}, not a specjax.verify.Rule.")
    if found.name.partition(":")[0] in verify.RULES and found is not verify.RULES.get(found.name):
        raise ValueError(f"config.verify={text!r} is called {found.name!r} as a rule of specjax: give it another name.")
    return found


def drafter_function(text: str) -> Callable[..., Any]:
    """The function of a file, which must only take arguments that specjax gives.

    Raises:
      ValueError: for something else.
      FileNotFoundError: where the file does not exist.
    """
    function = _own("drafter", text)
    if isinstance(function, Drafter | Draft) or not callable(function):
        kind = type(function).__name__
        raise ValueError(
            f"config.drafter={text!r} is a {kind}: name a function that returns a specjax.Drafter, such as "
            "`def mine(num_draft_tokens): ...`."
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.drafter={text!r} has no signature: name a function.") from error
    unknown = [p.name for p in parameters if p.default is p.empty and p.name not in _ARGUMENTS and p.kind not in (2, 4)]
    if unknown:
        raise ValueError(
            f"config.drafter={text!r} takes {', '.join(unknown)}, which specjax does not give: its arguments may be "
            f"{', '.join(_ARGUMENTS)}, others need defaults."
        )
    return function


def drafter(text: str, draft: str, target: Pretrained) -> Callable[[int], AnyDrafter]:
    """A user's drafter, as a function of K.

    Raises:
      ValueError: for a file without such a function, one that raises, or one that returns no drafter of K tokens.
      FileNotFoundError: where the file does not exist.
    """
    function = drafter_function(text)
    named = inspect.signature(function).parameters

    @functools.cache
    def of(k: int) -> AnyDrafter:
        given = {"num_draft_tokens": k, "target": target, "draft": draft}
        made = _guard(text, "function", function)(**{name: given[name] for name in _ARGUMENTS if name in named})
        try:
            checked = contract.check(made)
        except (TypeError, ValueError) as error:
            raise ValueError(f"config.drafter={text!r} does not return a drafter: {error}") from error
        if made.num_draft_tokens != k:
            raise ValueError(
                f"config.drafter={text!r} returns a drafter of {made.num_draft_tokens} tokens where {k} were asked "
                "for: give it an argument num_draft_tokens, or set --config.num_draft_tokens."
            )
        inner = checked.drafter
        guarded = {name: _guard(text, name, getattr(inner, name)) for name in ("init", "propose", "update")}
        return checked._replace(drafter=inner._replace(**guarded))

    return of
