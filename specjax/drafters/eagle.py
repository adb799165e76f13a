"""A published EAGLE head drafts: EAGLE (arXiv 2401.15077), EAGLE-2 (2406.16858), EAGLE-3 (2503.01840)."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.drafters import head_rollout
from specjax.drafters.children import Children, without_replacement
from specjax.drafters.model_dynamic import Dynamic
from specjax.models import eagle as heads
from specjax.models import feature_head, linear
from specjax.models.config import DecoderConfig
from specjax.models.eagle import EagleConfig
from specjax.models.weights import eagle_export, eagle_files
from specjax.parallel import sharding
from specjax.sampling import warp
from specjax.types import Draft, Params, Tree


class EagleHead(NamedTuple):
    """A head.

    Attributes:
      config: its shape.
      params: its parameters.
      tokens: `[W]` the target's ids of the tokens that it can draft; None: all.
    """

    config: EagleConfig
    params: Tree
    tokens: Int[np.ndarray, " W"] | None = None


class EagleParams(NamedTuple):
    """What `Params.draft` is for a head.

    Attributes:
      head: its parameters.
      place: `[V]` the place of each of the target's tokens among those of the head; W where it has no such token. None:
        it has all.
    """

    head: Tree
    place: Int[Array, " V"] | None


def eagle(
    head: EagleHead,
    target: Any,
    *,
    num_draft_tokens: int | None = None,
    min_confidence: float = 0.0,
    lengths: tuple[int, ...] = (),
    topology: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
    children: Children = without_replacement,
    dynamic: Dynamic | None = None,
    rules: sharding.Rules = sharding.RULES,
) -> Draft:
    """Drafts with a published EAGLE head, as a chain, a static tree or a dynamic tree.

    The head reads the target's hidden states, which the target computes anyway, and each token that the target has
    written. Where it has a vocabulary of its own, it drafts these tokens alone; the target still writes all of them. A
    chain and a static tree state the head's distribution, so that `rejection` uses it and is exact. A dynamic tree
    (EAGLE-2, the published way of EAGLE-3) is chosen, not drawn, which is exact as well.

    Args:
      head: from `specjax.load_draft`, `load_eagle`, or training (`training.heads`).
      target: the `Pretrained` that it was trained for.
      num_draft_tokens: K, for a chain; by default 4.
      min_confidence: as for `drafters.model`.
      lengths: of a chain, as for `drafters.model`.
      topology: the shape of a tree, as for `drafters.model`, such as "eagle_25"; None: no such tree.
      children: as for `drafters.model`.
      dynamic: the size of a dynamic tree, such as `drafters.Dynamic(width=10, depth=7, num_nodes=59)`; None: no such
        tree.
      rules: logical to mesh axes, for the head's activations and cache.

    Raises:
      ValueError: for another target than a decoder of the width, depth and vocabulary that the head reads, or sizes
        that `drafters.model` refuses.
    """
    config, shape = target.config, head.config
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"The target is an encoder-decoder ({type(config).__name__}): EAGLE heads read decoders.")
    if config.hidden_size != shape.target_size or not all(0 <= tap <= config.num_layers for tap in shape.taps):
        raise ValueError(
            f"The head reads the hidden states {shape.taps} of width {shape.target_size}, but the target has 0 to "
            f"{config.num_layers} of width {config.hidden_size}: give the target that the head was trained for."
        )
    if not shape.num_embeddings and shape.layer.hidden_size != config.hidden_size:
        raise ValueError(
            f"The head of width {shape.layer.hidden_size} has no embeddings of its own, and the target's have "
            f"{config.hidden_size} entries: give the target that the head was trained for."
        )
    place = None
    if head.tokens is not None:
        if head.tokens.max() >= config.vocab_size:
            raise ValueError(
                f"The head drafts token {head.tokens.max()}, but the target has {config.vocab_size} tokens: give the "
                "target that the head was trained for."
            )
        place = np.full(config.vocab_size, len(head.tokens), np.int32)
        place[head.tokens] = np.arange(len(head.tokens))
    drafter = head_rollout.drafter(
        functions(shape, config, rules),
        num_draft_tokens=num_draft_tokens,
        min_confidence=min_confidence,
        lengths=lengths,
        topology=topology,
        children=children,
        dynamic=dynamic,
        default=4,
    )
    params = EagleParams(head.params, None if place is None else jnp.asarray(place))
    return Draft(drafter, params, target.tokenizer, config.max_position)


@functools.cache
def functions(shape: EagleConfig, target: DecoderConfig, rules: sharding.Rules) -> head_rollout.Head:
    """The head for a target of this shape."""

    def step(params: Params, seen: Any, tokens: Any, *where: Any, is_own: bool) -> Any:
        head = heads.bind(shape, params.draft.head, rules)
        if shape.num_embeddings:
            embedding = linear.look_up(head.embedding[...], tokens)
        else:
            embedding = feature_head.embed(target, params.target, tokens)
        return head.step(seen, embedding, *where, is_own=is_own)

    def logits(params: Params, state: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        head = heads.bind(shape, params.draft.head, rules)
        if not shape.own_head:
            return feature_head.target_logits(target, params.target, head.before_head(state))
        known = head.logits(state)
        if params.draft.place is None:
            return warp.match_vocab(known, target.vocab_size)
        # Read from a row that ends in -inf, and not written to the places of the tokens: scatters are slow.
        known = jnp.pad(known, ((0, 0), (0, 0), (0, 1)), constant_values=-jnp.inf)
        return jnp.take(known, params.draft.place, axis=-1)

    return head_rollout.Head(
        step,
        logits,
        shape.layer,
        shape.taps,
        shape.target_size,
        heads.EagleHead.sees_first,
        target.vocab_size,
        target.max_position,
        rules,
    )


def load_eagle(
    directory: str | pathlib.Path,
    target: Any,
    *,
    taps: tuple[int, ...] | None = None,
    dtype: str | None = None,
    rules: sharding.Rules = sharding.RULES,
) -> EagleHead:
    """Reads a head from a directory; `specjax.load_draft` also takes hub ids.

    Args:
      directory: `config.json` and the weights, in the layout of the authors, of speculators or of Model-Optimizer
        (`models.weights.eagle_files`).
      target: the `Pretrained` that it was trained for; its mesh becomes the head's.
      taps: the hidden states that the head reads, where its file is wrong about them.
      dtype: that of the parameters; None: the target's.
      rules: logical to mesh axes.

    Raises:
      FileNotFoundError: for a missing file.
      ValueError: for a file that is broken, or a head of another target.
    """
    config = target.config
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"The target is an encoder-decoder ({type(config).__name__}): EAGLE heads read decoders.")
    mesh = sharding.mesh_of(target.params)
    dtype = config.dtype if dtype is None else dtype
    return EagleHead(*eagle_files.read(directory, config, taps=taps, dtype=dtype, mesh=mesh, rules=rules))


def save_eagle(head: EagleHead, target: Any, directory: str | pathlib.Path) -> None:
    """Writes a head in the layout of the authors, which `specjax.load_draft` and other engines read.

    Args:
      head: the head.
      target: the `Pretrained` that it was trained for.
      directory: made if it does not exist.
    """
    eagle_export.write(directory, head.config, head.params, head.tokens, target.config.vocab_size)
