"""A trained head over the target's hidden states drafts (EAGLE-3, Li et al. 2025, arXiv 2503.01840)."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Bool, Float, Int

from specjax import control, files
from specjax.drafters import model_tree, rollout, store
from specjax.drafters.children import Children, without_replacement
from specjax.limits import check_num_draft_tokens
from specjax.models import cache as cache_lib
from specjax.models import feature_head as heads
from specjax.models import layers, linear
from specjax.models.config import DecoderConfig
from specjax.models.feature_head import FeatureHeadConfig
from specjax.types import Block, Context, Draft, Drafter, Feedback, Model, ModelOutput, Params, Proposal, Tree


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


class HeadCache(NamedTuple):
    """The keys and values of the head's layer, and its estimates of the target's last hidden states.

    Attributes:
      keys: one `[B, kv_heads, S, head_dim]` array.
      values: one array of the same shape.
      length: `[B]` how many tokens of the text have entries, made from the target's hidden states (see `models.cache`).
      states: `[B, 1 + U, D]` the estimate after the last of them, then those after the entries of drafts behind it.
      feature: `[B, F, D]` the target's hidden states at the last token that it has read.
    """

    keys: tuple[Float[Array, "B H S E"]]
    values: tuple[Float[Array, "B H S E"]]
    length: Int[Array, " B"]
    states: Float[Array, "B U D"]
    feature: Float[Array, "B F D"]


class _Plan(NamedTuple):
    """A head for a target.

    Attributes:
      head: the shape of the head.
      target: that of the target.
      num_behind: U, how many drafts have entries at a time.
    """

    head: FeatureHeadConfig
    target: DecoderConfig
    num_behind: int


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
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence={min_confidence}: a probability, from 0 (off) to 1.")
    shape, params = heads.cast(head.config, head.params, config.dtype)
    if topology is None:
        num_draft_tokens = 2 if num_draft_tokens is None else num_draft_tokens
        check_num_draft_tokens(num_draft_tokens)
        if not num_draft_tokens:
            raise ValueError("num_draft_tokens=0 drafts nothing: give at least 1, or drafter=None.")
        drafter = _chain(_Plan(shape, config, 1), num_draft_tokens, min_confidence, tuple(lengths))
    elif num_draft_tokens is not None or min_confidence or lengths:
        raise ValueError(
            f"topology={topology} says what is drafted: leave out num_draft_tokens, lengths and min_confidence."
        )
    else:
        levels = model_tree.parse(topology)
        parents = {parent for level in levels for parent in level.parents} - {-1}
        drafter = _tree(_Plan(shape, config, max(1, len(parents))), topology, children)
    rows = heads.output_rows(config, target.params, head.tokens)
    return Draft(drafter, HeadParams(params, rows, jnp.asarray(head.tokens)), target.tokenizer, config.max_position)


# The head as a model: what it drafts from is its own estimate after the token before.


def _logits(params: HeadParams, state: Float[Array, "B T D"], vocab_size: int) -> Float[Array, "B T V"]:
    """The logits of the tokens that the head can draft, -inf elsewhere."""
    weight = params.rows if linear.outputs_first(params.rows.dtype) else params.rows.T
    known = linear.product(state, weight)
    return jnp.full((*state.shape[:2], vocab_size), -jnp.inf).at[..., params.tokens].set(known)


def _run(
    plan: _Plan, params: Params, x: Float[Array, "B T D"], view: layers.View, cache: HeadCache, start: Int[Array, " B"]
) -> tuple[Float[Array, "B T D"], HeadCache]:
    """The layer, whose entries are written from `start` on."""
    head = heads.bind(plan.head, params.draft.head)
    state, keys, values = head.layer(x, view, cache.keys[0], cache.values[0], start)
    return state, cache._replace(keys=(keys,), values=(values,))


def _parents(sees: Bool[Array, "B T W"]) -> Int[Array, "B T"]:
    """The place in `HeadCache.states` of the token before each: the last that it attends to besides itself."""
    width, total = sees.shape[1:]
    own = jnp.arange(total) == (total - width + jnp.arange(width))[:, None]
    return jnp.max(jnp.where(sees & ~own, jnp.arange(total, dtype=jnp.int32) + 1, 0), axis=-1)


@functools.cache
def _as_model(plan: _Plan) -> Model:
    """The head as a draft model, for the rollouts that all drafters with a model share. Its `params` are `Params`."""
    layer = plan.head.layer

    def init_cache(batch_size: int, max_len: int, max_source: int = 0) -> HeadCache:
        del max_source
        empty = cache_lib.init(1, batch_size, layer.num_kv_heads, max_len, layer.head_dim, layer.dtype)
        states = jnp.zeros((batch_size, 1 + plan.num_behind, layer.hidden_size))
        feature = jnp.zeros((batch_size, len(plan.head.taps), layer.hidden_size))
        return HeadCache((empty.keys[0],), (empty.values[0],), empty.length, states, feature)

    def prefill(params: Any, inputs: Any, cache: Any) -> Any:
        raise NotImplementedError("A head reads a prompt's hidden states (`Drafter.update`), not its tokens alone.")

    def apply(params: Any, block: Block, cache: HeadCache) -> tuple[ModelOutput, HeadCache]:
        rows, width = block.tokens.shape
        depth = jnp.arange(width) if block.depth is None else block.depth
        sees = jnp.ones((rows, 1, 1), bool) if block.sees is None else block.sees
        earlier = sees.shape[-1] - width
        positions = cache.length[:, None] + depth
        mask, _ = layers.visible(cache.keys[0].shape[-2], positions, cache.length, sees)
        before = jnp.take_along_axis(cache.states, _parents(sees)[..., None], axis=1)
        head = heads.bind(plan.head, params.draft.head)
        x = head.combine(before, heads.embed(plan.target, params.target, block.tokens), is_own=True)
        state, cache = _run(plan, params, x, head.view(positions, mask), cache, cache.length + earlier)
        states = cache.states.at[:, 1 + earlier : 1 + earlier + width].set(state)
        logits = _logits(params.draft, state, plan.target.vocab_size)
        return ModelOutput(logits, state[:, :, None][:, :, :0]), cache._replace(states=states)

    def commit(cache: HeadCache, path: Any, count: Int[Array, " B"]) -> HeadCache:
        assert path is None
        last = jnp.take_along_axis(cache.states, count[:, None, None], axis=1)
        return cache._replace(length=cache.length + count, states=cache.states.at[:, :1].set(last))

    return Model(init_cache, prefill, apply, commit, plan.target.vocab_size, plan.target.max_position)


def _update(plan: _Plan, params: Params, cache: HeadCache, feedback: Feedback) -> HeadCache:
    """Reads the committed tokens, each with the target's hidden states at the token before it."""
    count, features = feedback.num_tokens, feedback.features
    if feedback.context is None:
        # A prompt's features are those of its own tokens; a step's begin with those of the token before.
        last = jnp.take_along_axis(features, jnp.maximum(count - 1, 0)[:, None, None, None], axis=1)
        features = jnp.concatenate([cache.feature[:, None], features[:, :-1]], axis=1)
    else:
        last = features[:, :1]
    width = feedback.tokens.shape[1]
    begin = feedback.length - count
    positions = begin[:, None] + jnp.arange(width)
    mask, _ = layers.visible(cache.keys[0].shape[-2], positions, begin, None)
    head = heads.bind(plan.head, params.draft.head)
    embedding = heads.embed(plan.target, params.target, jnp.maximum(feedback.tokens, 0))
    x = head.combine(features, embedding, is_own=False)
    state, cache = _run(plan, params, x, head.view(positions, mask), cache, begin)
    newest = jnp.take_along_axis(state, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
    some = (count > 0)[:, None, None]
    return cache._replace(
        length=jnp.where(count > 0, feedback.length, cache.length),
        states=cache.states.at[:, :1].set(jnp.where(some, newest, cache.states[:, :1])),
        feature=jnp.where(some, last[:, 0], cache.feature),
    )


def _first_logits(plan: _Plan, params: Params, cache: HeadCache) -> Float[Array, "B 1 V"]:
    return _logits(params.draft, cache.states[:, :1], plan.target.vocab_size)


def _back(cache: HeadCache, before: HeadCache) -> HeadCache:
    """The cache after a rollout, of the text alone: the drafts' entries are stale."""
    return cache._replace(length=before.length, states=before.states)


@functools.cache
def _chain(plan: _Plan, num_draft_tokens: int, min_confidence: float, lengths: tuple[int, ...]) -> Drafter:
    draft = _as_model(plan)
    chain = rollout.Chain(draft, num_draft_tokens, lengths)

    def propose(params: Params, state: HeadCache, cache: Any, context: Context) -> tuple[Proposal, HeadCache, Any]:
        threshold = rollout.threshold(min_confidence, context)

        def roll_out(none: rollout.Rollout) -> rollout.Rollout:
            logits = _first_logits(plan, params, none.cache)
            return rollout.draw(chain, params, logits, none.cache, context, threshold)

        nothing = rollout.none(chain, state, context, threshold)
        drawn = control.once(jnp.any(context.max_draft > 0), roll_out, nothing)
        return drawn.proposal(context), _back(drawn.cache, state), cache

    def update(params: Params, state: HeadCache, feedback: Feedback) -> HeadCache:
        return _update(plan, params, state, feedback)

    return Drafter(draft.init_cache, propose, update, chain.topology, plan.head.taps)


@functools.lru_cache(maxsize=64)
def _of_plan(plan: _Plan, grown: model_tree.Plan) -> Drafter:
    def propose(params: Params, state: HeadCache, cache: Any, context: Context) -> tuple[Proposal, HeadCache, Any]:
        tokens, probs, after = control.once(
            jnp.any(context.max_draft > 0),
            lambda carry: model_tree.grow(grown, params, _first_logits(plan, params, carry[-1]), carry, context),
            model_tree.nothing(grown, state, context),
        )
        return model_tree.proposal(grown, tokens, probs, context), _back(after, state), cache

    def update(params: Params, state: HeadCache, feedback: Feedback) -> HeadCache:
        return _update(plan, params, state, feedback)

    return Drafter(_as_model(plan).init_cache, propose, update, grown.topology, plan.head.taps)


def _tree(plan: _Plan, topology: Any, children: Children) -> Drafter:
    return _of_plan(plan, model_tree.plan(_as_model(plan), topology, children))


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
