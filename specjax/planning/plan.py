"""What a decode step takes on chips that are not here: memory, arithmetic, collectives, and the time at the roofline.

Everything here is computed from shapes: a model call is traced, its matrix products are counted, and what they read is
divided by the shardings that the rules give it. `aot` compiles the same step for TPUs and reads what XLA made of it.

The time of a call is the larger of its arithmetic at the chip's peak and its bytes at the memory's peak, and after that
its all-reduces, each of which waits for the slowest hop: nothing overlaps with them while one token follows another.
So it is a prediction, and a lower bound.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from specjax import decoding, drafters, sampling, theory
from specjax.models import cache as cache_lib
from specjax.models import families, linear
from specjax.models.config import DecoderConfig, ModelConfig
from specjax.parallel import sharding
from specjax.planning import chips
from specjax.planning.chips import Topology
from specjax.types import DecodeState, Drafter, Model, Params, Tree

SIDES = ("target", "draft")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is planned.

    Attributes:
      target: its shape.
      draft: its shape.
      topology: the chips.
      data: over how many of the devices rows are split; the others split each row's model.
      num_draft_tokens: K.
      batch_size: B.
      prompt_tokens: of each row.
      max_new_tokens: of each row.
      max_len: the length of the buffer, or None for what these three need.
      draft_replicated: every device has the whole draft, which then needs no collectives.
    """

    target: ModelConfig
    draft: ModelConfig
    topology: Topology
    data: int = 1
    num_draft_tokens: int = 4
    batch_size: int = 1
    prompt_tokens: int = 128
    max_new_tokens: int = 128
    max_len: int | None = None
    draft_replicated: bool = False

    def __post_init__(self):
        if self.num_draft_tokens < 1:
            raise ValueError(f"num_draft_tokens={self.num_draft_tokens}: at least 1.")
        for name in ("batch_size", "prompt_tokens", "max_new_tokens", "data"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1.")
        if self.topology.num_devices % self.data:
            raise ValueError(
                f"data={self.data} does not divide the {self.topology.num_devices} devices of {self.topology.name}."
            )
        if self.batch_size % self.data:
            raise ValueError(f"batch_size={self.batch_size} does not divide over data={self.data}: raise it.")

    @property
    def buffer(self) -> int:
        """The length of the text buffer."""
        return self.max_len or decoding.buffer_length(self.prompt_tokens + self.max_new_tokens, self.num_draft_tokens)

    @property
    def mesh_shape(self) -> tuple[int, int]:
        """Devices along `data` and `model`."""
        return self.data, self.topology.num_devices // self.data

    def side(self, name: str) -> ModelConfig:
        """The shape of the target or the draft."""
        return self.target if name == "target" else self.draft


class Sharded(NamedTuple):
    """The abstract arguments of a decode step, with their shardings.

    Attributes:
      models: target and draft, by side.
      drafter: the drafter around the draft.
      rules: by side.
      params: of both.
      state: the loop's.
    """

    models: dict[str, Model]
    drafter: Drafter
    rules: dict[str, sharding.Rules]
    params: Params
    state: DecodeState


def abstract_mesh(setup: Setup) -> AbstractMesh:
    """The mesh, without its devices."""
    types = (jax.sharding.AxisType.Auto,) * 2
    return AbstractMesh(setup.mesh_shape, ("data", "model"), axis_types=types)


def _wanted_rules(setup: Setup, side: str) -> sharding.Rules:
    return sharding.REPLICATED if side == "draft" and setup.draft_replicated else sharding.RULES


def placed_config(setup: Setup, side: str) -> ModelConfig:
    """The shape of one side as it lies on the mesh: its key/value heads repeated, where more devices share them."""
    config = setup.side(side)
    if not isinstance(config, DecoderConfig):
        return config
    return families.repeat_kv_heads(config, abstract_mesh(setup), _wanted_rules(setup, side))


def rules_of(setup: Setup, side: str, mesh: Mesh | AbstractMesh) -> sharding.Rules:
    """The rules of one side: those of everybody, with what does not divide replicated."""
    config, rules = placed_config(setup, side), _wanted_rules(setup, side)
    return sharding.fitting(families.abstract_params(config), families.param_axes(config), mesh, rules)


def _place_params(setup: Setup, side: str, mesh: Mesh | AbstractMesh) -> Tree:
    """The abstract parameters of one side, laid out on a mesh."""
    config = placed_config(setup, side)
    shapes, axes = families.abstract_params(config), families.param_axes(config)
    return sharding.abstract(shapes, axes, mesh, rules_of(setup, side, mesh))


def _cache_axes(cache: Any) -> Any:
    """Logical axes of a cache of any family: layers' keys and values, and lengths."""
    return jax.tree.map(lambda x: cache_lib.axes_of(x.ndim), cache)


@functools.lru_cache(maxsize=64)
def _state_shapes(
    target: ModelConfig,
    draft: ModelConfig,
    num_draft_tokens: int,
    batch_size: int,
    prompt_tokens: int,
    max_new_tokens: int,
    max_len: int,
) -> DecodeState:
    """The loop's state after the prefill, wherever it lies."""
    model, drafter = families.model(target), drafters.model(families.model(draft), num_draft_tokens=num_draft_tokens)
    inputs, options = decoding.read_inputs(model, [[0] * prompt_tokens] * batch_size), sampling.options(batch_size)

    def prefill(params: Params) -> DecodeState:
        return decoding.prefill(
            model, drafter, params, inputs, max_new_tokens=max_new_tokens, options=options, max_len=max_len
        )

    return jax.eval_shape(prefill, Params(families.abstract_params(target), families.abstract_params(draft)))


@functools.lru_cache(maxsize=8)
def shard(setup: Setup, mesh: Mesh | AbstractMesh) -> Sharded:
    """The abstract arguments of the step, laid out on a mesh."""
    rules = {side: rules_of(setup, side, mesh) for side in SIDES}
    models = {}
    for side in SIDES:
        model = families.model(placed_config(setup, side), rules[side])
        # The scope is to be seen in the compiled program's names, and changes nothing.
        models[side] = model._replace(apply=jax.named_scope(f"{side}_call")(model.apply))
    drafter = drafters.model(models["draft"], num_draft_tokens=setup.num_draft_tokens)
    drafter = drafter._replace(propose=jax.named_scope("drafting")(drafter.propose))
    state = _state_shapes(
        placed_config(setup, "target"),
        placed_config(setup, "draft"),
        setup.num_draft_tokens,
        setup.batch_size,
        setup.prompt_tokens,
        setup.max_new_tokens,
        setup.buffer,
    )

    def place(tree: Tree, axes: Any, side: str = "target") -> Tree:
        return sharding.abstract(tree, axes, mesh, rules[side])

    rows = state._replace(cache=None, drafter=None, stop_tokens=None, step_cost=None)  # pyright: ignore[reportArgumentType]
    placed = place(rows, jax.tree.map(lambda x: ("batch", *[None] * (x.ndim - 1)), rows))
    return Sharded(
        models,
        drafter,
        rules,
        Params(*(_place_params(setup, side, mesh) for side in SIDES)),
        placed._replace(
            cache=place(state.cache, _cache_axes(state.cache)),
            drafter=place(state.drafter, _cache_axes(state.drafter), "draft"),
            stop_tokens=place(state.stop_tokens, (None,)),
            step_cost=place(state.step_cost, ()),
        ),
    )


def _local_shape(x: Any) -> tuple[int, ...]:
    return x.sharding.shard_shape(x.shape)


def local_bytes(tree: Tree) -> int:
    """What each device holds of a tree of abstract, sharded arrays; random keys count eight bytes."""
    return sum(
        math.prod(_local_shape(x)) * (8 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize)
        for x in jax.tree.leaves(tree)
    )


class Memory(NamedTuple):
    """Bytes on each device for as long as a text is decoded.

    Attributes:
      target_parameters: of the target.
      draft_parameters: of the draft.
      target_cache: keys and values.
      draft_cache: likewise.
      other: the rest of the loop's state.
    """

    target_parameters: int
    draft_parameters: int
    target_cache: int
    draft_cache: int
    other: int


def with_layers(setup: Setup, target: int, draft: int) -> Setup:
    """The same plan with another number of layers."""
    return dataclasses.replace(
        setup,
        target=dataclasses.replace(setup.target, num_layers=target),
        draft=dataclasses.replace(setup.draft, num_layers=draft),
    )


def unrolled(setup: Setup) -> Setup:
    """The same plan with no layers scanned, which holds, reads and computes the same."""

    def side(config: ModelConfig) -> ModelConfig:
        return dataclasses.replace(config, scan_layers=False) if isinstance(config, DecoderConfig) else config

    return dataclasses.replace(setup, target=side(setup.target), draft=side(setup.draft))


@functools.lru_cache(maxsize=64)
def memory(setup: Setup) -> Memory:
    """What lies in each device's memory, temporaries not counted."""
    setup, mesh = unrolled(setup), abstract_mesh(setup)
    # Caches are traced with one layer: all are alike, and there may be many.
    state = shard(with_layers(setup, 1, 1), mesh).state

    def cache(tree: Tree, side: str) -> int:
        leaves = jax.tree.leaves(tree)
        layers = setup.side(side).num_layers
        return sum(local_bytes([x]) * (layers if x.ndim == len(cache_lib.AXES) else 1) for x in leaves)

    caches = cache(state.cache, "target"), cache(state.drafter, "draft")
    other = local_bytes(state) - local_bytes(state.cache) - local_bytes(state.drafter)
    target, draft = (local_bytes(_place_params(setup, side, mesh)) for side in SIDES)
    return Memory(target, draft, *caches, other)


class Cost(NamedTuple):
    """What one model call takes on each device.

    Attributes:
      flops: multiplications and additions of its matrix products.
      parameter_bytes: of the parameters that it reads.
      cache_bytes: of the keys and values that it reads, which is the whole buffer.
      all_reduces: how many.
      all_reduce_bytes: of all of them.
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
_LOOKUPS = frozenset(("gather", "dynamic_slice"))


class _Product(NamedTuple):
    """A matrix product: its operations, and which argument of the program its operands stem from, or -1."""

    flops: int
    arguments: tuple[int, int]


def _inner(eqn: Any) -> Any:
    """The program that an equation calls, if it does: of a branch, that for accelerators, which is the last."""
    params = eqn.params
    found = params.get("jaxpr", params.get("call_jaxpr", (params.get("branches") or [None])[-1]))
    return getattr(found, "jaxpr", found)


def _walk(jaxpr: Any, origins: list[int], read: set[int], looked_up: set[int]) -> Generator[_Product, None, list[int]]:
    """The matrix products of a program, noting which of its arguments are read, and which are only looked up in.

    Returns:
      which argument each result is another form of, or -1.
    """
    origin: dict[Any, int] = dict(zip(jaxpr.invars, origins, strict=True))

    def of(x: Any) -> int:
        return -1 if hasattr(x, "val") else origin.get(x, -1)

    for eqn in jaxpr.eqns:
        name, sources = eqn.primitive.name, [of(x) for x in eqn.invars]
        inner = _inner(eqn)
        if name in _SAME_DATA or name in _UPDATES:
            origin[eqn.outvars[0]] = sources[0]
        elif inner is not None:
            results = yield from _walk(inner, sources[len(sources) - len(inner.invars) :], read, looked_up)
            origin.update(zip(eqn.outvars, results, strict=True))
        elif name in _LOOKUPS:
            looked_up.update({sources[0]} - {-1})
        else:
            read.update(source for source in sources if source >= 0)
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            size = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            yield _Product(2 * size * math.prod(eqn.outvars[0].aval.shape), (sources[0], sources[1]))
    return [of(x) for x in jaxpr.outvars]


def _reduced(config: ModelConfig, params: Tree, read: set[int], looked_up: set[int]) -> Iterator[int]:
    """Numbers a token of each all-reduce: products whose contracted axes are split, lookups in a split vocabulary."""
    leaves, treedef = jax.tree.flatten(params)
    contracted, axes = (treedef.flatten_up_to(f(config)) for f in (families.num_contracted, families.param_axes))
    for i, (leaf, number, names) in enumerate(zip(leaves, contracted, axes, strict=True)):
        split = [axis is not None for axis in (*leaf.sharding.spec, *[None] * leaf.ndim)]
        outputs_first = linear.outputs_first(leaf.dtype)
        inputs = range(leaf.ndim - number, leaf.ndim) if outputs_first else range(number)
        if i in read and any(split[axis] for axis in inputs):
            yield leaf.size // math.prod(leaf.shape[axis] for axis in inputs)
        if i in looked_up and "vocab" in names and split[names.index("vocab")]:
            yield leaf.size // leaf.shape[names.index("vocab")]


def call_cost(setup: Setup, side: str) -> Callable[[int], Cost]:
    """What a call of one side takes on each device, by the number of tokens that it reads of each row.

    Two calls are traced, of two and three tokens; every cost grows by as much with each further token.
    """
    setup = unrolled(setup)
    placed = shard(setup, abstract_mesh(setup))
    index = SIDES.index(side)
    params, cache = placed.params[index], (placed.state.cache, placed.state.drafter)[index]
    arguments = jax.tree.leaves((params, cache))
    shards = [x.size // math.prod(_local_shape(x)) for x in arguments]
    num_params = len(jax.tree.leaves(params))
    rows = setup.batch_size // setup.data

    def traced(tokens: int) -> Cost:
        block = jax.ShapeDtypeStruct((setup.batch_size, tokens), jnp.int32)
        apply = placed.models[side].apply
        jaxpr = jax.make_jaxpr(lambda params, cache, tokens: apply(params, tokens, cache))(params, cache, block).jaxpr
        read: set[int] = set()
        looked_up: set[int] = set()
        flops = 0.0
        for product in _walk(jaxpr, [*range(len(arguments)), -1], read, looked_up):
            known = [i for i in product.arguments if i >= 0]
            # A product with the cache has its rows split already; one with a parameter runs for the device's own rows.
            divisors = [shards[i] * (setup.data if i < num_params else 1) for i in known]
            flops += product.flops / max(divisors, default=setup.data)
        reduced = list(_reduced(placed_config(setup, side), params, read, looked_up)) if setup.mesh_shape[1] > 1 else []
        return Cost(
            flops,
            local_bytes([arguments[i] for i in read if i < num_params]),
            local_bytes([arguments[i] for i in read if i >= num_params]),
            len(reduced),
            # Partial sums are float32.
            4.0 * rows * tokens * sum(reduced),
        )

    two, three = traced(2), traced(3)
    return lambda tokens: Cost(*(a + (tokens - 2) * (b - a) for a, b in zip(two, three, strict=True)))


def with_collectives(cost: Callable[[int], Cost], seen: dict[int, tuple[float, float]]) -> Callable[[int], Cost]:
    """Costs with the collectives that a compiled program has in the place of those that were computed.

    Args:
      cost: by number of tokens.
      seen: how many, and the bytes of all, by number of tokens; in between and beyond, the line through the first and
        the last.
    """
    first, last = min(seen), max(seen)

    def at(tokens: int) -> Cost:
        share = (tokens - first) / (last - first) if last > first else 0.0
        number, size = (a + share * (b - a) for a, b in zip(seen[first], seen[last], strict=True))
        return cost(tokens)._replace(all_reduces=number, all_reduce_bytes=size)

    return at


class Times(NamedTuple):
    """Seconds of a call at the roofline.

    Attributes:
      arithmetic: at the chip's peak rate.
      memory: parameters and cache at the memory's.
      collectives: all-reduces, one after the other.
    """

    arithmetic: float
    memory: float
    collectives: float

    @property
    def total(self) -> float:
        """Arithmetic and memory overlap; collectives wait for both."""
        return max(self.arithmetic, self.memory) + self.collectives


def times(setup: Setup, cost: Cost) -> Times:
    """How long a call takes at the least, by its cost."""
    chip, group = setup.topology.chip, setup.mesh_shape[1]
    one = chips.all_reduce_seconds(setup.topology, group, cost.all_reduce_bytes / max(cost.all_reduces, 1.0))
    return Times(
        cost.flops / (chip.flops / chip.devices),
        (cost.parameter_bytes + cost.cache_bytes) / (chip.bandwidth / chip.devices),
        cost.all_reduces * one,
    )


class Forecast(NamedTuple):
    """What speculation should bring, of times at the roofline.

    Attributes:
      target: seconds of a target call that scores T = 1, 2 ... tokens.
      draft: seconds of a draft call of one token.
      cost_ratio: c.
      alpha: the acceptance rate that is assumed.
      milliseconds: per token with K = 0, 1, 2 ... draft tokens a step, all rows together writing one each.
      best: the K of the fewest.
    """

    target: list[float]
    draft: float
    cost_ratio: float
    alpha: float
    milliseconds: list[float]
    best: int


def forecast(target: list[float], draft: float, alpha: float) -> Forecast:
    """Theorem 3.8 of Leviathan et al. 2022 over roofline times, where scoring K + 1 tokens has its own.

    Args:
      target: seconds of a target call that scores T = 1, 2 ... tokens.
      draft: seconds of a draft call of one token.
      alpha: the acceptance rate.
    """
    c, most = draft / target[0], len(target) - 1

    def score_cost(k: int) -> float:
        return target[k] / target[0]

    milliseconds = [1e3 * target[0] / theory.walltime_factor(alpha, k, c, score_cost(k)) for k in range(most + 1)]
    best = theory.best_num_draft_tokens(alpha, c, score_cost, max_draft_tokens=most)
    return Forecast(target, draft, c, alpha, milliseconds, best)


class Fit(NamedTuple):
    """Whether a plan fits.

    Attributes:
      needed: bytes on each device.
      available: likewise.
      remedies: where it does not fit, what would, each computed; else nothing.
    """

    needed: int
    available: int
    remedies: list[str]

    @property
    def fits(self) -> bool:
        """Whether there is as much as it takes."""
        return self.needed <= self.available


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _larger(setup: Setup) -> Iterator[Setup]:
    """The plan on twice as many chips, four times ..., which split the models, or, where they can, rows too.

    The smallest dimension of the topology is doubled.
    """
    shape = list(setup.topology.shape)
    while 2 * math.prod(shape) <= setup.topology.chip.most:
        # The last of the smallest.
        i = max(range(len(shape)), key=lambda i: (-shape[i], i))
        shape[i] *= 2
        topology = dataclasses.replace(setup.topology, shape=tuple(shape))
        data = setup.data
        while setup.batch_size % data == 0 and topology.num_devices % data == 0:
            yield dataclasses.replace(setup, topology=topology, data=data)
            data *= 2


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number in `low .. high` that fits, of those that fit up to some number."""
    if high < low or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def fit(setup: Setup, overhead: int = 0) -> Fit:
    """Whether a plan fits, and if not, what would.

    Args:
      setup: the plan.
      overhead: bytes on each device beside parameters and state: temporaries, code, padding.
    """
    available = setup.topology.chip.memory // setup.topology.chip.devices

    def needs(setup: Setup) -> int:
        return sum(memory(setup)) + overhead

    def enough(setup: Setup) -> bool:
        return needs(setup) <= available

    if enough(setup):
        return Fit(needs(setup), available, [])
    remedies = []
    narrow = setup
    for side in SIDES:
        if setup.side(side).dtype != "bfloat16":
            narrow = dataclasses.replace(narrow, **{side: dataclasses.replace(setup.side(side), dtype="bfloat16")})
    if narrow != setup and enough(narrow):
        remedies.append(f"bfloat16 needs {_gib(needs(narrow))} a device: --config.dtype=bfloat16")
    # More chips as things are, and, where bfloat16 alone is not enough, fewer of them with it.
    plans = [(setup, "", "")]
    if narrow != setup and not enough(narrow):
        plans.append((narrow, " in bfloat16", " --config.dtype=bfloat16"))
    for plan, words, flag in plans:
        larger = next((setup for setup in _larger(plan) if enough(setup)), None)
        if larger is not None:
            split = f" --config.data={larger.data}" if larger.data != setup.data else ""
            remedies.append(
                f"{larger.topology.num_chips} chips{words} need {_gib(needs(larger))} a device: "
                f"--config.topology={larger.topology.name}{split}{flag}"
            )
    batch = _largest(
        1,
        setup.batch_size // setup.data - 1,
        lambda n: enough(dataclasses.replace(setup, batch_size=n * setup.data)),
    )
    if batch is not None:
        smaller = dataclasses.replace(setup, batch_size=batch * setup.data)
        remedies.append(
            f"a batch of {smaller.batch_size} needs {_gib(needs(smaller))}: --config.batch_size={smaller.batch_size}"
        )
    least = decoding.buffer_length(setup.prompt_tokens + 1, setup.num_draft_tokens) // decoding.BUFFER_MULTIPLE

    def of_buffer(n: int) -> Setup:
        length = n * decoding.BUFFER_MULTIPLE
        room = length - setup.prompt_tokens - setup.num_draft_tokens - 1
        return dataclasses.replace(setup, max_len=length, max_new_tokens=min(room, setup.max_new_tokens))

    buffer = _largest(least, setup.buffer // decoding.BUFFER_MULTIPLE - 1, lambda n: enough(of_buffer(n)))
    if buffer is not None:
        shorter = of_buffer(buffer)
        remedies.append(
            f"a buffer of {shorter.buffer} tokens needs {_gib(needs(shorter))}: "
            f"--config.max_new_tokens={shorter.max_new_tokens}"
        )
    return Fit(needs(setup), available, remedies)


def replicated(setup: Setup, side: str) -> list[str]:
    """Logical axes of one side that the mesh would have split, but that do not divide: every device has them whole."""
    if side == "draft" and setup.draft_replicated:
        return []
    mesh = abstract_mesh(setup)
    table = dict(rules_of(setup, side, mesh))
    return [name for name, axis in sharding.RULES if axis is not None and mesh.shape[axis] > 1 and table[name] is None]
