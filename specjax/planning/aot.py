"""Compiles the decode step for TPUs and GPUs that you don't have, and reads what XLA made of it.

libtpu and the CUDA plugin of JAX compile for a topology; nothing is run. Compiling dozens of unrolled layers takes
minutes, so a step is compiled with few layers, twice, and extrapolated to all of them (`extrapolate`): every layer is
the same program.

`cost_analysis` counts the body of a loop once, so operations and bytes are read from single calls, without a loop:
`draft_call` and `target_call`, each with its sampling, whose options are constants, so that one branch is compiled.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specjax import decoding, sampling
from specjax.decoding import verify
from specjax.decoding.verify import Rule
from specjax.drafters.rollout import choose
from specjax.planning import cuda, kinds, libtpu, plan
from specjax.planning.chips import Chip, Topology
from specjax.planning.extrapolation import both_sides, combine, samples
from specjax.planning.plan import Setup, Sharded
from specjax.planning.program import Counts, Program, cache_shapes, read
from specjax.types import Block, Draft, History, Proposal, SamplingOptions, StepKeys

__all__ = [
    "Compiled",
    "Counts",
    "Program",
    "cache_shapes",
    "draft_call",
    "extrapolate",
    "is_available",
    "make_mesh",
    "read",
    "step",
    "target_call",
]


def is_available(chip: Chip) -> bool:
    """Whether the compiler for a chip is installed."""
    return (libtpu if chip.tpu else cuda).is_available()


def make_mesh(topology: Topology, data: int) -> Mesh:
    """The mesh of a topology that you don't have, `data` times `model`.

    Raises:
      ValueError: where its compiler is not installed, does not know the topology, or cannot be loaded.
    """
    return (libtpu if topology.chip.tpu else cuda).make_mesh(topology, data)


def _compile(lowered: Any, options: Mapping[str, str] | None = None) -> Any:
    """Compiles without the compilation cache: a program for chips that are not here can be written, but not read."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX decides only once whether it uses its cache.
    try:
        return lowered.compile(compiler_options=dict(options) if options else None)
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def step(
    setup: Setup,
    mesh: Mesh,
    rule: Rule = verify.rejection,
    make: Callable[[Sharded], Draft] | None = None,
    compiler_options: Mapping[str, str] | None = None,
) -> Any:
    """The whole loop (`decoding.advance`), compiled: its state is donated, its sampling options are arguments.

    Args:
      setup: the plan.
      mesh: from `make_mesh`.
      rule: the acceptance rule.
      make: another drafter than the plan's chain, as deep as that is long, from the models and their parameters.
      compiler_options: options of XLA.
    """
    placed = plan.shard(setup, mesh)
    drafter, params, state = placed.drafter, placed.params, placed.state
    if make is not None:
        made = make(placed)
        drafter, params = made.drafter, params._replace(draft=made.params)
        lengths = len(drafter.topology.all_lengths)
        stats = state.rows.stats._replace(steps_by_length=_rows_like(mesh, (setup.batch_size, lengths), jnp.int32))
        state = state._replace(rows=state.rows._replace(stats=stats))
        own = jax.eval_shape(lambda: drafter.init(setup.batch_size, setup.buffer, setup.prompt_tokens))
        if jax.tree.structure(own) != jax.tree.structure(state.rows.drafter):
            # Not the cache of the plan's draft model, which is placed already.
            own = jax.tree.map(lambda x: _rows_like(mesh, x.shape, x.dtype), own)
            state = state._replace(rows=state.rows._replace(drafter=own))
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        lowered = decoding.advance.lower(placed.models["target"], drafter, rule, params, state, number)
        return _compile(lowered, compiler_options)


def _rows_like(mesh: Mesh, shape: tuple[int, ...], dtype: Any, vocab: str | None = None) -> jax.ShapeDtypeStruct:
    """An array whose first axis is rows, and whose last one is split over the mesh axis `vocab`."""
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
    """A placeholder: without penalties and a grammar, the history is not read."""
    none = jnp.zeros(rows, jnp.int32)
    nothing = jnp.zeros((rows, tokens), jnp.int32)
    return History(none[:, None], none, none, nothing[:, :0], None, nothing)


