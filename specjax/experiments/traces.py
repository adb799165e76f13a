"""What a drafter would have proposed at every position of a text, and how much of it the text confirms.

From such traces every way to choose the number of draft tokens can be replayed without a model (`policies`), thresholds
on the confidence of a draft model included.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax import api
from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.drafters import contract
from specjax.types import AnyDrafter, Context, Draft, Drafter, Feedback, Params, Proposal, Tree

LEAST_CONFIDENCE = 1e-9
"""A threshold that ends no draft: with it, drafters that run a model say how confident they are."""


class Trace(NamedTuple):
    """A text, position by position.

    Attributes:
      text: `[T]` its tokens.
      proposed: `[T]` how many tokens the drafter proposes from each position on, at most K.
      matched: `[T]` how many of them, from the first on, are those of the text.
      confidence: `[T, K]` the probability of the draft's most probable token at the place of each
        (`Proposal.confidence`); 1 where the drafter does not say.
    """

    text: np.ndarray
    proposed: np.ndarray
    matched: np.ndarray
    confidence: np.ndarray


class _Recorder(NamedTuple):
    """The state of a recording drafter: its own, and what it has proposed.

    Attributes:
      inner: the drafter's state.
      tokens: `[B, L, K]` the tokens proposed at each length of the text; -1 where none was.
      confidence: `[B, L, K]` how confident it was; 1 where it does not say.
    """

    inner: Tree
    tokens: Int[Array, "B L K"]
    confidence: Float[Array, "B L K"]


@functools.cache
def recording(drafter: Drafter) -> Drafter:
    """The same drafter of chains, which also keeps what it proposes; cached, so that it is compiled once."""
    k = drafter.num_draft_tokens

    def init(batch_size: int, max_len: int, max_source: int = 0) -> _Recorder:
        nothing = jnp.full((batch_size, max_len, k), -1, jnp.int32)
        return _Recorder(drafter.init(batch_size, max_len, max_source), nothing, jnp.ones(nothing.shape))

    def propose(params: Params, state: _Recorder, cache: Any, context: Context) -> tuple[Proposal, Any, Any]:
        proposal, inner, cache = drafter.propose(params, state.inner, cache, context)
        is_drafted = jnp.arange(k) < proposal.length[:, None]
        drafted = jnp.where(is_drafted, proposal.tokens, -1)
        here = jnp.arange(len(drafted)), context.history.length
        state = state._replace(inner=inner, tokens=state.tokens.at[here].set(drafted))
        if proposal.confidence is not None:
            confidence = jnp.where(is_drafted, proposal.confidence, 1.0)
            state = state._replace(confidence=state.confidence.at[here].set(confidence))
        return proposal, state, cache

    def update(params: Params, state: _Recorder, feedback: Feedback) -> _Recorder:
        return state._replace(inner=drafter.update(params, state.inner, feedback))

    return drafter._replace(init=init, propose=propose, update=update)


def record(
    target: Pretrained, prompts: Sequence[str | Sequence[int]], drafter: AnyDrafter, **options: Any
) -> list[Trace]:
    """Decodes prompts plainly, and asks the drafter at every position.

    Args:
      target: the target.
      prompts: as `generate` takes them.
      drafter: a drafter of chains of K tokens, whose drafts no threshold ends above `LEAST_CONFIDENCE`.
      **options: of `generate`.

    Raises:
      ValueError: for a drafter of trees.
    """
    draft = contract.check(drafter)
    if not draft.drafter.topology.is_chain:
        raise ValueError(f"a trace needs a drafter of chains, not of the topology {draft.drafter.topology}.")
    recorder: Draft = draft._replace(drafter=recording(draft.drafter))
    request = api.prepare(target, prompts, drafter=recorder, verify=verify.observe, step_cost=0.0, **options)
    rows = jax.device_get(api.run(request).rows._replace(cache=None))
    traces = []
    for i, (begin, end) in enumerate(zip(rows.prompt_length, rows.length, strict=True)):
        text, drafted = rows.tokens[i], rows.drafter.tokens[i]
        proposed = np.sum(drafted[begin:end] >= 0, axis=1)
        behind = np.pad(text[:end], (0, drafted.shape[1]), constant_values=-2)
        following = np.stack([behind[t : t + drafted.shape[1]] for t in range(begin, end)])
        matched = np.cumprod(drafted[begin:end] == following, axis=1).sum(axis=1)
        traces.append(Trace(text[begin:end], proposed, matched, rows.drafter.confidence[i, begin:end]))
    return traces
