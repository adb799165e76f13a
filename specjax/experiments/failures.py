"""The error that ends a run, as one line for the user: what went wrong, and what to do about it."""

import errno
import pathlib
import traceback
from typing import Any

import jax

USER, BUG = 1, 2
"""Exit codes: for an error caused by a flag, a file or the machine, and for a bug of specjax."""

_EXPECTED = (ValueError, OSError, FloatingPointError)
"""The errors that specjax and its libraries raise for wrong flags and files."""

_PACKAGE = pathlib.Path(__file__).parents[1]

_MEMORY = "lower --config.batch_size or max_new_tokens, choose a smaller model, or --config.dtype=bfloat16"


def _one_line(message: Any) -> str:
    return " ".join(str(message).split())


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised by a line of specjax, whose messages name the remedy."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _PACKAGE in pathlib.Path(frames[-1].filename).parents


def explain(error: BaseException) -> tuple[str, int]:
    """The line that tells a user what went wrong, and the exit code."""
    text = _one_line(error)
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return f"Out of memory ({named[:300]}): {_MEMORY}.", USER
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk is full ({text}): free some space; the same command continues.", USER
    if isinstance(error, ImportError) and error.name and not error.name.startswith("specjax"):
        return (
            f"The package {error.name} is missing ({text}): pip install it, or the extra of specjax that has it.",
            USER,
        )
    if isinstance(error, _EXPECTED):
        if _is_ours(error) or isinstance(error, OSError):
            return text or named, USER
        return f"{named} (--debug shows where it comes from).", USER
    if isinstance(error, jax.errors.JaxRuntimeError):
        return f"The device failed ({named[:500]}): --debug shows where.", USER
    return f"{named}: this is a bug of specjax. Please report it with what --debug prints.", BUG
