"""Aggressive decoding: the input is the draft, until the text leaves it and finds back.

Sun et al. 2021, arXiv 2106.04970 (input-guided aggressive decoding, for grammatical error correction); Ge et al. 2022,
arXiv 2205.10350, section 3.1. Made for tasks whose output is mostly a copy of the input: correction, rewriting,
formatting, changes of style.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from specjax.drafters import source as sources
from specjax.drafters.source import Source
from specjax.limits import check_num_draft_tokens
from specjax.types import Context, Drafter, Feedback, Params, Proposal, Topology


class Place(NamedTuple):
    """Where one row, or each of B rows, has come to in its input.

    Attributes:
      at: `[B]` the next token of the input to copy; where the text has left the input, the place at which it did.
      copies: `[B]` whether the text follows the input.
      read: `[B]` the length of the text for which this holds.
    """

    at: Int[Array, "*B"]
    copies: Bool[Array, "*B"]
    read: Int[Array, "*B"]


class State(NamedTuple):
    """The inputs and the place of each row in its own; S = 0 where the input is the prompt, which the text begins with.

    Attributes:
      source: what the encoder has read.
      place: in the source, or in the prompt.
    """

    source: Source
    place: Place


def resynchronise(
    place: Place,
    text: Int[Array, " L"],
    length: Int[Array, ""],
    inputs: Int[Array, " S"],
    size: Int[Array, ""],
    *,
    window: int,
    min_match: int,
    max_match: int,
) -> Place:
    """The place in the input after the tokens that the text has gained (Sun et al. 2021, section 3.2).

    A text that copies goes on while its new tokens are those of the input. Otherwise the text's last tokens are looked
    up in the input: the longest match counts; of equal ones the nearest that the text has not passed, as an edit rarely
    moves text, and then the nearest that it has. Where there is no match, it waits for further tokens. (Sun
    et al. take the shortest match that is unique in the rest of the input.)

    Args:
      place: after the text's first `place.read` tokens.
      text: `[L]` the text buffer.
      length: tokens of text in it.
      inputs: `[S]` the input.
      size: its tokens.
      window: the most new tokens that are compared; after more, the last of them are looked up.
      min_match: the shortest match that counts, in tokens.
      max_match: the longest match; longer ones count as equal to it.
    """
    gained = length - place.read
    offset = jnp.arange(window)
    said = text.at[place.read + offset].get(mode="fill", fill_value=-1)
    wanted = inputs.at[place.at + offset].get(mode="fill", fill_value=-2)
    agrees = (said == wanted) & (place.at + offset < size)
    copied = jnp.sum(jnp.cumprod(agrees & (offset < gained)), dtype=jnp.int32)
    at = place.at + jnp.where(place.copies, copied, 0)
    goes_on = place.copies & (copied == gained)

    index = jnp.arange(inputs.shape[0], dtype=jnp.int32)
    matched = jnp.zeros(inputs.shape[0], jnp.int32)
    # Behind the last token of the input there is nothing to copy.
    running = index < size - 1
    for back in range(max_match):
        last = text[jnp.maximum(length - 1 - back, 0)]
        running &= (jnp.roll(inputs, back) == last) & (index >= back) & (length > back)
        matched = matched + running
    longest = jnp.max(matched, initial=0)
    ahead = index - at
    # What lies ahead comes before all else, each by its distance.
    distance = jnp.where(ahead >= 0, ahead, inputs.shape[0] - ahead)
    nearest = jnp.argmin(jnp.where(matched == longest, distance, 2 * inputs.shape[0] + 1)).astype(jnp.int32)
    found = longest >= min_match
    return Place(jnp.where(goes_on | ~found, at, nearest + 1), goes_on | found, length)


@functools.cache
def aggressive(*, num_draft_tokens: int = 15, min_match: int = 1, max_match: int = 4) -> Drafter:
    """Drafts the input from where the text has come to in it; a text that has left the input drafts nothing.

    The input is the source of an encoder-decoder, which is copied from its first token on, and for other models the
    whole prompt: where in it to begin follows from the last tokens of the prompt, and then from the first tokens of the
    text. `ngram` finds the same copies where matches are long; this drafter keeps its place instead, so that one token
    is enough to find back, and takes the occurrence that comes next in the input, not the most recent one.

    Args:
      num_draft_tokens: K, the most tokens copied in a step.
      min_match: the shortest match, in tokens, after which a text that has left the input follows it again.
      max_match: the longest match that is compared.

    Raises:
      ValueError: for K < 0 or above `limits.MAX_DRAFT_TOKENS`, or matches that make no sense.
    """
    check_num_draft_tokens(num_draft_tokens)
    if not 1 <= min_match <= max_match:
        raise ValueError(f"min_match={min_match} and max_match={max_match}: need 1 <= min_match <= max_match.")
    follow = functools.partial(resynchronise, window=num_draft_tokens + 1, min_match=min_match, max_match=max_match)

    def init(batch_size: int, max_len: int, max_source: int = 0) -> State:
        del max_len
        none = jnp.zeros(batch_size, jnp.int32)
        # A source is copied from its beginning; where in a prompt its text begins has to be found.
        place = Place(none, jnp.full(batch_size, max_source > 0), none)
        return State(sources.init(batch_size, max_source), place)

    def propose(params: Params, state: State, cache: Any, context: Context) -> tuple[Proposal, State, Any]:
        del params
        history, source, before = context.history, state.source, state.place
        has_source = source.tokens.shape[1] > 0
        inputs = source if has_source else Source(history.tokens, history.prompt_length)
        if has_source:  # What the text begins with is no copy.
            before = before._replace(read=jnp.maximum(before.read, history.prompt_length))
        place = jax.vmap(follow)(before, history.tokens, history.length, inputs.tokens, inputs.length)
        index = place.at[:, None] + jnp.arange(num_draft_tokens)
        draft = jnp.take_along_axis(inputs.tokens, jnp.minimum(index, inputs.tokens.shape[1] - 1), axis=1)
        left = jnp.where(place.copies, jnp.maximum(inputs.length - place.at, 0), 0)
        length = jnp.minimum(jnp.minimum(left, num_draft_tokens), context.max_draft)
        return Proposal(draft, length, None), State(source, place), cache

    def update(params: Params, state: State, feedback: Feedback) -> State:
        del params
        return state._replace(source=sources.update(state.source, feedback))

    return Drafter(init, propose, update, Topology.chain(num_draft_tokens))
