"""Layouts of the cache where there are fewer key/value heads than chips, compiled for TPUs that you don't have.

    python benchmarks/layouts.py --topology=v5e:4x4 --target=llama3_70b

compiles a target call of two and of three layers in each layout, with libtpu, and prints the cost of one more layer on
each chip: the bytes of its parameters and cache, its collectives, and the time at the roofline, which is those bytes at
the memory's rate and then the collectives (`chips`, every kind as an all-reduce). Nothing is run.

- repeated: each key/value head on as many chips as share it (`decoder.repeat_kv_heads`, what `specjax.load` does).
- whole: every chip has all heads, of queries too (`override(RULES, kv_heads=None)`).
- head_dim: each head is cut across its width (`override(RULES, kv_heads=None, head_dim="model")`).
- length: the cache is cut across its positions, the parameters as in head_dim.
"""

import collections
import dataclasses
import datetime
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specjax.experiments.reports import tables
from specjax.models import cache as cache_lib
from specjax.models import decoder, families, presets
from specjax.models.config import DecoderConfig
from specjax.parallel import sharding
from specjax.parallel.sharding import RULES, Rules, override
from specjax.planning import aot, chips, hlo, plan

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "A TPU slice.")
_TARGET = flags.DEFINE_string("target", "llama3_70b", "One of `presets`.")
_HEADS = flags.DEFINE_list("kv_heads", ["8", "1"], "How many key/value heads the target is given.")
_TOKENS = flags.DEFINE_integer("num_tokens", 5, "That a call reads of each row.", lower_bound=1)
_SIZES = flags.DEFINE_list("sizes", ["1x4096", "8x32768"], "Rows x positions of the cache.")


class Layout(NamedTuple):
    """Rules of the parameters and of the cache, and whether heads are repeated."""

    params: Rules
    cache: Rules
    repeat: bool = False


_CUT = override(RULES, kv_heads=None, head_dim="model")
LAYOUTS = {
    "repeated": Layout(RULES, RULES, repeat=True),
    "whole": Layout(override(RULES, kv_heads=None), override(RULES, kv_heads=None)),
    "head_dim": Layout(_CUT, _CUT),
    "length": Layout(_CUT, override(RULES, kv_heads=None, length="model")),
}

Found = tuple[float, float, dict[str, tuple[int, int]]]
"""Bytes of parameters and of the cache on a chip, and by kind how many collectives and their bytes."""


def compiled(config: DecoderConfig, layout: Layout, mesh: Mesh, rows: int, size: int) -> Found:
    """The bytes and the collectives of a call."""
    model = families.model(config, layout.cache)
    shapes, axes = families.abstract_params(config), families.param_axes(config)
    params = sharding.abstract(shapes, axes, mesh, layout.params)
    cache = jax.eval_shape(lambda: model.init_cache(rows, size))
    cache = sharding.abstract(cache, jax.tree.map(lambda x: cache_lib.axes_of(x.ndim), cache), mesh, layout.cache)
    place = NamedSharding(mesh, PartitionSpec("data", None))
    tokens = jax.ShapeDtypeStruct((rows, _TOKENS.value), jnp.int32, sharding=place)
    with jax.set_mesh(mesh):
        program = jax.jit(model.apply, donate_argnums=2).lower(params, tokens, cache).compile().as_text()
    sent: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for one in hlo.collectives(program or ""):
        number, total = sent[one.kind]
        sent[one.kind] = number + 1, total + one.size_in_bytes
    return plan.local_bytes(params), plan.local_bytes(cache), dict(sent)


def row(name: str, heads: int, rows: int, size: int, topology: chips.Topology, mesh: Mesh) -> list[str]:
    """A layout's row of the table."""
    layout = LAYOUTS[name]
    shape = presets.get(_TARGET.value)
    if not isinstance(shape, DecoderConfig):
        raise app.UsageError(f"--target={_TARGET.value} is not a decoder-only model.")
    config = dataclasses.replace(shape, num_kv_heads=heads, max_position=max(size, 8192))
    if layout.repeat:
        config = decoder.repeat_kv_heads(config, mesh, layout.params)
    two, three = (compiled(dataclasses.replace(config, num_layers=n), layout, mesh, rows, size) for n in (2, 3))
    params, cache = three[0] - two[0], three[1] - two[1]
    kinds = {kind: [b - a for a, b in zip(two[2].get(kind, (0, 0)), n, strict=True)] for kind, n in three[2].items()}
    kinds = {kind: n for kind, n in kinds.items() if n[0]}
    chip, group = topology.chip, mesh.shape["model"]
    read = (params + cache) / (chip.bandwidth / chip.devices)
    wait = sum(n * chips.all_reduce_seconds(topology, group, total / n) for n, total in kinds.values())
    return [
        f"{heads}",
        f"{rows} x {size}",
        name,
        f"{params / 1e6:.1f}",
        f"{cache / 1e6:.2f}",
        ", ".join(f"{n} {kind} ({total / 1e6:.2f} MB)" for kind, (n, total) in kinds.items()),
        f"{1e6 * read:.0f}",
        f"{1e6 * wait:.0f}",
        f"{1e6 * (read + wait):.0f}",
    ]


def main(argv: list[str]) -> None:
    """Prints a Markdown table."""
    del argv
    topology = chips.parse(_TOPOLOGY.value)
    mesh = aot.make_mesh(topology, 1)
    head = ["kv heads", "cache", "layout", "parameters, MB", "cache, MB", "collectives", "read, us", "wait, us", "us"]
    table = [head]
    for heads in map(int, _HEADS.value):
        for size in _SIZES.value:
            rows, length = map(int, size.split("x"))
            table += [row(name, heads, rows, length, topology, mesh) for name in LAYOUTS]
    print(f"{_TARGET.value} on {topology.name}, {_TOKENS.value} tokens per row, cost of a layer on each chip; ", end="")
    print(f"jax {jax.__version__}, {datetime.date.today()}\n\n{tables.markdown(table)}")


if __name__ == "__main__":
    app.run(main)
