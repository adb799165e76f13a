"""The rules by name, for flags and files."""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from specjax.decoding.verify.exact import block, coupled, greedy, observe, rejection, traversal
from specjax.decoding.verify.lossy import distance, lenient, top_k, typical
from specjax.decoding.verify.rule import Rule, greedy_judge
from specjax.types import Topology

RULES: dict[str, Rule | Callable[..., Rule]] = {
    "greedy": greedy,
    "rejection": rejection,
    "block": block,
    "traversal": traversal,
    "coupled": coupled,
    "observe": observe,
    "lenient": lenient,
    "typical": typical,
    "top_k": top_k,
    "distance": distance,
}
"""The rules by name, for flags; a value that is not a rule is a function of numbers that returns one."""


_EXAMPLES = {"lenient": "0.3", "typical": "0.09,0.3", "top_k": "3", "distance": "2"}
"""Example numbers for error messages, by the name of the function that makes a rule of them."""


def parse(rule: Any) -> Rule:
    """The rule that a user means: a `Rule`, or a name such as "rejection", "lenient:0.3" or "top_k:3,1.0".

    Raises:
      ValueError: for a name that is not known, or numbers that make no sense.
      TypeError: for any other object, such as `verify.lenient` without its number.
    """
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, str):
        return _named(rule)
    for name, numbers in _EXAMPLES.items():
        if rule is RULES[name]:
            raise TypeError(
                f"verify=verify.{name} is not called: write verify.{name}({', '.join(numbers.split(','))}), "
                f"or {f'{name}:{numbers}'!r}."
            )
    if callable(rule) and not isinstance(rule, type):
        called = getattr(rule, "__name__", None) or type(rule).__name__
        raise TypeError(
            f"verify={called} is a function, not a rule: write verify.Rule({called}, name={called!r}, exact=False)."
        )
    raise TypeError(f"verify={rule!r} is not a rule: give a verify.Rule, or one of the names {', '.join(RULES)}.")


def _named(text: str) -> Rule:
    head, colon, numbers = text.strip().partition(":")
    found = RULES.get(head)
    if found is None:
        raise ValueError(f"verify={text!r} is not known: choose one of {', '.join(RULES)}.")
    if isinstance(found, Rule):
        if colon:
            raise ValueError(f"verify={text!r}: {head} takes no number.")
        return found
    try:
        return found(*_numbers(found, numbers.split(",") if colon else []))
    except ValueError as error:
        raise ValueError(f"verify={text!r}: {error} Write it as {head}:{_EXAMPLES[head]}.") from error


def _numbers(make: Callable[..., Rule], texts: list[str]) -> list[int | float]:
    """The numbers in the name of a rule, in the types that `make` takes."""
    parameters = list(inspect.signature(make).parameters.values())
    needed = sum(parameter.default is parameter.empty for parameter in parameters)
    if not needed <= len(texts) <= len(parameters):
        names = ", ".join(parameter.name for parameter in parameters)
        raise ValueError(f"{len(texts)} numbers are given; it takes {names}.")
    values = []
    for parameter, text in zip(parameters, texts, strict=False):
        kind = "a whole number" if parameter.annotation is int else "a number"
        try:
            value = parameter.annotation(text)
        except ValueError as error:
            raise ValueError(f"{parameter.name}={text!r} is not {kind}.") from error
        # The rules compute in float32 and int32.
        if abs(value) >= 2**31 and value != float("inf"):
            raise ValueError(f"{parameter.name}={text} is too large.")
        if value and not jnp.float32(value):
            raise ValueError(f"{parameter.name}={text} is 0 in float32.")
        values.append(value)
    return values


def replaced_at_zero(rule: Rule) -> str:
    """The warning for a rule that judges rows at temperature 0 by default; empty for the rules of this module."""
    known = (greedy, rejection, block, traversal, coupled)
    if rule.at_zero is not greedy_judge or any(rule is one for one in known):
        return ""
    return (
        f"verify={rule.name} has no `at_zero` of its own: at temperature 0 greedy takes its place, which accepts the "
        "target's most probable token alone. Give verify.Rule(..., at_zero=...) to judge such rows otherwise."
    )


def check(rule: Rule, topology: Topology) -> None:
    """Refuses a rule that cannot judge a drafter's proposals, or would bias the text.

    Raises:
      ValueError: naming the rule and those that fit.
    """
    if topology.is_chain:
        return
    if not rule.trees:
        judges = [name for name, known in RULES.items() if isinstance(known, Rule) and known.exact and known.trees]
        raise ValueError(
            f"verify={rule.name} judges chains of draft tokens, and this drafter proposes trees: choose one of "
            f"{', '.join(name for name in judges if name != 'observe')}."
        )
    if rule.own_draws and topology.shares_draws:
        raise ValueError(
            f"verify={rule.name} would bias the text: it needs draws of their own for the children of each node, and "
            "this drafter shares one draw among all nodes of a depth (`Topology.shares_draws`): choose "
            "verify.rejection or verify.coupled."
        )
