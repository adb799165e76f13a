"""Trains a head over a target's hidden states on texts that the target wrote (`harvest`).

The target is frozen; its hidden states come with the texts. The head is trained as it will be used: the first token is
drafted from the target's hidden states, each further one from the head's own state after the token before
(training-time test, EAGLE-3, Li et al. 2025, arXiv 2503.01840, section 3.2).

Heads of two kinds are trained: those of specjax (`drafters.feature_head`), whose input maps begin as the closed-form
solution of a ridge regression of the target's last hidden states, and EAGLE heads (`drafters.eagle`), whose published
recipes are in `configs/eagle.py`. EAGLE and EAGLE-2 (Li et al. 2024, arXiv 2401.15077, section 4.2) train one draft
token, and the head's output is to be the target's next hidden state (`Recipe.feature_weight`).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped

from specjax.models import eagle, linear
from specjax.models import feature_head as heads
from specjax.models.eagle import EagleConfig, EagleHead
from specjax.models.feature_head import FeatureHead, FeatureHeadConfig
from specjax.training import data
from specjax.training.harvest import Texts
from specjax.types import Tree

DECAY = 0.8
"""The weight of a draft token's loss, relative to that of the one before it."""

AnyHead = FeatureHeadConfig | EagleConfig
"""The shape of a head of either kind."""


class Recipe(NamedTuple):
    """How a head is trained.

    Attributes:
      learning_rate: the largest, after a warm-up of a twentieth of the steps; it falls to a tenth along a cosine.
      num_steps: of the optimiser.
      batch_size: texts per step.
      depth: how many draft tokens in a row are trained.
      prompt_weight: the weight of the prompts' tokens, where those that the target wrote have 1.
      weight_decay: of AdamW.
      clip: the largest norm of a gradient.
      only_known: whether the loss leaves out the tokens after which the target's most probable one is none that the
        head can draft.
      token_weight: the weight of the cross-entropy.
      feature_weight: the weight of the smooth L1 distance between what the head makes and the target's last hidden
        state there; 0: the head may make what it likes.
      noise: the width of the uniform noise that is added to the hidden states that the head reads, in texts of 512
        tokens; in inverse proportion to their length.
      seed: of the order of the texts, and of the noise.
    """

    learning_rate: float = 5e-4
    num_steps: int = 200
    batch_size: int = 8
    depth: int = 2
    prompt_weight: float = 0.3
    weight_decay: float = 0.01
    clip: float = 1.0
    only_known: bool = False
    token_weight: float = 1.0
    feature_weight: float = 0.0
    noise: float = 0.0
    seed: int = 0


class Frozen(NamedTuple):
    """What the head uses of the target.

    Attributes:
      embeddings: `[V, D]` of its tokens.
      output: `[V, D]` its output matrix; the embeddings, where they are tied.
      rows: `[W, D]` of it, for the tokens that the head can draft.
    """

    embeddings: Float[Array, "V D"]
    output: Float[Array, "V D"]
    rows: Float[Array, "W D"]


class Quality(NamedTuple):
    """What a head does on texts, by draft position, each given that those before it are the text's.

    Attributes:
      greedy: `[K]` how often its most probable token is the target's: the acceptance rate at temperature 0.
      overlap: `[K]` the mean of sum min(p, q), the acceptance rate at temperature 1.
      loss: the training loss.
    """

    greedy: Float[Array, " K"]
    overlap: Float[Array, " K"]
    loss: Float[Array, ""]


def frequent_tokens(batches: Sequence[Texts], size: int) -> Int[np.ndarray, " W"]:
    """The ids of the most frequent tokens of the texts that were written, in increasing order.

    Where the texts have fewer different tokens, those of the smallest ids follow: a tokenizer by merges numbers its
    tokens by how frequent they were where it was made.
    """
    counts: Any = 0
    for texts in batches:
        place = np.arange(texts.tokens.shape[1])
        written = (place >= texts.prompt_length[:, None]) & (place < texts.length[:, None])
        # Tokens of prompts count too, where nothing else tells two tokens apart.
        counts = counts + np.bincount(texts.tokens[written], minlength=2**17)
        counts = counts + 0.1 * np.bincount(texts.tokens[place < texts.prompt_length[:, None]], minlength=2**17)
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


def _weights(texts: Texts, prompt_weight: float) -> Float[Array, "B L"]:
    """The weight of the target's distribution after each token, 0 where there is none: at the first and the last."""
    place = jnp.arange(texts.tokens.shape[1])
    is_known = (place >= 1) & (place < texts.length[:, None] - 1)
    weight = jnp.where(place >= texts.prompt_length[:, None] - 1, 1.0, prompt_weight)
    return jnp.where(is_known, weight, 0.0)


