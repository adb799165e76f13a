"""Logits to probabilities: one function, in float32, for target and draft, on every path.

Speculative decoding is exact for whatever distribution the target is *given*; so temperature and truncation are applied
to both sides first ("standardized sampling", Leviathan et al. 2022, §2.2), in the order of transformers: temperature,
top-k, top-p, min-p. A vocabulary is never sorted: top-k and top-p both ask for a threshold on the weights, and thirty
halvings of the bits of a float find it exactly.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.types import PRNGKey, SamplingOptions


def options(
    batch_size: int,
    *,
    temperature: float | list[float] = 0.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
) -> SamplingOptions:
    """Checks the options and spreads them over the rows.

    Args:
      batch_size: B.
      temperature: at least 0; 0 is greedy.
      top_k: at least 0; 0 keeps all.
      top_p: in (0, 1]; 1 keeps all.
      min_p: in [0, 1]; 0 keeps all.

    Raises:
      ValueError: naming the option and its value.
    """

    def spread(name: str, value, dtype, low: float, high: float, open_low: bool = False) -> Array:
        values = jnp.asarray(value, dtype)
        if values.shape not in ((), (batch_size,)):
            raise ValueError(f"{name} has shape {values.shape}: give one value, or one for each of {batch_size} rows.")
        if not bool(jnp.all((values > low if open_low else values >= low) & (values <= high))):
            bounds = f"{'(' if open_low else '['}{low}, {high}]"
            raise ValueError(f"{name}={value} is outside {bounds}.")
        return jnp.broadcast_to(values, (batch_size,))

    return SamplingOptions(
        spread("temperature", temperature, jnp.float32, 0.0, 1e6),
        spread("top_k", top_k, jnp.int32, 0, 2**31 - 1),
        spread("top_p", top_p, jnp.float32, 0.0, 1.0, open_low=True),
        spread("min_p", min_p, jnp.float32, 0.0, 1.0),
    )


def threshold(
    weights: Float[Array, "B T V"], measure: Float[Array, "B T V"], target: Float[Array, "B #T"]
) -> Float[Array, "B T"]:
    """The largest t for which the tokens of weight >= t measure at least `target` together.

    With measure 1 and target k this is the k-th largest weight; with the weights themselves and a mass, the cut of
    nucleus sampling. Weights of [0, 1] order like their bits, so the bits of t are found from the highest down.

    Args:
      weights: `[B, T, V]` in [0, 1].
      measure: `[B, T, V]` not negative.
      target: `[B, 1]` or `[B, T]`, at most the whole measure.
    """
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)

    def halve(i: Array, found: Int[Array, "B T"]) -> Int[Array, "B T"]:
        candidate = found | (1 << (29 - i))
        reached = jnp.sum(jnp.where(bits >= candidate[..., None], measure, 0.0), axis=-1) >= target
        return jnp.where(reached, candidate, found)

    return jax.lax.bitcast_convert_type(
        jax.lax.fori_loop(0, 30, halve, jnp.zeros(weights.shape[:2], jnp.int32)), jnp.float32
    )


def _top_k(weights: Float[Array, "B T V"], k: Int[Array, " B"]) -> Float[Array, "B T V"]:
    size = weights.shape[-1]
    wanted = jnp.where((k <= 0) | (k > size), size, k).astype(jnp.float32)
    cut = threshold(weights, jnp.ones_like(weights), wanted[:, None])
    return jnp.where(weights >= cut[..., None], weights, 0.0)


def _top_p(weights: Float[Array, "B T V"], p: Float[Array, " B"]) -> Float[Array, "B T V"]:
    cut = threshold(weights, weights, p[:, None] * jnp.sum(weights, axis=-1))
    keep = (weights >= cut[..., None]) | (p >= 1.0)[:, None, None]
    return jnp.where(keep, weights, 0.0)


def greedy(logits: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
    """One-hot at the argmax, the first of equals; not a number where the logits are not."""
    one_hot = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
    return jnp.where(jnp.isnan(logits), logits, one_hot)


def probabilities(logits: Float[Array, "B T V"], sampling: SamplingOptions) -> Float[Array, "B T V"]:
    """The distribution that a row's options make of its logits.

    Ties at a top-k or top-p cut are all kept. A row of temperature 0 is one-hot at its argmax. What no row of the batch
    asks for is skipped at run time.

    Args:
      logits: `[B, T, V]`; -inf forbids a token.
      sampling: `[B]` options.

    Returns:
      `[B, T, V]` float32, each row summing to 1; not a number where the logits are not.
    """
    logits = logits.astype(jnp.float32)

    def sampled() -> Array:
        temperature = sampling.temperature[:, None, None]
        relative = logits - jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(relative / jnp.where(temperature > 0, temperature, 1.0))
        weights = jax.lax.cond(jnp.any(sampling.top_k > 0), lambda w: _top_k(w, sampling.top_k), lambda w: w, weights)
        weights = jax.lax.cond(jnp.any(sampling.top_p < 1), lambda w: _top_p(w, sampling.top_p), lambda w: w, weights)
        # The most probable token has weight 1, so min-p needs no normalisation.
        weights = jnp.where(weights >= sampling.min_p[:, None, None], weights, 0.0)
        probs = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return jnp.where(temperature > 0, probs, greedy(logits))

    return jax.lax.cond(jnp.any(sampling.temperature > 0), sampled, lambda: greedy(logits))


def categorical(key: PRNGKey, probs: Float[Array, " V"]) -> Int[Array, ""]:
    """Draws a token by the Gumbel trick: argmax(log p + noise). The weights need not be normalised."""
    return jnp.argmax(jnp.log(probs) + jax.random.gumbel(key, probs.shape)).astype(jnp.int32)


def sample(keys: Array, probs: Float[Array, "B V"], sampling: SamplingOptions) -> Int[Array, " B"]:
    """Draws one token a row; where every row is greedy, takes the argmax and makes no noise."""
    return jax.lax.cond(
        jnp.any(sampling.temperature > 0),
        lambda: jax.vmap(categorical)(keys, probs),
        lambda: jnp.argmax(probs, axis=-1).astype(jnp.int32),
    )
