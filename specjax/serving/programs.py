"""The programs that an engine runs on the device: read a chunk of a prompt, insert a row, resize the batch, advance.

Each is compiled before the engine is ready. All that a request chooses is row data of static size, so that no mix of
requests compiles anything.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from specjax.decoding.adaptive import init as new_adaptation
from specjax.decoding.logprobs import log_probabilities
from specjax.decoding.prefill import Settings, Text, new_rows, row_keys
from specjax.decoding.step import decode_step
from specjax.decoding.verify import Rule
from specjax.drafters import contract
from specjax.models import cache
from specjax.parallel import sharding
from specjax.state import DecodeState, Logprobs, Rows, Shared
from specjax.types import Automaton, Block, Drafter, Feedback, Inputs, Model, Params, SamplingOptions


class Sizes(NamedTuple):
    """The static sizes of an engine's state.

    Attributes:
      max_len: L, the length of the text buffer.
      max_source: S, of the encoder's input, or of what drafts may be looked up in beside the text.
      num_stop_tokens: X, the most stop tokens of a row.
      num_biases: M, the most logit biases of a row.
      num_top: the most log-probabilities of a position that are returned.
      max_steps: the most steps of a call.
      grammar_states: the states of the shared table of grammars.
      grammar_classes: its classes of tokens.
    """

    max_len: int
    max_source: int
    num_stop_tokens: int
    num_biases: int
    num_top: int
    max_steps: int
    grammar_states: int
    grammar_classes: int


class Programs(NamedTuple):
    """What the programs are compiled for; static.

    Attributes:
      target: the target.
      drafter: the drafter.
      rule: the acceptance rule.
      sizes: the sizes of the state.
    """

    target: Model
    drafter: Drafter
    rule: Rule
    sizes: Sizes

    @property
    def window(self) -> int:
        """W, the most tokens that a row gains in a call."""
        return self.sizes.max_steps * (self.drafter.topology.depth + 1)


class Choices(NamedTuple):
    """What a request has chosen, as arrays of one row; `decoding.prefill.Settings` documents the fields.

    Attributes:
      seed: `[1]` of its random numbers.
    """

    limit: Int[Array, "1"]
    seed: UInt32[Array, "1"]
    sampling: SamplingOptions
    stop_tokens: Int[Array, "1 X"]
    grammar_state: Int[Array, "1"]
    wants_logprobs: Bool[Array, "1"]


class Results(NamedTuple):
    """What a call brought, small enough to copy to the host in every call.

    Attributes:
      numbers: `[B, 7 + D + 2 W]` int32: `NUMBERS`, then the accepted draft tokens by position, then the new tokens,
        then whether each was a draft token.
      logprobs: `[B, W]` of the new tokens.
    """

    numbers: Int[Array, "B X"]
    logprobs: Logprobs


NUMBERS = ("begin", "length", "done", "failed_at", "draft_failed", "steps", "draft_steps", "drafted")
"""The first columns of `Results.numbers`: the length before and after the call, then fields and sums of `Rows`."""


def _is_by_position(array: Any, max_len: int) -> bool:
    """Whether an array holds keys or values, one entry for each position of the text buffer (`models.cache`)."""
    return array.ndim >= 4 and array.shape[-2] == max_len


def _settled(programs: Programs, tree: Any) -> Any:
    """On a mesh: each array split in the one way that all programs agree on, so that none is compiled twice.

    Left alone, the compiler splits what it returns as suits the program, and the next program, compiled for arrays that
    are split otherwise, is compiled anew.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    table, sizes = dict(sharding.RULES), dict(mesh.shape)

    def settle(x: Array) -> Array:
        is_cache = _is_by_position(x, programs.sizes.max_len)
        axes = cache.axes_of(x.ndim) if is_cache else ("batch",) + (None,) * (x.ndim - 1)
        spec = [
            on if (on := table[name] if name else None) in sizes and size % sizes[on] == 0 else None
            for name, size in zip(axes, x.shape, strict=False)
        ]
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))

    return jax.tree.map(settle, tree)


@functools.partial(jax.jit, static_argnames=("programs",))
def begin(programs: Programs) -> Text:
    """An empty text of one row, for `read`."""
    sizes = programs.sizes
    empty_cache = programs.target.init_cache(1, sizes.max_len, sizes.max_source)
    state = programs.drafter.init(1, sizes.max_len, sizes.max_source)
    text = Text(jnp.zeros((1, sizes.max_len), jnp.int32), jnp.zeros(1, jnp.int32), empty_cache, state)
    return _settled(programs, text)


