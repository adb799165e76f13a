"""Every type that the modules of specjax share. No logic lives here.

Axis names: `B` rows of a batch, `L` the text buffer, `P` a padded prompt, `T` tokens of one model call, `K` draft
tokens of one step, `V` the vocabulary, `D` the width of the model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int, Key

Tree = Any
"""A pytree of arrays whose structure only its owner knows (parameters, caches, drafter states)."""


class Inputs(NamedTuple):
    """Right-padded prompts.

    An encoder-decoder reads the prompt with its encoder: then `source` is the prompt, and `tokens` is what the
    decoder's text begins with, which is its start token.

    Attributes:
      tokens: `[B, P]` token ids; what lies at or beyond a row's length is never read as text.
      length: `[B]` the number of tokens of each prompt, at least 1.
      source: `[B, S]` what the encoder reads, padded likewise, or None.
      source_length: `[B]` the number of its tokens, at least 1, or None.
    """

    tokens: Int[Array, "B P"]
    length: Int[Array, " B"]
    source: Int[Array, "B S"] | None = None
    source_length: Int[Array, " B"] | None = None


class Batch(NamedTuple):
    """Packed texts to train on: several texts may share a row, each a segment that sees itself alone.

    Attributes:
      tokens: `[B, T]` what a decoder reads.
      targets: `[B, T]` what it should say after each token.
      segments: `[B, T]` the number of the text that each token is of, from 1; 0 is padding.
      positions: `[B, T]` the place of each token in its text, from 0.
      weights: `[B, T]` what each target counts; 0 where there is none.
      source: `[B, S]` what an encoder reads, or None.
      source_segments: `[B, S]` the number of the text that each token of `source` is of; 0 is padding.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    source: Int[Array, "B S"] | None
    source_segments: Int[Array, "B S"] | None


class ModelOutput(NamedTuple):
    """What one model call says about each token that it was fed.

    Attributes:
      logits: `[B, T, V]` float32, the unnormalised log-probabilities of the token that follows.
      hidden: `[B, T, D]` the last hidden state (after the final norm), which self-drafting heads read.
    """

    logits: Float[Array, "B T V"]
    hidden: Float[Array, "B T D"]


class Model(NamedTuple):
    """A target or a draft: pure functions; parameters are always arguments.

    Two `Model`s built from equal configurations are equal, so that a jitted function that takes one as a static
    argument compiles once.

    Attributes:
      init_cache: `(batch_size, max_len) -> cache`, an empty cache; `cache.length` is `[B]`, the number of tokens in it.
        Setting it to a smaller value rolls the cache back.
      prefill: `(params, inputs, cache) -> (ModelOutput, cache)`, reads whole prompts. The logits are of each row's
        last prompt token only: `[B, 1, V]`; the hidden states are of all: `[B, P, D]`.
      apply: `(params, tokens[B, T], cache) -> (ModelOutput, cache)`, reads T more tokens of each row, starting at
        that row's `cache.length`, and advances it by T.
      vocab_size: V, the width of the logits (which may be padded beyond the tokenizer's vocabulary).
      max_len: the longest text in tokens that the model knows positions for.
      start_token: of an encoder-decoder, which reads `inputs.source`, the token that its texts begin with; else None.
      score: `(params, batch) -> logits [B, T, V]` of a training `Batch`; None for what cannot be trained.
    """

    init_cache: Callable[..., Any]
    prefill: Callable[..., Any]
    apply: Callable[..., Any]
    vocab_size: int
    max_len: int
    start_token: int | None = None
    score: Callable[..., Any] | None = None


class Proposal(NamedTuple):
    """A chain of draft tokens. Batched as written; the rules of `verify` see one row, without `B`.

    Attributes:
      tokens: `[B, K]`. An id outside the vocabulary is never accepted.
      length: `[B]` how many of the K are really proposed; the others are padding. Whether token i is proposed may
        depend on the text and on the draft tokens before i, **never on token i itself**: a draft that drops a token
        because of what was drawn biases the text, and no acceptance rule can repair that.
      probs: `[B, K, V]` float32, the distribution that each token was *sampled* from, or None where the tokens
        were chosen deterministically (their distribution is one-hot).
    """

    tokens: Int[Array, "*B K"]
    length: Int[Array, "*B"]
    probs: Float[Array, "*B K V"] | None


class Verdict(NamedTuple):
    """What an acceptance rule says of a proposal.

    Attributes:
      tokens: `[B, K + 1]` the accepted draft tokens, then one more token from the target, then padding.
      num_accepted: `[B]` the number of accepted draft tokens, the one more not counted.
    """

    tokens: Int[Array, "*B K+1"]
    num_accepted: Int[Array, "*B"]


