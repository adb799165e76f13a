"""Compiles the decode step for TPUs that you don't have, and reads what XLA made of it.

libtpu compiles for a topology by name; nothing is run. Compiling dozens of unrolled layers takes minutes, so a step is
compiled with few layers, twice, and what is per layer is extrapolated (`extrapolate`): every layer is the same program.

`cost_analysis` counts the body of a loop once, so operations and bytes are read from single calls, without a loop:
`draft_call` and `target_call`, each with its sampling, options known, so that only the branch that runs is compiled.
"""

import collections
import importlib.util
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specjax import decoding, sampling
from specjax.decoding import verify
from specjax.decoding.verify import Rule
from specjax.drafters.model import choose
from specjax.models import cache as cache_lib
from specjax.planning import hlo, plan
from specjax.planning.chips import Topology
from specjax.planning.plan import Setup, Sharded
from specjax.types import Block, History, Proposal, SamplingOptions, StepKeys

# Without the first three, libtpu asks a metadata server what machine it is on, and complains that there is none.
# Without the last, only one process at a time may load it, which is meant for those that use a TPU.
_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

FEW, MORE = 2, 4
"""The numbers of layers that are compiled, instead of all of them."""

PARTS = ("target_call", "draft_call", "drafting", "")
"""Scopes that `plan.shard` names, the innermost first; the last is everything else: verification and commit."""

Counts = Mapping[tuple[str, str], tuple[float, float, float]]
"""By part and kind of collective: how many, the bytes of all, and those of the largest."""


