"""Every type that the modules of specjax share, except what the loop carries (`state`). No logic lives here.

Axis names: `B` rows of a batch, `L` the text buffer, `P` a padded prompt, `S` a padded source, `T` tokens of one model
call, `N` draft tokens (nodes) of one step, `D` the depth of their tree, `M` probes behind them, `V` the vocabulary, `F`
tapped layers, `E` the width of the model. For a chain, N = D = K.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int, Key

from specjax import protocols

Tree = Any
"""A pytree of arrays whose structure only its owner knows (parameters, caches, drafter states)."""


class Inputs(NamedTuple):
    """Right-padded prompts.

    For an encoder-decoder, `source` is the prompt and `tokens` is the start token, with which the text begins.

    Attributes:
      tokens: `[B, P]` token ids; entries at or beyond a row's length are padding.
      length: `[B]` the number of tokens in each row of `tokens`, at least 1.
      source: `[B, S]` the token ids that the encoder reads, right-padded, or None.
      source_length: `[B]` the number of tokens in each row of `source`, at least 1, or None.
    """

    tokens: Int[Array, "B P"]
    length: Int[Array, " B"]
    source: Int[Array, "B S"] | None = None
    source_length: Int[Array, " B"] | None = None


class Batch(NamedTuple):
    """Packed sequences to train on: several may share a row, each a segment that attends only to itself.

    Attributes:
      tokens: `[B, T]` the decoder's input.
      targets: `[B, T]` the token to predict after each token.
      segments: `[B, T]` the number of the sequence that each token belongs to, from 1; 0 is padding.
      positions: `[B, T]` the position of each token in its sequence, from 0.
      weights: `[B, T]` the loss weight of each target; 0 where there is none.
      source: `[B, S]` the encoder's input, or None.
      source_segments: `[B, S]` the number of the sequence that each token of `source` belongs to; 0 is padding.
      sees: `[B, T, T]` which tokens of its own segment each token attends to, as in `Block.sees`; None: itself and
        those before it.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    source: Int[Array, "B S"] | None
    source_segments: Int[Array, "B S"] | None
    sees: Bool[Array, "B T T"] | None = None


class Dropout(NamedTuple):
    """Dropout of the forward pass of training (`models.dropout`).

    Attributes:
      rate: the probability that a number is set to zero.
      keys: `[B]` the random key of each row of the batch.
    """

    rate: float | Float[Array, ""]
    keys: Key[Array, " B"]


class Block(NamedTuple):
    """The tokens that one model call reads, given the cache of those before them.

    Attributes:
      tokens: `[B, T]` token ids.
      depth: `[B, T]` the position of each token minus `cache.length`; None: 0 .. T - 1.
      sees: `[B, T, U + T]` which entries after `cache.length` each token attends to: the U that earlier calls wrote but
        did not commit, then the T of this block, which are written after them. The entries that a token attends to form
        a path, each continuing the one before: itself, those before it, and those after it where tokens see both ways.
        None: U = 0, and each token attends to itself and those before it. All committed entries are attended to (within
        the window, where layers have one).
      embeddings: `[X, E]` what the ids from `Model.vocab_size` on read in the place of rows of the embedding table:
        id V + i reads row i. None: no token has such an id. A model without an embedding table ignores them.
    """

    tokens: Int[Array, "B T"]
    depth: Int[Array, "B T"] | None = None
    sees: Bool[Array, "B T W"] | None = None
    embeddings: Float[Array, "X E"] | None = None


class ModelOutput(NamedTuple):
    """The output of one model call, for each token that it read.

    Attributes:
      logits: `[B, T, V]` float32, the unnormalised log-probabilities of the next token.
      features: `[B, T, F, E]` float32, the hidden states of the tapped layers (`Model.with_taps`); F = 0 without taps.
    """

    logits: Float[Array, "B T V"]
    features: Float[Array, "B T F E"]


class Skips(NamedTuple):
    """The sublayers that a model leaves out, by the number of their layer; the residual stream passes them unchanged.

    Attributes:
      attention: those of attention; in the decoder of an encoder-decoder, that to the text and that to the source.
      mlp: those of the feed-forward.
    """

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    @classmethod
    def of_layers(cls, layers: Iterable[int]) -> "Skips":
        """Whole layers."""
        numbers = tuple(layers)
        return cls(numbers, numbers)


NO_SKIPS = Skips()
"""The whole model."""


