"""Beam search, plain and speculative (Leviathan et al. 2022, arXiv 2211.17192, appendix A.4).

The draft searches K steps ahead with u >= w beams, the target scores in one call every beam that the draft kept on the
way, and the target's own search of width w then walks through those scores. A step of the search is free while the
target's w beams are all among the draft's u; the first beam that is not ends the walk, after a step that was still
scored. So a call of the target gives 1 to K + 1 steps, whose beams and scores are those of plain beam search for any
draft. Plain beam search is the same loop with K = 0.

**The draft's tree.** The u beams that the draft keeps at each depth make a tree of K u nodes, most of whose branches
die out before depth K. They must be scored nevertheless: the target's beams die out as well, later. The target reads
the tree after each of its w live beams, as a block in which a node attends only to its ancestors (`beam_tree`).

**The caches.** All w beams of a text have the same length n. Between steps both caches have w rows per text; the
target's hold the first n - 1 tokens of each beam, the draft's at least the first n - K - 1.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding import beam_tree, buffers
from specjax.limits import MAX_DRAFT_TOKENS, check_num_draft_tokens
from specjax.parallel import distributed
from specjax.types import Inputs, Model, Params, Tree

MAX_BEAMS = 1024
"""Each beam has a cache of its own."""


class Beams(NamedTuple):
    """The w best texts of each row, best first.

    Where the target gives fewer than w texts of a row a probability above 0, the remaining ones are the prompt alone,
    with a score of -inf.

    Attributes:
      tokens: `[B, W, L]` prompts and new tokens, the stop token included; 0 at and beyond `length`.
      length: `[B, W]` of the texts, prompt included.
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
    """The options of a search: constant, but traced.

    Attributes:
      prompt_length: `[B]`.
      limit: `[B]` the length at which every text of a row ends.
      stops: `[V]` the tokens that end a text.
      length_penalty: `[]` see `Beams.score`.
      stop_when_full: `[]` end a row as soon as it has w finished texts (`early_stopping=True`).
      full_length: `[]` bound the score that a beam can still reach by its longest continuation
        (`early_stopping="never"`).
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
      root: `[B, W]` the live beam, before the last call, that each beam continues.
      node: `[B, W]` the index in that call's block of each beam, or of the beam less its last token (`beam_tree.find`).
      walking: `[B]` whether all live beams are in the scored tree, so that another step needs no call of the target.
    """

    tokens: Int[Array, "B W L"]
    score: Float[Array, "B W"]
    length: Int[Array, " B"]
    pool: _Pool
    done: Bool[Array, " B"]
    failed_at: Int[Array, " B"]
    root: Int[Array, "B W"]
    node: Int[Array, "B W"]
    walking: Bool[Array, " B"]


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


def _select(rows: Bool[Array, " B"], new: _Search, old: _Search) -> _Search:
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _append(
    tokens: Int[Array, "B N L"], parent: Int[Array, "B M"], token: Int[Array, "B M"], length: Int[Array, " B"]
) -> Int[Array, "B M L"]:
    """The texts of the parents, each with one more token at `length`."""
    here = jnp.arange(tokens.shape[2]) == length[:, None, None]
    return jnp.where(here, token[..., None], beam_tree.take(tokens, parent))


def _divisor(request: _Request, length: Int[Array, " B"]) -> Float[Array, " B"]:
    """The divisor, by the length penalty, of the score of a text of that length."""
    return (length - request.prompt_length).astype(jnp.float32) ** request.length_penalty


def _keep_best(pool: _Pool, tokens: Int[Array, "B W L"], length: Int[Array, " B"], score: Float[Array, "B W"]) -> _Pool:
    """The pool after adding the new texts, all of one length, that are better; in a tie the older one stays."""
    best, index = jax.lax.top_k(jnp.concatenate([pool.score, score], axis=1), score.shape[1])
    lengths = jnp.concatenate([pool.length, jnp.broadcast_to(length[:, None], score.shape)], axis=1)
    return _Pool(
        beam_tree.take(jnp.concatenate([pool.tokens, tokens], axis=1), index), beam_tree.take(lengths, index), best
    )