def _learn(programs: Programs, params: Params, text: Text, inputs: Inputs, output: Any, after: Any) -> Text:
    length = text.length + inputs.length
    feedback = Feedback(inputs.tokens, inputs.length, length, output.features, output, inputs)
    tokens = jax.lax.dynamic_update_slice(text.tokens, inputs.tokens, (0, text.length[0]))
    drafter = contract.update(programs.drafter, params, text.drafter, feedback)
    return _settled(programs, Text(tokens, length, after, drafter))


@functools.partial(jax.jit, static_argnames=("programs",), donate_argnames=("text",))
def read(programs: Programs, params: Params, text: Text, inputs: Inputs) -> Text:
    """Reads a chunk of a prompt behind what has been read.

    Args:
      programs: what it is compiled for.
      params: the parameters of both sides.
      text: before the chunk; donated.
      inputs: `[1, C]` the chunk, padded.
    """
    output, after = programs.target.prefill(params.target, inputs, text.cache)
    return _learn(programs, params, text, inputs, output, after)


@functools.partial(jax.jit, static_argnames=("programs",), donate_argnames=("text",))
def read_scored(
    programs: Programs, params: Params, text: Text, inputs: Inputs, following: Int[Array, "1 C"]
) -> tuple[Text, Logprobs]:
    """Like `read`; also returns the log-probability of the token that follows each token of the chunk.

    Args:
      programs: as for `read`.
      params: as for `read`.
      text: as for `read`.
      inputs: as for `read`.
      following: the next token after each of the chunk.
    """
    target = programs.target
    output, after = target.apply(params.target, Block(inputs.tokens), text.cache)
    logprobs = log_probabilities(output.logits, following, programs.sizes.num_top)
    after = target.commit(after, None, inputs.length)
    last = jnp.take_along_axis(output.logits, (inputs.length - 1)[:, None, None], axis=1)
    return _learn(programs, params, text, inputs, output._replace(logits=last), after), logprobs


def _rows(programs: Programs, text: Text, choices: Choices) -> Rows:
    settings = Settings(
        choices.limit,
        row_keys(choices.seed),
        choices.sampling,
        choices.stop_tokens,
        choices.grammar_state,
        choices.wants_logprobs,
    )
    behind = programs.target.commit(text.cache, None, jnp.full(text.length.shape, -1, jnp.int32))
    return new_rows(programs.drafter, text._replace(cache=behind), settings, programs.sizes.num_top)


@functools.partial(jax.jit, static_argnames=("programs",), donate_argnames=("state",))
def insert(programs: Programs, state: DecodeState, slot: Int[Array, ""], text: Text, choices: Choices) -> DecodeState:
    """Puts a text that has been read into a slot.

    Args:
      programs: what it is compiled for.
      state: the state; donated.
      slot: which row to write.
      text: the whole prompt; may be inserted again.
      choices: what the request has chosen.
    """

    def put(all_rows: Array, row: Array) -> Array:
        if jnp.issubdtype(all_rows.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(all_rows), jax.random.key_data(row)))
        return jax.lax.dynamic_update_slice_in_dim(all_rows, row, slot, axis=0)

    rows = jax.tree.map(put, state.rows, _rows(programs, text, choices))
    return state._replace(rows=_settled(programs, rows))


@functools.partial(jax.jit, static_argnames=("programs", "batch_size"))
def empty(
    programs: Programs, batch_size: int, choices: Choices, step_costs: Float[Array, " C"], grammar: Automaton
) -> DecodeState:
    """A state whose rows are all done.

    Args:
      programs: what it is compiled for.
      batch_size: B.
      choices: of any request, for their shapes.
      step_costs: see `Shared`.
      grammar: the table that grammars will be written into.
    """
    sizes, one = programs.sizes, jnp.ones(batch_size, jnp.int32)
    # A row that is done still reads its last token, so it has one.
    read_one = programs.target.commit(
        programs.target.init_cache(batch_size, sizes.max_len, sizes.max_source), None, one
    )
    drafter = programs.drafter.init(batch_size, sizes.max_len, sizes.max_source)
    tokens = jnp.zeros((batch_size, sizes.max_len), jnp.int32)
    choices = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch_size, *x.shape[1:])), choices)
    rows = _rows(programs, Text(tokens, one, read_one, drafter), choices._replace(limit=one))
    return DecodeState(_settled(programs, rows), Shared(None, grammar, step_costs))