def is_available() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def make_mesh(topology: Topology, data: int) -> Mesh:
    """The mesh of a topology that this machine does not have, `data` times `model`.

    Raises:
      ValueError: where libtpu is not installed, does not know the topology, or cannot be loaded.
    """
    from jax.experimental import topologies

    if not is_available():
        raise ValueError(
            f"Compiling for {topology.name} needs libtpu: pip install -e '.[tpu]', or --config.compile=False, which "
            "computes everything from shapes."
        )
    chip = topology.chip
    options: dict[str, Any] = {}
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # One device a chip.
    if topology.num_chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    for name, value in _MACHINE.items():
        os.environ.setdefault(name, value)
    shape = "x".join(map(str, topology.shape))
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.compiler_name}:{shape}", **options
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"topology={topology.name!r}: libtpu does not give it ({reason}). There are sizes of 1, 2, 4, 8 ..."
        ) from error
    devices = topologies.make_mesh(description, (data, topology.num_devices // data), ("data", "model")).devices
    return Mesh(devices, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


class Program(NamedTuple):
    """What XLA made of a program, of one device.

    Attributes:
      argument_bytes: of what goes in, as it lies in memory, padding and all.
      output_bytes: of what comes out.
      alias_bytes: of those outputs that are written in place of an argument.
      temporary_bytes: beside.
      code_bytes: of the program itself.
      flops: counted by XLA; bodies of loops once.
      bytes_accessed: counted in the same way, on-chip memories included; None where extrapolated, since it depends on
        what fits into them.
      optimal_seconds: XLA's own estimate; None where it has none (it is not positive), or where extrapolated.
      collectives: as they stand in the program, each once.
      cache_copies: instructions that copy a layer's keys or values.
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


def _part(op_name: str) -> str:
    return next(part for part in PARTS if part in op_name)


def read(compiled: Any, cache_shapes: set[tuple[int, ...]]) -> Program:
    """Reads a compiled program.

    Args:
      compiled: as `lowered.compile()` gives it.
      cache_shapes: of the layers' keys and values on one device.
    """
    text, cost, stats = compiled.as_text(), compiled.cost_analysis() or {}, compiled.memory_analysis()
    found: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for collective in hlo.collectives(text):
        found[_part(collective.op_name), collective.kind].append(collective.size_in_bytes)
    seconds = float(cost.get("optimal_seconds", -1.0))
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
    )


def cache_shapes(*caches: Any) -> set[tuple[int, ...]]:
    """The shapes of the layers' keys and values on one device, of abstract caches (`plan.shard`)."""
    leaves = jax.tree.leaves(caches)
    return {x.sharding.shard_shape(x.shape) for x in leaves if len(cache_lib.axes_of(x.ndim)) > 1}


def step(setup: Setup, mesh: Mesh, rule: Rule = verify.rejection) -> Any:
    """The whole loop (`decode.advance`), compiled: its state is donated, its sampling options are arguments."""
    placed = plan.shard(setup, mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        lowered = decoding.advance.lower(
            placed.models["target"], placed.drafter, rule, placed.params, placed.state, number
        )
        return lowered.compile()


def _rows_like(mesh: Mesh, shape: tuple[int, ...], dtype: Any, vocab: str | None = None) -> jax.ShapeDtypeStruct:
    """An array whose first axis is rows; and whose last is the vocabulary, where it is split."""
    spec = ["data", *[None] * (len(shape) - 2), vocab] if len(shape) > 1 else ["data"]
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def _numbers(temperature: float) -> dict[str, tuple[Any, Any]]:
    """Sampling options as plain numbers, which become constants of a program."""
    options = sampling.options(1, temperature=temperature)
    return {name: (x.item(), x.dtype) for name, x in options._asdict().items() if x is not None}


def _constant(numbers: dict[str, tuple[Any, Any]], rows: int) -> SamplingOptions:
    """Sampling options that XLA knows when it compiles."""
    values: dict[str, Any] = {name: jnp.full(rows, value, dtype) for name, (value, dtype) in numbers.items()}
    return SamplingOptions(**values, penalties=None)


def _no_history(rows: int, tokens: int) -> History:
    """Without penalties and grammar, it is not read."""
    none = jnp.zeros(rows, jnp.int32)
    nothing = jnp.zeros((rows, tokens), jnp.int32)
    return History(none[:, None], none, none, nothing[:, :0], None, nothing)


def draft_call(setup: Setup, mesh: Mesh, temperature: float = 0.0) -> Any:
    """One draft call that reads one token of each row and draws the next, compiled (`drafters.model`)."""
    placed, rows = plan.shard(setup, mesh), setup.batch_size
    vocab_size, numbers = setup.target.vocab_size, _numbers(temperature)

    def call(params: Any, cache: Any, token: Any, keys: Any) -> Any:
        output, cache = placed.models["draft"].apply(params, Block(token), cache)
        with jax.named_scope("drafting"):
            history, options = _no_history(rows, 1), _constant(numbers, rows)
            return *choose(output.logits, keys, history, options, vocab_size), cache

    token = _rows_like(mesh, (rows, 1), jnp.int32)
    with jax.set_mesh(mesh):
        keys = placed.state.rows.seed
        lowered = jax.jit(call, donate_argnums=1).lower(placed.params.draft, placed.state.rows.drafter, token, keys)
        return lowered.compile()


def target_call(setup: Setup, mesh: Mesh, tokens: int, temperature: float = 0.0, rule: Rule = verify.rejection) -> Any:
    """One target call that scores some tokens of each row and judges the drafts among them, compiled (`decode`)."""
    placed, rows = plan.shard(setup, mesh), setup.batch_size
    vocab_size, numbers = setup.target.vocab_size, _numbers(temperature)
    table = dict(placed.rules["target"])
    keys = _rows_like(mesh, (rows, tokens), placed.state.rows.seed.dtype)

    def call(params: Any, cache: Any, block: Any, probs: Any, accept: Any, token: Any) -> Any:
        output, cache = placed.models["target"].apply(params, Block(block), cache)
        proposal = Proposal(block[:, 1:], jnp.full(rows, tokens - 1), probs)
        verdict, target_probs = decoding.apply_rule(
            rule,
            _constant(numbers, rows),
            proposal,
            StepKeys(accept, token),
            output.logits,
            _no_history(rows, tokens),
        )
        return verdict, jax.vmap(verify.overlap)(target_probs, proposal), cache

    block = _rows_like(mesh, (rows, tokens), jnp.int32)
    probs = _rows_like(mesh, (rows, tokens - 1, vocab_size), jnp.float32, table["vocab"])
    with jax.set_mesh(mesh):
        lowered = jax.jit(call, donate_argnums=1).lower(
            placed.params.target, placed.state.rows.cache, block, probs, placed.state.rows.seed, keys
        )
        return lowered.compile()


def _combine(programs: list[tuple[float, Program]]) -> Program:
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


def _samples(layers: int, every: bool) -> list[tuple[float, int]]:
    """Numbers of layers to compile, and the weight of each in the result for all layers."""
    if every or layers <= MORE:
        return [(1.0, layers)]
    slope = (layers - FEW) / (MORE - FEW)
    return [(1.0 - slope, FEW), (slope, MORE)]


class Compiled(NamedTuple):
    """What XLA makes of a plan.

    Attributes:
      step: the whole loop.
      calls: single calls, by side and number of tokens: the draft of one, the target of one and of K + 1.
      layers: with how many layers of the target, and of the draft, programs were compiled.
      exact: whether those are all layers; else `step` and `calls` are extrapolated from them.
      seconds: that compiling took.
    """

    step: Program
    calls: dict[tuple[str, int], Program]
    layers: dict[str, list[int]]
    exact: bool
    seconds: float


def extrapolate(
    setup: Setup, mesh: Mesh, *, temperature: float = 0.0, rule: Rule = verify.rejection, every_layer: bool = False
) -> Compiled:
    """Compiles a plan with few layers and extrapolates, linearly in the layers of either side, to all.

    Args:
      setup: the plan.
      mesh: of `make_mesh`.
      temperature: at which single calls sample.
      rule: the acceptance rule.
      every_layer: compile all layers instead.
    """
    start = time.perf_counter()
    targets, drafts = (_samples(setup.side(side).num_layers, every_layer) for side in plan.SIDES)
    base = targets[0][1], drafts[0][1]

    def compiled_step(target: int, draft: int) -> Program:
        few = plan.with_layers(setup, target, draft)
        placed = plan.shard(few, mesh)
        return read(step(few, mesh, rule), cache_shapes(placed.state.rows.cache, placed.state.rows.drafter))

    # f(t, d) = f(t0, d0) + (f(t, d0) - f(t0, d0)) + (f(t0, d) - f(t0, d0)): linear in both.
    terms = [(weight, (layers, base[1])) for weight, layers in targets]
    terms += [(weight, (base[0], layers)) for weight, layers in drafts] + [(-1.0, base)]
    weights: dict[tuple[int, int], float] = collections.defaultdict(float)
    for weight, layers in terms:
        weights[layers] += weight
    whole = _combine([(weight, compiled_step(*layers)) for layers, weight in weights.items() if weight])

    def compiled_call(side: str, tokens: int) -> Program:
        programs = []
        for weight, layers in targets if side == "target" else drafts:
            few = (
                plan.with_layers(setup, layers, base[1])
                if side == "target"
                else plan.with_layers(setup, base[0], layers)
            )
            placed: Sharded = plan.shard(few, mesh)
            if side == "target":
                program = target_call(few, mesh, tokens, temperature, rule)
                shapes = cache_shapes(placed.state.rows.cache)
            else:
                program, shapes = draft_call(few, mesh, temperature), cache_shapes(placed.state.rows.drafter)
            programs.append((weight, read(program, shapes)))
        return _combine(programs)

    wanted = (("draft", 1), ("target", 1), ("target", setup.num_draft_tokens + 1))
    calls = {(side, tokens): compiled_call(side, tokens) for side, tokens in wanted}
    layers = {side: [n for _, n in found] for side, found in zip(plan.SIDES, (targets, drafts), strict=True)}
    exact = all(len(found) == 1 for found in (targets, drafts))
    return Compiled(whole, calls, layers, exact, time.perf_counter() - start)