class Feedback(NamedTuple):
    """What a drafter learns after a step.

    Attributes:
      verdict: the verdict on its proposal.
      length: `[B]` the length of each text after the step.
      hidden: `[B, T, D]` the target's hidden states of the tokens that it was fed in this step.
    """

    verdict: Verdict
    length: Int[Array, " B"]
    hidden: Float[Array, "B T D"]


class Automaton(NamedTuple):
    """A finite automaton over the tokens of a vocabulary (see `automaton`). State 0 is the start.

    Attributes:
      token_class: `[V]` the class of each token; tokens of a class lead to the same states.
      next_state: `[S, C]` the successor of a state under the tokens of a class; -1 where they are forbidden.
    """

    token_class: Int[Array, " V"]
    next_state: Int[Array, "S C"]


class Penalties(NamedTuple):
    """Options that change logits before they become a distribution, most of them by the text so far (`processors`).

    Attributes:
      repetition_penalty: `[B]` divides the positive logits of tokens in prompt or text, multiplies their negative ones;
        1 is none.
      presence_penalty: `[B]` subtracted from the logits of tokens in the new text; 0 is none.
      frequency_penalty: `[B]` subtracted once for every time that a token is in the new text; 0 is none.
      no_repeat_ngram_size: `[B]` no n-gram of this size occurs twice in prompt and text; 0 is none.
      min_new_tokens: `[B]` stop tokens are forbidden before the text has this many new tokens.
      bias_tokens: `[B, M]` ids of the tokens that `bias` is added to; ids beyond the vocabulary are padding.
      bias: `[B, M]` float32; -inf forbids a token.
    """

    repetition_penalty: Float[Array, " B"]
    presence_penalty: Float[Array, " B"]
    frequency_penalty: Float[Array, " B"]
    no_repeat_ngram_size: Int[Array, " B"]
    min_new_tokens: Int[Array, " B"]
    bias_tokens: Int[Array, "B M"]
    bias: Float[Array, "B M"]


