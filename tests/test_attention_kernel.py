"""Attention whose cost follows each row's own length: interpreted, against the einsum; compiled, without its chips."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import usual
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specjax.models import attention, layers
from specjax.models.attention_kernel import attend_ragged
from specjax.planning import aot, chips, hlo

BLOCK, HEADS = 32, 2

FORMS: dict[str, dict[str, Any]] = {
    "gpu": {"form": "gpu", "interpret": True},
    "tpu": {"form": "tpu", "interpret": True},
    "tpu with its memories": {"form": "tpu", "interpret": pltpu.InterpretParams(uninitialized_memory="nan")},
}


class Case(NamedTuple):
    """A shape, and what its queries see."""

    kind: str = "chain"
    tokens: int = 5
    group: int = 3
    dtype: str = "float32"
    window: int | None = None
    cap: float | None = None
    entries: int = 80
    size: int = 16

    @property
    def lengths(self) -> np.ndarray:
        """Those around the edges of a block, and those that fill the least and the most of the buffer."""
        last = self.entries - max(self.tokens, 5)
        return np.minimum([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, last], last)

    @property
    def statics(self) -> dict[str, Any]:
        return {"window": self.window, "cap": self.cap}


CASES = {
    "a token": Case(tokens=1, group=4),
    "a chain": Case(),
    "a chain in bfloat16": Case(group=1, dtype="bfloat16", size=128),
    "a tree": Case("tree", window=7, cap=3.0),
    "a tree in bfloat16": Case("tree", group=4, dtype="bfloat16"),
    "a level of a tree": Case("level", tokens=2),
    "a narrow window": Case("tree", window=2),
    "as many tokens as there are bits": Case(tokens=32, group=1, window=20),
    "many queries": Case(tokens=32, group=3),
    "whole blocks": Case(entries=96, size=64, cap=50.0),
    "less than a block": Case(entries=16, group=1),
    "a wide head": Case(size=128),
    "an odd head": Case(size=80, group=4, window=40),
}
CELLS = list(itertools.product(FORMS, CASES))


class Inputs(NamedTuple):
    """What both take; `sees` is None, or [B, T, W]."""

    query: Any
    keys: Any
    values: Any
    length: Any
    sees: Any
    positions: Any


def paths(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random trees of five nodes: which nodes each sees, and the depth of each; of a level only the last."""
    rows, nodes = len(case.lengths), 5
    sees = np.zeros((rows, nodes, nodes), bool)
    for row, node in itertools.product(range(rows), range(nodes)):
        if node:
            sees[row, node] = sees[row, rng.integers(node)]
        sees[row, node, node] = True
    return sees[:, -case.tokens :], sees.sum(axis=2)[:, -case.tokens :] - 1


def inputs_of(case: Case) -> Inputs:
    """Random ones; what lies behind the block is stale, and the largest that there is."""
    rng = np.random.default_rng(0)
    rows, width = len(case.lengths), max(case.tokens, 5)
    cache = rows, HEADS, case.entries, case.size
    sees, depth = (None, np.arange(case.tokens)) if case.kind == "chain" else paths(case, rng)
    query = rng.normal(size=(rows, case.tokens, HEADS, case.group, case.size)) * case.size**-0.5
    stale = (np.arange(case.entries) >= case.lengths[:, None] + width)[:, None, :, None]
    huge = float(jnp.finfo(case.dtype).max) * rng.choice([-1, 1], cache)
    keys, values = (jnp.asarray(np.where(stale, huge, rng.normal(size=cache)), case.dtype) for _ in range(2))
    return Inputs(
        jnp.asarray(query, case.dtype),
        keys,
        values,
        jnp.asarray(case.lengths, jnp.int32),
        None if sees is None else jnp.asarray(sees),
        jnp.asarray(case.lengths[:, None] + depth, jnp.int32),
    )


def bits(sees: Any) -> Any:
    return None if sees is None else jnp.sum(sees << jnp.arange(sees.shape[-1], dtype=jnp.uint32), -1, jnp.uint32)


def ragged(form: str, case: Case, given: Inputs, layer: Any = None) -> np.ndarray:
    given = given._replace(sees=bits(given.sees))
    return np.asarray(attend_ragged(*given, layer, **case.statics, **FORMS[form], block=BLOCK))


@functools.partial(jax.jit, static_argnames=("window", "cap"))
def whole(given: Inputs, window: int | None, cap: float | None) -> Any:
    """By the einsum that reads the whole buffer."""
    mask, distance = layers.visible(given.keys.shape[2], given.positions, given.length, given.sees)
    if window is not None:
        mask &= distance < window
    return attention.attend(given.query, given.keys, given.values, mask, cap=cap)


