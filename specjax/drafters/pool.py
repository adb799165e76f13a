"""A pool of n-grams on the device: for each token, what has followed it lately.

Each row has a fixed number of buckets, and a token's n-grams are kept in the bucket of its id modulo that number. A
bucket keeps the last few n-grams, the latest first; each knows its first token, so that tokens which share a bucket do
not answer for one another.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def empty(batch_size: int, num_buckets: int, size: int, ngram: int) -> Int[Array, "B H G n"]:
    """Pools with room for `size` n-grams of `ngram` tokens in each bucket; entries of -1 hold none."""
    return jnp.full((batch_size, num_buckets, size, ngram), -1, jnp.int32)


def insert(
    pool: Int[Array, "B H G n"], ngrams: Int[Array, "B M n"], is_valid: Bool[Array, "B M"]
) -> Int[Array, "B H G n"]:
    """Adds n-grams, one after the other.

    Each moves to the front of its bucket. One that was not there takes the place of the last.

    Args:
      pool: of each row.
      ngrams: the n-grams of each row, the latest last.
      is_valid: which of them are added.
    """
    return jax.lax.scan(_insert_one, pool, (jnp.swapaxes(ngrams, 0, 1), is_valid.T))[0]


def _insert_one(
    pool: Int[Array, "B H G n"], entry: tuple[Int[Array, "B n"], Bool[Array, " B"]]
) -> tuple[Int[Array, "B H G n"], None]:
    def of_row(pool: Array, ngram: Array, is_valid: Array) -> Array:
        at = ngram[0] % pool.shape[0]
        bucket = jax.lax.dynamic_index_in_dim(pool, at, keepdims=False)
        is_same = jnp.all(bucket == ngram, axis=-1)
        last = bucket.shape[0] - 1
        leaves = jnp.where(jnp.any(is_same), jnp.argmax(is_same), last)
        moved = jnp.roll(bucket, 1, axis=0).at[0].set(ngram)
        after = jnp.where((jnp.arange(last + 1) <= leaves)[:, None], moved, bucket)
        return jax.lax.dynamic_update_index_in_dim(pool, jnp.where(is_valid, after, bucket), at, 0)

    return jax.vmap(of_row)(pool, *entry), None


def find(pool: Int[Array, "B H G n"], first: Int[Array, " B"]) -> tuple[Int[Array, "B G m"], Int[Array, " B"]]:
    """The m = n - 1 tokens that have followed a token, the latest n-gram first, and the number of such n-grams.

    Entries beyond that number are -1.
    """

    def of_row(pool: Array, first: Array) -> tuple[Array, Array]:
        bucket = jax.lax.dynamic_index_in_dim(pool, first % pool.shape[0], keepdims=False)
        is_found = bucket[:, 0] == first
        order = jnp.argsort(~is_found, stable=True)
        return jnp.where(is_found[:, None], bucket, -1)[order, 1:], jnp.sum(is_found, dtype=jnp.int32)

    return jax.vmap(of_row)(pool, first)


def windows(tokens: Int[Array, "B P"], length: Int[Array, " B"], ngram: int) -> tuple[Array, Array]:
    """All n-grams of some texts, `[B, M, n]`, and which of them lie within their text, `[B, M]`; M = P - n + 1 or 0."""
    count = max(tokens.shape[1] - ngram + 1, 0)
    at = jnp.arange(count)[:, None] + jnp.arange(ngram)
    is_valid = jnp.arange(count) + ngram <= length[:, None]
    return tokens[:, at], is_valid