@functools.partial(jax.jit, static_argnames=("programs",), donate_argnames=())
def resize(programs: Programs, state: DecodeState, source: Int[Array, " C"]) -> DecodeState:
    """The state with other rows: row i is the old row `source[i]`; those of -1 are done."""
    rows = jax.tree.map(lambda x: x[jnp.maximum(source, 0)], state.rows)
    return state._replace(rows=_settled(programs, rows._replace(done=rows.done | (source < 0))))


@functools.partial(jax.jit, static_argnames=("programs",), donate_argnames=("state",))
def advance(
    programs: Programs,
    params: Params,
    state: DecodeState,
    stop: Bool[Array, " B"],
    num_steps: Int[Array, ""],
    leave_early: Bool[Array, ""],
) -> tuple[DecodeState, Results]:
    """Runs at most `num_steps` steps, fewer where all rows are done.

    Args:
      programs: what it is compiled for.
      params: the parameters of both sides.
      state: the state; donated.
      stop: `[B]` rows that are to end before the first step.
      num_steps: at most `Sizes.max_steps`.
      leave_early: whether to return as soon as any row is done, because someone waits for a slot.
    """
    state = state._replace(rows=state.rows._replace(done=state.rows.done | stop))
    length, done = state.rows.length, state.rows.done

    def goes_on(carry: tuple[Array, DecodeState]) -> Array:
        now = carry[1].rows.done
        return (carry[0] < num_steps) & ~jnp.all(now) & ~(leave_early & jnp.any(now & ~done))

    def body(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        number, before = carry
        # Bound to the number of the step, or XLA:CPU would convert and reorder matrices once for all steps of a call:
        # calls are short, and that takes longer than a step.
        own, number = jax.lax.optimization_barrier((params, number))
        step = decode_step(programs.target, programs.drafter, programs.rule, own, before)
        return number + 1, step

    state = jax.lax.while_loop(goes_on, body, (jnp.zeros((), jnp.int32), state))[1]
    state = state._replace(rows=_settled(programs, state.rows))
    return state, _results(programs, state.rows, length)


def _results(programs: Programs, rows: Rows, begin: Int[Array, " B"]) -> Results:
    index = begin[:, None] + jnp.arange(programs.window)

    def new(buffer: Array) -> Array:
        return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(buffer, index)

    s = rows.stats
    drafted = jnp.sum(s.proposed, axis=1, dtype=jnp.int32)
    scalars = (begin, rows.length, rows.done, rows.failed_at, rows.draft_failed, s.target_calls, s.draft_steps, drafted)
    parts = [jnp.stack(scalars, axis=1).astype(jnp.int32), s.accepted]
    parts += [new(rows.tokens), new(rows.from_draft).astype(jnp.int32)]
    return Results(jnp.concatenate(parts, axis=1), jax.tree.map(new, rows.logprobs))


@functools.partial(jax.jit, static_argnames=("programs",), donate_argnames=("state",))
def rewind(programs: Programs, state: DecodeState, length: Int[Array, ""]) -> DecodeState:
    """All rows running, at the same length, with nothing learned: what step costs are measured on."""
    rows = state.rows
    at = jnp.full(rows.length.shape, length, jnp.int32)
    rows = rows._replace(
        length=at,
        prompt_length=at,
        limit=jnp.full(at.shape, programs.sizes.max_len - programs.drafter.topology.num_read - 1, jnp.int32),
        done=jnp.zeros(at.shape, bool),
        adaptation=new_adaptation(len(at), programs.drafter.topology.depth),
        cache=programs.target.commit(rows.cache, None, at - 1 - rows.cache.length),
    )
    return state._replace(rows=_settled(programs, rows))


@functools.partial(jax.jit, static_argnames=("programs", "size"))
def trim(programs: Programs, text: Text, size: int) -> Text:
    """A copy whose caches hold the first `size` positions only, to be kept; the text is at most as long."""
    max_len = programs.sizes.max_len

    def cut(x: Array) -> Array:
        return x[..., :size, :] if _is_by_position(x, max_len) else jnp.copy(x)

    kept = text._replace(cache=jax.tree.map(cut, text.cache), drafter=jax.tree.map(cut, text.drafter))
    return _settled(programs, kept)


@functools.partial(jax.jit, static_argnames=("programs",))
def restore(programs: Programs, kept: Text) -> Text:
    """A text that `read` may continue, from a trimmed copy."""
    whole = jax.eval_shape(functools.partial(begin, programs))

    def widen(x: Array, like: jax.ShapeDtypeStruct) -> Array:
        missing = like.shape[-2] - x.shape[-2] if x.ndim >= 4 else 0
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)]) if missing else jnp.copy(x)

    return _settled(programs, jax.tree.map(widen, kept, whole))
