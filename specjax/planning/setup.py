"""What is planned, and the abstract arguments of its decode step on a mesh of devices that you don't have."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from specjax import decoding, sampling
from specjax.models import cache as cache_lib
from specjax.models import families, quantisation
from specjax.models.attention_choice import Choice
from specjax.models.config import ModelConfig
from specjax.parallel import sharding
from specjax.planning import chips, kinds
from specjax.planning.chips import Topology
from specjax.planning.kinds import Declared, Kind, Run
from specjax.state import DecodeState
from specjax.types import Block, Drafter, Model, Params, Tree

SIDES = ("target", "draft")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is planned.

    Attributes:
      target: the target's shape.
      draft: the draft's shape, of the class that the kind takes.
      topology: the chips.
      data: the number of devices that rows are split over; each model is split over the others.
      num_draft_tokens: K, or the nodes of a tree.
      batch_size: B.
      prompt_tokens: the length of each row's prompt.
      max_new_tokens: the most new tokens of each row.
      max_len: the length of the buffer; None: as long as prompt, new tokens and draft need.
      draft_replicated: every device has the whole draft, which then needs no collectives.
      kind: what the draft is; a chain of a draft model by default.
    """

    target: ModelConfig
    draft: Any
    topology: Topology
    data: int = 1
    num_draft_tokens: int = 4
    batch_size: int = 1
    prompt_tokens: int = 128
    max_new_tokens: int = 128
    max_len: int | None = None
    draft_replicated: bool = False
    kind: Kind = kinds.MODEL

    def __post_init__(self):
        if self.num_draft_tokens < 1:
            raise ValueError(f"num_draft_tokens={self.num_draft_tokens}: at least 1.")
        most = self.kind.num_nodes or self.kind.most(self.draft) or self.num_draft_tokens
        if self.num_draft_tokens > most or (self.kind.num_nodes and self.num_draft_tokens != most):
            raise ValueError(f"num_draft_tokens={self.num_draft_tokens}: this draft has {most}; give that.")
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
        read = self.step.scored - 1
        return self.max_len or decoding.buffer_length(self.prompt_tokens + self.max_new_tokens, read)

    @property
    def step(self) -> kinds.Step:
        """The calls of a step that drafts."""
        return self.kind.step(self.draft, self.num_draft_tokens)

    @property
    def mesh_shape(self) -> tuple[int, int]:
        """Devices along `data` and `model`."""
        return self.data, self.topology.num_devices // self.data

    def side(self, name: str) -> Any:
        """The shape of the target or the draft."""
        return self.target if name == "target" else self.draft

    def shapes(self, name: str) -> kinds.Shapes:
        """The functions of the shape of that side."""
        return kinds.MODELS if name == "target" else self.kind.shapes

    def num_layers(self, name: str) -> int:
        """How many layers of a side are alike."""
        return self.shapes(name).num_layers(self.side(name))


def with_layers(setup: Setup, target: int, draft: int) -> Setup:
    """The same plan with another number of layers."""
    return dataclasses.replace(
        setup,
        target=dataclasses.replace(setup.target, num_layers=target),
        draft=setup.kind.shapes.with_layers(setup.draft, target, draft),
    )


def unrolled(setup: Setup) -> Setup:
    """The same plan with no layers scanned, which holds, reads and computes the same."""
    target, draft = kinds.unrolled_model(setup.target), setup.kind.shapes.unrolled(setup.draft)
    return dataclasses.replace(setup, target=target, draft=draft)


class Sharded(NamedTuple):
    """The abstract arguments of a decode step, with their shardings.

    Attributes:
      models: target and draft, by side; no draft where it is not a model.
      drafter: the drafter around the draft.
      calls: the calls of each, by name.
      rules: the sharding rules by side.
      params: the parameters of both.
      state: the loop's state.
    """

    models: dict[str, Model]
    drafter: Drafter
    calls: dict[str, Run]
    rules: dict[str, sharding.Rules]
    params: Params
    state: DecodeState


def abstract_mesh(setup: Setup) -> AbstractMesh:
    """The mesh, without its devices."""
    types = (jax.sharding.AxisType.Auto,) * 2
    return AbstractMesh(setup.mesh_shape, ("data", "model"), axis_types=types)


def _wanted_rules(setup: Setup, side: str) -> sharding.Rules:
    return sharding.REPLICATED if side == "draft" and setup.draft_replicated else sharding.RULES


def placed_config(setup: Setup, side: str) -> Any:
    """The shape of one side as placed on the mesh: its key/value heads repeated, where more devices share them."""
    return setup.shapes(side).placed(setup.side(side), abstract_mesh(setup), _wanted_rules(setup, side))


def declared(setup: Setup, side: str) -> Declared:
    """The parameters of one side as placed on the mesh."""
    return setup.shapes(side).declared(placed_config(setup, side), placed_config(setup, "target"))


def rules_of(setup: Setup, side: str, mesh: Mesh | AbstractMesh) -> sharding.Rules:
    """The sharding rules of one side, with axes that do not divide replicated."""
    found = declared(setup, side)
    return sharding.fitting(found.params, found.axes, mesh, _wanted_rules(setup, side))


def replicated(setup: Setup, side: str) -> list[str]:
    """Logical axes of one side that the mesh would have split, but that do not divide: every device has them whole."""
    if side == "draft" and setup.draft_replicated:
        return []
    mesh = abstract_mesh(setup)
    table = dict(rules_of(setup, side, mesh))
    return [name for name, axis in sharding.RULES if axis is not None and mesh.shape[axis] > 1 and table[name] is None]


