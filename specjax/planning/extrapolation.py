"""Extrapolates from programs of few layers to all: every layer is the same program, so costs are linear in layers."""

import collections
from typing import Any

from specjax.planning.program import Program

FEW, MORE = 2, 4
"""Numbers of layers that are compiled instead of all."""


def combine(programs: list[tuple[float, Program]]) -> Program:
    """The weighted sum of programs."""
    if len(programs) == 1:
        return programs[0][1]

    def add(name: str) -> float:
        return sum(weight * getattr(program, name) for weight, program in programs)

    counts = {}
    for key in sorted({key for _, program in programs for key in program.collectives}):
        found = [(weight, program.collectives.get(key, (0.0, 0.0, 0.0))) for weight, program in programs]
        number, size = (sum(weight * count[i] for weight, count in found) for i in (0, 1))
        counts[key] = (number, size, max(count[2] for _, count in found))
    values: dict[str, Any] = {"bytes_accessed": None, "optimal_seconds": None, "collectives": counts}
    values |= {name: add(name) for name in Program._fields if name not in values}
    # A line through two programs may lie below either, where XLA has fused one of them better.
    values["temporary_bytes"] = max(values["temporary_bytes"], *(program.temporary_bytes for _, program in programs))
    return Program(**values)


def samples(layers: int, every: bool) -> list[tuple[float, int]]:
    """Numbers of layers to compile, and the weight of each in the result for all layers."""
    if every or layers <= MORE:
        return [(1.0, layers)]
    slope = (layers - FEW) / (MORE - FEW)
    return [(1.0 - slope, FEW), (slope, MORE)]


def both_sides(targets: list[tuple[float, int]], drafts: list[tuple[float, int]]) -> dict[tuple[int, int], float]:
    """The weights of programs by the numbers of layers of the target and the draft, from the `samples` of each.

    f(t, d) = f(t0, d0) + (f(t, d0) - f(t0, d0)) + (f(t0, d) - f(t0, d0)): linear in both.
    """
    base = targets[0][1], drafts[0][1]
    terms = [(weight, (layers, base[1])) for weight, layers in targets]
    terms += [(weight, (base[0], layers)) for weight, layers in drafts] + [(-1.0, base)]
    weights: dict[tuple[int, int], float] = collections.defaultdict(float)
    for weight, layers in terms:
        weights[layers] += weight
    return {layers: weight for layers, weight in weights.items() if weight}