class SamplingOptions(NamedTuple):
    """How logits become a distribution, row by row: a batch may mix requests.

    Attributes:
      temperature: `[B]` 0 for greedy decoding (a one-hot distribution).
      top_k: `[B]` keep the k most probable tokens; 0 keeps all.
      top_p: `[B]` keep the smallest set of most probable tokens whose mass reaches p; 1 keeps all.
      min_p: `[B]` keep tokens at least this fraction as probable as the most probable one; 0 keeps all.
      typical_p: `[B]` keep the smallest set of tokens of most typical surprise whose mass reaches p; 1 keeps all.
      epsilon_cutoff: `[B]` keep tokens at least this probable; 0 keeps all.
      penalties: what happens to the logits before; None where no row asks for any, which is another program.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    typical_p: Float[Array, " B"]
    epsilon_cutoff: Float[Array, " B"]
    penalties: Penalties | None


class History(NamedTuple):
    """The text before each of the T tokens whose logits one call gives: what the options may depend on.

    Attributes:
      tokens: `[B, L]` the text; in verification the draft tokens stand behind it.
      length: `[B]` the number of tokens before the first of the T; one more before each of the others.
      prompt_length: `[B]` how many of them are the prompt's.
      stop_tokens: `[E]` token ids that end a row.
      grammar: the automaton that says which tokens may follow, or None.
      grammar_state: `[B, T]` its state before each of the T tokens.
    """

    tokens: Int[Array, "B L"]
    length: Int[Array, " B"]
    prompt_length: Int[Array, " B"]
    stop_tokens: Int[Array, " E"]
    grammar: Automaton | None
    grammar_state: Int[Array, "B T"]


class StepKeys(NamedTuple):
    """The random keys of one step, each used once.

    Attributes:
      accept: `[B]` decides what is accepted.
      token: `[B, T]` draws the token of each position, if it is drawn from the target. A position's key depends on the
        row's seed and the position alone: plain decoding draws with the same.
    """

    accept: Key[Array, "*B"]
    token: Key[Array, "*B T"]


class Context(NamedTuple):
    """What a drafter may look at when it proposes. Made inside the step; never crosses a `jit` boundary.

    Attributes:
      history: the text so far (T = 1): prompt and committed tokens.
      keys: `[B, K]` the random key of each draft token.
      max_draft: `[B]` the most draft tokens that a row can use in this step; 0: draft nothing for it.
      sampling: the row's sampling options, which target and draft share.
      vocab_size: V of the target.
    """

    history: History
    keys: Key[Array, "B K"]
    max_draft: Int[Array, " B"]
    sampling: SamplingOptions
    vocab_size: int


class Drafter(NamedTuple):
    """Pure functions that propose draft tokens.

    Attributes:
      init: `(params, inputs, target_output, max_len) -> state`, called once after the target has read the prompts;
        `max_len` is the length of the text buffer.
      propose: `(params, state, context) -> (Proposal, state)`. Whether it proposes a token must not depend on that
        token (see `Proposal.length`); `testing.check_drafter` tries a drafter's conformance.
      update: `(params, state, feedback) -> state`, called after every step, also after one that drafted nothing.
      num_draft_tokens: K, the most tokens it proposes in a step.
      source: the `Pretrained` that it drafts with, where it has one: the front door takes the parameters and the
        tokenizer from it. The loop, whose parameters are arguments, sees None here.
    """

    init: Callable[..., Any]
    propose: Callable[..., Any]
    update: Callable[..., Any]
    num_draft_tokens: int
    source: Any = None


class Params(NamedTuple):
    """The parameters of both sides."""

    target: Tree
    draft: Tree


class Stats(NamedTuple):
    """Counters of each row, kept on the device.

    Attributes:
      target_calls: `[B]` steps that the row took part in.
      draft_steps: `[B]` those in which at least one token was proposed for it.
      proposed: `[B, K]` how often position k of a draft was judged, i.e. all before it had been accepted.
      accepted: `[B, K]` how often position k was accepted.
      histogram: `[B, K + 1]` steps by number of accepted draft tokens.
      overlap: `[B]` sum of `sum_x min(target(x), draft(x))` over the judged positions (the paper's beta).
    """

    target_calls: Int[Array, " B"]
    draft_steps: Int[Array, " B"]
    proposed: Int[Array, "B K"]
    accepted: Int[Array, "B K"]
    histogram: Int[Array, "B K+1"]
    overlap: Float[Array, " B"]


class Logprobs(NamedTuple):
    """Log-probabilities that the target itself gives (its softmax, before any option), by place in the text.

    Attributes:
      token: `[B, L]` float32, of the token that stands there.
      top_tokens: `[B, L, N]` the N most probable tokens of that place, most probable first.
      top: `[B, L, N]` float32, theirs.
    """

    token: Float[Array, "B L"]
    top_tokens: Int[Array, "B L N"]
    top: Float[Array, "B L N"]


class Adaptation(NamedTuple):
    """What decides whether a row drafts (see `adaptive`).

    Attributes:
      gain: `[B]` a running mean of accepted tokens per drafting step.
      pause: `[B]` steps left without drafting.
      backoff: `[B]` how long the next pause will be.
    """

    gain: Float[Array, " B"]
    pause: Int[Array, " B"]
    backoff: Int[Array, " B"]


class DecodeState(NamedTuple):
    """Everything that the loop carries.

    Attributes:
      tokens: `[B, L]` prompts and committed tokens; what lies beyond `length` is stale.
      from_draft: `[B, L]` whether a token was an accepted draft token.
      length: `[B]`.
      prompt_length: `[B]`.
      limit: `[B]` the length at which a row stops.
      done: `[B]`.
      failed_at: `[B]` the position at which the next token had no distribution (NaN logits, or every token forbidden),
        or -1.
      draft_failed: `[B]` whether that was the draft's distribution.
      seed: `[B]` one random key a row.
      sampling: the sampling options.
      stop_tokens: `[E]` token ids that end a row (-1: padding).
      stop_strings: an automaton whose last state means that one of the strings has occurred, or None.
      stop_state: `[B]` its state after the text.
      grammar: an automaton of the tokens that may follow, or None.
      grammar_state: `[B]` its state after the text.
      logprobs: log-probabilities of the text, or None where nobody asked for them.
      step_cost: `[]` time of a drafting step over that of a plain step, which a draft has to win back.
      adaptation: what decides whether a row drafts.
      cache: the target's cache. It holds all tokens of a text but the last one.
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
    stop_tokens: Int[Array, " E"]
    stop_strings: Automaton | None
    stop_state: Int[Array, " B"]
    grammar: Automaton | None
    grammar_state: Int[Array, " B"]
    logprobs: Logprobs | None
    step_cost: Float[Array, ""]
    adaptation: Adaptation
    cache: Tree
    drafter: Tree
    stats: Stats


PRNGKey = jax.Array
"""A typed JAX random key."""
