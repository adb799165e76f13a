"""What a model call computes, reads and sends on each device, counted in its traced program.

A model call is traced, its matrix products are counted, and what they read is divided by the shardings that the rules
give it. `aot` compiles the same step for TPUs and reads what XLA made of it.
"""

import math
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specjax.models import linear, modules
from specjax.models.config import DecoderConfig, Experts
from specjax.models.experts import distinct_experts
from specjax.planning import kinds
from specjax.planning.setup import (
    SIDES,
    Setup,
    abstract_mesh,
    declared,
    local_bytes,
    local_shape,
    placed_config,
    shard,
    unrolled,
)
from specjax.types import Params


class Cost(NamedTuple):
    """The cost of one model call on each device.

    Attributes:
      flops: multiplications and additions of its matrix products.
      parameter_bytes: bytes of the parameters that it reads.
      cache_bytes: bytes of the keys and values that it reads: the whole buffer.
      all_reduces: the number of all-reduces.
      all_reduce_bytes: bytes of all of them together.
    """

    flops: float
    parameter_bytes: float
    cache_bytes: float
    all_reduces: float
    all_reduce_bytes: float


_SAME_DATA = frozenset(
    ("reshape", "transpose", "convert_element_type", "broadcast_in_dim", "squeeze", "slice", "sharding_constraint")
)
"""Primitives whose result is their first argument in another form: what reads it reads that argument."""


_UPDATES = frozenset(("dynamic_update_slice", "scatter"))


_SCALINGS = frozenset(("mul", "add"))


_LOOKUPS = frozenset(("gather", "dynamic_slice"))


class _Product(NamedTuple):
    """A matrix product: its operations, and which argument of the program its operands stem from, or -1."""

    flops: int
    arguments: tuple[int, int]


def _inner(eqn: Any) -> Any:
    """The program that an equation calls, if any; for a branch, the last one, which is that for accelerators."""
    params = eqn.params
    found = params.get("jaxpr", params.get("call_jaxpr", (params.get("branches") or [None])[-1]))
    return getattr(found, "jaxpr", found)


def _walk(
    jaxpr: Any,
    origins: list[int],
    small: frozenset[int],
    stacks: frozenset[int],
    read: set[int],
    looked_up: set[int],
) -> Generator[_Product, None, list[int]]:
    """The matrix products of a program, noting which of its arguments are read, and which only by look-ups of rows.

    What is made of one of the arguments `small`, quantised matrices, by scales and offsets is that matrix in floats.
    Loops over `stacks`, the matrices of experts, are left out: how many of those are read depends on the tokens.

    Returns:
      which argument each result is another form of, or -1.
    """
    origin: dict[Any, int] = dict(zip(jaxpr.invars, origins, strict=True))

    def of(x: Any) -> int:
        return -1 if hasattr(x, "val") else origin.get(x, -1)

    for eqn in jaxpr.eqns:
        name, sources = eqn.primitive.name, [of(x) for x in eqn.invars]
        inner = _inner(eqn)
        if name == "scan" and stacks.intersection(sources):
            continue
        if name in _SAME_DATA or name in _UPDATES:
            origin[eqn.outvars[0]] = sources[0]
        elif inner is not None:
            results = yield from _walk(
                inner, sources[len(sources) - len(inner.invars) :], small, stacks, read, looked_up
            )
            origin.update(zip(eqn.outvars, results, strict=True))
        elif name in _SCALINGS and (matrices := [source for source in sources if source in small]):
            origin[eqn.outvars[0]] = matrices[0]
            read.update({*sources} - {-1})
        elif name in _LOOKUPS:
            looked_up.update({sources[0]} - {-1})
        else:
            read.update(source for source in sources if source >= 0)
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            size = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            yield _Product(2 * size * math.prod(eqn.outvars[0].aval.shape), (sources[0], sources[1]))
    return [of(x) for x in jaxpr.outvars]


class _Leaves(NamedTuple):
    """The parameters of both sides, one after the other.

    Attributes:
      arrays: abstract, with their shardings.
      axes: their logical axes.
      num_contracted: how many axes of each are inputs; 0 for one that is no matrix.
      number: how many are the target's, which come first.
    """

    arrays: list[Any]
    axes: list[Any]
    num_contracted: list[int]
    number: int


def _leaves(setup: Setup, params: Params) -> _Leaves:
    found = [declared(setup, side) for side in SIDES]
    treedef = jax.tree.structure(params)
    axes, inputs = (
        treedef.flatten_up_to(Params(*(getattr(x, name) for x in found))) for name in ("axes", "num_contracted")
    )
    return _Leaves(jax.tree.leaves(params), axes, inputs, len(jax.tree.leaves(params.target)))


def _reduced(leaves: _Leaves, read: set[int], looked_up: set[int]) -> Iterator[int]:
    """Values per token of each all-reduce: of products with split contracted axes, look-ups in a split vocabulary."""
    for i, (leaf, number, names) in enumerate(zip(leaves.arrays, leaves.num_contracted, leaves.axes, strict=True)):
        split = [axis is not None for axis in (*leaf.sharding.spec, *[None] * leaf.ndim)]
        first = modules.num_stacked(names)
        inputs = [leaf.ndim - number + j if linear.outputs_first(leaf.dtype) else first + j for j in range(number)]
        if i in read and any(split[axis] for axis in inputs):
            yield leaf.size // math.prod(leaf.shape[axis] for axis in [*inputs, *range(first)])
        if i in looked_up and "vocab" in names and split[names.index("vocab")]:
            yield leaf.size // leaf.shape[names.index("vocab")]


