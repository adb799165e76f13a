"""Drafters and rules as flags name them: those of specjax, or a user's own as FILE.py:NAME.

A user's drafter is a function that returns a `specjax.Drafter`. It is called with those of these arguments that it
names: `num_draft_tokens` (K), `target` (the loaded `Pretrained`) and `draft` (the text of config.draft). A user's rule
is a `verify.Rule`, or a function without arguments that returns one. A relative FILE is looked up where the command is
run. Everything that can be checked without a model is checked by `check`.
"""

import functools
import importlib.util
import inspect
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from specjax import drafters, limits, sampling
from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.decoding.verify import Rule
from specjax.drafters import contract
from specjax.types import AnyDrafter, Draft, Drafter

Config = Any
"""An `ml_collections.ConfigDict`."""

DRAFTERS = ("model", "ngram", "none", "table", "retrieval")

WITH_DRAFT = {"model": "SOURCE", "table": "PATH (of configs/count.py)", "retrieval": "PATH (of configs/count.py)"}
"""Drafters that need `config.draft`, and what that is."""

MAX_MATCH = 64
"""Tokens of a match: each is a comparison with the whole text."""

MAX_BATCH = 65_536
"""Rows."""

_ARGUMENTS = ("num_draft_tokens", "target", "draft")


def is_own(text: str) -> bool:
    """Whether a text names something in a file of the user's."""
    head = text.partition(":")[0]
    return head.endswith(".py") or "/" in head


@functools.cache
def _module(path: pathlib.Path) -> Any:
    """Runs a file once; what it imports may lie beside it."""
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
    """What FILE.py:NAME stands for.

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
        what = "is a directory" if path.is_dir() else "is no Python file"
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
    """The function; what it raises names the file that it is of."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # Whatever the code of the file raises.
            raise ValueError(f"{text} fails in its {part} ({_words(error)}): --debug shows where.") from error

    return guarded


@functools.cache
def _own_rule(text: str) -> Rule:
    found = _own("verify", text)
    if not _is_rule(found) and inspect.isfunction(found):
        needed = [p.name for p in inspect.signature(found).parameters.values() if p.default is p.empty]
        if needed:
            raise ValueError(
                f"config.verify={text!r} takes {', '.join(needed)}: give a specjax.verify.Rule, or a function without "
                f"arguments that returns one; a judge is made one by verify.Rule({found.__name__}, "
                f"name={found.__name__!r}, exact=False)."
            )
        found = _guard(text, "function", found)()
    if not isinstance(found, Rule):
        raise ValueError(f"config.verify={text!r} is a {type(found).__name__}, and no specjax.verify.Rule.")
    if found.name.partition(":")[0] in verify.RULES and found is not verify.RULES.get(found.name):
        raise ValueError(f"config.verify={text!r} is called {found.name!r} as a rule of specjax: give it another name.")
    return found


def rule(text: str) -> Rule:
    """The acceptance rule that config.verify names.

    Raises:
      ValueError: for a name that is not known, numbers that make no sense, or a file without a rule.
      FileNotFoundError: where the file does not exist.
    """
    return _own_rule(text) if is_own(text) else verify.parse(text)


def _own_drafter(text: str) -> Callable[..., Any]:
    """The function of a file; its arguments are known."""
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
            f"config.drafter={text!r} takes {', '.join(unknown)}, which nobody gives: its arguments may be "
            f"{', '.join(_ARGUMENTS)}, others need defaults."
        )
    return function


def own_drafter(text: str, source: str, target: Pretrained) -> Callable[[int], AnyDrafter]:
    """A user's drafter by K.

    Raises:
      ValueError: for a file without such a function; where the function raises; for what is no drafter of K tokens.
      FileNotFoundError: where the file does not exist.
    """
    function = _own_drafter(text)
    named = inspect.signature(function).parameters

    @functools.cache
    def of(k: int) -> AnyDrafter:
        given = {"num_draft_tokens": k, "target": target, "draft": source}
        made = _guard(text, "function", function)(**{name: given[name] for name in _ARGUMENTS if name in named})
        try:
            draft = contract.check(made)
        except (TypeError, ValueError) as error:
            raise ValueError(f"config.drafter={text!r} returns no drafter: {error}") from error
        if made.num_draft_tokens != k:
            raise ValueError(
                f"config.drafter={text!r} returns a drafter of {made.num_draft_tokens} tokens where {k} were asked "
                "for: give it an argument num_draft_tokens, or set --config.num_draft_tokens."
            )
        inner = draft.drafter
        guarded = {name: _guard(text, name, getattr(inner, name)) for name in ("init", "propose", "update")}
        return draft._replace(drafter=inner._replace(**guarded))

    return of


def name_of(text: str) -> str:
    """What tables call a drafter: of a file, its name without its directories."""
    if not is_own(text):
        return text
    file, _, name = text.partition(":")
    return f"{pathlib.PurePath(file).name}:{name}"


