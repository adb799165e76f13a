"""What XLA made of one program: its memory, its operations, and what it sends between devices."""

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from specjax.models import cache as cache_lib
from specjax.planning import hlo

PARTS = ("target_call", "draft_call", "drafting", "")
"""Scopes that `plan.shard` names, the innermost first; the last is everything else: verification and commit."""

Counts = Mapping[tuple[str, str], tuple[float, float, float]]
"""By part and kind of collective: how many, the bytes of all, and those of the largest."""


class Program(NamedTuple):
    """What XLA made of a program, on one device.

    Attributes:
      argument_bytes: the size of the arguments in memory, padding included.
      output_bytes: the size of the outputs.
      alias_bytes: the size of those outputs that are written in place of an argument.
      temporary_bytes: the size of the temporaries.
      code_bytes: the size of the program itself.
      flops: as XLA counts them; bodies of loops once.
      bytes_accessed: as XLA counts them, with on-chip memories; None where extrapolated, since they depend on what fits
        there.
      optimal_seconds: XLA's own estimate; None where it has none (it is not positive), or where extrapolated.
      collectives: those in the program, each once.
      cache_copies: instructions that copy a layer's keys or values.
      gathered_bytes: of all collectives that are not all-reduces: parameters, caches or logits that are gathered.
      kernels: fusions, library calls and other instructions, each once.
      host_predicates: loops and conditions for which the host reads a predicate; on GPUs a round trip each.
    """

    argument_bytes: float
    output_bytes: float
    alias_bytes: float
    temporary_bytes: float
    code_bytes: float
    flops: float
    bytes_accessed: float | None
    optimal_seconds: float | None
    collectives: Counts
    cache_copies: float
    gathered_bytes: float
    kernels: float
    host_predicates: float


def _part(op_name: str) -> str:
    return next(part for part in PARTS if part in op_name)


def read(compiled: Any, cache_shapes: set[tuple[int, ...]]) -> Program:
    """Reads a compiled program.

    Args:
      compiled: as `lowered.compile()` gives it.
      cache_shapes: the shapes of the layers' keys and values on one device.
    """
    text, cost, stats = compiled.as_text(), compiled.cost_analysis() or {}, compiled.memory_analysis()
    found: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for collective in hlo.collectives(text):
        found[_part(collective.op_name), collective.kind].append(collective.size_in_bytes)
    seconds, kernels = float(cost.get("optimal_seconds", -1.0)), hlo.kernels(text)
    return Program(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
        float(cost.get("flops", 0.0)),
        float(cost.get("bytes accessed", 0.0)),
        seconds if seconds > 0 else None,
        {key: (len(sizes), sum(sizes), max(sizes)) for key, sizes in sorted(found.items())},
        len(hlo.copies(text, sorted(cache_shapes))),
        sum(sum(sizes) for (_, kind), sizes in found.items() if kind != "all-reduce"),
        sum(kernels[:3]),
        kernels.host_predicates,
    )


def cache_shapes(*caches: Any) -> set[tuple[int, ...]]:
    """The shapes of the layers' keys and values on one device, from abstract caches (`plan.shard`)."""
    leaves = jax.tree.leaves(caches)
    return {x.sharding.shard_shape(x.shape) for x in leaves if "kv_heads" in cache_lib.axes_of(x.ndim)}
