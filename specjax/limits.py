"""Bounds on sizes that users and files give, checked before anything is allocated."""

import math
import numbers
from typing import Any

MAX_DRAFT_TOKENS = 1024
"""The largest K: a target call scores K + 1 tokens of each row, with the logits of the whole vocabulary for each."""


def check_size(name: str, value: Any, low: int = 1, high: int = 2**31 - 1) -> None:
    """Checks that a value is a whole number within bounds.

    Args:
      name: what to call it in the error.
      value: the value.
      low: the smallest value allowed.
      high: the largest value allowed.

    Raises:
      ValueError: for any other number, or a value that is not a number, such as a string or a bool.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name}={_shown(value)} is not a whole number: give one from {low} to {high}.")
    if not low <= int(value) <= high:
        raise ValueError(f"{name}={_shown(value)} is out of range: give a whole number from {low} to {high}.")


def check_number(name: str, value: Any, *, positive: bool = True) -> None:
    """Checks that a value is a finite number above zero.

    Args:
      name: what to call it in the error.
      value: the value.
      positive: whether zero is refused too.

    Raises:
      ValueError: for any other number, or a value that is not a number, such as a string or a bool.
    """
    wanted = "above 0" if positive else "of at least 0"
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Real)
        or not -math.inf < value < math.inf  # pyright: ignore[reportOperatorIssue]
        or value < 0
        or (positive and value == 0)
    ):
        raise ValueError(f"{name}={_shown(value)} is not a finite number {wanted}: give one.")


def check_flag(name: str, value: Any) -> None:
    """Checks that a value is True or False.

    Raises:
      ValueError: for anything else, such as the string "false".
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={_shown(value)} is neither true nor false: give one of them.")


def check_num_draft_tokens(value: Any) -> None:
    """Checks K, the most tokens that a drafter proposes in a step; 0 is plain decoding.

    Raises:
      ValueError: for anything but a whole number from 0 to `MAX_DRAFT_TOKENS`.
    """
    if not isinstance(value, bool) and isinstance(value, numbers.Integral) and value < 0:
        raise ValueError(f"num_draft_tokens={_shown(value)} is negative; 0 is plain decoding.")
    check_size("num_draft_tokens", value, 0, MAX_DRAFT_TOKENS)


def _shown(value: Any) -> str:
    """The value as error messages show it."""
    if isinstance(value, int) and abs(value) >= 10**30:  # Python prints no integer of thousands of digits
        return f"{'-' if value < 0 else ''}10**30 and more"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