def draft_call(setup: Setup, mesh: Mesh, temperature: float = 0.0, call: str = kinds.DRAFT, tokens: int = 1) -> Any:
    """One draft call that reads some tokens of each row and draws one from each of its logits, compiled.

    Args:
      setup: the plan.
      mesh: from `make_mesh`.
      temperature: the sampling temperature.
      call: one of the calls of the draft's kind (`kinds.Made.calls`).
      tokens: how many tokens of each row it reads.
    """
    placed, rows = plan.shard(setup, mesh), setup.batch_size
    vocab_size, numbers, run = setup.target.vocab_size, _numbers(temperature), placed.calls[call]
    state, token = placed.state.rows.drafter, _rows_like(mesh, (rows, tokens), jnp.int32)
    number = jax.eval_shape(run, placed.params, state, token)[0].shape[1]

    def draw(logits: Any, keys: Any) -> Any:
        history, options = _no_history(rows, 1), _constant(numbers, rows)
        return choose(logits, keys, history, options, vocab_size)

    def read(params: Any, state: Any, token: Any, keys: Any) -> Any:
        logits, state = run(params, state, token)
        with jax.named_scope("drafting"):
            if number == 1:
                return *draw(logits, keys[:, 0]), state
            return *jax.vmap(draw, in_axes=1)(logits[:, :, None], keys), state

    with jax.set_mesh(mesh):
        keys = _rows_like(mesh, (rows, number), placed.state.rows.seed.dtype)
        return _compile(jax.jit(read, donate_argnums=1).lower(placed.params, state, token, keys))


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
        return _compile(lowered)


class Compiled(NamedTuple):
    """The programs that XLA compiles for a plan.

    Attributes:
      step: the whole loop.
      calls: single calls, by name and number of tokens: the draft's as a step makes them, the target's of one token and
        of as many as a step scores.
      layers: with how many layers of the target, and of the draft, programs were compiled.
      exact: whether those are all layers; else `step` and `calls` are extrapolated from them.
      seconds: the time that compilation took.
    """

    step: Program
    calls: dict[tuple[str, int], Program]
    layers: dict[str, list[int]]
    exact: bool
    seconds: float


def extrapolate(
    setup: Setup,
    mesh: Mesh,
    *,
    temperature: float = 0.0,
    rule: Rule = verify.rejection,
    every_layer: bool = False,
    compiler_options: Mapping[str, str] | None = None,
) -> Compiled:
    """Compiles a plan with few layers and extrapolates to all, linearly in the layers of each side.

    Args:
      setup: the plan.
      mesh: from `make_mesh`.
      temperature: the sampling temperature of single calls.
      rule: the acceptance rule.
      every_layer: compile all layers instead.
      compiler_options: options of XLA for the step; single calls are compiled without them.
    """
    start, setup = time.perf_counter(), plan.with_attention(setup)
    targets, drafts = (samples(setup.num_layers(side), every_layer) for side in plan.SIDES)
    base = targets[0][1], drafts[0][1]

    def compiled_step(target: int, draft: int) -> Program:
        few = plan.with_layers(setup, target, draft)
        placed = plan.shard(few, mesh)
        compiled = step(few, mesh, rule, compiler_options=compiler_options)
        return read(compiled, cache_shapes(placed.state.rows.cache, placed.state.rows.drafter))

    def compiled_draft(layers: int, reads: kinds.Reads) -> Program:
        few = plan.with_layers(setup, base[0], layers)
        program = draft_call(few, mesh, temperature, reads.call, reads.tokens)
        return read(program, cache_shapes(plan.shard(few, mesh).state.rows.drafter))

    def compiled_target(layers: int, tokens: int) -> Program:
        few = plan.with_layers(setup, layers, base[1])
        program = target_call(few, mesh, tokens, temperature, rule)
        return read(program, cache_shapes(plan.shard(few, mesh).state.rows.cache))

    whole = combine([(weight, compiled_step(*layers)) for layers, weight in both_sides(targets, drafts).items()])
    calls = {}
    for reads in setup.step.drafting:
        if reads.call != kinds.TARGET:
            found = [(weight, compiled_draft(layers, reads)) for weight, layers in drafts]
            calls[reads.call, reads.tokens] = combine(found)
    for tokens in (1, setup.step.scored):
        calls[kinds.TARGET, tokens] = combine([(weight, compiled_target(layers, tokens)) for weight, layers in targets])
    layers = {side: [n for _, n in found] for side, found in zip(plan.SIDES, (targets, drafts), strict=True)}
    exact = all(len(found) == 1 for found in (targets, drafts))
    return Compiled(whole, calls, layers, exact, time.perf_counter() - start)