class Model(NamedTuple):
    """A target or a draft: pure functions; parameters are always arguments.

    `Model`s built from equal configurations are equal: a jitted function that takes one as a static argument compiles
    once.

    Attributes:
      init_cache: `(batch_size, max_len, max_source=0) -> cache`, an empty cache; `cache.length` is `[B]`, the number of
        committed tokens in it.
      prefill: `(params, inputs, cache) -> (ModelOutput, cache)`, reads prompts, or chunks of them, into the cache after
        `cache.length` and commits them. The logits are those of each row's last token only: `[B, 1, V]`.
      apply: `(params, block, cache) -> (ModelOutput, cache)`, writes the block's entries after `cache.length`, which
        does not change. Entries that are not committed are overwritten later.
      commit: `(cache, path, count) -> cache`, keeps the entries `path[:count]` of the last block in this order, so that
        the cache is what a prefill of the kept tokens would have made, and adds `count` to the length. A path of None
        means 0, 1, 2 ... (a chain), and no entry is moved; a negative count then removes committed tokens.
      vocab_size: V, the width of the logits (which may be padded beyond the tokenizer's vocabulary).
      max_len: the longest sequence that the model supports, in tokens.
      start_token: the token that the sequences of an encoder-decoder begin with; None for other models.
      score: `(params, batch, remat=False, dropout=None, embeddings=None) -> logits [B, T, V]` of a training `Batch`;
        with `remat`, gradients compute each layer again; `embeddings` are those of `Block`. None for a model that
        cannot be trained.
      with_taps: `(taps) -> Model`, the same model, whose outputs have the hidden states of these indices as `features`:
        0 is the embedding, i the residual stream after layer i, and the number of layers (or -1) the last one, after
        the final norm. None for a model without layers.
      with_skips: `(skips) -> Model`, the same model without these sublayers: a draft that shares the parameters of the
        whole model, and its cache, in which a skipped attention writes nothing. None for a model without layers, or
        one whose layers are scanned.
      num_layers: how many layers these two count; 0 for a model without layers.
      features: `(params, batch) -> [B, T, F, E]`, the hidden states of the tapped layers at the tokens of a training
        `Batch`, float32; None where `score` is.
    """

    init_cache: protocols.InitCache
    prefill: protocols.Prefill
    apply: protocols.Apply
    commit: protocols.Commit
    vocab_size: int
    max_len: int
    start_token: int | None = None
    score: protocols.Score | None = None
    with_taps: protocols.WithTaps | None = None
    with_skips: protocols.WithSkips | None = None
    num_layers: int = 0
    features: protocols.Features | None = None


class Topology(NamedTuple):
    """The static shape of what a drafter proposes in a step.

    Attributes:
      num_nodes: N, the most tokens that it proposes.
      depth: D, the most of them on one path. N = D is a chain.
      parents: the parent of each node, where that is the same in every step; None: it is in `Proposal.parent`.
      num_probes: M, how many tokens behind the nodes the target reads for their outputs alone (`Probes`).
      shares_draws: whether the children of all nodes of a depth come from one draw, as where their distribution depends
        on the depth alone. Rules that judge more than one node of a depth are then biased (`Rule.own_draws`).
      lengths: of a chain, lengths below K for which the loop has programs of their own: a step in which no row drafts
        more tokens than that drafts and scores that many. Each costs the compilation of one more call of the target.
    """

    num_nodes: int
    depth: int
    parents: tuple[int, ...] | None = None
    num_probes: int = 0
    shares_draws: bool = False
    lengths: tuple[int, ...] = ()

    @classmethod
    def chain(cls, num_draft_tokens: int, lengths: tuple[int, ...] = ()) -> "Topology":
        """K draft tokens, each of which follows the one before it."""
        return cls(num_draft_tokens, num_draft_tokens, lengths=lengths)

    @property
    def is_chain(self) -> bool:
        """Whether every node continues the one before it."""
        return self.num_nodes == self.depth

    @property
    def all_lengths(self) -> tuple[int, ...]:
        """The numbers of draft tokens for which there is a program: `lengths`, and N itself; none where N is 0."""
        return (*self.lengths, self.num_nodes) if self.num_nodes else ()

    @property
    def num_read(self) -> int:
        """N + M, the most tokens that the target reads in a step behind the last committed one."""
        return self.num_nodes + self.num_probes


