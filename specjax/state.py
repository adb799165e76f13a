"""What the loop carries from step to step. No logic lives here; `types` explains the axis names."""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int, Key

from specjax.types import Automaton, SamplingOptions, Tree


class Stats(NamedTuple):
    """Counters of each row, kept on the device.

    Attributes:
      target_calls: `[B]` steps that the row took part in.
      draft_steps: `[B]` those in which at least one token was read for it behind the text: a draft token or a probe.
      proposed: `[B, D]` how often position k of a draft was judged, i.e. all before it had been accepted.
      accepted: `[B, D]` how often position k was accepted.
      histogram: `[B, D + 1]` steps by number of accepted draft tokens.
      steps_by_length: `[B, G]` the drafting steps by the shortest of `Topology.all_lengths` that held all rows' drafts.
      overlap: `[B]` sum of `sum_x min(target(x), draft(x))` over the judged positions (the paper's beta); for trees and
        for rules that are not exact, the number of accepted tokens.
    """

    target_calls: Int[Array, " B"]
    draft_steps: Int[Array, " B"]
    proposed: Int[Array, "B D"]
    accepted: Int[Array, "B D"]
    histogram: Int[Array, "B D+1"]
    steps_by_length: Int[Array, "B G"]
    overlap: Float[Array, " B"]


class Logprobs(NamedTuple):
    """Log-probabilities under the target itself (its softmax, before any option), by position in the text.

    Attributes:
      token: `[B, L]` float32, of the token at each position.
      top_tokens: `[B, L, N]` the N most probable tokens at each position, most probable first.
      top: `[B, L, N]` float32, their log-probabilities.
    """

    token: Float[Array, "B L"]
    top_tokens: Int[Array, "B L N"]
    top: Float[Array, "B L N"]


class Adaptation(NamedTuple):
    """What decides how many tokens a row drafts (see `adaptive`).

    Attributes:
      judged: `[B, D]` how often position k of a draft was judged; earlier steps count less.
      accepted: `[B, D]` how often it was accepted.
      pause: `[B]` steps left without drafting.
      backoff: `[B]` how long the next pause will be.
    """

    judged: Float[Array, "B D"]
    accepted: Float[Array, "B D"]
    pause: Int[Array, " B"]
    backoff: Int[Array, " B"]


class Rows(NamedTuple):
    """What the loop carries for each row. B is the first axis of every array, so that rows can be inserted or repeated.

    Attributes:
      tokens: `[B, L]` prompts and committed tokens; what lies beyond `length` is stale.
      from_draft: `[B, L]` whether a token was an accepted draft token.
      length: `[B]` the number of tokens in each row.
      prompt_length: `[B]` how many of them belong to the prompt.
      limit: `[B]` the length at which a row stops.
      done: `[B]`.
      failed_at: `[B]` the position at which the next token had no distribution (NaN logits, or every token forbidden),
        or -1.
      draft_failed: `[B]` whether that was the draft's distribution.
      seed: `[B]` one random key per row.
      sampling: the sampling options.
      stop_tokens: `[B, X]` token ids that end the row (-1: padding).
      stop_state: `[B]` the state of `Shared.stop_strings` after the text.
      grammar_state: `[B]` the state of `Shared.grammar` after the text.
      logprobs: log-probabilities of the text, or None where there is no room for them.
      wants_logprobs: `[B]` which rows ask for them; where no row does, they are not computed.
      adaptation: what decides whether a row drafts.
      cache: the target's cache. It holds all tokens of a text except the last one.
      drafter: the drafter's state.
      stats: counters.
    """

    tokens: Int[Array, "B L"]
    from_draft: Bool[Array, "B L"]
    length: Int[Array, " B"]
    prompt_length: Int[Array, " B"]
    limit: Int[Array, " B"]
    done: Bool[Array, " B"]
    failed_at: Int[Array, " B"]
    draft_failed: Bool[Array, " B"]
    seed: Key[Array, " B"]
    sampling: SamplingOptions
    stop_tokens: Int[Array, "B X"]
    stop_state: Int[Array, " B"]
    grammar_state: Int[Array, " B"]
    logprobs: Logprobs | None
    wants_logprobs: Bool[Array, " B"]
    adaptation: Adaptation
    cache: Any
    drafter: Tree
    stats: Stats


class Shared(NamedTuple):
    """What all rows share.

    Attributes:
      stop_strings: an automaton whose last state means that one of the strings has occurred, or None.
      grammar: an automaton of the tokens that may follow, or None.
      step_costs: `[D + 1]` the time of a step by the number of its draft tokens, over that of a plain step (see
        `adaptive`).
    """

    stop_strings: Automaton | None
    grammar: Automaton | None
    step_costs: Float[Array, " C"]


class DecodeState(NamedTuple):
    """Everything that the loop carries.

    Attributes:
      rows: the state of each row.
      shared: what all rows share.
    """

    rows: Rows
    shared: Shared
