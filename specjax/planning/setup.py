"""What is planned, and the abstract arguments of its decode step on a mesh of devices that you don't have."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from specjax import decoding, drafters, sampling
from specjax.models import cache as cache_lib
from specjax.models import families, quantisation
from specjax.models.config import ModelConfig
from specjax.parallel import sharding
from specjax.planning.chips import Topology
from specjax.state import DecodeState
from specjax.types import Drafter, Model, Params, Tree

SIDES = ("target", "draft")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is planned.

    Attributes:
      target: the target's shape.
      draft: the draft's shape.
      topology: the chips.
      data: the number of devices that rows are split over; each model is split over the others.
      num_draft_tokens: K.
      batch_size: B.
      prompt_tokens: the length of each row's prompt.
      max_new_tokens: the most new tokens of each row.
      max_len: the length of the buffer; None: as long as prompt, new tokens and draft need.
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
        return dataclasses.replace(config, scan_layers=False) if config.scan_layers else config

    return dataclasses.replace(setup, target=side(setup.target), draft=side(setup.draft))


class Sharded(NamedTuple):
    """The abstract arguments of a decode step, with their shardings.

    Attributes:
      models: target and draft, by side.
      drafter: the drafter around the draft.
      rules: the sharding rules by side.
      params: the parameters of both.
      state: the loop's state.
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
    """The shape of one side as placed on the mesh: its key/value heads repeated, where more devices share them."""
    return families.placed(setup.side(side), abstract_mesh(setup), _wanted_rules(setup, side))


def rules_of(setup: Setup, side: str, mesh: Mesh | AbstractMesh) -> sharding.Rules:
    """The sharding rules of one side, with axes that do not divide replicated."""
    config, rules = placed_config(setup, side), _wanted_rules(setup, side)
    return sharding.fitting(families.abstract_params(config), families.param_axes(config), mesh, rules)


def replicated(setup: Setup, side: str) -> list[str]:
    """Logical axes of one side that the mesh would have split, but that do not divide: every device has them whole."""
    if side == "draft" and setup.draft_replicated:
        return []
    mesh = abstract_mesh(setup)
    table = dict(rules_of(setup, side, mesh))
    return [name for name, axis in sharding.RULES if axis is not None and mesh.shape[axis] > 1 and table[name] is None]


def place_params(setup: Setup, side: str, mesh: Mesh | AbstractMesh) -> Tree:
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
    """The shapes of the loop's state after the prefill, without shardings."""
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
        # The scope appears in the compiled program's names, and changes nothing else.
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

    rows = state.rows._replace(cache=None, drafter=None)
    placed = place(rows, jax.tree.map(lambda x: ("batch", *[None] * (x.ndim - 1)), rows))
    placed = placed._replace(
        cache=place(state.rows.cache, _cache_axes(state.rows.cache)),
        drafter=place(state.rows.drafter, _cache_axes(state.rows.drafter), "draft"),
    )
    shared = state.shared._replace(step_costs=place(state.shared.step_costs, (None,)))
    return Sharded(
        models,
        drafter,
        rules,
        Params(*(place_params(setup, side, mesh) for side in SIDES)),
        DecodeState(placed, shared),
    )


def local_shape(x: Any) -> tuple[int, ...]:
    """The shape of what each device holds of an abstract, sharded array."""
    return x.sharding.shard_shape(x.shape)


def local_bytes(tree: Tree) -> int:
    """What each device holds of a tree of abstract, sharded arrays; random keys count eight bytes, int4 half a byte."""
    return sum(
        math.prod(local_shape(x))
        * (64 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else quantisation.bits(x.dtype))
        // 8
        for x in jax.tree.leaves(tree)
    )