def _before(features: Float[Array, "B L *F"]) -> Float[Array, "B L *F"]:
    """The features of the token before each token; zeros before the first."""
    return jnp.concatenate([jnp.zeros_like(features[:, :1]), features[:, :-1]], axis=1)


def _after(values: Shaped[Array, "B L *F"]) -> Shaped[Array, "B L *F"]:
    """The values of the token after each token; zeros after the last."""
    return jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)


@functools.partial(jax.jit, static_argnames="prompt_weight")
def _products(
    embeddings: Float[Array, "V D"], texts: Texts, prompt_weight: float
) -> tuple[Float[Array, "n n"], Float[Array, "n D"]]:
    """The products of the regressions: of all inputs with each other, and with the target's last hidden states.

    The inputs are the features, the last hidden state, the embedding and 1.
    """
    features = texts.features.astype(jnp.float32)
    last, weight = features[:, :, -1], jnp.sqrt(_weights(texts, prompt_weight))[..., None]
    tokens = heads.normed(jnp.take(embeddings, texts.tokens, axis=0).astype(jnp.float32))
    inputs = [heads.flatten(_before(features)), _before(last), tokens, jnp.ones((*tokens.shape[:2], 1))]
    x = (jnp.concatenate(inputs, axis=-1) * weight).reshape(-1, sum(part.shape[-1] for part in inputs))
    y = (last * weight).reshape(len(x), -1)
    return x.T @ x, x.T @ y


def ridge(
    config: FeatureHeadConfig,
    params: Tree,
    embeddings: Float[Array, "V D"],
    batches: Sequence[Texts],
    *,
    strength: float = 1e-3,
    prompt_weight: float = 0.3,
) -> Tree:
    """The parameters with the input maps that predict the target's last hidden states best, in closed form.

    Args:
      config: the head's shape, in float32.
      params: its parameters.
      embeddings: of the target's tokens.
      batches: texts, whose last feature is the target's last hidden state.
      strength: of the penalty, relative to the mean square of an input.
      prompt_weight: see `Recipe`.
    """
    gram: Any = 0
    cross: Any = 0
    for texts in batches:
        one, two = _products(embeddings, texts, prompt_weight)
        gram, cross = gram + np.asarray(one, np.float64), cross + np.asarray(two, np.float64)
    width = config.layer.hidden_size
    num_features = len(config.taps) * width
    first = np.r_[0:num_features, num_features + width : len(gram)]
    fused = _solve(gram[np.ix_(first, first)], cross[first], strength)
    token = fused[num_features:]
    # The map of the head's own estimate takes the place of that of the features, with the same map of the embedding.
    own = np.arange(num_features, num_features + width)
    others = np.arange(num_features + width, len(gram))
    rest = cross[own] - gram[np.ix_(own, others)] @ token
    state = _solve(gram[np.ix_(own, own)], rest, strength)
    found = {"features": fused[:num_features], "token": token[:width], "state": state}
    maps = {name: {**params[name], "values": jnp.asarray(value, jnp.float32)} for name, value in found.items()}
    return params | maps | {"bias": jnp.asarray(token[width], jnp.float32)}


def _solve(gram: np.ndarray, cross: np.ndarray, strength: float) -> np.ndarray:
    penalty = strength * np.trace(gram) / len(gram)
    return np.linalg.solve(gram + penalty * np.eye(len(gram)), cross)


def bind(config: AnyHead, params: Tree) -> FeatureHead | EagleHead:
    """The head with these parameters."""
    return eagle.bind(config, params) if isinstance(config, EagleConfig) else heads.bind(config, params)


def initial(config: EagleConfig, rows: Float[Array, "W D"], key: jax.Array) -> Tree:
    """Random parameters of an EAGLE head, whose output matrix, if any, begins as the target's, cut to its tokens.

    Args:
      config: the head's shape, in float32.
      rows: `[W, D]` of the target's output matrix (`Frozen`).
      key: of the random numbers.
    """
    params = eagle.initial(config, key)
    if not config.own_head:
        return params
    assert not linear.outputs_first(config.layer.dtype)
    return params | {"head": {"values": rows.T.astype(jnp.float32)}}


