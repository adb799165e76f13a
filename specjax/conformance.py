"""The conformance suite of drafters, which `specjax.testing.check_drafter` runs.

Four parts, each of which runs if those before it found nothing:

  trace      shapes, types and the structure of the state, by `drafters.contract`;
  proposals  their values, at every step of a ragged batch: ids, lengths, probabilities, what they may depend on;
  draws      tokens are distributed as stated, whatever the length (many texts of one prompt);
  texts      greedy and `coupled` text is plain decoding's, that of `rejection` and `block` (for trees `traversal`) the
             target's, jointly over its first tokens; the drafts of a model for itself are always accepted.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax import decoding, drafters, sampling, testing
from specjax.decoding import verify
from specjax.decoding.verify import Rule
from specjax.drafters import contract
from specjax.sampling import tree
from specjax.state import DecodeState
from specjax.types import Block, Context, Drafter, Feedback, Model, Params, Proposal, Topology, Tree

# The p-value below which a distribution is wrong; tokens of the texts whose joint distribution is enumerated.
SIGNIFICANCE, NUM_TOKENS = 1e-6, 3

SMALL = 64
"""A target with at most this many tokens is assumed to be a table, which is cheap to decode with."""

# The tokens kept at each position of a larger vocabulary; the rows of the ragged part of the batch.
_TOP_K, _RAGGED = 3, 24


class Trial(NamedTuple):
    """A drafter, its target, and the batch that it is tested with: `num_texts` rows of one prompt, then others.

    Attributes:
      target: the target.
      drafter: the drafter.
      params: of both.
      prompts: token ids, one prompt per row.
      budgets: new tokens of each row.
      options: keyword arguments of `sampling.options`.
      num_texts: how many rows at the beginning share prompt, options and budget.
    """

    target: Model
    drafter: Drafter
    params: Params
    prompts: list[list[int]]
    budgets: list[int]
    options: dict[str, Any]
    num_texts: int

    def start(self, drafter: Drafter | None = None, *, reverse: bool = False) -> DecodeState:
        """The state after the prefill, with the rows in reverse order if `reverse`."""
        order = slice(None, None, -1 if reverse else 1)
        chosen = self.drafter if drafter is None else drafter
        rows = len(self.prompts)
        return decoding.prefill(
            self.target,
            chosen,
            self.params,
            decoding.read_inputs(self.target, self.prompts[order]),
            max_new_tokens=self.budgets[order],
            options=sampling.options(rows, **{name: values[order] for name, values in self.options.items()}),
            seeds=list(range(rows))[order],
            step_cost=0.0,
            max_len=self.max_len,
        )

    @property
    def max_len(self) -> int:
        """The length of the buffer."""
        longest = max(len(p) + b for p, b in zip(self.prompts, self.budgets, strict=True))
        return decoding.buffer_length(longest, self.drafter.topology.num_read)

    def decode(self, rule: Rule, drafter: Drafter | None = None, *, reverse: bool = False) -> DecodeState:
        """Decodes all rows; every call scores K + 1 tokens."""
        chosen = self.drafter if drafter is None else drafter
        state = self.start(chosen, reverse=reverse)
        return _advance(self, rule, chosen, state, 2**31 - 1)


def _loop(target: Model, drafter: Drafter, rule: Rule, params: Params, state: DecodeState, steps: Any) -> DecodeState:
    return decoding.advance(target, drafter, rule, params, state, steps, True)


_STATIC = {"static_argnames": ("target", "drafter", "rule"), "donate_argnames": ("state",)}
_fast_loop = jax.jit(_loop, **_STATIC)
# Compiling takes longer than running where the target is a table.
_quick_loop = jax.jit(_loop, **_STATIC, compiler_options={"xla_backend_optimization_level": 0})


def _advance(trial: "Trial", rule: Rule, drafter: Drafter, state: DecodeState, steps: int) -> DecodeState:
    """At most `steps` steps, each of which scores K + 1 tokens."""
    loop = _quick_loop if trial.target.vocab_size <= SMALL else _fast_loop
    return loop(trial.target, drafter, rule, trial.params, state, np.int32(steps))


def make_trial(target: Model, params: Params, drafter: Drafter, num_texts: int) -> Trial:
    """The batch of a trial: prompts of few different tokens, so that lookups match; greedy and sampled rows."""
    rng = np.random.default_rng(0)
    known = rng.permutation(target.vocab_size)[:4].tolist()
    repeated = [known[i] for i in (0, 1, 2, 0, 1, 2, 0, 1) if i < len(known)]
    prompts, budgets = [repeated] * num_texts, [NUM_TOKENS] * num_texts
    for _ in range(_RAGGED):
        prompts.append([known[i] for i in rng.integers(0, len(known), rng.integers(1, 13))])
        budgets.append(int(rng.integers(0, 25)))
    limit = 0 if target.vocab_size <= 8 else _TOP_K
    options = {
        "temperature": [1.0] * num_texts + [(0.0, 1.0, 0.6)[i % 3] for i in range(_RAGGED)],
        "top_k": [limit] * num_texts + [(0, 0, 2)[i % 3] for i in range(_RAGGED)],
    }
    return Trial(target, drafter, params, prompts, budgets, options, num_texts)


# Trace.


def _context(target: Model, drafter: Drafter, state: DecodeState) -> Context:
    depth = drafter.topology.depth
    keys, _ = decoding.step_keys(state.rows.seed, state.rows.length, depth)
    room = jnp.where(state.rows.done, 0, jnp.minimum(depth, state.rows.limit - state.rows.length - 1))
    return Context(decoding.history_of(state), keys, room, state.rows.sampling, target.vocab_size)


def _trace_problem(trial: Trial) -> str:
    """The error that tracing the drafter raises; empty where there is none."""
    drafter, topology = trial.drafter, trial.drafter.topology

    def traced(params: Params, state: DecodeState) -> Tree:
        context = _context(trial.target, drafter, state)
        _, after, cache = contract.propose(drafter, params, state.rows.drafter, state.rows.cache, context)
        rows = len(trial.prompts)
        block = Block(jnp.zeros((rows, topology.num_read + 1), jnp.int32))
        output, _ = trial.target.apply(params.target, block, cache)
        tokens, one = jnp.zeros((rows, topology.depth + 1), jnp.int32), jnp.ones(rows, jnp.int32)
        features, length = output.features[:, : topology.depth + 1], state.rows.length + 1
        return contract.update(drafter, params, after, Feedback(tokens, one, length, features, output, context=context))

    where = contract.describe(drafter.init)
    try:
        state = trial.start()
        where = f"{contract.describe(drafter.propose)}, or its update,"
        jax.eval_shape(traced, trial.params, state)
    except Exception as error:  # Whatever the drafter's code raises.
        text = str(error)
        if text.startswith("The drafter is wrong"):
            return text
        return f"{where} raises {type(error).__name__}: {text.splitlines()[0] if text else 'without a message'}"
    return ""


# Proposals.


class _Seen(NamedTuple):
    """The proposal for a state, and the proposals with other random keys and with other stale tokens."""

    room: Any
    proposal: Any
    other_keys: Any
    other_stale: Any


def _propose(
    target: Model, drafter: Drafter, params: Params, state: DecodeState, salt: Any, shift: Any
) -> tuple[Any, Proposal]:
    """The room of each row, and the proposal; `salt` changes the keys, `shift` the stale tokens after the text."""
    context = _context(target, drafter, state)
    history = context.history
    stale = jnp.arange(history.tokens.shape[1]) >= history.length[:, None]
    changed = jnp.where(stale, (history.tokens + shift) % target.vocab_size, history.tokens)
    keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, salt)))(context.keys)
    context = context._replace(keys=keys, history=history._replace(tokens=changed))
    return context.max_draft, contract.propose(drafter, params, state.rows.drafter, state.rows.cache, context)[0]


_quick_propose = jax.jit(
    _propose, static_argnames=("target", "drafter"), compiler_options={"xla_backend_optimization_level": 0}
)


def _see(trial: Trial, state: DecodeState) -> _Seen:
    def propose(salt: int, shift: int) -> Any:
        changes = jnp.int32(salt), jnp.int32(shift)
        return jax.device_get(_quick_propose(trial.target, trial.drafter, trial.params, state, *changes))

    room, proposal = propose(0, 0)
    return _Seen(room, proposal, propose(1, 0)[1], propose(0, 1)[1])


def _value_problems(proposal: Proposal, room: np.ndarray, k: int, vocab_size: int) -> Iterator[tuple[str, int]]:
    """What is wrong with a proposal, and the first row where it is."""
    tokens, length = np.asarray(proposal.tokens), np.asarray(proposal.length)
    used = np.arange(k) < length[:, None]

    def rows(wrong: np.ndarray, say: Callable[[int], str]) -> Iterator[tuple[str, int]]:
        found = np.flatnonzero(wrong if wrong.ndim == 1 else wrong.any(axis=1))
        if len(found):
            yield say(int(found[0])), int(found[0])

    yield from rows(length > k, lambda r: f"proposes length {length[r]}, which is above K = {k}")
    yield from rows(length < 0, lambda r: f"proposes length {length[r]}, which is negative")
    most = room if proposal.parent is None else np.where(room > 0, k, 0)  # A tree has more nodes than it is deep.
    yield from rows(
        (length > most) & (length <= k),
        lambda r: f"proposes length {length[r]} where context.max_draft allows {room[r]}: take the minimum of both",
    )
    # In a tree, a node that has no token is -1.
    least = 0 if proposal.parent is None else -1
    outside = used & ((tokens < least) | (tokens >= vocab_size))
    yield from rows(
        outside, lambda r: f"proposes ids {tokens[r][outside[r]].tolist()}, outside the vocabulary [0, {vocab_size})"
    )
    if proposal.probs is None:
        return
    used &= tokens >= 0
    probs = np.asarray(proposal.probs, np.float64)
    with np.errstate(invalid="ignore"):
        total = probs.sum(axis=-1)
        negative = used & (probs.min(axis=-1) < 0)
        off = used & ~negative & ~(np.abs(total - 1) < 1e-3)
        of_token = np.take_along_axis(probs, np.clip(tokens, 0, vocab_size - 1)[..., None], axis=-1)[..., 0]
        impossible = used & ~outside & ~off & ~negative & (of_token == 0)
    yield from rows(negative, lambda r: "states negative probabilities")
    yield from rows(off, lambda r: f"states probabilities that sum to {total[r][off[r]][0]:.4g}, not to 1")
    yield from rows(
        impossible,
        lambda r: f"proposes token {tokens[r][impossible[r]][0]}, to which the probabilities that it states give 0",
    )


def _same(a: Proposal, b: Proposal, rows: np.ndarray) -> np.ndarray:
    """Which of the rows propose the same number of tokens, and the same ones."""
    length = np.asarray(a.length)[rows]
    used = np.arange(np.asarray(a.tokens).shape[1]) < length[:, None]
    tokens = (np.asarray(a.tokens)[rows] == np.asarray(b.tokens)[rows]) | ~used
    return (length == np.asarray(b.length)[rows]) & tokens.all(axis=1)


def _dependence_problems(seen: _Seen) -> Iterator[tuple[str, int]]:
    """What a proposal depends on but must not."""
    every, probs = np.arange(len(np.asarray(seen.room))), seen.proposal.probs

    def first(different: np.ndarray, say: str) -> Iterator[tuple[str, int]]:
        if different.any():
            yield say, int(np.flatnonzero(different)[0])

    stale = "reads context.history.tokens at or beyond context.history.length, where rejected drafts lie"
    yield from first(~_same(seen.proposal, seen.other_stale, every), stale)
    if probs is None:
        unstated = "draws at random, but states no probs: put each token's distribution into Proposal.probs"
        yield from first(~_same(seen.proposal, seen.other_keys, every), unstated)
        return
    # The distribution of the first token depends on the text alone.
    both = (np.asarray(seen.proposal.length) > 0) & (np.asarray(seen.other_keys.length) > 0)
    a, b = (np.asarray(x.probs)[:, 0] for x in (seen.proposal, seen.other_keys))
    late = "states probs that depend on the random keys: they have to be the distribution before the token is drawn"
    yield from first(both & (np.abs(a - b).max(axis=-1) > 1e-3), late)


def _describe_row(trial: Trial, state: DecodeState, row: int) -> str:
    length = int(np.asarray(state.rows.length)[row])
    text = np.asarray(state.rows.tokens)[row, :length].tolist()
    shown = f"{text}" if length <= 12 else f"[... {text[-12:]}".replace("[... [", "[... ")
    return f"after the text {shown} at temperature {trial.options['temperature'][row]:g}"


def _step_problems(trial: Trial, state: DecodeState, seen: _Seen) -> list[str]:
    k = trial.drafter.num_draft_tokens
    if not k:
        return []
    where = contract.describe(trial.drafter.propose)
    found = [
        *_value_problems(seen.proposal, np.asarray(seen.room), k, trial.target.vocab_size),
        *_dependence_problems(seen),
    ]
    return [f"{where} {what} ({_describe_row(trial, state, row)})" for what, row in found]


# Draws.


def _test(counts: np.ndarray, probs: np.ndarray) -> float:
    probs = np.asarray(probs, np.float64)
    return testing.g_test(counts, probs / probs.sum())


def _draw_problem(trial: Trial, proposal: Proposal) -> str:
    """Where the proposed tokens are not distributed as stated, given those before them; empty if they are."""
    if proposal.probs is None or not trial.drafter.num_draft_tokens:
        return ""
    tokens, length, probs = (np.asarray(x)[: trial.num_texts] for x in proposal[:3])
    where, vocab_size = contract.describe(trial.drafter.propose), trial.target.vocab_size
    shared = np.asarray(proposal.parent)[0].tolist() if trial.drafter.topology.shares_draws else None
    usual: dict[int, int] = {}
    for place in range(trial.drafter.num_draft_tokens):
        given = [node for node in usual if shared is None or node in tree.elders(shared, place)]
        alike = (tokens[:, given] == [usual[node] for node in given]).all(axis=1)
        there = alike & (length > place) & (tokens[:, place] >= 0)
        if there.sum() < 100:
            continue
        stated = probs[there, place]
        if np.abs(stated - stated[0]).max() > 1e-3:
            return f"{where} states different probs for draft token {place} after equal texts and drafts before it"
        counts = np.bincount(tokens[there, place], minlength=vocab_size)
        p = _test(counts, stated[0])
        if p < SIGNIFICANCE:
            whole = _test(np.bincount(tokens[alike, place], minlength=vocab_size), stated[0])
            why = "its tokens are not drawn from the probs that it states"
            if whole >= SIGNIFICANCE:
                why = "the length depends on the token that was drawn: it may depend on the tokens before it only"
            return (
                f"{where} biases draft token {place} (p = {p:.0e}): {why}. In {there.sum()} proposals the counts are "
                f"{counts[: min(vocab_size, 8)].tolist()}; the expected counts are "
                f"{np.round(stated[0][:8] * there.sum()).astype(int).tolist()}"
            )
        usual[place] = int(np.argmax(counts))
    return ""


# Texts.


@functools.partial(jax.jit, static_argnames=("target",))
def _next_logits(target: Model, params: Tree, inputs: Any) -> Any:
    max_source = 0 if inputs.source is None else inputs.source.shape[1]
    rows, width = inputs.tokens.shape
    output, _ = target.prefill(params, inputs, target.init_cache(rows, width, max_source))
    return output.logits[:, 0]


def exact_joint(trial: Trial) -> dict[tuple[int, ...], float]:
    """The probability of every text of `NUM_TOKENS` tokens after the first row's prompt, from the target's prefill."""
    target, top_k = trial.target, trial.options["top_k"][0]
    joint: dict[tuple[int, ...], float] = {(): 1.0}
    prompt = trial.prompts[0]
    for _ in range(NUM_TOKENS):
        texts = list(joint)
        if target.start_token is None:
            inputs = decoding.pad_prompts([[*prompt, *text] for text in texts])
        else:
            source = decoding.pad_prompts([prompt] * len(texts))
            begun = decoding.pad_prompts([[target.start_token, *text] for text in texts])
            inputs = begun._replace(source=source.tokens, source_length=source.length)
        logits = np.asarray(_next_logits(target, trial.params.target, inputs))
        longer: dict[tuple[int, ...], float] = {}
        for text, row in zip(texts, logits, strict=True):
            for token, p in enumerate(testing.distribution(row, top_k=top_k)):
                if p > 0:
                    longer[*text, token] = joint[text] * float(p)
        joint = longer
    return joint


def _new_tokens(state: DecodeState, rows: Sequence[int] | slice) -> list[list[int]]:
    tokens, begin, end = (np.asarray(x)[rows] for x in (state.rows.tokens, state.rows.prompt_length, state.rows.length))
    return [row[a:b].tolist() for row, a, b in zip(tokens, begin, end, strict=True)]


def _joint_p_value(trial: Trial, state: DecodeState, joint: dict[tuple[int, ...], float]) -> float:
    index = {text: i for i, text in enumerate(joint)}
    counts = np.zeros(len(joint) + 1)
    for text in _new_tokens(state, slice(0, trial.num_texts)):
        counts[index.get(tuple(text), len(joint))] += 1
    return testing.g_test(counts, np.append(list(joint.values()), 0.0))


def _sampled_rules(topology: Topology) -> tuple[Rule, ...]:
    """The rules whose text depends on what a drafter states of its draws."""
    rules = verify.rejection, verify.block if topology.is_chain else verify.traversal
    return rules[:1] if topology.shares_draws else rules


def _text_problems(trial: Trial, report: testing.Report) -> None:
    k, where = trial.drafter.num_draft_tokens, contract.describe(trial.drafter.propose)
    plain = trial.decode(verify.coupled, drafters.none(num_draft_tokens=k))
    coupled = trial.decode(verify.coupled)
    wanted, got = (_new_tokens(state, slice(None)) for state in (plain, coupled))
    temperature = trial.options["temperature"]
    wrong = [row for row, (a, b) in enumerate(zip(wanted, got, strict=True)) if a != b]
    for row in wrong[:1]:
        kind = "greedy" if temperature[row] == 0 else "coupled"
        report.problems.append(
            f"{where}: the {kind} text is not plain decoding's in {len(wrong)} of {len(wanted)} rows: {got[row]} "
            f"instead of {wanted[row]} (prompt {trial.prompts[row]})"
        )
    reverse = trial.decode(verify.coupled, reverse=True)
    counters = np.asarray(coupled.rows.stats.proposed), np.asarray(reverse.rows.stats.proposed)[::-1]
    moved = np.flatnonzero((counters[0] != counters[1]).any(axis=1))
    if len(moved):
        report.problems.append(
            f"{where}: what is proposed for a row depends on the other rows of the batch, or on its index in it (row "
            f"{moved[0]}: {counters[0][moved[0]].tolist()} drafts judged by position, "
            f"{counters[1][moved[0]].tolist()} with the rows in reverse order)"
        )
    joint = exact_joint(trial)
    rules = _sampled_rules(trial.drafter.topology)
    for rule in rules:
        p = _joint_p_value(trial, trial.decode(rule), joint)
        if p < SIGNIFICANCE:
            report.problems.append(
                f"{where}: with verify={rule.name}, {trial.num_texts} texts of {NUM_TOKENS} tokens are not distributed "
                f"as the target's (p = {p:.0e}), so its tokens are not drawn from the probs that it states"
            )
    if report.problems:
        return
    names = " and ".join(rule.name for rule in rules)
    error = testing.smallest_error(trial.num_texts, len(joint), significance=SIGNIFICANCE)
    report.passed.extend(
        [
            f"greedy and coupled text is plain decoding's in all {len(wanted)} rows, in any order of the rows",
            f"{names}: {trial.num_texts} texts of {NUM_TOKENS} tokens are distributed as the target's "
            f"(errors of {error:.3f} in total variation would have been seen)",
        ]
    )
    proposed, accepted = (int(np.asarray(x).sum()) for x in (coupled.rows.stats.proposed, coupled.rows.stats.accepted))
    if not proposed:
        report.notes.append(f"{where} proposed nothing for any of these texts: what it proposes was not tested")
    else:
        report.passed.append(f"{accepted} of {proposed} judged drafts were accepted")


def _perfect_problem(alone: Model, params: Tree, drafter: Drafter, num_texts: int) -> str:
    """What goes wrong where a model drafts for itself, with all drafts accepted or none, and with pauses; or empty."""
    trial = make_trial(alone, Params(params, params), drafter, num_texts)
    for rule in (verify.rejection, verify.observe) if drafter.topology.is_chain else (verify.coupled,):
        state, together = trial.start(), False
        while not np.asarray(state.rows.done).all():
            # All rows pause for two steps, or some do: a row that does not draft may share a step with one that does.
            pause = jnp.full(len(trial.prompts), 2, jnp.int32) if together else jnp.arange(len(trial.prompts)) % 3
            together = not together
            adaptation = state.rows.adaptation._replace(pause=pause)
            state = state._replace(rows=state.rows._replace(adaptation=adaptation))
            state = _advance(trial, rule, trial.drafter, state, 4)
        judged, overlap = np.asarray(state.rows.stats.proposed).sum(axis=1), np.asarray(state.rows.stats.overlap)
        bad = np.flatnonzero(overlap < judged * 0.99)
        if len(bad):
            before = "rejected" if rule is verify.observe else "accepted"
            return (
                f"{contract.describe(drafter.propose)}: drafting for its own model it is right at "
                f"{overlap[bad[0]]:.2f} of {judged[bad[0]]} positions after {before} drafts and steps without drafts, "
                "not at all of them: its state (a cache?) does not hold the text that was committed"
            )
    return ""


def _steps(trial: Trial, report: testing.Report) -> None:
    """Checks the proposals of every step, and the distribution of the first ones."""
    state = trial.start()
    steps = 0
    while True:
        seen = _see(trial, state)
        report.problems.extend(_step_problems(trial, state, seen))
        if not steps and not report.problems:
            report.problems.extend(filter(None, [_draw_problem(trial, seen.proposal)]))
        if report.problems or np.asarray(state.rows.done).all():
            break
        state = _advance(trial, verify.coupled, trial.drafter, state, 1)
        steps += 1
    if not report.problems:
        report.passed.append(f"proposals of {len(trial.prompts)} rows are sound, in each of {steps} steps")
        report.passed.append(f"{trial.num_texts} first proposals are distributed as stated")


def run(
    drafter: Drafter, target: Model, params: Params, alone: Model | None = None, *, num_texts: int = 8192
) -> testing.Report:
    """Checks a drafter; see `specjax.testing.check_drafter`.

    Args:
      drafter: the drafter.
      target: the target.
      params: of both.
      alone: the draft model, whose drafts for itself must all be accepted; None skips that test.
      num_texts: how many texts of one prompt the distributions are tested with.
    """
    report = testing.Report([], [], [])
    trial = make_trial(target, params, drafter, num_texts)
    report.problems.extend(filter(None, [_trace_problem(trial)]))
    if report.problems:
        return report
    report.passed.append("shapes, types and the structure of the state")
    _steps(trial, report)
    if report.problems:
        return report
    _text_problems(trial, report)
    if alone is not None and not report.problems:
        problem = _perfect_problem(alone, params.draft, drafter, num_texts if target.vocab_size <= SMALL else 1)
        if problem:
            report.problems.append(problem)
        else:
            report.passed.append("drafting for its own model it is always right, also after rejections and pauses")
    return report
