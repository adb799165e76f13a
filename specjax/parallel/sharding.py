"""Logical axes to mesh axes, in one table.

Every parameter and cache entry names its axes where its shape is declared (`("embed", "mlp")`); `RULES` says which
mesh axis each name is split over. A name that the table lacks, two names of one array on the same mesh axis and a
size that does not divide are errors: nothing is replicated by accident.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Axes = Sequence[str | None]
Rules = tuple[tuple[str, str | None], ...]

RULES: Rules = (
    ("batch", "data"),
    ("vocab", "model"),
    ("kv_heads", "model"),
    ("mlp", "model"),
    ("embed", None),
    ("heads_per_group", None),
    ("head_dim", None),
    ("layers", None),
    ("experts", None),
    ("length", None),
    ("positions", None),
    ("gate_up", None),
    ("qkv", None),
    ("buckets", None),
    ("tokens", None),
)
"""Megatron-style tensor parallelism over `model`, rows over `data`: two all-reduces per layer."""


def override(rules: Rules, **changes: str | None) -> Rules:
    """The rules with some names mapped elsewhere, e.g. `override(RULES, kv_heads=None)` to replicate the heads.

    Raises:
      ValueError: for a name that the rules lack.
    """
    table = dict(rules)
    for name in changes:
        if name not in table:
            raise ValueError(f"Unknown logical axis {name!r}; the rules know {sorted(table)}.")
    return tuple((table | changes).items())


def with_whole(names: str) -> Rules:
    """`RULES`, but every device holds the named axes whole.

    Args:
      names: such as "kv_heads", separated by commas; empty: the rules as they are.

    Raises:
      ValueError: for a name that the rules lack, or one that they do not split.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    split = [name for name, mesh_axis in RULES if mesh_axis is not None]
    for name in found:
        if name not in split:
            raise ValueError(f"config.mesh_whole={names!r}: {name!r} is not split; choose from {', '.join(split)}.")
    return override(RULES, **dict.fromkeys(found))


EXPERT_PARALLEL = override(RULES, experts="model", mlp=None)
"""Each device has some of the experts of a mixture whole. `RULES` split every expert over all devices instead: then all
of them work on each token, where the few experts of a few tokens may be on one device. For batches of many tokens."""

RULES_2D = override(RULES, embed="width")
"""Matrices split both ways, over `model` and `width`: for models that are too large for as many chips as they have
key/value heads. The two-dimensional weight-stationary layout of Pope et al. 2022 (arXiv 2211.05102, §3.2.2)."""

REPLICATED = override(RULES, **{name: None for name, _ in RULES if name != "batch"})
"""Every device holds the whole model, and computes its rows: for a draft that is too small to be worth collectives."""


def make_mesh(data: int = 1, model: int = 1, width: int = 1) -> Mesh:
    """A mesh of `data * model * width` devices with those axes.

    Args:
      data: over how many devices the rows of a batch are split.
      model: over how many the heads, the feed-forward's inner width and the vocabulary are split.
      width: over how many the model's width is split, by `RULES_2D`.

    Raises:
      ValueError: where there are not exactly that many devices.
    """
    sizes = (data, model, width)
    if math.prod(sizes) != jax.device_count():
        raise ValueError(
            f"data={data} times model={model} times width={width} is {math.prod(sizes)} devices, but JAX sees "
            f"{jax.device_count()}: choose factors of that number."
        )
    return jax.make_mesh(sizes, ("data", "model", "width"), axis_types=(AxisType.Auto,) * 3)


def partition_spec(axes: Axes, rules: Rules) -> PartitionSpec:
    """The mesh axes of an array whose logical axes are `axes` (None: not split).

    Raises:
      ValueError: for a name without a rule, or where two axes of the array map to one mesh axis.
    """
    table = dict(rules)
    unknown = [a for a in axes if a is not None and a not in table]
    if unknown:
        raise ValueError(f"Logical axes {unknown} of {tuple(axes)} have no rule; the rules know {sorted(table)}.")
    mapped = [table[a] if a is not None else None for a in axes]
    used = [m for m in mapped if m is not None]
    if len(used) != len(set(used)):
        raise ValueError(
            f"Logical axes {tuple(axes)} map to {mapped}: one mesh axis cannot split two axes of an array."
        )
    return PartitionSpec(*mapped)


