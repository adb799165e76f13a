"""Compiles ahead what calls will need, so that the first of them does not wait, and keeps it on disk."""

import concurrent.futures
import os
import sys
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from specjax import decoding, files
from specjax.api.generate import generate
from specjax.api.pretrained import Pretrained
from specjax.drafters import contract


class Shape(NamedTuple):
    """What the programs of a call depend on, besides its options.

    Attributes:
      prompt_width: the length that prompts are padded to.
      max_len: the length of the text buffer.
    """

    prompt_width: int
    max_len: int


def keep_programs() -> None:
    """Keeps compiled programs in specjax's cache directory, unless JAX has been told of another one."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        directory = files.cache_directory() / "jax"
        directory.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(directory))
        compilation_cache.reset_cache()  # JAX decides at its first compilation whether it keeps programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def warm(
    target: Pretrained,
    *,
    prompt_lengths: Iterable[int],
    max_new_tokens: int = 128,
    batch_size: int = 1,
    progress: bool = True,
    **options: Any,
) -> dict[Shape, float]:
    """Compiles the programs of later calls of `generate`, several at a time, and keeps them on disk.

    Prompts and buffers are padded to a few lengths, each with programs of its own; lengths that share their programs
    are compiled once. The programs are also kept in the compilation cache (JAX's own, if it is configured, or
    `~/.cache/specjax/jax`), where later processes find them: one that calls `warm` again takes a fraction of the time.

        specjax.warm(target, drafter=drafter, prompt_lengths=range(1, 513), max_new_tokens=256)

    Args:
      target: as in `generate`.
      prompt_lengths: the lengths, in tokens, of the prompts that will come.
      max_new_tokens: 128; what the calls will ask for.
      batch_size: 1; the number of prompts of a call.
      progress: whether to write a line to stderr for every shape.
      **options: the other options of `generate`, of which the drafter, the rule and their settings matter.

    Returns:
      The shapes that were compiled, and the seconds that each took.

    Raises:
      ValueError: for no lengths, lengths below 1 or beyond the target's positions, a batch without prompts, or what
        `generate` refuses.
    """
    lengths = sorted(set(prompt_lengths))
    if not lengths or lengths[0] < 1 or batch_size < 1:
        raise ValueError(
            f"prompt_lengths={lengths[:3]}, batch_size={batch_size}: give at least one length, and only whole numbers "
            "from 1 on."
        )
    longest = max_new_tokens + (lengths[-1] if target.model.start_token is None else 1)
    if longest > target.model.max_len:
        raise ValueError(
            f"Prompts of up to {lengths[-1]} tokens with max_new_tokens={max_new_tokens} do not fit the "
            f"{target.model.max_len} positions that the target knows: lower one of them."
        )
    drafter = options.get("drafter")
    num_read = 0 if drafter is None else contract.check(drafter).drafter.topology.num_read
    shapes: dict[Shape, int] = {}
    for length in lengths:
        width = options.get("prompt_width") or decoding.round_up(length, 16)
        # An encoder-decoder encodes the prompt, and its text begins with one token.
        begin, least = (length, width) if target.model.start_token is None else (1, 1)
        buffer = decoding.buffer_length(begin + max_new_tokens, num_read)
        shapes[Shape(width, options.get("max_len") or max(buffer, least))] = length
    keep_programs()

    def compile_shape(shape: Shape) -> float:
        begin = time.perf_counter()
        prompts = [[0] * shapes[shape]] * batch_size
        # The number of new tokens is an argument of the programs: one token runs them all.
        own: dict[str, Any] = options | {"prompt_width": shape.prompt_width, "max_len": shape.max_len}
        generate(target, prompts, max_new_tokens=min(1, max_new_tokens), **own)
        return time.perf_counter() - begin

    seconds: dict[Shape, float] = {}
    # The first shape alone: what all have in common is then compiled once.
    first, *rest = shapes
    with concurrent.futures.ThreadPoolExecutor(min(len(shapes), os.cpu_count() or 1)) as pool:
        for group in ([first], rest):
            running = {pool.submit(compile_shape, shape): shape for shape in group}
            try:
                for done in concurrent.futures.as_completed(running):
                    shape = running[done]
                    seconds[shape] = done.result()
                    if progress:
                        what = f"prompts padded to {shape.prompt_width} tokens, in a buffer of {shape.max_len}"
                        said = f"[{len(seconds)}/{len(shapes)}] {what}: {seconds[shape]:.1f} s"
                        print(said, file=sys.stderr, flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return seconds
