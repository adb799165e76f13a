"""The draft's part of speculative beam search: its beams of all depths, a tree that the target reads in one call."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax import sampling
from specjax.models import bfloat16
from specjax.sampling import tree
from specjax.types import Block, Model, Tree


class Beams(NamedTuple):
    """The draft's beams of all depths, u at each: node `d u + j` is beam j of depth d + 1.

    Attributes:
      root: `[B, N]` the live beam that each node continues, N = K u.
      parent: `[B, N]` the node that it continues by one token; -1: the live beam itself.
      tokens: `[B, N]` its token. Beams of probability 0 have tokens, too: the target scores them like any other.
    """

    root: Int[Array, "B N"]
    parent: Int[Array, "B N"]
    tokens: Int[Array, "B N"]


class Front(NamedTuple):
    """The draft's beams of one depth: N = w at depth 0, then N = u.

    Attributes:
      score: `[B, N]` the target's score of the live beam plus the draft's log-probabilities since.
      root: `[B, N]` the live beam that each continues.
      token: `[B, N]` the last token of each.
      beams: those of all depths so far.
      failed_at: `[B]` the depth at which the draft's logits were NaN, or -1.
    """

    score: Float[Array, "B N"]
    root: Int[Array, "B N"]
    token: Int[Array, "B N"]
    beams: Beams
    failed_at: Int[Array, " B"]


def expand(
    score: Float[Array, "B N"], log_probs: Float[Array, "B N V"], width: int
) -> tuple[Float[Array, "B M"], Int[Array, "B M"], Int[Array, "B M"]]:
    """The best continuations of beams by one token, for the searches of both target and draft.

    Args:
      score: `[B, N]` of the beams.
      log_probs: `[B, N, V]` of the token that follows each.
      width: M, how many continuations to keep, at most N V.

    Returns:
      `[B, M]` each, best first, in a tie the first beam, then the first token: the scores, the indices of the beams
      that are continued, and the tokens.
    """
    size = log_probs.shape[-1]
    # The logits that follow a dead beam may be NaN; no text depends on them.
    total = jnp.where(score[..., None] > -jnp.inf, score[..., None] + log_probs, -jnp.inf)
    best, index = jax.lax.top_k(total.reshape(score.shape[0], -1), width)
    return best, index // size, index % size


def take(x: Array, index: Int[Array, "B M"]) -> Array:
    """`x[b, index[b, m]]` for every b and m: picks beams, or rows of a tree, with any further axes."""
    return x[jnp.arange(index.shape[0])[:, None], index]


def gather(cache: Tree, rows: Int[Array, "B M"]) -> Tree:
    """A cache with the given M of each text's rows. The batch axis is the first axis of every array in a cache."""
    batch = rows.shape[0]
    index = (rows + jnp.arange(batch)[:, None] * (cache.length.shape[0] // batch)).reshape(-1)
    return jax.tree.map(lambda x: bfloat16.moved(lambda x, index: x[index], (x,), index), cache)


def set_length(model: Model, cache: Any, length: Int[Array, " B"]) -> Any:
    """The cache with `length` committed entries in all rows of a text; they must have been written."""
    each = jnp.repeat(length, cache.length.shape[0] // length.shape[0])
    return model.commit(cache, None, each - cache.length)


def none(rows: int, num_draft_tokens: int, draft_beams: int) -> Beams:
    """No beams yet, and room for K u of them."""
    empty = jnp.zeros((rows, num_draft_tokens * draft_beams), jnp.int32)
    return Beams(empty, empty - 1, empty)


def grow(front: Front, parent: Int[Array, "B U"], token: Int[Array, "B U"], depth: Int[Array, ""]) -> Beams:
    """All beams so far, with those of one more depth.

    Args:
      front: the deepest beams so far.
      parent: `[B, U]` which of them each new beam continues.
      token: `[B, U]` with what token.
      depth: that of the front.
    """
    width = parent.shape[1]
    above = jnp.where(depth == 0, -1, (depth - 1) * width + parent)
    new = Beams(take(front.root, parent), above, token)
    at = depth * width
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, at, axis=1), front.beams, new)


def search_ahead(
    draft: Model,
    params: Tree,
    stops: Bool[Array, " V"],
    score: Float[Array, "B W"],
    tokens: Int[Array, "B W L"],
    length: Int[Array, " B"],
    cache: Any,
    num_draft_tokens: int,
    draft_beams: int,
) -> tuple[Beams, Any, Int[Array, " B"]]:
    """The draft's own beam search, K steps ahead of the live beams, whose scores it starts from.

    Args:
      draft: the draft.
      params: its parameters.
      stops: the tokens that end a text.
      score: `[B, W]` of the live beams.
      tokens: `[B, W, L]` of the live beams.
      length: `[B]` of every live beam of a row.
      cache: the draft's cache.
      num_draft_tokens: K.
      draft_beams: u.

    Returns:
      The draft's beams; the cache with all tokens of the live beams and none of the drafts; and the depth at which
      logits were NaN, or -1.
    """
    rows, width = score.shape

    def step(front: Front, logits: Array, depth: Array) -> tuple[Front, Array]:
        log_probs = jax.nn.log_softmax(sampling.match_vocab(logits, stops.size), axis=-1)
        alive = front.score > -jnp.inf
        broken = jnp.any(alive[..., None] & jnp.isnan(log_probs), axis=(1, 2)) & (front.failed_at < 0)
        # A text that has stopped is never continued, so the draft need not guess where texts stop.
        best, parent, token = expand(front.score, jnp.where(stops, -jnp.inf, log_probs), draft_beams)
        failed_at = jnp.where(broken, depth, front.failed_at)
        return Front(best, take(front.root, parent), token, grow(front, parent, token, depth), failed_at), parent

    # One call reads what the last step added, up to K + 1 tokens, and scores the first drafts. Where it added less,
    # the call begins before that and writes some entries again.
    begin = jnp.maximum(length - num_draft_tokens - 1, 0)
    at = begin[:, None, None] + jnp.arange(num_draft_tokens + 1)
    window = jnp.take_along_axis(tokens, jnp.broadcast_to(at, (rows, width, at.shape[2])), axis=2)
    output, cache = draft.apply(params, Block(window.reshape(rows * width, -1)), set_length(draft, cache, begin))
    cache = set_length(draft, cache, length)
    last = jnp.arange(rows), slice(None), length - 1 - begin
    logits = output.logits.reshape(rows, width, num_draft_tokens + 1, -1)[last]
    root = jnp.broadcast_to(jnp.arange(width), (rows, width))
    start = Front(score, root, window[last], none(rows, num_draft_tokens, draft_beams), jnp.full(rows, -1, jnp.int32))
    front, parent = step(start, logits, jnp.zeros((), jnp.int32))
    if num_draft_tokens == 1:
        return front.beams, cache, front.failed_at

    def deepen(carry: tuple[Any, Front], depth: Array) -> tuple[tuple[Any, Front], None]:
        ahead, front = carry
        token = front.token.reshape(-1, 1)
        output, ahead = draft.apply(params, Block(token), ahead)
        ahead = draft.commit(ahead, None, jnp.ones_like(token[:, 0]))
        front, parent = step(front, output.logits.reshape(rows, draft_beams, -1), depth)
        return (gather(ahead, parent), front), None

    ahead = gather(cache, parent), front
    (_, front), _ = jax.lax.scan(deepen, ahead, jnp.arange(1, num_draft_tokens, dtype=jnp.int32))
    return front.beams, cache, front.failed_at


def score(
    target: Model, params: Tree, last: Int[Array, "B W"], beams: Beams, max_depth: int, cache: Any
) -> tuple[Float[Array, "B W T V"], Any]:
    """One call of the target: after every live beam it reads the whole tree, T = N + 1 tokens.

    Args:
      target: the target.
      params: its parameters.
      last: `[B, W]` the last token of each live beam.
      beams: the draft's.
      max_depth: K.
      cache: the target's, of all other tokens, one row per live beam.
    """
    rows, width = last.shape
    nodes = jnp.broadcast_to(beams.tokens[:, None], (rows, width, beams.tokens.shape[1]))
    tokens = jnp.concatenate([last[..., None], nodes], axis=-1).reshape(rows * width, -1)
    block = Block(tokens)
    if max_depth:
        shape = tree.shape(jnp.repeat(beams.parent, width, axis=0), max_depth)
        block = Block(tokens, shape.depth, shape.sees)
    output, cache = target.apply(params, block, cache)
    return output.logits.reshape(rows, width, tokens.shape[1], -1), cache


def find(
    beams: Beams, root: Int[Array, "B W"], node: Int[Array, "B W"], token: Int[Array, "B W"]
) -> tuple[Int[Array, "B W"], Bool[Array, "B W"]]:
    """Looks a beam's next token up among the draft's beams.

    Args:
      beams: the draft's.
      root: `[B, W]` the live beam that each beam continues.
      node: `[B, W]` its index in the block that `score` read: 0, or one more than a node's index.
      token: `[B, W]` its next token.

    Returns:
      the index of the beam with that token, and whether there is one.
    """
    same = (beams.parent[:, None] + 1 == node[..., None]) & (beams.tokens[:, None] == token[..., None])
    # The same tokens may have been drafted after another live beam: they are read after this one as well. Its own are
    # preferred, since the draft has searched on from them.
    preference = same * (1 + (beams.root[:, None] == root[..., None]))
    # The block begins with the live beam itself, which continues nothing.
    preference = jnp.pad(preference, ((0, 0), (0, 0), (1, 0)))
    return jnp.argmax(preference, axis=-1).astype(jnp.int32), jnp.any(same, axis=-1)


def paths(beams: Beams, node: Int[Array, "B W"], max_depth: int) -> Int[Array, "B W P"]:
    """The path that `Model.commit` keeps of the block for each beam: from the live beam down to `node`."""
    shape = tree.shape(beams.parent, max_depth)
    sees = take(shape.sees, node)
    on_path = sees[..., None] & (shape.depth[:, None, :, None] == jnp.arange(max_depth + 1))
    return jnp.argmax(on_path, axis=2).astype(jnp.int32)
