"""What a plan needs to know of a draft, made from shapes alone: one `Kind` for each way to draft.

A draft model, an EAGLE head, parallel heads, a model that reads masks, and masks that the target reads itself. A plan
takes the kind as an argument (`Setup.kind`); a new one is a function here.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from specjax import drafters
from specjax.drafters import head_rollout, parallel_heads
from specjax.drafters.eagle import EagleParams, functions
from specjax.drafters.head_rollout import HeadCache
from specjax.models import families, layers, modules
from specjax.models import parallel_heads as heads
from specjax.models.config import ModelConfig
from specjax.models.eagle import EagleConfig, EagleHead
from specjax.models.parallel_heads import ParallelHeads, ParallelHeadsConfig
from specjax.parallel import sharding
from specjax.types import Block, Drafter, Model, Params, Tree

TARGET, DRAFT, FIRST = "target", "draft", "first draft"
"""Names of calls: the target's; a draft's; and that of an EAGLE head that reads what the target has just written."""

Run = Callable[[Params, Tree, Int[Array, "B T"]], tuple[Float[Array, "B U V"], Tree]]
"""`(params, state, tokens) -> (logits, state)`: a call of a drafter, which plans trace and compile, and never run."""


class Declared(NamedTuple):
    """The parameters of a draft, `Params.draft`.

    Attributes:
      params: a tree of `jax.ShapeDtypeStruct`.
      axes: the same tree with the logical axes of each.
      num_contracted: the same tree with the number of input axes of each; 0 where it is not a matrix.
    """

    params: Tree
    axes: Tree
    num_contracted: Tree


NOTHING = Declared((), (), ())
"""A draft without parameters."""


class Shapes(NamedTuple):
    """Functions of the shape of a draft.

    Attributes:
      declared: `(shape, target) -> Declared`, given the shape of the target.
      placed: `(shape, mesh, rules) -> shape`, as it is placed on a mesh.
      num_layers: `(shape) -> int`, how many layers are alike, so that programs of fewer can be extrapolated.
      with_layers: `(shape, target_layers, layers) -> shape`, with so many of them, for a target with so many.
      with_dtype: `(shape, dtype) -> shape`.
      quantised: `(shape, how) -> shape`; ValueError where it cannot be.
      quantised_as: `(shape) -> str`, empty where it is not.
      unrolled: `(shape) -> shape`, with no layers scanned.
    """

    declared: Callable[[Any, ModelConfig], Declared]
    placed: Callable[[Any, Mesh | AbstractMesh, sharding.Rules], Any]
    num_layers: Callable[[Any], int]
    with_layers: Callable[[Any, int, int], Any]
    with_dtype: Callable[[Any, str], Any]
    quantised: Callable[[Any, str], Any]
    quantised_as: Callable[[Any], str]
    unrolled: Callable[[Any], Any]


class Reads(NamedTuple):
    """Calls of one name in a step.

    Attributes:
      call: the name, one of those of `Made.calls`, or `TARGET`.
      tokens: how many tokens of each row it reads.
      times: how many such calls follow each other.
    """

    call: str
    tokens: int
    times: int = 1


class Step(NamedTuple):
    """The calls of a step that drafts.

    Attributes:
      drafting: those that make the draft, one after the other.
      scored: how many tokens of each row the target's call reads that judges it.
    """

    drafting: tuple[Reads, ...]
    scored: int


class Made(NamedTuple):
    """A drafter, and its calls apart from each other.

    Attributes:
      drafter: the drafter.
      calls: by name.
      model: the draft model, where it is one.
    """

    drafter: Drafter
    calls: Mapping[str, Run]
    model: Model | None = None


class Kind(NamedTuple):
    """One way to draft.

    Attributes:
      shapes: functions of the draft's shape.
      make: `(shape, target's shape, target, rules, num_draft_tokens) -> Made`.
      step: `(shape, num_draft_tokens) -> Step`; a tree has its own number of draft tokens.
      most: `(shape) -> ` the most draft tokens of a step; None: any number.
      num_nodes: the number of draft tokens of a tree; 0: a chain, which has as many as the plan says.
    """

    shapes: Shapes
    make: Callable[[Any, ModelConfig, Model, sharding.Rules, int], Made]
    step: Callable[[Any, int], Step]
    most: Callable[[Any], int | None] = lambda shape: None
    num_nodes: int = 0


def declared_model(config: ModelConfig) -> Declared:
    """The parameters of a model."""
    return Declared(families.abstract_params(config), families.param_axes(config), families.num_contracted(config))


def unrolled_model(config: ModelConfig) -> ModelConfig:
    """The same model with no layers scanned."""
    return dataclasses.replace(config, scan_layers=False) if config.scan_layers else config


MODELS = Shapes(
    declared=lambda config, target: declared_model(config),
    placed=families.placed,
    num_layers=lambda config: config.num_layers,
    with_layers=lambda config, target, layers: dataclasses.replace(config, num_layers=layers),
    with_dtype=lambda config, dtype: dataclasses.replace(config, dtype=dtype),
    quantised=families.with_quantisation,
    quantised_as=families.quantised_as,
    unrolled=unrolled_model,
)
"""Models of any family (`models.config`)."""


def _not_quantised(shape: Any, how: str) -> Any:
    if how:
        raise ValueError(f"draft_quantise={how!r}: only a draft that is a model is quantised; leave it out.")
    return shape


_HEADS = Shapes(
    declared=lambda shape, target: NOTHING,
    placed=lambda shape, mesh, rules: shape,
    num_layers=lambda shape: 1,
    with_layers=lambda shape, target, layers: shape,
    with_dtype=lambda shape, dtype: dataclasses.replace(shape, dtype=dtype),
    quantised=_not_quantised,
    quantised_as=lambda shape: "",
    unrolled=lambda shape: shape,
)
"""What is small, and not cut into layers."""


def _named(model: Model) -> Model:
    # The scope appears in the compiled program's names, and changes nothing else.
    return model._replace(apply=jax.named_scope("draft_call")(model.apply))


def _apply(model: Model) -> Run:
    def run(params: Params, state: Tree, tokens: Int[Array, "B T"]) -> tuple[Float[Array, "B T V"], Tree]:
        output, state = model.apply(params.draft, Block(tokens), state)
        return output.logits, state

    return run


def _of_tree(dynamic: drafters.Dynamic, first: str) -> Step:
    """A dynamic tree: what was committed is read, then the nodes of each depth but the last."""
    width, depth, num_nodes = dynamic
    deeper = (Reads(DRAFT, width, depth - 1),) if depth > 1 else ()
    return Step((Reads(first, depth + 1), *deeper), num_nodes + 1)


@functools.cache
def model(dynamic: drafters.Dynamic | None = None) -> Kind:
    """A draft model (`drafters.model`), whose shape is a `ModelConfig`.

    A chain of K tokens takes K calls of one token each; where all K are accepted, one of them reads two.

    Args:
      dynamic: the size of a dynamic tree; None: chains.
    """

    def make(config: ModelConfig, target: ModelConfig, of: Model, rules: sharding.Rules, k: int) -> Made:
        del target, of
        draft = _named(families.model(config, rules))
        shape: Any = {"num_draft_tokens": k} if dynamic is None else {"dynamic": dynamic}
        return Made(drafters.model(draft, **shape), {DRAFT: _apply(draft)}, draft)

    def step(config: ModelConfig, k: int) -> Step:
        return Step((Reads(DRAFT, 1, k),), k + 1) if dynamic is None else _of_tree(dynamic, DRAFT)

    return Kind(MODELS, make, step, num_nodes=dynamic.num_nodes if dynamic else 0)


MODEL = model()
"""A chain of a draft model."""


def _declared_eagle(shape: EagleConfig, target: ModelConfig) -> Declared:
    axes, inputs = (modules.metadata(EagleHead, shape, name) for name in ("axes", "num_contracted"))
    is_cut = shape.own_head and shape.layer.vocab_size != target.vocab_size
    # Where each of the target's tokens is among those of the head (`drafters.eagle`).
    places: list[Any] = [None, None, None]
    if is_cut:
        places = [jax.ShapeDtypeStruct((target.vocab_size,), jnp.int32), (None,), 0]
    trees = modules.abstract(EagleHead, shape), axes, inputs
    return Declared(*(EagleParams(tree, place) for tree, place in zip(trees, places, strict=True)))


def _fewer_taps(shape: EagleConfig, target: int, layers: int) -> EagleConfig:
    del layers
    return dataclasses.replace(shape, taps=tuple(min(tap, target) for tap in shape.taps))


def _eagle_layer(shape: EagleConfig, layer: Any) -> EagleConfig:
    return dataclasses.replace(shape, layer=layer)


_EAGLE = _HEADS._replace(
    declared=_declared_eagle,
    placed=lambda shape, mesh, rules: _eagle_layer(shape, families.placed(shape.layer, mesh, rules)),
    with_layers=_fewer_taps,
    with_dtype=lambda shape, dtype: _eagle_layer(shape, dataclasses.replace(shape.layer, dtype=dtype)),
)


def _head_calls(head: head_rollout.Head) -> dict[str, Run]:
    """The two calls of an EAGLE head: after the target's hidden states, and after the head's own."""

    def read(params: Params, state: HeadCache, tokens: Int[Array, "B T"], seen: Array, is_own: bool) -> Any:
        positions = state.length[:, None] + jnp.arange(tokens.shape[1])
        mask, _ = layers.visible(state.keys[0].shape[-2], positions, state.length, None)
        entries = state.keys[0], state.values[0]
        found, keys, values = head.step(params, seen, tokens, positions, mask, *entries, state.length, is_own=is_own)
        return found, state._replace(keys=(keys,), values=(values,))

    def first(params: Params, state: HeadCache, tokens: Int[Array, "B T"]) -> tuple[Float[Array, "B 1 V"], HeadCache]:
        features = state.feature[:, None]
        seen = jnp.broadcast_to(features, (len(tokens), tokens.shape[1], *features.shape[2:]))
        found, state = read(params, state, tokens, seen, False)
        return head.logits(params, found[:, -1:]), state

    def draft(params: Params, state: HeadCache, tokens: Int[Array, "B T"]) -> tuple[Float[Array, "B T V"], HeadCache]:
        seen = jnp.broadcast_to(state.states[:, :1], (*tokens.shape, state.states.shape[-1]))
        found, state = read(params, state, tokens, seen, True)
        return head.logits(params, found), state

    return {FIRST: first, DRAFT: draft}


@functools.cache
def eagle(dynamic: drafters.Dynamic | None = None) -> Kind:
    """An EAGLE head (`drafters.eagle`), whose shape is an `EagleConfig`.

    One call reads the tokens that were committed, each with the target's hidden states, and gives the logits of the
    first draft token; each further token takes a call of one token, and each further depth of a tree one of its width.

    Args:
      dynamic: the size of a dynamic tree (EAGLE-2, EAGLE-3); None: chains.
    """

    def make(shape: EagleConfig, target: ModelConfig, of: Model, rules: sharding.Rules, k: int) -> Made:
        del of
        head: Any = functions(shape, target, rules)  # pyright: ignore[reportArgumentType]
        scope = jax.named_scope("draft_call")
        head = head._replace(step=scope(head.step), logits=scope(head.logits))
        size: Any = {"num_draft_tokens": k} if dynamic is None else {"dynamic": dynamic}
        drafter = head_rollout.drafter(head, **size, children=drafters.children.without_replacement, default=k)
        return Made(drafter, _head_calls(head))

    def step(shape: EagleConfig, k: int) -> Step:
        if dynamic is not None:
            return _of_tree(dynamic, FIRST)
        others = (Reads(DRAFT, 1, k - 1),) if k > 1 else ()
        return Step((Reads(FIRST, k + 1), *others), k + 1)

    return Kind(_EAGLE, make, step, num_nodes=dynamic.num_nodes if dynamic else 0)


def _declared_heads(shape: ParallelHeadsConfig, target: ModelConfig) -> Declared:
    del target
    return Declared(heads.abstract(shape), heads.axes(shape), modules.metadata(ParallelHeads, shape, "num_contracted"))


def _make_heads(shape: ParallelHeadsConfig, target: ModelConfig, of: Model, rules: sharding.Rules, k: int) -> Made:
    del rules
    read = jax.named_scope("draft_call")(parallel_heads.Reader(shape, target))
    plan = parallel_heads.Plan(read, shape.num_heads, shape.hidden_size, of.num_layers)

    def run(params: Params, state: parallel_heads.State, tokens: Int[Array, "B T"]) -> tuple[Array, Any]:
        del tokens
        return read(params, state.feature), state

    return Made(parallel_heads.of_chain(plan, k), {DRAFT: run})


PARALLEL_HEADS = Kind(
    _HEADS._replace(declared=_declared_heads),
    _make_heads,
    step=lambda shape, k: Step((Reads(DRAFT, 1),), k + 1),
    most=lambda shape: shape.num_heads,
)
"""Heads that read one hidden state (`drafters.medusa`, `drafters.blockwise`): a `ParallelHeadsConfig`.