def named_sharding(mesh: Mesh | AbstractMesh, shape: Sequence[int], axes: Axes, rules: Rules = RULES) -> NamedSharding:
    """The sharding of an array of that shape.

    Raises:
      ValueError: also where a size does not divide over its mesh axis.
    """
    if len(shape) != len(axes):
        raise ValueError(f"An array of shape {tuple(shape)} cannot have the {len(axes)} logical axes {tuple(axes)}.")
    spec = partition_spec(axes, rules)
    for size, name, mesh_axis in zip(shape, axes, spec, strict=True):
        if mesh_axis is None:
            continue
        if mesh_axis not in mesh.shape:
            raise ValueError(f"Axis {name!r} maps to mesh axis {mesh_axis!r}, but the mesh has {tuple(mesh.shape)}.")
        if size % mesh.shape[mesh_axis]:
            raise ValueError(
                f"Axis {name!r} of size {size} does not divide over the {mesh.shape[mesh_axis]} devices of mesh axis "
                f"{mesh_axis!r}: choose another --config.mesh_{mesh_axis}, or let every device hold all of it: "
                f"--config.mesh_whole={name} where the config has this key, in Python override(RULES, {name}=None)."
            )
    return NamedSharding(mesh, spec)


def shard(tree: Any, axes: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Places every array of `tree` as the tree of logical axes `axes` says.

    Args:
      tree: a pytree of arrays.
      axes: the same pytree with each array replaced by a tuple of axis names.
      mesh: where to place them.
      rules: logical to mesh axes.
    """
    leaves, treedef = jax.tree.flatten(tree)
    names = treedef.flatten_up_to(axes)
    placed = [jax.device_put(x, named_sharding(mesh, x.shape, a, rules)) for x, a in zip(leaves, names, strict=True)]
    return jax.tree.unflatten(treedef, placed)


def replicate_rest(tree: Any, mesh: Mesh) -> Any:
    """Copies the arrays of `tree` that are not on the mesh to all of its devices."""

    def place(x: Any) -> Any:
        on_it = isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh
        return x if on_it else jax.device_put(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(place, tree)


def abstract(tree: Any, axes: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Any:
    """`tree`, of `jax.ShapeDtypeStruct`s, each with the sharding that `shard` would give it.

    Args:
      tree: a pytree of shapes.
      axes: the same pytree with each array replaced by a tuple of axis names.
      mesh: where they would be placed.
      rules: logical to mesh axes.
    """
    leaves, treedef = jax.tree.flatten(tree)
    names = treedef.flatten_up_to(axes)
    return treedef.unflatten(
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named_sharding(mesh, x.shape, a, rules))
        for x, a in zip(leaves, names, strict=True)
    )


def fitting(tree: Any, axes: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Rules:
    """The rules, except that an axis that does not divide over its mesh axis in some array is replicated in all.

    For plans and reports, which say so. When arrays are really placed, the caller decides (`override`).

    Args:
      tree: a pytree of arrays or shapes.
      axes: the same pytree with each array replaced by a tuple of axis names.
      mesh: where they would be placed.
      rules: logical to mesh axes.
    """
    leaves, treedef = jax.tree.flatten(tree)
    table = dict(rules)
    sizes = [
        (name, size)
        for x, names in zip(leaves, treedef.flatten_up_to(axes), strict=True)
        for name, size in zip(names, x.shape, strict=True)
    ]
    whole = {
        name: None
        for name, size in sizes
        if name is not None and table[name] in mesh.shape and size % mesh.shape[table[name] or ""]
    }
    return override(rules, **whole)


def dividing(shape: Sequence[int], axes: Axes, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> PartitionSpec:
    """How an activation of that shape is split: as `partition_spec`, but not along what does not divide."""
    sizes: Mapping[str, int] = dict(mesh.shape)
    spec = zip(partition_spec(axes, rules), shape, strict=True)
    return PartitionSpec(*(m if m in sizes and size % sizes[m] == 0 else None for m, size in spec))


def constrain(x: jax.Array, axes: Axes, rules: Rules = RULES) -> jax.Array:
    """Keeps an activation split as its logical axes say; without a mesh (`jax.set_mesh`), does nothing.

    An axis that does not divide stays where the compiler puts it: only parameters, which the user places, are strict.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = (PartitionSpec.UNCONSTRAINED if m is None else m for m in dividing(x.shape, axes, mesh, rules))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that parameters are on; None where they are on one device."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            mesh = leaf.sharding.mesh
            return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None
    return None


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The context in which programs are traced for that mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