def attention(setup: Setup, side: str) -> Choice:
    """How calls of one side that score K + 1 tokens of each row, or fewer, attend to the cache, and why."""
    if setup.shapes(side) is not kinds.MODELS:
        return Choice("einsum", "heads of a target attend by XLA's products")
    config = placed_config(setup, side)
    return families.of(config).attention(config, setup.batch_size / setup.data, setup.step.scored, setup.buffer)


def with_attention(setup: Setup) -> Setup:
    """The same plan with how each model attends settled, whatever number of layers it is then compiled with."""
    models = [side for side in SIDES if setup.shapes(side) is kinds.MODELS]
    settled = {side: families.with_attention(setup.side(side), attention(setup, side).name) for side in models}
    return dataclasses.replace(setup, **settled)


def place_params(setup: Setup, side: str, mesh: Mesh | AbstractMesh) -> Tree:
    """The abstract parameters of one side, laid out on a mesh."""
    found = declared(setup, side)
    return sharding.abstract(found.params, found.axes, mesh, rules_of(setup, side, mesh))


def num_params(setup: Setup, side: str) -> int:
    """The number of parameters of one side, without the scales of quantised matrices."""
    config, shapes = setup.side(side), setup.shapes(side)
    if shapes is kinds.MODELS:
        return families.num_params(config)
    floats = shapes.declared(config, setup.target).params
    return sum(x.size for x in jax.tree.leaves(floats) if jnp.issubdtype(x.dtype, jnp.floating))


def _row_axes(x: Any) -> tuple[str | None, ...]:
    """Logical axes of an array whose first axis is rows."""
    return ("batch", *[None] * (x.ndim - 1))


def _cache_axes(cache: Any) -> Any:
    """Logical axes of a cache, or of a drafter's state: layers' keys and values, and arrays of rows."""
    return jax.tree.map(lambda x: cache_lib.axes_of(x.ndim), cache)


def _tapped(model: Model, drafter: Drafter) -> Model:
    """The target, whose outputs have the hidden states that the drafter reads."""
    if not drafter.taps:
        return model
    assert model.with_taps is not None  # Every family has layers.
    return model.with_taps(drafter.taps)


def _on_one_device(setup: Setup) -> Setup:
    """The plan of what is placed, as if it were on one device: topologies share the shapes of its state."""
    target, draft = (placed_config(setup, side) for side in SIDES)
    alone = {"topology": chips.parse("H100:1"), "data": 1, "draft_replicated": False, "max_len": setup.buffer}
    return dataclasses.replace(setup, target=target, draft=draft, **alone)


@functools.lru_cache(maxsize=64)
def _state_shapes(setup: Setup) -> DecodeState:
    """The shapes of the loop's state after the prefill, without shardings."""
    target, draft = setup.target, setup.draft
    model, rows = families.model(target), setup.batch_size
    drafter = setup.kind.make(draft, target, model, sharding.RULES, setup.num_draft_tokens).drafter
    model = _tapped(model, drafter)
    inputs, options = decoding.read_inputs(model, [[0] * setup.prompt_tokens] * rows), sampling.options(rows)

    def prefill(params: Params) -> DecodeState:
        return decoding.prefill(
            model, drafter, params, inputs, max_new_tokens=setup.max_new_tokens, options=options, max_len=setup.buffer
        )

    return jax.eval_shape(prefill, Params(*(declared(setup, side).params for side in SIDES)))


def _made(setup: Setup, mesh: Mesh | AbstractMesh) -> tuple[dict[str, Model], kinds.Made]:
    """The models, and the drafter with its calls. Scopes appear in the program's names, and change nothing else."""
    rules = {side: rules_of(setup, side, mesh) for side in SIDES}
    target, draft = (placed_config(setup, side) for side in SIDES)
    model = families.model(target, rules["target"])
    made = setup.kind.make(draft, target, model, rules["draft"], setup.num_draft_tokens)
    model = _tapped(model, made.drafter)
    model = model._replace(apply=jax.named_scope("target_call")(model.apply))
    models = {"target": model} if made.model is None else {"target": model, "draft": made.model}

    def call(params: Params, cache: Any, tokens: Any) -> Any:
        output, cache = model.apply(params.target, Block(tokens), cache)
        return output.logits, cache

    drafter = made.drafter._replace(propose=jax.named_scope("drafting")(made.drafter.propose))
    return models, made._replace(drafter=drafter, calls={kinds.TARGET: call, **made.calls})


@functools.lru_cache(maxsize=8)
def shard(setup: Setup, mesh: Mesh | AbstractMesh) -> Sharded:
    """The abstract arguments of the step, laid out on a mesh."""
    rules = {side: rules_of(setup, side, mesh) for side in SIDES}
    models, made = _made(setup, mesh)
    state = _state_shapes(_on_one_device(setup))

    def place(tree: Tree, axes: Any, side: str = "target") -> Tree:
        return sharding.abstract(tree, axes, mesh, rules[side])

    rows = state.rows._replace(cache=None, drafter=None)
    placed = place(rows, jax.tree.map(_row_axes, rows))
    placed = placed._replace(
        cache=place(state.rows.cache, _cache_axes(state.rows.cache)),
        drafter=place(state.rows.drafter, _cache_axes(state.rows.drafter), "draft"),
    )
    shared = state.shared._replace(step_costs=place(state.shared.step_costs, (None,)))
    return Sharded(
        models,
        made.drafter,
        dict(made.calls),
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
