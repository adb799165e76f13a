"""A trained head over the target's hidden states drafts (EAGLE-3, Li et al. 2025, arXiv 2503.01840)."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int

from specjax import files
from specjax.drafters import head_rollout, store
from specjax.drafters.children import Children, without_replacement
from specjax.models import feature_head as heads
from specjax.models.config import DecoderConfig
from specjax.models.feature_head import FeatureHeadConfig
from specjax.types import Draft, Params, Tree


class Head(NamedTuple):
    """A trained head.

    Attributes:
      config: its shape.
      params: its parameters.
      tokens: `[W]` the ids of the tokens that it can draft, in increasing order.
      vocabulary: the `store.fingerprint` of the target's tokenizer, or None where it had none.
    """

    config: FeatureHeadConfig
    params: Tree
    tokens: Int[np.ndarray, " W"]
    vocabulary: str | None = None


class HeadParams(NamedTuple):
    """What `Params.draft` is for a head.

    Attributes:
      head: its parameters.
      rows: `[W, D]` the rows of the target's output matrix for the tokens that it can draft.
      tokens: `[W]` their ids.
    """

    head: Tree
    rows: Float[Array, "W D"]
    tokens: Int[Array, " W"]


def feature_head(
    head: Head,
    target: Any,
    *,
    num_draft_tokens: int | None = None,
    min_confidence: float = 0.0,
    lengths: tuple[int, ...] = (),
    topology: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
    children: Children = without_replacement,
) -> Draft:
    """Drafts with a head over the target's hidden states, which costs a few hundredths of a step per token.

    The head predicts from what the target computed for the token before, so it needs neither a model nor a cache of
    all layers. It can draft the tokens of a reduced vocabulary only; the target still writes all of them. Its
    distribution is stated, so that `rejection` is exact.

    Args:
      head: from `load_feature_head`, or from training (`training.heads`).
      target: the `Pretrained` that it was trained for; its embeddings and output matrix are the head's.
      num_draft_tokens: K, for a chain; by default 2.
      min_confidence: as for `drafters.model`.
      lengths: of a chain, as for `drafters.model`.
      topology: the shape of a tree, as for `drafters.model`; None: a chain.
      children: as for `drafters.model`.

    Raises:
      ValueError: for another target than a decoder of the head's width and depth, or sizes that `drafters.model`
        refuses.
    """
    config = target.config
    width = head.config.layer.hidden_size
    deepest = max(head.config.taps)
    if not isinstance(config, DecoderConfig) or config.hidden_size != width or config.num_layers < deepest:
        raise ValueError(
            f"The head reads the hidden states {head.config.taps} of width {width}, which this target does not have: "
            "give the decoder-only target that the head was trained for."
        )
    if head.tokens.max() >= config.vocab_size:
        raise ValueError(f"The head drafts token {head.tokens.max()}, but the target has {config.vocab_size} tokens.")
    if head.vocabulary and target.tokenizer is not None and store.fingerprint(target.tokenizer) != head.vocabulary:
        raise ValueError("The vocabularies do not match: the head was trained for a target with another tokenizer.")
    shape, params = heads.cast(head.config, head.params, config.dtype)
    drafter = head_rollout.drafter(
        _functions(shape, config),
        num_draft_tokens=num_draft_tokens,
        min_confidence=min_confidence,
        lengths=lengths,
        topology=topology,
        children=children,
        default=2,
    )
    rows = heads.output_rows(config, target.params, head.tokens)
    return Draft(drafter, HeadParams(params, rows, jnp.asarray(head.tokens)), target.tokenizer, config.max_position)


@functools.cache
def _functions(shape: FeatureHeadConfig, target: DecoderConfig) -> head_rollout.Head:
    """The head for a target of this shape."""

    def step(params: Params, seen: Any, tokens: Any, *where: Any, is_own: bool) -> Any:
        head = heads.bind(shape, params.draft.head)
        return head.step(seen, heads.embed(target, params.target, tokens), *where, is_own=is_own)

    def logits(params: Params, state: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        known = heads.bind(shape, params.draft.head).logits(state, params.draft.rows)
        return jnp.full((*state.shape[:2], target.vocab_size), -jnp.inf).at[..., params.draft.tokens].set(known)

    return head_rollout.Head(
        step,
        logits,
        shape.layer,
        shape.taps,
        target.hidden_size,
        heads.FeatureHead.sees_first,
        target.vocab_size,
        target.max_position,
    )


# Files.

_KIND = "feature_head"

TRAINED = pathlib.Path(__file__).parent / "trained"
"""The heads that come with specjax: a folder each, whose README.md is its model card."""


def save_feature_head(head: Head, directory: str | pathlib.Path) -> None:
    """Writes a head in bfloat16, which `load_feature_head` reads."""
    config, params = heads.cast(head.config, head.params, "bfloat16")
    info = {
        # What is as in any decoder is left out, so that a file outlives the fields of the configuration.
        "layer": {
            field.name: value
            for field in dataclasses.fields(config.layer)
            if (value := getattr(config.layer, field.name)) != field.default
        },
        "taps": list(config.taps),
        "vocabulary": head.vocabulary,
    }
    arrays = {name: np.asarray(x) for name, x in traverse_util.flatten_dict(params, sep=".").items()}
    store.write(directory, _KIND, arrays | {"tokens": head.tokens}, info, None)


def _path(source: str | pathlib.Path) -> pathlib.Path:
    own = TRAINED / str(source)
    return own if isinstance(source, str) and own.is_dir() else pathlib.Path(source).expanduser()


def is_feature_head(source: str | pathlib.Path) -> bool:
    """Whether this names a head, as `load_feature_head` takes it, rather than a model."""
    path = _path(source)
    return (path / store.FILE).is_file() or path.name == store.FILE


def load_feature_head(source: str | pathlib.Path) -> Head:
    """Reads a head.

    Args:
      source: the name of one that comes with specjax, such as "smollm2-135m-instruct", or a directory that
        `save_feature_head` wrote.

    Raises:
      FileNotFoundError: where there is none.
      ValueError: for a file that is damaged, or holds something else.
    """
    path = _path(source)
    if not path.exists():
        known = files.listed(sorted(found.name for found in TRAINED.iterdir() if found.is_dir()))
        raise FileNotFoundError(f"{source} does not exist: give a directory, or the name of a trained head: {known}.")
    arrays, info, _ = store.read(path, _KIND, None)
    tokens = arrays.pop("tokens")
    layer: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in info["layer"].items()
    }
    config = FeatureHeadConfig(DecoderConfig(**layer), tuple(info["taps"]))
    params = traverse_util.unflatten_dict({name: jnp.asarray(x) for name, x in arrays.items()}, sep=".")
    return Head(config, params, tokens, info["vocabulary"])