def _advance(request: _Request, beams: beam_tree.Beams, logits: Float[Array, "B W T V"], search: _Search) -> _Search:
    """One step of the target's beam search, as transformers' `generate(num_beams=w)` defines it.

    Args:
      request: the options of the search.
      beams: the draft's, whose tree was scored.
      logits: the target's, for that tree.
      search: beams that are all in the tree.

    Returns:
      The beams after the step.
    """
    width = search.score.shape[1]
    batch = jnp.arange(search.length.size)[:, None]
    log_probs = jax.nn.log_softmax(logits[batch, search.root, search.node], axis=-1)
    broken = jnp.any((search.score > -jnp.inf)[..., None] & jnp.isnan(log_probs), axis=(1, 2))
    length = search.length + 1
    is_last = length >= request.limit

    # A text is finished if it stops while it is among the best w continuations, and not if w others, which go on, are
    # better. At the limit all of them stop.
    score, parent, token = beam_tree.expand(search.score, log_probs, width)
    stops = request.stops[token] | is_last[:, None]
    score = jnp.where(stops, score / _divisor(request, length)[:, None], -jnp.inf)
    pool = _keep_best(search.pool, _append(search.tokens, parent, token, search.length), length, score)

    # The live beams are the best w continuations that go on.
    score, parent, token = beam_tree.expand(search.score, jnp.where(request.stops, -jnp.inf, log_probs), width)
    tokens = _append(search.tokens, parent, token, search.length)

    # A row is done when its best beam could no longer enter a full pool even if it lost no more probability.
    horizon = jnp.where(request.full_length & (request.length_penalty > 0), request.limit, length)
    worst = pool.score[:, -1]
    hopeless = ~(score[:, 0] / _divisor(request, horizon) > worst)
    done = is_last | hopeless | (request.stop_when_full & (worst > -jnp.inf))

    root, node = beam_tree.take(search.root, parent), beam_tree.take(search.node, parent)
    new_node, found = beam_tree.find(beams, root, node, token)
    after = _Search(
        tokens=tokens,
        score=score,
        length=length,
        pool=pool,
        done=done,
        failed_at=search.failed_at,
        root=root,
        # Either way the path holds all tokens of the beam except the last, as the cache must if the walk ends here.
        node=jnp.where(found, new_node, node),
        walking=~done & jnp.all(found | (score == -jnp.inf), axis=-1),
    )
    stuck = search._replace(done=jnp.ones_like(done), failed_at=search.length, walking=jnp.zeros_like(search.walking))
    return _select(broken, stuck, after)


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
    first = jnp.broadcast_to(jnp.arange(width), (rows, width))
    before = state.search._replace(root=first, node=jnp.zeros_like(first))
    beams, draft_cache = beam_tree.none(rows, num_draft_tokens, draft_beams), state.draft_cache
    draft_failed = jnp.zeros(rows, bool)
    if draft is not None:
        live = before.score, before.tokens, before.length
        sizes = num_draft_tokens, draft_beams
        beams, draft_cache, failed_depth = beam_tree.search_ahead(
            draft, params.draft, request.stops, *live, draft_cache, *sizes
        )
        draft_failed = running & (failed_depth >= 0)
        before = before._replace(
            done=before.done | draft_failed,
            failed_at=jnp.where(draft_failed, before.length + failed_depth, before.failed_at),
        )
    last = before.tokens[jnp.arange(rows), :, before.length - 1]
    logits, cache = beam_tree.score(target, params.target, last, beams, num_draft_tokens, state.cache)

    def in_tree(carry: tuple[Array, _Search]) -> Array:
        return (carry[0] <= num_draft_tokens) & jnp.any(carry[1].walking)

    def walk(carry: tuple[Array, _Search]) -> tuple[Array, _Search]:
        depth, search = carry
        return depth + 1, _select(search.walking, _advance(request, beams, logits, search), search)

    before = before._replace(walking=~before.done)
    _, after = jax.lax.while_loop(in_tree, walk, (jnp.zeros((), jnp.int32), before))

    # A beam's cache is that of the live beam that it continues, extended by the path to the beam, without its last
    # token.
    steps = after.length - before.length
    path = beam_tree.paths(beams, after.node, num_draft_tokens).reshape(rows * width, -1)
    cache = target.commit(beam_tree.gather(cache, after.root), path, jnp.repeat(steps, width))
    return _State(
        search=after,
        cache=cache,
        draft_cache=draft_cache if draft is None else beam_tree.gather(draft_cache, after.root),
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
            root=jnp.broadcast_to(beam, (rows, num_beams)),
            node=jnp.zeros((rows, num_beams), jnp.int32),
            walking=jnp.zeros(rows, bool),
        ),
        # The first step scores the last prompt token again: no step is special.
        cache=beam_tree.set_length(target, read(target, params.target), inputs.length - 1),
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
    if num_draft_tokens * draft_beams > MAX_DRAFT_TOKENS:
        raise ValueError(
            f"num_draft_tokens={num_draft_tokens} and draft_beams={draft_beams} make {num_draft_tokens * draft_beams} "
            f"draft tokens per call, more than {MAX_DRAFT_TOKENS}: lower one of them."
        )
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
    """Beam search of the target, in one jitted loop, with a draft that saves calls and does not change the result.

    The result is that of transformers' `generate(num_beams=w, do_sample=False)` for each prompt by itself: rows do not
    depend on their neighbours.

    Args:
      target: the model whose beams are sought.
      draft: a model of the same vocabulary (its padding may differ), or None.
      params: the parameters of both; without a draft, the draft's are not read.
      inputs: padded prompts (`decode.read_inputs`).
      num_beams: w, at least 1.
      num_draft_tokens: K, how many steps the draft searches ahead; 0: plain beam search.
      draft_beams: u, the width of the draft's search; by default w.
      max_new_tokens: how many tokens each text may add; one number, or one per row.
      stop_tokens: token ids that end a text.
      length_penalty: p: texts are ranked by the sum of their log-probabilities over `n ** p`, for n new tokens. Above
        0, long texts gain.
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
    # The target reads K u tokens after a text.
    limit, max_len = buffers.text_limits(inputs, max_new_tokens, k * draft_beams, max_len, models)
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
