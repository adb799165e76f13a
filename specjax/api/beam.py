"""Beam search, plain and speculative (Leviathan et al. 2022, arXiv 2211.17192, appendix A.4), and its public API.

The draft searches K steps ahead with u >= w beams, the target scores in one call every beam that the draft kept on the
way, and the target's own search of width w then walks through those scores. A step of the search is free while the
target's w beams are all among the draft's u; the first beam that is not ends the walk, after a step that was scored all
the same. So a call of the target gives 1 to K + 1 steps, whose beams and scores are those of plain beam search whatever
the draft says. Plain beam search is the same loop with K = 0.

**The draft's tree in rows.** The u beams that the draft keeps at each depth make a tree, most of whose branches die out
before depth K. They must be scored nevertheless, since the target's beams die out too, but later. A `Model` reads
chains, so the tree is laid out in R = w + K (u - 1) rows of the target's cache, each holding one path from the text: a
node's first child goes on in its row, and every other child starts a new row with a copy of the path. (The paper
counts w + u K positions; rows feed what paths share once a path. Attention over a tree would save that.)

**Who holds what.** All w beams of a text have the same length n. Between steps both caches have w rows per text; the
target's hold the first n - 1 tokens of each beam, the draft's at least the first n - K - 1.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax import api, decoding, sampling
from specjax.api.pretrained import Pretrained
from specjax.limits import check_num_draft_tokens
from specjax.models import bfloat16
from specjax.parallel import distributed, sharding
from specjax.types import Block, Inputs, Model, Params, Tree

MAX_BEAMS = 1024
"""Each beam has a cache of its own."""


class Beams(NamedTuple):
    """The w best texts of each row, best first.

    A row whose target gives fewer than w texts a probability above 0 has fewer: the rest are the bare prompt, with a
    score of -inf.

    Attributes:
      tokens: `[B, W, L]` prompts and new tokens, the stop token among them; 0 at and beyond `length`.
      length: `[B, W]` of the texts, prompt and all.
      score: `[B, W]` float32, the sum of the log-probabilities of the new tokens over their number to the power of
        `length_penalty`.
      target_calls: `[B]` calls of the target that the row took part in, the prefill not counted.
      histogram: `[B, K + 1]` those calls by the number of draft steps accepted; a call that accepts n of them advances
        the search by n + 1 steps.
    """

    tokens: Int[Array, "B W L"]
    length: Int[Array, "B W"]
    score: Float[Array, "B W"]
    target_calls: Int[Array, " B"]
    histogram: Int[Array, "B K+1"]


class _Request(NamedTuple):
    """What a search is asked for; constant, and traced.

    Attributes:
      prompt_length: `[B]`.
      limit: `[B]` the length at which every text of a row ends.
      stops: `[V]` the tokens that end a text.
      length_penalty: `[]` see `Beams.score`.
      stop_when_full: `[]` end a row as soon as it has w finished texts (`early_stopping=True`).
      full_length: `[]` judge what a beam can still become by its longest continuation (`early_stopping="never"`).
    """

    prompt_length: Int[Array, " B"]
    limit: Int[Array, " B"]
    stops: Bool[Array, " V"]
    length_penalty: Float[Array, ""]
    stop_when_full: Bool[Array, ""]
    full_length: Bool[Array, ""]


class _Pool(NamedTuple):
    """The best finished texts so far, best first; an empty slot has the score -inf.

    Attributes:
      tokens: `[B, W, L]`.
      length: `[B, W]`.
      score: `[B, W]` with the length penalty.
    """

    tokens: Int[Array, "B W L"]
    length: Int[Array, "B W"]
    score: Float[Array, "B W"]


class _Search(NamedTuple):
    """What one step of beam search changes.

    Attributes:
      tokens: `[B, W, L]` the live beams, best first; what lies beyond `length` is stale.
      score: `[B, W]` the sum of the log-probabilities of their new tokens; -inf: a dead beam, which only fills a slot.
      length: `[B]` of every live beam of a row.
      pool: the finished texts.
      done: `[B]`.
      failed_at: `[B]` the position whose logits were NaN, or -1.
      row: `[B, W]` the row of the scored tree that each beam's path lies in.
      walking: `[B]` whether all live beams are in the scored tree, so that another step needs no call of the target.
    """

    tokens: Int[Array, "B W L"]
    score: Float[Array, "B W"]
    length: Int[Array, " B"]
    pool: _Pool
    done: Bool[Array, " B"]
    failed_at: Int[Array, " B"]
    row: Int[Array, "B W"]
    walking: Bool[Array, " B"]


class _Tree(NamedTuple):
    """The draft's beams of all depths, a path per row.

    Attributes:
      root: `[B, R]` the live beam that the path continues. Rows 0 .. w - 1 continue beams 0 .. w - 1.
      tokens: `[B, R, K]` the draft tokens of the path, then zeros: the target scores them too, guesses like any other.
      used: `[B]` rows in use.
    """

    root: Int[Array, "B R"]
    tokens: Int[Array, "B R K"]
    used: Int[Array, " B"]


class _Front(NamedTuple):
    """The draft's beams of one depth: N = w of depth 0, then N = u.

    Attributes:
      score: `[B, N]` the target's score of the live beam plus the draft's log-probabilities since.
      row: `[B, N]` where in the tree each is.
      token: `[B, N]` the last token of each.
      tree: the tree so far.
      failed_at: `[B]` the depth at which the draft's logits were NaN, or -1.
    """

    score: Float[Array, "B N"]
    row: Int[Array, "B N"]
    token: Int[Array, "B N"]
    tree: _Tree
    failed_at: Int[Array, " B"]


class _State(NamedTuple):
    """Everything that the loop carries.

    Attributes:
      search: the beams.
      cache: the target's cache, w rows per text.
      draft_cache: the draft's cache, w rows per text; empty without a draft.
      draft_failed: `[B]` whether it was the draft whose logits were NaN.
      target_calls: `[B]`.
      histogram: `[B, K + 1]`.
    """

    search: _Search
    cache: Tree
    draft_cache: Tree
    draft_failed: Bool[Array, " B"]
    target_calls: Int[Array, " B"]
    histogram: Int[Array, "B K+1"]


def expand(
    score: Float[Array, "B N"], log_probs: Float[Array, "B N V"], width: int
) -> tuple[Float[Array, "B M"], Int[Array, "B M"], Int[Array, "B M"]]:
    """The best continuations of beams by one token; target and draft both search by it.

    Args:
      score: `[B, N]` of the beams.
      log_probs: `[B, N, V]` of the token that follows each.
      width: M, how many continuations to keep, at most N V.

    Returns:
      `[B, M]` each, best first; of equals the one of the first beam, then of the first token: the scores, the numbers
      of the beams that are continued, and the tokens.
    """
    size = log_probs.shape[-1]
    # The logits that follow a dead beam may be NaN; no text depends on them.
    total = jnp.where(score[..., None] > -jnp.inf, score[..., None] + log_probs, -jnp.inf)
    best, index = jax.lax.top_k(total.reshape(score.shape[0], -1), width)
    return best, index // size, index % size


def _take(x: Array, index: Int[Array, "B M"]) -> Array:
    """`x[b, index[b, m]]` for every b and m: picks beams, or rows of a tree, with whatever axes they have."""
    return x[jnp.arange(index.shape[0])[:, None], index]


def _gather(cache: Tree, rows: Int[Array, "B M"]) -> Tree:
    """A cache with the given M of each text's rows. All that a cache holds leads with the batch axis."""
    batch = rows.shape[0]
    index = (rows + jnp.arange(batch)[:, None] * (cache.length.shape[0] // batch)).reshape(-1)
    return jax.tree.map(lambda x: bfloat16.moved(lambda x, index: x[index], (x,), index), cache)


def _set_length(model: Model, cache: Any, length: Int[Array, " B"]) -> Any:
    """The cache with so many committed entries in all rows of a text, which are there."""
    each = jnp.repeat(length, cache.length.shape[0] // length.shape[0])
    return model.commit(cache, None, each - cache.length)


def _select(rows: Bool[Array, " B"], new: _Search, old: _Search) -> _Search:
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _append(
    tokens: Int[Array, "B N L"], parent: Int[Array, "B M"], token: Int[Array, "B M"], length: Int[Array, " B"]
) -> Int[Array, "B M L"]:
    """The texts of the parents, each with one more token at `length`."""
    here = jnp.arange(tokens.shape[2]) == length[:, None, None]
    return jnp.where(here, token[..., None], _take(tokens, parent))


# The draft.


def _bare_tree(rows: int, width: int, num_draft_tokens: int, draft_beams: int) -> _Tree:
    """The tree before the first draft token: a row for each live beam, and empty rows."""
    row = jnp.arange(width + num_draft_tokens * (draft_beams - 1))
    return _Tree(
        root=jnp.broadcast_to(jnp.where(row < width, row, 0), (rows, row.size)),
        tokens=jnp.zeros((rows, row.size, num_draft_tokens), jnp.int32),
        used=jnp.full(rows, width, jnp.int32),
    )


def _grow(
    tree: _Tree, row: Int[Array, "B N"], parent: Int[Array, "B U"], token: Int[Array, "B U"], depth: Int[Array, ""]
) -> tuple[_Tree, Int[Array, "B U"]]:
    """Adds one depth to the tree.

    Args:
      tree: with paths of at most `depth` tokens.
      row: `[B, N]` the rows of the beams of that depth.
      parent: `[B, U]` which of them each new beam continues.
      token: `[B, U]` with what token.
      depth: that of the parents.

    Returns:
      The tree, and the rows of the new beams: the parent's for its first child, unused ones for the others.
    """
    order = jnp.arange(parent.shape[1])
    has_elder = jnp.any((parent[:, :, None] == parent[:, None, :]) & (order < order[:, None]), axis=-1)
    old_row = _take(row, parent)
    new_row = jnp.where(has_elder, tree.used[:, None] + jnp.cumsum(has_elder, axis=-1) - 1, old_row)
    at = jnp.arange(parent.shape[0])[:, None], new_row
    return _Tree(
        root=tree.root.at[at].set(_take(tree.root, old_row)),
        tokens=tree.tokens.at[at].set(_take(tree.tokens, old_row).at[:, :, depth].set(token)),
        used=tree.used + jnp.sum(has_elder, axis=-1, dtype=jnp.int32),
    ), new_row


def _draft(
    draft: Model, params: Tree, request: _Request, search: _Search, cache: Tree, tree: _Tree, draft_beams: int
) -> tuple[_Tree, Tree, Int[Array, " B"]]:
    """The draft's own beam search, K steps ahead of the live beams, whose scores it starts from.

    Args:
      draft: the draft.
      params: its parameters.
      request: what is asked for.
      search: the live beams.
      cache: the draft's cache.
      tree: the bare tree.
      draft_beams: u.

    Returns:
      The tree; the cache with all tokens of the live beams and none of the drafts; and the depth at which logits were
      NaN, or -1.
    """
    rows, width, num_draft_tokens = *search.score.shape, tree.tokens.shape[2]

    def grow(front: _Front, logits: Array, depth: Array) -> tuple[_Front, Array]:
        log_probs = jax.nn.log_softmax(sampling.match_vocab(logits, request.stops.size), axis=-1)
        alive = front.score > -jnp.inf
        broken = jnp.any(alive[..., None] & jnp.isnan(log_probs), axis=(1, 2)) & (front.failed_at < 0)
        # A text that has stopped is never continued, so the draft need not guess where texts stop.
        score, parent, token = expand(front.score, jnp.where(request.stops, -jnp.inf, log_probs), draft_beams)
        tree, row = _grow(front.tree, front.row, parent, token, depth)
        return _Front(score, row, token, tree, jnp.where(broken, depth, front.failed_at)), parent

    # One call reads what the last step added, up to K + 1 tokens, and scores the first drafts. Where it added less,
    # the call begins before that and writes some entries again.
    begin = jnp.maximum(search.length - num_draft_tokens - 1, 0)
    at = begin[:, None, None] + jnp.arange(num_draft_tokens + 1)
    window = jnp.take_along_axis(search.tokens, jnp.broadcast_to(at, (rows, width, at.shape[2])), axis=2)
    output, cache = draft.apply(params, Block(window.reshape(rows * width, -1)), _set_length(draft, cache, begin))
    cache = _set_length(draft, cache, search.length)
    last = jnp.arange(rows), slice(None), search.length - 1 - begin
    logits = output.logits.reshape(rows, width, num_draft_tokens + 1, -1)[last]
    front = _Front(search.score, search.row, window[last], tree, jnp.full(rows, -1, jnp.int32))
    front, parent = grow(front, logits, jnp.zeros((), jnp.int32))
    if num_draft_tokens == 1:
        return front.tree, cache, front.failed_at

    def deepen(carry: tuple[Tree, _Front], depth: Array) -> tuple[tuple[Tree, _Front], None]:
        ahead, front = carry
        token = front.token.reshape(-1, 1)
        output, ahead = draft.apply(params, Block(token), ahead)
        ahead = draft.commit(ahead, None, jnp.ones_like(token[:, 0]))
        front, parent = grow(front, output.logits.reshape(rows, draft_beams, -1), depth)
        return (_gather(ahead, parent), front), None

    ahead = _gather(cache, parent), front
    (_, front), _ = jax.lax.scan(deepen, ahead, jnp.arange(1, num_draft_tokens, dtype=jnp.int32))
    return front.tree, cache, front.failed_at


# The target.


def _score(
    target: Model, params: Tree, search: _Search, cache: Tree, tree: _Tree
) -> tuple[Float[Array, "B R T V"], Tree]:
    """One call of the target for the whole tree: T = K + 1 tokens per path, the first the last token of its live beam.

    Returns:
      The logits, and the cache, R rows per text.
    """
    rows, num_paths, num_draft_tokens = tree.tokens.shape
    last = search.tokens[jnp.arange(rows), :, search.length - 1]
    block = jnp.concatenate([_take(last, tree.root)[..., None], tree.tokens], axis=-1)
    if num_draft_tokens > 0:  # Otherwise the paths are the live beams themselves.
        cache = _gather(cache, tree.root)
    cache = _set_length(target, cache, search.length - 1)
    output, cache = target.apply(params, Block(block.reshape(rows * num_paths, -1)), cache)
    return output.logits.reshape(rows, num_paths, num_draft_tokens + 1, -1), cache


def _find(
    tree: _Tree, row: Int[Array, "B W"], token: Int[Array, "B W"], depth: Int[Array, ""]
) -> tuple[Int[Array, "B W"], Bool[Array, "B W"]]:
    """Looks beams up in the tree.

    Args:
      tree: the scored tree.
      row: `[B, W]` rows whose first `depth` draft tokens the beams have.
      token: `[B, W]` what follows them in the beams.
      depth: see `row`.

    Returns:
      A row that holds the beam, token and all, and whether there is one.
    """
    position = jnp.arange(tree.tokens.shape[2])
    path = jnp.where(position == depth, token[..., None], _take(tree.tokens, row))
    same = jnp.all((tree.tokens[:, None] == path[:, :, None]) | (position > depth), axis=-1)
    same &= tree.root[:, None] == _take(tree.root, row)[..., None]
    return jnp.argmax(same, axis=-1).astype(jnp.int32), jnp.any(same, axis=-1)


def _divisor(request: _Request, length: Int[Array, " B"]) -> Float[Array, " B"]:
    """The number that the length penalty divides the score of a text of that length by."""
    return (length - request.prompt_length).astype(jnp.float32) ** request.length_penalty


def _keep_best(pool: _Pool, tokens: Int[Array, "B W L"], length: Int[Array, " B"], score: Float[Array, "B W"]) -> _Pool:
    """The pool after adding those new texts, all of one length, that are better; of equals the older stays."""
    best, index = jax.lax.top_k(jnp.concatenate([pool.score, score], axis=1), score.shape[1])
    lengths = jnp.concatenate([pool.length, jnp.broadcast_to(length[:, None], score.shape)], axis=1)
    return _Pool(_take(jnp.concatenate([pool.tokens, tokens], axis=1), index), _take(lengths, index), best)


def _advance(
    request: _Request, tree: _Tree, logits: Float[Array, "B R T V"], depth: Int[Array, ""], search: _Search
) -> _Search:
    """One step of the target's beam search, by the meaning of transformers' `generate(num_beams=w)`.

    Args:
      request: what is asked for.
      tree: the scored tree.
      logits: the scores.
      depth: the number of steps since the tree was scored.
      search: beams that are all in the tree, `depth` draft tokens deep.

    Returns:
      The beams after the step.
    """
    width = search.score.shape[1]
    batch = jnp.arange(search.length.size)[:, None]
    log_probs = jax.nn.log_softmax(logits[batch, search.row, depth], axis=-1)
    broken = jnp.any((search.score > -jnp.inf)[..., None] & jnp.isnan(log_probs), axis=(1, 2))
    length = search.length + 1
    is_last = length >= request.limit

    # A text is finished if it stops while it is among the best w continuations, and not if w others, which go on, are
    # better. At the limit all of them stop.
    score, parent, token = expand(search.score, log_probs, width)
    stops = request.stops[token] | is_last[:, None]
    score = jnp.where(stops, score / _divisor(request, length)[:, None], -jnp.inf)
    pool = _keep_best(search.pool, _append(search.tokens, parent, token, search.length), length, score)

    # The live beams are the best w continuations that go on.
    score, parent, token = expand(search.score, jnp.where(request.stops, -jnp.inf, log_probs), width)
    tokens = _append(search.tokens, parent, token, search.length)

    # A row is done when its best beam could not enter a full pool any more, if it came to no further loss.
    horizon = jnp.where(request.full_length & (request.length_penalty > 0), request.limit, length)
    worst = pool.score[:, -1]
    hopeless = ~(score[:, 0] / _divisor(request, horizon) > worst)
    done = is_last | hopeless | (request.stop_when_full & (worst > -jnp.inf))

    old_row = _take(search.row, parent)
    new_row, found = _find(tree, old_row, token, depth)
    after = _Search(
        tokens=tokens,
        score=score,
        length=length,
        pool=pool,
        done=done,
        failed_at=search.failed_at,
        # Either row holds all tokens of the beam but the last: what the cache has to hold if the walk ends here.
        row=jnp.where(found, new_row, old_row),
        walking=~done & jnp.all(found | (score == -jnp.inf), axis=-1),
    )
    stuck = search._replace(done=jnp.ones_like(done), failed_at=search.length, walking=jnp.zeros_like(search.walking))
    return _select(broken, stuck, after)


# The loop.


def _step(
    target: Model,
    draft: Model | None,
    params: Params,
    request: _Request,
    state: _State,
    num_draft_tokens: int,
    draft_beams: int,
) -> _State:
    """One call of the target for all texts: those that are not done advance by 1 to K + 1 steps of beam search."""
    rows, width = state.search.score.shape
    running = ~state.search.done
    before = state.search._replace(row=jnp.broadcast_to(jnp.arange(width), (rows, width)))
    tree, draft_cache = _bare_tree(rows, width, num_draft_tokens, draft_beams), state.draft_cache
    draft_failed = jnp.zeros(rows, bool)
    if draft is not None:
        tree, draft_cache, failed_depth = _draft(draft, params.draft, request, before, draft_cache, tree, draft_beams)
        draft_failed = running & (failed_depth >= 0)
        before = before._replace(
            done=before.done | draft_failed,
            failed_at=jnp.where(draft_failed, before.length + failed_depth, before.failed_at),
        )
    logits, cache = _score(target, params.target, before, state.cache, tree)

    def in_tree(carry: tuple[Array, _Search]) -> Array:
        return (carry[0] <= num_draft_tokens) & jnp.any(carry[1].walking)

    def walk(carry: tuple[Array, _Search]) -> tuple[Array, _Search]:
        depth, search = carry
        return depth + 1, _select(search.walking, _advance(request, tree, logits, depth, search), search)

    before = before._replace(walking=~before.done)
    _, after = jax.lax.while_loop(in_tree, walk, (jnp.zeros((), jnp.int32), before))

    # Roll back: a beam's cache is that of the path that it came along, cut behind its last token but one.
    steps = after.length - before.length
    return _State(
        search=after,
        cache=_set_length(target, _gather(cache, after.row), after.length - 1),
        draft_cache=draft_cache if draft is None else _gather(draft_cache, _take(tree.root, after.row)),
        draft_failed=state.draft_failed | draft_failed,
        target_calls=state.target_calls + running,
        histogram=state.histogram + (jnp.arange(num_draft_tokens + 1) == steps[:, None] - 1),
    )


@functools.partial(
    jax.jit, static_argnames=("target", "draft", "num_beams", "num_draft_tokens", "draft_beams", "max_len")
)
def _search(
    target: Model,
    draft: Model | None,
    params: Params,
    inputs: Inputs,
    request: _Request,
    num_beams: int,
    num_draft_tokens: int,
    draft_beams: int,
    max_len: int,
) -> _State:
    """Reads the prompts and searches until every row is done."""
    rows, width = inputs.tokens.shape

    def read(model: Model, params: Tree) -> Tree:
        max_source = 0 if inputs.source is None else inputs.source.shape[1]
        _, cache = model.prefill(params, inputs, model.init_cache(rows, max_len, max_source))
        return jax.tree.map(lambda x: jnp.repeat(x, num_beams, axis=0), cache)

    tokens = jnp.zeros((rows, num_beams, max_len), jnp.int32).at[:, :, :width].set(inputs.tokens[:, None])
    beam, zero = jnp.arange(num_beams), jnp.zeros((), jnp.float32)
    no_budget = inputs.length >= request.limit
    state = _State(
        search=_Search(
            tokens=tokens,
            # One live beam: w equal ones would find the same continuations w times.
            score=jnp.broadcast_to(jnp.where(beam == 0, zero, -jnp.inf), (rows, num_beams)),
            length=inputs.length,
            pool=_Pool(
                tokens=tokens,
                length=jnp.broadcast_to(inputs.length[:, None], (rows, num_beams)),
                # Where nothing may be added, adding nothing is the best and only text.
                score=jnp.where(no_budget[:, None] & (beam == 0), zero, -jnp.inf),
            ),
            done=no_budget,
            failed_at=jnp.full(rows, -1, jnp.int32),
            row=jnp.broadcast_to(beam, (rows, num_beams)),
            walking=jnp.zeros(rows, bool),
        ),
        # The first step scores the last prompt token again: no step is special.
        cache=_set_length(target, read(target, params.target), inputs.length - 1),
        draft_cache=() if draft is None else read(draft, params.draft),
        draft_failed=jnp.zeros(rows, bool),
        target_calls=jnp.zeros(rows, jnp.int32),
        histogram=jnp.zeros((rows, num_draft_tokens + 1), jnp.int32),
    )

    def step(state: _State) -> _State:
        return _step(target, draft, params, request, state, num_draft_tokens, draft_beams)

    return jax.lax.while_loop(lambda state: ~jnp.all(state.search.done), step, state)


def _check_widths(
    draft: Model | None, vocab_size: int, num_beams: int, num_draft_tokens: int, draft_beams: int
) -> None:
    if not 1 <= num_beams <= MAX_BEAMS:
        raise ValueError(f"num_beams={num_beams}: at least 1, which is greedy decoding, and at most {MAX_BEAMS}.")
    check_num_draft_tokens(num_draft_tokens)
    if num_draft_tokens > 0 and draft is None:
        raise ValueError(
            f"num_draft_tokens={num_draft_tokens}, but there is no draft: give one, or set num_draft_tokens=0."
        )
    if draft_beams < num_beams:
        raise ValueError(
            f"draft_beams={draft_beams} is less than num_beams={num_beams}: the target's beams cannot all be among the "
            "draft's. Raise draft_beams."
        )
    if draft_beams > MAX_BEAMS:
        raise ValueError(f"draft_beams={draft_beams} is more than {MAX_BEAMS}: lower it.")
    if draft_beams > num_beams * vocab_size:
        raise ValueError(
            f"draft_beams={draft_beams}, but {num_beams} beams have {num_beams * vocab_size} continuations by one of "
            f"{vocab_size} tokens: lower draft_beams."
        )


def search(
    target: Model,
    draft: Model | None,
    params: Params,
    inputs: Inputs,
    *,
    num_beams: int,
    num_draft_tokens: int = 0,
    draft_beams: int | None = None,
    max_new_tokens: int | Sequence[int],
    stop_tokens: Sequence[int] = (),
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    max_len: int | None = None,
) -> Beams:
    """Beam search of the target, in one jitted loop, with a draft that saves calls and changes nothing.

    What is found is what transformers' `generate(num_beams=w, do_sample=False)` finds for each prompt by itself: rows
    do not depend on their neighbours.

    Args:
      target: the model whose beams are sought.
      draft: a model of the same vocabulary (its padding may differ), or None.
      params: the parameters of both; nothing is read of the draft's without a draft.
      inputs: padded prompts (`decode.read_inputs`).
      num_beams: w, at least 1.
      num_draft_tokens: K, how many steps the draft searches ahead; 0: plain beam search.
      draft_beams: u, the width of the draft's search; by default w.
      max_new_tokens: how many tokens each text may add; one number, or one per row.
      stop_tokens: token ids that end a text.
      length_penalty: p: texts are ranked by the sum of their log-probabilities over `length ** p` of the new tokens.
        Above 0, long texts gain.
      early_stopping: when a row with w finished texts ends. True: at once. False: when its best beam would rank below
        them if it stopped at the length it has. "never": when it would rank below them at any length (where p > 0:
        if it went on to its limit without loss).
      max_len: the length of the buffer; by default the smallest that holds everything (`decode.buffer_length`).

    Returns:
      The w best finished texts of each row. Scores in float32 agree with plain beam search to rounding.

    Raises:
      ValueError: where a text does not fit the buffer or a model, or an option makes no sense.
      FloatingPointError: for NaN logits.
    """
    draft_beams = num_beams if draft_beams is None else draft_beams
    k = num_draft_tokens
    _check_widths(draft, target.vocab_size, num_beams, k, draft_beams)
    if early_stopping not in (True, False, "never"):
        raise ValueError(f'early_stopping={early_stopping!r}: choose True, False or "never".')
    if not np.isfinite(length_penalty):
        raise ValueError(f"length_penalty={length_penalty} is not a finite number.")
    draft = draft if k > 0 else None
    models = {"target": target} | ({} if draft is None else {"draft": draft})
    limit, max_len = decoding.text_limits(inputs, max_new_tokens, k, max_len, models)
    state = _search(
        target,
        draft,
        params if draft is not None else params._replace(draft=()),
        inputs,
        _Request(
            prompt_length=inputs.length,
            limit=jnp.asarray(limit, jnp.int32),
            stops=jnp.asarray(np.isin(np.arange(target.vocab_size), list(stop_tokens))),
            length_penalty=jnp.asarray(length_penalty, jnp.float32),
            stop_when_full=jnp.asarray(early_stopping not in (False, "never")),
            full_length=jnp.asarray(early_stopping == "never"),
        ),
        num_beams=num_beams,
        num_draft_tokens=k,
        draft_beams=draft_beams if draft is not None else num_beams,
        max_len=max_len,
    )
    failed_at, draft_failed = distributed.to_host(state.search.failed_at), distributed.to_host(state.draft_failed)
    for row in np.flatnonzero(failed_at >= 0):
        side = "draft" if draft_failed[row] else "target"
        raise FloatingPointError(
            f"The {side}'s logits are NaN at position {failed_at[row]} of a beam of row {row}. Check the "
            "weights, or decode in float32."
        )
    pool = state.search.pool
    tokens = jnp.where(jnp.arange(max_len) < pool.length[..., None], pool.tokens, 0)
    return Beams(tokens, pool.length, pool.score, state.target_calls, state.histogram)


class BeamGeneration(NamedTuple):
    """What `beam_search` returns. Lists have one entry per prompt, and in it one per text, best first.

    Attributes:
      text: the new text, special tokens left out; None where the target has no tokenizer.
      tokens: the new token ids, the stop token among them.
      scores: see `Beams.score`.
      finish_reason: "stop" or "length".
      target_calls: calls of the target for each prompt, the prefill not counted.
      histogram: those calls by the number of draft steps accepted, from 0 to K.
      steps_per_call: steps of beam search per call of the target, over all prompts; 1 is plain beam search.
    """

    text: list[list[str]] | None
    tokens: list[list[list[int]]]
    scores: list[list[float]]
    finish_reason: list[list[str]]
    target_calls: list[int]
    histogram: list[list[int]]
    steps_per_call: float


def beam_search(
    target: Pretrained,
    prompts: Sequence[str | Sequence[int]],
    *,
    draft: Pretrained | None = None,
    num_beams: int = 4,
    draft_beams: int | None = None,
    num_draft_tokens: int = 4,
    max_new_tokens: int | Sequence[int] = 128,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    stop_tokens: Sequence[int] | None = None,
    num_return_sequences: int = 1,
    chat: bool = False,
) -> BeamGeneration:
    """Finds the most probable texts by beam search, speculatively where there is a draft.

    Args:
      target: the model whose texts are sought (`specjax.load`).
      prompts: texts, or lists of token ids.
      draft: a smaller model with the target's tokenizer; None searches plainly.
      num_beams: w.
      draft_beams: u, the width of the draft's search; by default w.
      num_draft_tokens: K, how many steps the draft searches ahead; unused without a draft.
      max_new_tokens: one number, or one per prompt.
      length_penalty: above 0, long texts gain (see `search`).
      early_stopping: when to stop looking for better texts (see `search`).
      stop_tokens: ids that end a text; by default the tokenizer's end-of-sequence tokens.
      num_return_sequences: how many of the w texts to return for each prompt; fewer where fewer have a probability
        above 0.
      chat: put each text into the model's chat template.

    Returns:
      The texts and the counters.

    Raises:
      ValueError: for options that make no sense, texts that do not fit, vocabularies that do not match.
      FloatingPointError: for NaN logits.
    """
    if not 1 <= num_return_sequences <= max(num_beams, 1):
        raise ValueError(
            f"num_return_sequences={num_return_sequences}, but num_beams={num_beams} finds that many texts: "
            "choose between 1 and num_beams."
        )
    encoded = api.encode(target, prompts, chat=chat)
    if draft is not None:
        api.check_vocabularies(target, draft)
    if stop_tokens is None:
        stop_tokens = target.tokenizer.eos_token_ids if target.tokenizer is not None else ()
    mesh = sharding.mesh_of(target.params)
    params = Params(target.params, draft.params if draft is not None else ())
    params, inputs = api.place(mesh, params, decoding.read_inputs(target.model, encoded))
    with sharding.on_mesh(mesh):
        beams = search(
            target.model,
            draft.model if draft is not None else None,
            params,
            inputs,
            num_beams=num_beams,
            num_draft_tokens=num_draft_tokens if draft is not None else 0,
            draft_beams=draft_beams,
            max_new_tokens=max_new_tokens,
            stop_tokens=stop_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
    host = Beams(*(distributed.to_host(x) for x in beams))  # pyright: ignore[reportArgumentType]
    tokens: list[list[list[int]]] = []
    scores: list[list[float]] = []
    for i, begin in enumerate(distributed.to_host(inputs.length)):
        found = [b for b in range(num_return_sequences) if host.score[i, b] > -np.inf]
        tokens.append([host.tokens[i, b, begin : host.length[i, b]].tolist() for b in found])
        scores.append([float(host.score[i, b]) for b in found])
    stops, tokenizer, calls = set(stop_tokens), target.tokenizer, int(host.target_calls.sum())
    steps = int((host.histogram * np.arange(1, host.histogram.shape[1] + 1)).sum())
    return BeamGeneration(
        text=None if tokenizer is None else [[tokenizer.decode(text) for text in texts] for texts in tokens],
        tokens=tokens,
        scores=scores,
        finish_reason=[["stop" if text and text[-1] in stops else "length" for text in texts] for texts in tokens],
        target_calls=host.target_calls.tolist(),
        histogram=host.histogram.tolist(),
        steps_per_call=steps / calls if calls else 0.0,
    )
