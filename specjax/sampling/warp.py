"""Logits to probabilities: one function, in float32, for target and draft, on every path.

Speculative decoding is exact for whatever distribution the target is *given*; so penalties, temperature and truncation
are applied to both sides first ("standardized sampling", Leviathan et al. 2022, §2.2), in the order of transformers:
`processors`, then temperature, top-k, top-p, min-p, typical-p, epsilon cutoff. The vocabulary is never sorted: each cut
needs only a threshold, which a bisection over the bits of a float finds exactly.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, UInt32

from specjax import control
from specjax.sampling import processors
from specjax.sampling.processors import PerRow
from specjax.types import History, PRNGKey, SamplingOptions


def options(batch_size: int, **options: Any) -> SamplingOptions:
    """`host_options`, on the device."""
    return jax.tree.map(jnp.asarray, host_options(batch_size, **options))


def host_options(
    batch_size: int,
    *,
    temperature: PerRow = 0.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    min_p: PerRow = 0.0,
    typical_p: PerRow = 1.0,
    epsilon_cutoff: PerRow = 0.0,
    **penalties: Any,
) -> SamplingOptions:
    """Checks the options and broadcasts them to the rows, in host memory.

    Args:
      batch_size: B.
      temperature: at least 0; 0 is greedy.
      top_k: at least 0; 0 keeps all.
      top_p: in (0, 1]; 1 keeps all.
      min_p: in [0, 1]; 0 keeps all.
      typical_p: in (0, 1]; 1 keeps all (Meister et al. 2022, arXiv 2202.00666).
      epsilon_cutoff: in [0, 1); 0 keeps all (Hewitt et al. 2022, arXiv 2210.15191).
      **penalties: those of `processors.penalties`.

    Raises:
      ValueError: naming the option and its value.
      TypeError: for an option that does not exist.
    """
    known = set(inspect.signature(processors.penalties).parameters) - {"batch_size"}
    unknown = sorted(set(penalties) - known)
    if unknown:
        own = ["temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff"]
        raise TypeError(f"No option {', '.join(unknown)}: there are {', '.join(own + sorted(known))}.")

    def spread(name: str, value: Any, dtype: Any, low: float, high: float, *, above: bool = False) -> Any:
        return processors.spread(name, value, batch_size, dtype, low, high, above=above)

    return SamplingOptions(
        spread("temperature", temperature, jnp.float32, 0.0, 1e6),
        spread("top_k", top_k, jnp.int32, 0, 2**31 - 1),
        spread("top_p", top_p, jnp.float32, 0.0, 1.0, above=True),
        spread("min_p", min_p, jnp.float32, 0.0, 1.0),
        spread("typical_p", typical_p, jnp.float32, 0.0, 1.0, above=True),
        spread("epsilon_cutoff", epsilon_cutoff, jnp.float32, 0.0, 1.0),
        processors.penalties(batch_size, **penalties),
    )


def _threshold(
    order: Integer[Array, "B T V"], measure: Float[Array, "B T V"], target: Float[Array, "B #T"], bits: int
) -> Integer[Array, "B T"]:
    """The largest t for which the tokens of order >= t measure at least `target`, found from the highest bit down."""
    one = jnp.ones((), order.dtype)

    def halve(i: Array, found: Integer[Array, "B T"]) -> Integer[Array, "B T"]:
        candidate = found | (one << (bits - 1 - i).astype(order.dtype))
        reached = jnp.sum(jnp.where(order >= candidate[..., None], measure, 0.0), axis=-1) >= target
        return jnp.where(reached, candidate, found)

    return jax.lax.fori_loop(0, bits, halve, jnp.zeros(order.shape[:2], order.dtype))


def threshold(
    weights: Float[Array, "B T V"], measure: Float[Array, "B T V"], target: Float[Array, "B #T"]
) -> Float[Array, "B T"]:
    """The largest t for which the tokens of weight >= t measure at least `target` together.

    With measure 1 and target k this is the k-th largest weight; with the weights themselves and a mass, the cut of
    nucleus sampling. Weights in [0, 1] are ordered as their bits are, so the bits of t are found from the highest down.

    Args:
      weights: `[B, T, V]` in [0, 1].
      measure: `[B, T, V]` non-negative.
      target: `[B, 1]` or `[B, T]`, at most the total measure.
    """
    found = _threshold(jax.lax.bitcast_convert_type(weights, jnp.int32), measure, target, 30)
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def _order(logits: Float[Array, "B T V"]) -> UInt32[Array, "B T V"]:
    """Integers in the same order as the logits."""
    bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.uint32)  # -0 equals 0.
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _top_k(weights: Float[Array, "B T V"], k: Int[Array, " B"], logits: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
    """Ranks by the logits: at a high temperature, the weights of different logits may round to the same number."""
    size = weights.shape[-1]
    wanted = jnp.where((k <= 0) | (k > size), size, k).astype(jnp.float32)
    order = _order(logits)
    cut = _threshold(order, jnp.ones_like(weights), wanted[:, None], 32)
    return jnp.where(order >= cut[..., None], weights, 0.0)


def _top_p(weights: Float[Array, "B T V"], p: Float[Array, " B"]) -> Float[Array, "B T V"]:
    cut = threshold(weights, weights, p[:, None] * jnp.sum(weights, axis=-1))
    keep = (weights >= cut[..., None]) | (p >= 1.0)[:, None, None]
    return jnp.where(keep, weights, 0.0)


def _typical_p(weights: Float[Array, "B T V"], p: Float[Array, " B"]) -> Float[Array, "B T V"]:
    log_probs = jnp.log(weights / jnp.sum(weights, axis=-1, keepdims=True))
    probs = jnp.exp(log_probs)
    entropy = -jnp.sum(jnp.where(probs > 0, probs * log_probs, 0.0), axis=-1, keepdims=True)
    # Non-negative floats are ordered as their bits are; the most typical token comes first.
    infinity = jnp.asarray(jnp.inf, jnp.float32)
    distance = jnp.where(probs > 0, jnp.abs(-log_probs - entropy), infinity)
    order = jax.lax.bitcast_convert_type(infinity, jnp.int32) - jax.lax.bitcast_convert_type(distance, jnp.int32)
    cut = _threshold(order, weights, p[:, None] * jnp.sum(weights, axis=-1), 31)
    keep = (order >= cut[..., None]) | (p >= 1.0)[:, None, None]
    return jnp.where(keep, weights, 0.0)


def _epsilon(weights: Float[Array, "B T V"], epsilon: Float[Array, " B"]) -> Float[Array, "B T V"]:
    probs = weights / jnp.sum(weights, axis=-1, keepdims=True)
    keep = (probs >= epsilon[:, None, None]) | (weights == jnp.max(weights, axis=-1, keepdims=True))
    return jnp.where(keep, weights, 0.0)


def argmax(x: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """The index of the largest value, the first one in a tie; any index where a value is NaN.

    Uses two reductions that XLA:CPU vectorises: `jnp.argmax`, which it does not, takes five times as long.
    """
    size = x.shape[-1]
    is_largest = x == jnp.max(x, axis=-1, keepdims=True)
    return size - 1 - jnp.max(jnp.where(is_largest, size - 1 - jnp.arange(size, dtype=jnp.int32), 0), axis=-1)


def top(x: Float[Array, "*B V"], k: int) -> tuple[Float[Array, "*B k"], Int[Array, "*B k"]]:
    """The k largest values and their indices, the first one in a tie; beyond those that are finite, -inf.

    k maxima: `jax.lax.top_k` gathers a vocabulary that is split over devices, and sorts on GPUs.
    """

    def take(left: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        index = argmax(left)
        rest = jnp.where(jnp.arange(x.shape[-1]) == index[..., None], -jnp.inf, left)
        return rest, (jnp.max(left, axis=-1), index)

    _, (values, indices) = jax.lax.scan(take, x, None, length=k)
    return jnp.moveaxis(values, 0, -1), jnp.moveaxis(indices, 0, -1)


def greedy(logits: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
    """One-hot at the argmax, the first one in a tie; NaN where logits are NaN or all are -inf."""
    one_hot = jax.nn.one_hot(argmax(logits), logits.shape[-1], dtype=jnp.float32)
    broken = jnp.isnan(logits) | (jnp.max(logits, axis=-1, keepdims=True) == -jnp.inf)
    return jnp.where(broken, jnp.nan, one_hot)


def warp(logits: Float[Array, "B T V"], sampling: SamplingOptions) -> Float[Array, "B T V"]:
    """The distribution that temperature and truncation make of the logits.

    Ties at a cut are all kept. A row at temperature 0 is one-hot at its argmax. Options that no row of the batch uses
    are skipped at run time.

    Args:
      logits: `[B, T, V]`; -inf forbids a token.
      sampling: `[B]` options, whose penalties have been applied.

    Returns:
      `[B, T, V]` float32, each row summing to 1; NaN where logits are NaN or all tokens are forbidden.
    """

    def when(used: Array, cut: Any, option: Array, weights: Array) -> Array:
        return control.alike(jax.lax.cond(jnp.any(used), lambda w: cut(w, option), lambda w: w, weights), logits)

    def sampled() -> Array:
        s = sampling
        temperature = s.temperature[:, None, None]
        relative = logits - jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(relative / jnp.where(temperature > 0, temperature, 1.0))
        weights = when(s.top_k > 0, lambda w, k: _top_k(w, k, logits), s.top_k, weights)
        weights = when(s.top_p < 1, _top_p, s.top_p, weights)
        # The most probable token has weight 1, so min-p needs no normalisation.
        weights = jnp.where(weights >= s.min_p[:, None, None], weights, 0.0)
        weights = when(s.typical_p < 1, _typical_p, s.typical_p, weights)
        weights = when(s.epsilon_cutoff > 0, _epsilon, s.epsilon_cutoff, weights)
        probs = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return control.alike(
            jax.lax.cond(
                jnp.any(s.temperature <= 0), lambda p: jnp.where(temperature > 0, p, greedy(logits)), lambda p: p, probs
            ),
            logits,
        )

    return control.alike(jax.lax.cond(jnp.any(sampling.temperature > 0), sampled, lambda: greedy(logits)), logits)


def match_vocab(logits: Float[Array, "B T V"], vocab_size: int) -> Float[Array, "B T W"]:
    """Cuts or pads the draft's logits to the target's width; a token that one side lacks is never drafted.

    The vocabularies of models with the same tokenizer are often padded to different sizes.
    """
    missing = vocab_size - logits.shape[-1]
    if missing <= 0:
        return logits[..., :vocab_size]
    return jnp.pad(logits, ((0, 0), (0, 0), (0, missing)), constant_values=-jnp.inf)


def probabilities(logits: Float[Array, "B T V"], sampling: SamplingOptions, history: History) -> Float[Array, "B T V"]:
    """The distribution that a row's options make of its logits: penalties, then `warp`.

    Args:
      logits: `[B, T, V]`.
      sampling: `[B]` options.
      history: the text before each of the T tokens.

    Returns:
      `[B, T, V]` float32, each row summing to 1; NaN where logits are NaN or all tokens are forbidden.
    """
    return warp(processors.process(logits.astype(jnp.float32), sampling.penalties, history), sampling)


def uniform(key: PRNGKey, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    """Uniform numbers in [0, 1) whose smallest step near 0 is 2^-46.

    `jax.random.uniform` has steps of 2^-23: one number in 8 million is 0, and would accept every draft token whose
    target probability is not 0.
    """
    coarse, fine = jax.random.uniform(key, (2, *shape))
    return jnp.minimum(coarse + fine * 2.0**-23, 1.0 - 2.0**-24)


def categorical(key: PRNGKey, probs: Float[Array, " V"]) -> Int[Array, ""]:
    """Draws a token by the Gumbel trick: argmax(log p + noise). The weights need not be normalised."""
    return argmax(jnp.log(probs) + jax.random.gumbel(key, probs.shape))


def sample(keys: Array, probs: Float[Array, "B V"], sampling: SamplingOptions) -> Int[Array, " B"]:
    """Draws one token per row; where every row is greedy, takes the argmax and draws no noise."""
    return jax.lax.cond(
        jnp.any(sampling.temperature > 0),
        lambda: jax.vmap(categorical)(keys, probs),
        lambda: argmax(probs),
    )
