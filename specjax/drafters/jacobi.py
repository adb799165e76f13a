"""Jacobi decoding: the draft is what the target's last call gave behind the accepted tokens.

Santilli et al. 2023, arXiv 2305.10427. Greedy decoding solves y_i = argmax p(. | y_1 .. y_{i-1}) for i = 1 .. m; Jacobi
iteration computes the right sides of all m equations in one call, from the last guess, until nothing changes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax import sampling
from specjax.limits import check_num_draft_tokens
from specjax.sampling import processors
from specjax.types import Context, Drafter, Feedback, History, Params, Proposal, Topology


def own_tokens(logits: Float[Array, "B T V"], history: History, context: Context) -> Int[Array, "B T"]:
    """The token that the target would write at each of T = K + 1 positions, if the text before it were `history`.

    That is the argmax of its distribution, and for a coupled rule the draw with the noise of the position. The last
    position has no key in `context`: its argmax stands in until the next call.
    """
    probs = sampling.probabilities(logits, context.sampling, history)
    best = sampling.argmax(probs)
    if not context.coupled:
        return best
    draw = jax.vmap(lambda key, p: sampling.sample(key, p, context.sampling), in_axes=1, out_axes=1)
    return jnp.concatenate([draw(context.keys, probs[:, :-1]), best[:, -1:]], axis=1)


@functools.cache
def jacobi(*, num_draft_tokens: int = 8) -> Drafter:
    """Drafts what the target's last call said about the next tokens, without a model, parameters or further calls.

    The state is the guess, `[B, K]`. A step is one Jacobi iteration on K positions: the target reads the guess, the
    rule accepts the longest prefix that is the target's own text, and the outputs behind it are the next guess,
    followed by repetitions of the last one. So each iteration freezes at least one token, and the K positions move on
    by as many as were accepted.

    With K at least the length of the text this is the paper's algorithm PJ. PGJ iterates on a block of K tokens until
    all of it has converged, and then begins the next one from padding. What a position becomes depends on the positions
    before it alone; so, from the same guess, the tokens of a block are known here after the same number of calls as
    there. Here, however, the positions behind the known ones have been iterated on by then, and the call that would
    find a block converged commits what follows it. The later blocks begin from other guesses than PGJ's, of which
    either may be right by luck, so that fewer calls for every text are the rule and not a theorem. HGJ (PGJ up to a
    maximum, then plain decoding) is for texts of unknown length, which stop tokens end here as they end any text.

    At a temperature above 0 the equations are y_i = argmax(log p(. | y_1 .. y_{i-1}) + g_i), with the noise g_i that
    `verify.coupled` draws position i with, so that their solution is plain decoding's own text, and a guess that has
    converged is accepted whole. Under other rules the guess is the argmax. In both cases it is known before the step,
    so every exact rule stays exact. Penalties and grammars apply to each position, after the guess before it.

    Args:
      num_draft_tokens: K, the number of positions that are iterated on; at least 1.

    Raises:
      ValueError: for K < 1 or above `limits.MAX_DRAFT_TOKENS`.
    """
    check_num_draft_tokens(num_draft_tokens)
    if num_draft_tokens < 1:
        raise ValueError(f"num_draft_tokens={num_draft_tokens}: at least 1; drafters.none() decodes plainly.")
    k = num_draft_tokens

    def init(batch_size: int, max_len: int, max_source: int = 0) -> Int[Array, "B K"]:
        del max_len, max_source
        return jnp.zeros((batch_size, k), jnp.int32)

    def propose(
        params: Params, state: Int[Array, "B K"], cache: Any, context: Context
    ) -> tuple[Proposal, Int[Array, "B K"], Any]:
        del params
        return Proposal(state, jnp.minimum(context.max_draft, k), None), state, cache

    def update(params: Params, state: Int[Array, "B K"], feedback: Feedback) -> Int[Array, "B K"]:
        del params
        context = feedback.context
        if context is None:
            first = sampling.argmax(feedback.output.logits[:, -1:])
            return jnp.where(feedback.num_tokens[:, None] > 0, first, state)
        history = processors.follow(context.history, state, context.sampling.penalties)
        after = own_tokens(feedback.output.logits, history, context)
        kept = jnp.concatenate([state, state[:, -1:]], axis=1)
        known = jnp.where((context.max_draft > 0)[:, None], after, kept)
        # Of the T = K + 1 positions of the call, the committed tokens take the first.
        at = jnp.minimum(feedback.num_tokens[:, None] + jnp.arange(k), k)
        return jnp.take_along_axis(known, at, axis=1)

    return Drafter(init, propose, update, Topology.chain(k))