class Probes(NamedTuple):
    """Tokens that the target reads behind a proposal's nodes. No rule judges them, and none becomes text.

    Only their outputs come back (`Feedback.output`), for the drafter to draft the next tokens from.

    Attributes:
      tokens: `[B, M]` token ids.
      depth: `[B, M]` the position of each, counted from the last committed token, which has depth 0.
      sees: `[B, M, N + 1 + M]` which tokens of the block each attends to: the last committed token, the nodes, then the
        probes. As in `Block.sees`, they form a path, which ends with the probe itself. No node sees a probe.
      embeddings: `[X, E]` what ids from the vocabulary's size on read (`Block.embeddings`), or None.
    """

    tokens: Int[Array, "B M"]
    depth: Int[Array, "B M"]
    sees: Bool[Array, "B M W"]
    embeddings: Float[Array, "X E"] | None = None


class Proposal(NamedTuple):
    """A tree of draft tokens. Batched as written; the rules of `verify` see one row, without `B`.

    Attributes:
      tokens: `[B, N]`, parents before their children. An id outside the vocabulary is never accepted; a node of a tree
        whose id is -1 is not proposed, and neither are those below it.
      length: `[B]` how many of the N are really proposed; the others are padding. Whether token i is proposed may
        depend on the text, the ancestors and the elder siblings of token i, **never on token i itself**: a drafter that
        drops a token because of what was drawn biases the text, and no acceptance rule can repair that.
      probs: `[B, N, V]` float32, the distribution that each token was *sampled* from, given its ancestors and its elder
        siblings: siblings stand in the order in which they were drawn. So it is the draft's q without the elder
        siblings, renormalised, where they are drawn without replacement; q itself where they are drawn independently;
        each draft's own q where several are merged. None: chosen deterministically (the distribution is one-hot).
      parent: `[B, N]` the node that each continues; -1 is the last committed token. None: a chain,
        `parent = arange(N) - 1`.
      probes: what the target reads besides (`Topology.num_probes`), for every row that may draft in the step, whether
        or not any token is proposed for it. None: nothing. The rules see None.
      confidence: `[B, N]` float32, the probability of the draft's most probable token at the place of each token,
        before any option, where a threshold on it may end a draft; the loop does not read it. The rules see None.
    """

    tokens: Int[Array, "*B N"]
    length: Int[Array, "*B"]
    probs: Float[Array, "*B N V"] | None
    parent: Int[Array, "*B N"] | None = None
    probes: Probes | None = None
    confidence: Float[Array, "*B N"] | None = None


class Verdict(NamedTuple):
    """The decision of an acceptance rule on a proposal.

    Attributes:
      tokens: `[B, D + 1]` the accepted draft tokens, then one more token from the target, then padding.
      num_accepted: `[B]` the number of accepted draft tokens, without the target's token.
      path: `[B, D + 1]` indices in the block that the target read: 0 for the last committed token, then one more than
        the index of each accepted node, then padding. None: a chain, `arange(D + 1)`.
    """

    tokens: Int[Array, "*B D+1"]
    num_accepted: Int[Array, "*B"]
    path: Int[Array, "*B D+1"] | None = None


class Feedback(NamedTuple):
    """What a drafter is told after every step; a prompt, or each chunk of it, is a step that committed all its tokens.

    Attributes:
      tokens: `[B, T]` the tokens that were committed, then padding: T = D + 1 after a step, P for a prompt.
      num_tokens: `[B]` the number of committed tokens.
      length: `[B]` the length of each sequence, these tokens included.
      features: `[B, T, F, E]` the target's features (`Drafter.taps`) at the tokens that it read: for a prompt its
        tokens; after a step the last token before the step, then the accepted draft tokens.
      output: the whole output of the target's call: that of the last token before the step, of all nodes, rejected ones
        included, and of the probes. It says something about the first of these alone for a row that could not draft.
      inputs: the prompt; None after a step.
      context: what the drafter saw when it proposed; a row could draft where `context.max_draft > 0`. None for a
        prompt.
    """

    tokens: Int[Array, "B T"]
    num_tokens: Int[Array, " B"]
    length: Int[Array, " B"]
    features: Float[Array, "B T F E"]
    output: ModelOutput
    inputs: Inputs | None = None
    context: "Context | None" = None


class Automaton(NamedTuple):
    """A finite automaton over the tokens of a vocabulary (see `automaton`). State 0 is the start.

    Attributes:
      token_class: `[V]` the class of each token; tokens of a class lead to the same states.
      next_state: `[S, C]` the successor of a state under the tokens of a class; -1 where they are forbidden.
    """

    token_class: Int[Array, " V"]
    next_state: Int[Array, "S C"]