def check_drafter(config: Config, names: Sequence[str] = DRAFTERS) -> None:
    """Refuses a drafter that cannot be made, before anything is loaded.

    Args:
      config: with `drafter`, `draft`, `draft_int8`, `min_confidence` and `min_match`.
      names: the drafters that may be chosen, beside a user's own.

    Raises:
      ValueError: naming the key, its value and the remedy.
      FileNotFoundError: where a file does not exist.
    """
    chosen = config.drafter
    own = is_own(chosen)
    if not own and chosen not in names:
        raise ValueError(f"config.drafter={chosen!r}: choose one of {', '.join(names)}, or FILE.py:FUNCTION.")
    if own:
        _own_drafter(chosen)
    if not 0 <= config.min_confidence <= 1:
        raise ValueError(f"config.min_confidence={config.min_confidence}: a probability, from 0 (off) to 1.")
    if chosen != "model" and (config.draft_int8 or config.min_confidence):
        raise ValueError(
            f"config.draft_int8={config.draft_int8}, config.min_confidence={config.min_confidence}: only a draft model "
            f"has either, but config.drafter={chosen!r}. Give --config.drafter=model, or leave them out."
        )
    if chosen in WITH_DRAFT and not config.draft:
        raise ValueError(
            f"config.drafter={chosen!r} needs a draft: give --config.draft={WITH_DRAFT[chosen]}, or choose "
            "drafter=ngram."
        )
    if chosen not in WITH_DRAFT and config.draft and not own:
        raise ValueError(f"config.draft={config.draft!r} is of no use to drafter={chosen}: leave it out.")
    if chosen in ("table", "retrieval") and not pathlib.Path(config.draft).expanduser().exists():
        raise FileNotFoundError(f"config.draft={config.draft!r} does not exist: configs/count.py makes such a draft.")
    if not 1 <= config.min_match <= MAX_MATCH:
        raise ValueError(f"config.min_match={config.min_match}: from 1 to {MAX_MATCH} tokens.")


def check_num_draft_tokens(*numbers: int) -> None:
    """Refuses a K that no machine has memory for.

    Raises:
      ValueError: naming the key, its value and the bound.
    """
    for k in numbers:
        if not 0 <= k <= limits.MAX_DRAFT_TOKENS:
            raise ValueError(f"config.num_draft_tokens={k}: from 0 to {limits.MAX_DRAFT_TOKENS}; 4 to 10 are common.")


def check_seed(seed: int, texts: int = 0) -> None:
    """Refuses a seed that is none, or from which so many texts cannot be counted.

    Raises:
      ValueError: naming the key, its value and the bound.
    """
    if not 0 <= seed < 2**32 - texts:
        raise ValueError(f"config.seed={seed}: from 0 to {2**32 - 1 - texts}, since text i uses seed + i.")


def check_sampling(options: dict[str, Any]) -> None:
    """Refuses sampling options that make no sense.

    Raises:
      ValueError: naming the option, its value and the bounds.
    """
    for key, value in options.items():
        if not math.isfinite(value):
            raise ValueError(f"config.{key}={value} is no finite number.")
    try:
        sampling.options(1, **options)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"config.{error}") from error


def check_rule(text: str, temperature: float) -> None:
    """Refuses a rule that does not exist or does not fit the temperature.

    Raises:
      ValueError: naming the key, its value and the remedy.
      FileNotFoundError: where its file does not exist.
    """
    chosen = rule(text)
    if chosen is verify.greedy and temperature > 0:
        raise ValueError(f"config.verify='greedy' is for temperature 0, not {temperature}: choose rejection.")


def drafter_of(config: Config, target: Pretrained, read: Callable[[], Pretrained]) -> Callable[[int], AnyDrafter]:
    """The drafter that a config names, by K.

    Args:
      config: as `check_drafter` takes it.
      target: the loaded target.
      read: loads the draft model.

    Raises:
      ValueError: where what is loaded does not fit.
      OSError: for files that cannot be read.
    """
    shortest, longest = config.min_match, max(config.min_match, 8)
    if is_own(config.drafter):
        return own_drafter(config.drafter, config.draft, target)
    if config.drafter == "model":
        draft = read()
        return lambda k: drafters.model(draft, num_draft_tokens=k, min_confidence=config.min_confidence)
    if config.drafter == "ngram":
        return lambda k: drafters.ngram(num_draft_tokens=k, min_match=shortest, max_match=longest)
    if config.drafter == "table":
        table = drafters.load_table(config.draft)
        return lambda k: drafters.table(table, num_draft_tokens=k)
    if config.drafter == "retrieval":
        datastore = drafters.load_datastore(config.draft)
        longest = max(min(longest, datastore.depth), shortest)
        return lambda k: drafters.retrieval(datastore, num_draft_tokens=k, min_match=shortest, max_match=longest)
    return lambda k: drafters.none()
