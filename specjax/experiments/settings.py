"""Settings of an experiment: a frozen dataclass that is filled from a config once, every field checked on the way.

A field's checks are in its annotation, as in `repeats: Annotated[int, at_least(1)]`. What concerns several fields is
checked by the method `check`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

Config = Any
"""An `ml_collections.ConfigDict`."""

T = TypeVar("T")


class Check(NamedTuple):
    """A condition on the value of a key.

    Attributes:
      holds: whether a value is valid.
      remedy: the end of an error, after the key and its value; KEY stands for the key.
      each: the value is a tuple, and each of its entries is checked.
      last: it is checked after everything else: a missing value is reported only where nothing else is wrong.
    """

    holds: Callable[[Any], bool]
    remedy: str
    each: bool = False
    last: bool = False


def at_least(low: float, more: str = "") -> Check:
    """A number of at least `low`."""
    return Check(lambda value: value >= low, f"at least {low}{more}")


def at_most(high: float) -> Check:
    """A number of at most `high`."""
    return Check(lambda value: value <= high, f"at most {high}")


def between(low: float, high: float, more: str = "") -> Check:
    """A number from `low` to `high`, both included."""
    return Check(lambda value: low <= value <= high, f"from {low} to {high}{more}")


def all_at_least(low: int) -> Check:
    """A tuple of one or more numbers, each at least `low`."""
    return Check(lambda values: bool(values) and min(values) >= low, f"one at least, and each at least {low}")


def one_of(*known: str) -> Check:
    """One of some names."""
    return Check(lambda value: value in known, f"choose one of {', '.join(known)}")


def given(value: str) -> Check:
    """A string that is not empty."""
    return Check(bool, f"give --config.KEY={value}", last=True)


POSITIVE = Check(lambda value: value > 0, "more than 0")
FINITE = Check(math.isfinite, "give a finite number")


def _check(key: str, value: Any, check: Check) -> None:
    for one in value if check.each else (value,):
        if not check.holds(one):
            shown = f"config.{key} is empty" if one in ("", ()) else f"config.{key}={one!r}"
            raise ValueError(f"{shown}: {check.remedy.replace('KEY', key)}.")


def parse(kind: type[T], config: Config) -> T:
    """Fills a dataclass from the keys named like its fields; a field that is itself a dataclass, from the same config.

    Raises:
      ValueError: naming the key, its value and the remedy.
      OSError: for a file that a key names and that does not exist.
    """
    values: dict[str, Any] = {}
    later: list[tuple[str, Check]] = []
    hints = get_type_hints(kind, include_extras=True)
    for name in (field.name for field in dataclasses.fields(kind)):  # pyright: ignore[reportArgumentType]
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = parse(hint, config)  # pyright: ignore[reportArgumentType]
            continue
        value = config[name]
        values[name] = value.to_dict() if hasattr(value, "to_dict") else value
        for check in get_args(hint):
            if isinstance(check, Check) and check.last:
                later.append((name, check))
            elif isinstance(check, Check):
                _check(name, values[name], check)
    try:
        made = kind(**values)
    except ValueError as error:
        raise ValueError(f"config.{error}") from error
    if check_fields := getattr(made, "check", None):
        check_fields()
    for name, check in later:
        _check(name, values[name], check)
    return made