class Penalties(NamedTuple):
    """Options that change the logits, most of them depending on the text so far (`processors`).

    Attributes:
      repetition_penalty: `[B]` divides the positive logits of tokens in prompt or text, and multiplies their negative
        ones; 1: off.
      presence_penalty: `[B]` subtracted from the logits of tokens in the new text; 0: off.
      frequency_penalty: `[B]` subtracted once for every occurrence of a token in the new text; 0: off.
      no_repeat_ngram_size: `[B]` no n-gram of this size occurs twice in prompt and text; 0: off.
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
      typical_p: `[B]` keep the smallest set of most typical tokens whose mass reaches p; 1 keeps all.
      epsilon_cutoff: `[B]` keep tokens at least this probable; 0 keeps all.
      penalties: applied to the logits first; None where no row uses any, which compiles another program.
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
      tokens: `[B, L]` the text, followed by the draft tokens of a chain; for a tree `[B, T, L]`, one text for each of
        the T tokens.
      length: `[B]` the number of tokens before the first of the T (one more before each following one); for a tree
        `[B, T]`, the number before each.
      prompt_length: `[B]` how many of them belong to the prompt.
      stop_tokens: `[B, X]` token ids that end the row; -1 is padding.
      grammar: the automaton that says which tokens may follow, or None.
      grammar_state: `[B, T]` its state before each of the T tokens.
    """

    tokens: Int[Array, "B *T L"]
    length: Int[Array, "B *T"]
    prompt_length: Int[Array, " B"]
    stop_tokens: Int[Array, "B X"]
    grammar: Automaton | None
    grammar_state: Int[Array, "B T"]


class StepKeys(NamedTuple):
    """The random keys of one step, each used once.

    Attributes:
      accept: `[B]` for the acceptance test.
      token: `[B, D + 1]` for sampling the token of each position from the target. A position's key depends only on the
        row's seed and the position: plain decoding samples with the same key.
    """

    accept: Key[Array, "*B"]
    token: Key[Array, "*B T"]


class Context(NamedTuple):
    """What a drafter may look at when it proposes. Made inside the step; never crosses a `jit` boundary.

    Attributes:
      history: the text so far (T = 1): prompt and committed tokens.
      keys: `[B, D]` the random key of each draft position.
      max_draft: `[B]` the deepest draft token that a row can use in this step; 0: draft nothing for it.
      sampling: the rows' sampling options, which target and draft share.
      vocab_size: V of the target.
      coupled: whether `keys` are those with which the target draws. A drafter of trees then ranks the continuations of
        every node by the noise of its position alone, which all nodes of a depth share.
    """

    history: History
    keys: Key[Array, "B D"]
    max_draft: Int[Array, " B"]
    sampling: SamplingOptions
    vocab_size: int
    coupled: bool = False


class Drafter(NamedTuple):
    """Pure functions that propose draft tokens.

    Attributes:
      init: `(batch_size, max_len, max_source=0) -> state`, called once; `max_len` is the length of the text buffer.
      propose: `(params, state, cache, context) -> (Proposal, state, cache)`, given the target's parameters and cache: a
        self-drafter may write after `cache.length`, where everything is overwritten; others return the cache unchanged.
        Whether a token is proposed must not depend on that token (see `Proposal.length`).
      update: `(params, state, feedback) -> state`, called with each prompt, or its chunks in order, and after every
        step, even one that drafted nothing.
      topology: how many tokens it proposes in a step, and how deep their tree is.
      taps: the hidden states of the target that it reads from `Feedback.features` (`Model.with_taps`).
    """

    init: protocols.InitDrafter
    propose: protocols.Propose
    update: protocols.Update
    topology: Topology
    taps: tuple[int, ...] = ()

    @property
    def num_draft_tokens(self) -> int:
        """N, the most tokens that it proposes in a step."""
        return self.topology.num_nodes


class Draft(NamedTuple):
    """A drafter with its parameters, as `generate` takes it. The loop sees only the drafter.

    Attributes:
      drafter: the drafter.
      params: its parameters, which become `Params.draft`.
      tokenizer: the tokenizer of its token ids, or None.
      max_len: the longest sequence that it supports, or None.
      model: the draft model, where there is one that could decode alone, or None.
    """

    drafter: Drafter
    params: Tree
    tokenizer: Any = None
    max_len: int | None = None
    model: Model | None = None

    @property
    def num_draft_tokens(self) -> int:
        """N, the most tokens that it proposes in a step."""
        return self.drafter.num_draft_tokens


AnyDrafter = Drafter | Draft
"""What `generate` takes as a drafter."""


class Params(NamedTuple):
    """The parameters of both sides."""

    target: Tree
    draft: Tree


PRNGKey = jax.Array
"""A typed JAX random key."""