def _of_experts(experts: Experts, leaves: _Leaves, which: list[int], tokens: int) -> tuple[float, float]:
    """The operations of a call's experts on each device, and the bytes of those that it reads.

    Args:
      experts: the mixture.
      leaves: the parameters.
      which: those of all experts.
      tokens: the tokens of a device's rows.
    """
    weights = sum(math.prod(local_shape(leaves.arrays[i])) for i in which if leaves.num_contracted[i])
    share = distinct_experts(experts, tokens) / experts.number
    size = local_bytes([leaves.arrays[i] for i in which])
    return 2.0 * tokens * experts.chosen / experts.number * weights, share * size


def call_cost(setup: Setup, call: str) -> Callable[[int], Cost]:
    """The cost of a call on each device, by the number of tokens that it reads per row.

    Two calls are traced, of two and three tokens; every cost is linear in the number of tokens, but for those of
    experts, which are computed.

    Args:
      setup: the plan.
      call: "target", or one of the calls of the draft's kind (`kinds.Made.calls`): "draft" for a model.
    """
    setup = unrolled(setup)
    placed = shard(setup, abstract_mesh(setup))
    side = kinds.TARGET if call == kinds.TARGET else kinds.DRAFT
    state = placed.state.rows.cache if side == kinds.TARGET else placed.state.rows.drafter
    leaves = _leaves(setup, placed.params)
    arguments = jax.tree.leaves((placed.params, state))
    shards = [x.size // math.prod(local_shape(x)) for x in arguments]
    num_params = len(leaves.arrays)
    own = range(leaves.number) if side == kinds.TARGET else range(leaves.number, num_params)
    # Integers that are contracted or scaled are quantised matrices.
    small = frozenset(i for i, x in enumerate(leaves.arrays) if jnp.issubdtype(x.dtype, jnp.integer) and x.ndim > 1)
    config = placed_config(setup, side)
    stacks = frozenset(i for i in own if leaves.axes[i][:1] == ("experts",))
    rows = setup.batch_size // setup.data

    def traced(tokens: int) -> Cost:
        block = jax.ShapeDtypeStruct((setup.batch_size, tokens), jnp.int32)
        jaxpr = jax.make_jaxpr(placed.calls[call])(placed.params, state, block).jaxpr
        read: set[int] = set()
        looked_up: set[int] = set()
        flops = 0.0
        for product in _walk(jaxpr, [*range(len(arguments)), -1], small, stacks, read, looked_up):
            known = [i for i in product.arguments if i >= 0]
            # A product with the cache has its rows split already; one with a parameter runs for the device's own rows.
            divisors = [shards[i] * (setup.data if i < num_params else 1) for i in known]
            flops += product.flops / max(divisors, default=setup.data)
        reduced = list(_reduced(leaves, read | stacks, looked_up)) if setup.mesh_shape[1] > 1 else []
        return Cost(
            flops,
            local_bytes([arguments[i] for i in read if i < num_params]),
            local_bytes([arguments[i] for i in read if i >= num_params]),
            len(reduced),
            # Partial sums are float32.
            4.0 * rows * tokens * sum(reduced),
        )

    two, three = traced(2), traced(3)

    def cost(tokens: int) -> Cost:
        found = Cost(*(a + (tokens - 2) * (b - a) for a, b in zip(two, three, strict=True)))
        if not stacks or not isinstance(config, DecoderConfig) or config.experts is None:
            return found
        flops, size = _of_experts(config.experts, leaves, sorted(stacks), rows * tokens)
        return found._replace(flops=found.flops + flops, parameter_bytes=found.parameter_bytes + size)

    return cost


def costs(setup: Setup) -> dict[str, Callable[[int], Cost]]:
    """`call_cost` of the target's call and of each of the draft's, by name."""
    setup = unrolled(setup)
    return {name: call_cost(setup, name) for name in shard(setup, abstract_mesh(setup)).calls}


def with_collectives(cost: Callable[[int], Cost], seen: dict[int, tuple[float, float]]) -> Callable[[int], Cost]:
    """Costs with the collectives of compiled programs instead of the computed ones.

    Args:
      cost: the cost by number of tokens.
      seen: the number of collectives, and the bytes of all, by number of tokens; the others are on the line through the
        first and the last, and where there is only one, their bytes are in proportion to the tokens.
    """
    first, last = min(seen), max(seen)

    def at(tokens: int) -> Cost:
        if last == first:
            number, size = seen[first]
            return cost(tokens)._replace(all_reduces=number, all_reduce_bytes=size * tokens / first)
        share = (tokens - first) / (last - first)
        number, size = (a + share * (b - a) for a, b in zip(seen[first], seen[last], strict=True))
        return cost(tokens)._replace(all_reduces=number, all_reduce_bytes=size)

    return at