def drafted(
    config: AnyHead, params: Tree, frozen: Frozen, texts: Texts, depth: int, read: Float[Array, "B L F E"] | None = None
) -> Iterator[tuple[Float[Array, "B L D"], Float[Array, "B L W"]]]:
    """The state and the logits of each draft token, as the head would draft behind every token of the texts.

    The k-th are those after token i + k of the text, drafted behind token i, at index i; those before it are the
    text's. A draft attends to the text up to token i, and to the entries of the drafts before it.

    Args:
      config: the head's shape.
      params: its parameters.
      frozen: what it uses of the target.
      texts: tokens and features, of which the head reads the first.
      depth: K.
      read: what the head reads in the place of these features; None: those.

    Yields:
      what the head makes for each of the K draft tokens, and the logits of it.
    """
    head, layer = bind(config, params), config.layer
    rows, size = texts.tokens.shape
    features = texts.features[:, :, : len(config.taps)] if read is None else read
    tokens, seen = texts.tokens, _before(features.astype(jnp.float32))
    place = jnp.arange(size)
    keys = values = jnp.zeros((rows, layer.num_kv_heads, 0, layer.head_dim), layer.dtype)
    itself: Bool[Array, "L L"] = jnp.eye(size, dtype=bool)
    mask = place[:, None] >= place
    if not head.sees_first:
        mask &= (place > 0) | (place[:, None] == 0)
    for k in range(depth):
        embedding = jnp.take(frozen.embeddings, tokens, axis=0).astype(jnp.float32)
        positions, seen_of = jnp.broadcast_to(place + k, (rows, size)), jnp.broadcast_to(mask, (rows, *mask.shape))
        # The layer writes its entries at the beginning: those of earlier drafts stand behind them.
        room = jnp.zeros((rows, layer.num_kv_heads, size, layer.head_dim), layer.dtype)
        keys, values = (jnp.concatenate([room, old], axis=2) for old in (keys, values))
        seen, keys, values = head.step(seen, embedding, positions, seen_of, keys, values, None, is_own=k > 0)
        yield seen, head.logits(seen, frozen.rows.astype(jnp.float32))
        mask = jnp.concatenate([itself, mask], axis=1)
        tokens = jnp.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)


class _Known(NamedTuple):
    """The target's distributions, seen through the tokens that the head can draft.

    Attributes:
      logits: `[B, L, W]` of these tokens.
      log_sum: `[B, L]` the logarithm of the sum over all tokens.
      is_best: `[B, L]` whether the target's most probable token is among them.
      weight: `[B, L]` of the loss.
      last: `[B, L, D]` the target's last hidden state.
    """

    logits: Float[Array, "B L W"]
    log_sum: Float[Array, "B L"]
    is_best: Bool[Array, "B L"]
    weight: Float[Array, "B L"]
    last: Float[Array, "B L D"]


def _known(frozen: Frozen, texts: Texts, prompt_weight: float, whole: bool) -> _Known:
    """The target's distribution after each token; unless `whole`, as if it knew no more tokens than the head."""
    last, weight = texts.features[:, :, -1].astype(jnp.float32), _weights(texts, prompt_weight)
    logits = last @ frozen.rows.astype(jnp.float32).T
    if not whole:
        return _Known(logits, jax.nn.logsumexp(logits, axis=-1), jnp.ones(weight.shape, bool), weight, last)
    every = last @ frozen.output.astype(jnp.float32).T
    best = jnp.max(logits, axis=-1) >= jnp.max(every, axis=-1) - 1e-3
    return _Known(logits, jax.nn.logsumexp(every, axis=-1), best, weight, last)


def _losses(
    known: _Known, state: Float[Array, "B L D"], log_q: Float[Array, "B L W"], weights: tuple[float, float]
) -> Float[Array, ""]:
    """The loss of one draft token of each text: of its distribution, and of its state."""
    token_weight, feature_weight = weights
    loss = -token_weight * jnp.sum(jax.nn.softmax(known.logits, axis=-1) * log_q, axis=-1)
    if feature_weight:
        # Smooth L1: half the square below 1 (the authors' code, the mean over the width).
        away = jnp.abs(state - known.last)
        loss += feature_weight * jnp.mean(jnp.where(away < 1, 0.5 * away**2, away - 0.5), axis=-1)
    return jnp.sum(loss * known.weight) / jnp.maximum(jnp.sum(known.weight), 1e-6)