All heads are computed in one call, however many are drafted with.
"""


def _make_pard(config: ModelConfig, target: ModelConfig, of: Model, rules: sharding.Rules, k: int) -> Made:
    del target, of
    draft = _named(families.model(config, rules))
    return Made(drafters.pard(draft, mask_token=0, num_draft_tokens=k), {DRAFT: _apply(draft)}, draft)


PARD = Kind(MODELS, _make_pard, step=lambda config, k: Step((Reads(DRAFT, 2 * k),), k + 1))
"""A model that drafts in one call (`drafters.pard`): K + 1 tokens of the text and K - 1 masks, a `ModelConfig`."""


def _make_masks(shape: None, target: ModelConfig, of: Model, rules: sharding.Rules, k: int) -> Made:
    del shape, target, rules
    return Made(drafters.parallel_masks(of, mask_token=0, num_draft_tokens=k), {})


def _make_fused_masks(shape: None, target: ModelConfig, of: Model, rules: sharding.Rules, k: int) -> Made:
    del shape, target, of, rules
    return Made(drafters.mask_tokens(mask_token=0, num_draft_tokens=k), {})


_MASKS = _HEADS._replace(with_dtype=lambda shape, dtype: shape)

MASKS = Kind(_MASKS, _make_masks, step=lambda shape, k: Step((Reads(TARGET, k),), k + 1))
"""Masks that the target reads in a call of their own (`drafters.parallel_masks`); the draft's shape is None."""

FUSED_MASKS = Kind(_MASKS, _make_fused_masks, step=lambda shape, k: Step((), (k + 1) ** 2))
"""Masks behind every token that is judged, in the same call (`drafters.mask_tokens`); the draft's shape is None."""