@pytest.mark.parametrize(
    ("form", "name"),
    usual(
        CELLS,
        *itertools.product(("gpu", "tpu"), ("a token", "a chain in bfloat16", "a tree")),
        ("gpu", "as many tokens as there are bits"),
        ("tpu", "a level of a tree"),
    ),
)
def test_it_is_the_einsum(form: str, name: str):
    case = CASES[name]
    given = inputs_of(case)
    got = ragged(form, case, given)
    assert got.dtype == np.float32
    tolerance = 1e-5 if case.dtype == "float32" else 2e-2
    np.testing.assert_allclose(got, whole(given, **case.statics), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", usual(FORMS, "gpu", "tpu"))
def test_blocks_that_no_query_attends_to_are_not_read(form: str):
    """Here NaN tells whether they were: 0 * NaN is NaN."""
    case = CASES["a tree"]
    given = inputs_of(case)
    slots, length = np.arange(case.entries), case.lengths[:, None]
    first = np.maximum(length - (case.window or 0) + 1, 0) // BLOCK * BLOCK
    end = -(-(length + 5) // BLOCK) * BLOCK
    read = ((slots >= first) & (slots < end))[:, None, :, None]
    assert not read.all(axis=2).any(), "each row has a block that it does not need"
    spoiled = given._replace(**{name: jnp.where(read, getattr(given, name), jnp.nan) for name in ("keys", "values")})
    np.testing.assert_array_equal(ragged(form, case, spoiled), ragged(form, case, given))


@pytest.mark.parametrize("form", usual(FORMS, "gpu", "tpu"))
def test_a_query_that_sees_nothing_is_zero(form: str):
    case = CASES["a tree"]
    given = inputs_of(case)
    nothing = given._replace(sees=jnp.zeros_like(given.sees), length=jnp.zeros_like(given.length))
    assert not ragged(form, case, nothing).any()


@pytest.mark.parametrize("form", usual(FORMS, "gpu", "tpu"))
def test_a_layer_of_a_cache_of_all(form: str):
    case = CASES["a token"]
    given = inputs_of(case)
    caches = [given.keys, given.values]
    both = given._replace(keys=jnp.stack(caches, axis=1), values=jnp.stack(caches[::-1], axis=1))
    for layer in range(2):
        own = given._replace(keys=both.keys[:, layer], values=both.values[:, layer])
        got = ragged(form, case, both, jnp.asarray(layer))
        np.testing.assert_allclose(got, whole(own, **case.statics), atol=1e-5, rtol=1e-5)


def test_more_tokens_than_bits_are_refused():
    case = Case(tokens=33)
    with pytest.raises(ValueError, match="33 tokens of a row: at most 32"):
        ragged("gpu", case, inputs_of(case))


# --- Compiled for chips that are not here

CALLS = {"v": "tpu_custom_call", "H": "__gpu$xla.gpu.triton", "A": "__gpu$xla.gpu.triton"}


class Shape(NamedTuple):
    """An 8B model's."""

    rows: int = 1
    size: int = 128
    entries: int = 8192
    layers: int | None = None
    tokens: int = 5
    heads: int = 8
    group: int = 4
    window: int | None = None
    cap: float | None = None

    @property
    def cache(self) -> tuple[int, ...]:
        return self.rows, *([] if self.layers is None else [self.layers]), self.heads, self.entries, self.size


def mesh_of(topology: str, data: int = 1) -> Mesh:
    parsed = chips.parse(topology)
    if not aot.is_available(parsed.chip):
        pytest.skip(f"the compiler for {topology} is not installed")
    return aot.make_mesh(parsed, data)


def kernel_for(topology: str, shape: Shape) -> Any:
    form: Any = "tpu" if topology.startswith("v") else "gpu"
    return functools.partial(attend_ragged, form=form, window=shape.window, cap=shape.cap)


def abstract(shape: Shape, mesh: Mesh, rows: str | None = None, heads: str | None = None) -> Inputs:
    """Abstract arguments: rows and heads split over axes of a mesh, a tree where there is a window."""
    cache = PartitionSpec(rows, heads) if shape.layers is None else PartitionSpec(rows, None, heads)
    tokens = (shape.rows, shape.tokens), jnp.int32, PartitionSpec(rows)

    def array(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    query = (*tokens[0], shape.heads, shape.group, shape.size)
    return Inputs(
        array(query, jnp.bfloat16, PartitionSpec(rows, None, heads)),
        array(shape.cache, jnp.bfloat16, cache),
        array(shape.cache, jnp.bfloat16, cache),
        array((shape.rows,), jnp.int32, PartitionSpec(rows)),
        array(tokens[0], jnp.uint32, PartitionSpec(rows)) if shape.window else None,
        array(*tokens),
    )


def steps(attend: Any, shape: Shape, given: Inputs) -> Inputs:
    """A loop that writes its own queries into the cache, and attends to it, until the buffer is full."""

    def write(buffer: Any, new: Any, start: Any, layer: Any) -> Any:
        where = () if layer is None else (layer,)
        for row in range(shape.rows):
            own = new[row : row + 1] if layer is None else new[row : row + 1, None]
            buffer = jax.lax.dynamic_update_slice(buffer, own, (row, *where, 0, start[row], 0))
        return buffer

    def layer_of(given: Inputs, layer: Any) -> Inputs:
        new = jnp.swapaxes(given.query[:, :, :, 0], 1, 2)
        keys, values = (write(x, new * sign, given.length, layer) for x, sign in ((given.keys, 1), (given.values, -1)))
        given = given._replace(keys=keys, values=values)
        return given._replace(query=attend(*given, layer).astype(given.query.dtype))

    def step(given: Inputs) -> Inputs:
        if shape.layers is None:
            given = layer_of(given, None)
        else:
            given = jax.lax.scan(lambda x, i: (layer_of(x, i), None), given, jnp.arange(shape.layers))[0]
        return given._replace(length=given.length + shape.tokens, positions=given.positions + shape.tokens)

    return jax.lax.while_loop(lambda x: jnp.all(x.length < shape.entries - shape.tokens), step, given)


COMPILED = {
    "one row": Shape(),
    "eight rows": Shape(rows=8),
    "one token": Shape(tokens=1),
    "a tree in a window": Shape(size=256, heads=4, group=2, window=4096, cap=50.0),
    "narrow heads": Shape(rows=8, size=64, entries=8256),
    "odd heads": Shape(size=80, heads=32, group=1),
    "all layers": Shape(layers=3, window=100),
    "all layers of narrow heads": Shape(rows=2, layers=3, size=64),
    "the largest": Shape(tokens=32, group=8, size=256),
}


@pytest.mark.parametrize(
    ("topology", "name"),
    usual(
        list(itertools.product(("v5e:1x1", "H100:1", "A100:1"), COMPILED)),
        *itertools.product(("v5e:1x1", "H100:1"), ("one row", "eight rows")),
        ("v5e:1x1", "narrow heads"),
        ("v5e:1x1", "all layers"),
    ),
)
def test_the_compiled_loop_calls_the_kernel_and_copies_no_cache(topology: str, name: str):
    shape = COMPILED[name]
    given = abstract(shape, mesh_of(topology))
    loop = functools.partial(steps, kernel_for(topology, shape), shape)

    def run(keys: Any, values: Any, rest: Inputs) -> Inputs:
        return loop(rest._replace(keys=keys, values=values))

    rest = given._replace(keys=None, values=None)
    program = aot._compile(jax.jit(run, donate_argnums=(0, 1)).lower(given.keys, given.values, rest))
    text, memory = program.as_text(), program.memory_analysis()
    assert text.count(f'custom_call_target="{CALLS[topology[0]]}"') == 1
    assert not hlo.copies(text, [shape.cache])
    array = 2 * int(np.prod(shape.cache))
    assert memory.alias_size_in_bytes >= 2 * array
    assert memory.temp_size_in_bytes < array // 2


@pytest.mark.parametrize("rows", usual([1, 8], 1))
@pytest.mark.parametrize("topology", ["v5e:1x1", "H100:1"])
def test_a_compiled_call_copies_no_cache(topology: str, rows: int):
    shape = Shape(rows)
    given = abstract(shape, mesh_of(topology))
    program = aot._compile(jax.jit(kernel_for(topology, shape)).lower(*given))
    text = program.as_text()
    assert text.count(f'custom_call_target="{CALLS[topology[0]]}"') == 1
    assert not hlo.copies(text, [shape.cache])


@pytest.mark.parametrize(
    ("topology", "data"), usual([("v5e:2x2", 1), ("v5e:2x2", 2), ("v4:2x2x1", 1), ("H100:4", 2)], ("v5e:2x2", 2))
)
def test_each_device_of_a_mesh_reads_its_own_rows_and_heads(topology: str, data: int):
    shape = Shape(rows=4, window=100)
    mesh = mesh_of(topology, data)
    given = abstract(shape, mesh, "data", "model")
    specs = jax.tree.map(lambda x: x.sharding.spec, given)
    call = jax.shard_map(
        kernel_for(topology, shape), mesh=mesh, in_specs=tuple(specs), out_specs=specs.query, check_vma=False
    )
    text = aot._compile(jax.jit(call).lower(*given)).as_text()
    assert text.count(f'custom_call_target="{CALLS[topology[0]]}"') == 1
    assert not hlo.collectives(text)
    assert not hlo.copies(text, [given.keys.sharding.shard_shape(shape.cache)])