def judge(
    config: AnyHead,
    params: Tree,
    frozen: Frozen,
    texts: Texts,
    *,
    depth: int,
    prompt_weight: float = 0.3,
    whole: bool = False,
    only_known: bool = False,
    weights: tuple[float, float] = (1.0, 0.0),
    read: Float[Array, "B L F E"] | None = None,
) -> Quality:
    """The loss of a head, and its quality, on texts.

    The loss of a draft token is the cross-entropy to the target's distribution over the tokens that the head can draft,
    and, where it has a weight, the distance of the head's state from the target's last hidden state.

    Args:
      config: the head's shape.
      params: its parameters.
      frozen: what it uses of the target.
      texts: with features, of which the last is the target's last hidden state.
      depth: K.
      prompt_weight: see `Recipe`.
      whole: whether the quality counts tokens that the head cannot draft as rejected; takes the whole output matrix.
      only_known: see `Recipe`; takes it too.
      weights: `Recipe.token_weight` and `Recipe.feature_weight`.
      read: as for `drafted`.
    """
    known = _known(frozen, texts, prompt_weight, whole or only_known)
    written = known.weight == 1.0
    if only_known:
        known = known._replace(weight=jnp.where(known.is_best, known.weight, 0.0))
    greedy, overlap, loss = [], [], jnp.zeros(())
    for k, (state, logits) in enumerate(drafted(config, params, frozen, texts, depth, read)):
        log_q = jax.nn.log_softmax(logits, axis=-1)
        p = jnp.exp(known.logits - known.log_sum[..., None])
        loss += DECAY**k * _losses(known, state, log_q, weights)
        count = jnp.maximum(jnp.sum(written), 1)
        is_same = (jnp.argmax(logits, axis=-1) == jnp.argmax(known.logits, axis=-1)) & known.is_best
        greedy.append(jnp.sum(is_same & written) / count)
        overlap.append(jnp.sum(jnp.where(written, jnp.sum(jnp.minimum(p, jnp.exp(log_q)), axis=-1), 0.0)) / count)
        # The next draft token is judged one token later.
        known, written = jax.tree.map(_after, (known, written))
    return Quality(jnp.stack(greedy), jnp.stack(overlap), loss)


def _matrices(params: Tree) -> Tree:
    """Which parameters decay."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    steps, rate = recipe.num_steps, recipe.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps, rate / 10)
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.adamw(schedule, b2=0.95, weight_decay=recipe.weight_decay, mask=_matrices),
    )


def noisy(config: AnyHead, texts: Texts, noise: float, key: Array) -> Float[Array, "B L F E"]:
    """The hidden states that the head reads, with uniform noise (EAGLE, section 4.2).

    Args:
      config: the head's shape.
      texts: of L tokens.
      noise: its width where L = 512 (`Recipe.noise`).
      key: of the random numbers.
    """
    features = texts.features[:, :, : len(config.taps)].astype(jnp.float32)
    width = noise * 512 / features.shape[1]
    return features + width * jax.random.uniform(key, features.shape, minval=-0.5, maxval=0.5)


class TrainState(NamedTuple):
    """What changes while a head is trained."""

    params: Tree
    optimizer: Any
    step: int


def train(
    config: AnyHead,
    state: TrainState | Tree,
    frozen: Frozen,
    batches: Sequence[Texts],
    recipe: Recipe,
    report: Callable[[TrainState, float], bool] = lambda state, loss: True,
) -> TrainState:
    """Trains a head.

    The texts of a step depend on its number and the seed alone, so that a run that is resumed goes on as it was.

    Args:
      config: the head's shape, in float32.
      state: parameters, or where an earlier call stopped.
      frozen: what the head uses of the target.
      batches: texts of the target.
      recipe: how.
      report: called after every step with the state and the loss; False stops.

    Returns:
      the last state.
    """
    optimizer = _optimizer(recipe)
    if not isinstance(state, TrainState):
        state = TrainState(state, optimizer.init(state), 0)

    @jax.jit
    def step(params: Tree, optimizer_state: Any, frozen: Frozen, texts: Texts, key: Array) -> tuple[Tree, Any, Array]:
        read = noisy(config, texts, recipe.noise, key) if recipe.noise else None

        def loss(params: Tree) -> Array:
            judged = judge(
                config,
                params,
                frozen,
                texts,
                depth=recipe.depth,
                prompt_weight=recipe.prompt_weight,
                only_known=recipe.only_known,
                weights=(recipe.token_weight, recipe.feature_weight),
                read=read,
            )
            return judged.loss

        value, gradient = jax.value_and_grad(loss)(params)
        change, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return optax.apply_updates(params, change), optimizer_state, value

    while state.step < recipe.num_steps:
        texts = draw_texts(batches, recipe, state.step)
        key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
        params, optimizer_state, loss = step(state.params, state.optimizer, frozen, texts, key)
        state = TrainState(params, optimizer_state, state.step + 1)
        if not report(state, float(loss)):
            break
    return state


def draw_texts(batches: Sequence[Texts], recipe: Recipe, step: int) -> Texts:
    """The texts of a step: every text once before any twice."""
    places = [(batch, i) for batch, texts in enumerate(batches) for i in range(len(texts.length))]
    chosen = data.of_step(places, step, batch_size=recipe.batch_size, seed=recipe.seed)
    return Texts(*(np.stack([batches[b][field][i] for b, i in chosen]) for field in range(len(Texts._fields))))
