"""Models small enough to enumerate, the exact distribution of their texts, and a test of counts against it.

Nothing here uses `specjax.sampling` or `specjax.verify`: the tested code must not be its own oracle.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.models import families
from specjax.models.config import DecoderConfig
from specjax.types import Block, Inputs, Model, ModelOutput, Params, Tree


class TabularCache(NamedTuple):
    """The token history. Entries at or beyond `length` are stale, as in `models.cache`: never cleared, never read.

    Attributes:
      tokens: `[B, S]`.
      position: `[B, S]` the position of each token in its sequence.
      length: `[B]` the number of committed entries.
    """

    tokens: Int[Array, "B S"]
    position: Int[Array, "B S"]
    length: Int[Array, " B"]


def _write(history: Int[Array, "B S"], tokens: Int[Array, "B T"], start: Int[Array, " B"]) -> Int[Array, "B S"]:
    """Writes T tokens into each row from its `start` on, by a mask: a scatter of 10^5 rows is slow on a CPU."""
    index = jnp.arange(history.shape[1]) - start[:, None]
    new = jnp.take_along_axis(tokens, jnp.clip(index, 0, tokens.shape[1] - 1), axis=1)
    return jnp.where((index >= 0) & (index < tokens.shape[1]), new, history)


def _moved(history: Int[Array, "B S"], path: Int[Array, "B D"], length: Int[Array, " B"]) -> Int[Array, "B S"]:
    kept = jnp.take_along_axis(history, length[:, None] + path, axis=1, mode="clip")
    return _write(history, kept, length)


@functools.cache
def _tabular_model(vocab_size: int, order: int, width: int, max_len: int) -> Model:
    def context(cache: TabularCache, position: Int[Array, "B T"], sees: Any) -> Int[Array, "B T"]:
        """The row of the table for each of T positions: the last tokens up to it that its token sees, as digits."""
        found = jnp.zeros(position.shape, jnp.int32)
        slots = jnp.arange(cache.tokens.shape[1])
        for back in reversed(range(order)):
            at = position - back
            if sees is None:
                token = jnp.take_along_axis(cache.tokens, jnp.maximum(at, 0), axis=1)
            else:
                here = sees & (cache.position[:, None] == at[..., None])
                token = jnp.take_along_axis(cache.tokens, jnp.max(jnp.where(here, slots, 0), axis=-1), axis=1)
            found = found * vocab_size + jnp.where(at >= 0, jnp.clip(token, 0, vocab_size - 1), 0)
        return found

    def read(table: Float[Array, "C W"], cache: TabularCache, position: Int[Array, "B T"], sees: Any) -> ModelOutput:
        """The logits after the tokens at `position`, which depend only on the history."""
        # The real cache would shift a write that does not fit; here the error shows, as NaN.
        fits = (position < cache.tokens.shape[1])[..., None]
        logits = jnp.where(fits, table[context(cache, position, sees)], jnp.nan)
        return ModelOutput(logits, jnp.zeros((*position.shape, 0, 1)))

    def init_cache(batch_size: int, max_len: int, max_source: int = 0) -> TabularCache:
        del max_source
        empty = jnp.zeros((batch_size, max_len), jnp.int32)
        return TabularCache(empty, empty, jnp.zeros(batch_size, jnp.int32))

    def write(cache: TabularCache, tokens: Int[Array, "B T"], start: Array, position: Array) -> TabularCache:
        written = _write(cache.tokens, tokens, start), _write(cache.position, position, start)
        return TabularCache(*written, cache.length)

    def prefill(params: Tree, inputs: Inputs, cache: TabularCache) -> tuple[ModelOutput, TabularCache]:
        positions = cache.length[:, None] + jnp.arange(inputs.tokens.shape[1])
        cache = write(cache, inputs.tokens, cache.length, positions)
        last = cache.length + jnp.maximum(inputs.length - 1, 0)
        logits = read(params, cache, last[:, None], None).logits
        return ModelOutput(logits, jnp.zeros((*inputs.tokens.shape, 0, 1))), commit(cache, None, inputs.length)

    def apply(params: Tree, block: Block, cache: TabularCache) -> tuple[ModelOutput, TabularCache]:
        depth = jnp.arange(block.tokens.shape[1]) if block.depth is None else block.depth
        positions = jnp.broadcast_to(cache.length[:, None] + depth, block.tokens.shape)
        start, sees = cache.length, None
        if block.sees is not None:
            start = start + (block.sees.shape[-1] - block.tokens.shape[1])
            slots = jnp.arange(cache.tokens.shape[1]) - cache.length[:, None, None]
            behind = jnp.broadcast_to(jnp.clip(slots, 0, block.sees.shape[-1] - 1), (*positions.shape, slots.shape[-1]))
            of_block = jnp.take_along_axis(block.sees, behind, axis=-1) & (slots < block.sees.shape[-1])
            sees = (slots < 0) | ((slots >= 0) & of_block)
        cache = write(cache, block.tokens, start, positions)
        return read(params, cache, positions, sees), cache

    def commit(cache: TabularCache, path: Any, count: Int[Array, " B"]) -> TabularCache:
        length = cache.length + count
        if path is None:
            return cache._replace(length=length)
        tokens, position = _moved(cache.tokens, path, cache.length), _moved(cache.position, path, cache.length)
        return TabularCache(tokens, position, length)

    return Model(init_cache, prefill, apply, commit, width, max_len)


def tabular(
    seed: int = 0,
    *,
    vocab_size: int = 4,
    order: int = 2,
    scale: float = 1.0,
    zeros: float = 0.0,
    ties: bool = False,
    padding: int = 0,
    max_len: int = 1 << 20,
) -> tuple[Model, Float[Array, "C W"]]:
    """A model whose next-token logits are a table over the last `order` tokens.

    Its cache is the token history, with the rollback contract of the real one; a write beyond the buffer makes the
    logits NaN. Missing tokens at the beginning of a text count as 0, tokens in the padding as the last one before it.
    Equal shapes give the same `Model`.

    Args:
      seed: of the table.
      vocab_size: the number of tokens that a context distinguishes.
      order: the number of last tokens that a distribution depends on; 0: none, so that all positions are alike.
      scale: the standard deviation of the normally distributed logits.
      zeros: the share of tokens of probability 0 (-inf), never all of a row.
      ties: round the logits to multiples of `scale`, so that many are equal.
      padding: columns beyond `vocab_size`, with logits like the others, as in a model with a padded vocabulary.
      max_len: the longest sequence that it claims to support.

    Returns:
      the model, and its parameters: the table, `[vocab_size ** order, vocab_size + padding]`, in which the index of a
      row has the last tokens as its digits in base `vocab_size`, the oldest first.
    """
    rng = np.random.default_rng(seed)
    width = vocab_size + padding
    table = scale * rng.standard_normal((vocab_size**order, width))
    if ties:
        table = scale * np.round(table / scale)
    forbidden = rng.random(table.shape) < zeros
    forbidden[np.arange(len(table)), rng.integers(0, vocab_size, len(table))] = False
    table[forbidden] = -np.inf
    return _tabular_model(vocab_size, order, width, max_len), jnp.asarray(table, jnp.float32)


def distribution(
    logits: np.ndarray,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    epsilon_cutoff: float = 0.0,
) -> np.ndarray:
    """The distribution that sampling options make of logits, in float64, as defined and ordered by transformers.

    Args:
      logits: `[V]`.
      temperature: 0 is greedy; the first one in a tie counts.
      top_k: keep the k largest; 0 keeps all. Ties at the cut are kept.
      top_p: keep a token if the total probability of the strictly more probable tokens is below p.
      min_p: keep tokens at least this fraction as probable as the most probable.
      typical_p: keep a token if the total probability of those with a surprise closer to the entropy is below p.
      epsilon_cutoff: keep tokens at least this probable, and the most probable.

    Returns:
      `[V]` probabilities.
    """
    scores = np.asarray(logits, np.float64)
    if temperature == 0:
        return np.eye(len(scores))[np.argmax(scores)]

    def softmax(x: np.ndarray) -> np.ndarray:
        weights = np.exp(x - x.max())
        return weights / weights.sum()

    def keep(condition: np.ndarray) -> np.ndarray:
        return np.where(condition, scores, -np.inf)

    scores = scores / temperature
    if 0 < top_k < len(scores):
        scores = keep(scores >= np.sort(scores)[-top_k])
    if top_p < 1:
        probs = softmax(scores)
        scores = keep(np.array([probs[scores > score].sum() for score in scores]) < top_p)
    probs = softmax(scores)
    scores = keep(probs >= min_p * probs.max())
    if typical_p < 1:
        probs = softmax(scores)
        surprise = -np.log(probs, out=np.full_like(probs, -np.inf), where=probs > 0)
        odd = np.where(probs > 0, np.abs(surprise - (probs[probs > 0] * surprise[probs > 0]).sum()), np.inf)
        scores = keep(np.array([probs[odd < o].sum() for o in odd]) < typical_p)
    probs = softmax(scores)
    return softmax(keep((probs >= epsilon_cutoff) | (probs == probs.max())))


def processed(
    logits: np.ndarray,
    text: Sequence[int],
    prompt_length: int,
    *,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    no_repeat_ngram_size: int = 0,
    min_new_tokens: int = 0,
    logit_bias: Sequence[tuple[int, float]] = (),
    grammar: Sequence[Sequence[int]] | None = None,
    stop_tokens: Sequence[int] = (),
) -> np.ndarray:
    """The logits after a text with all processors applied, in float64 and plain Python.

    Args:
      logits: `[V]`.
      text: prompt and new tokens.
      prompt_length: how many of them belong to the prompt.
      repetition_penalty: see `processors`, as for the next five.
      presence_penalty: on the new tokens.
      frequency_penalty: on the new tokens.
      no_repeat_ngram_size: n.
      min_new_tokens: stop tokens are forbidden in a text with fewer new tokens.
      logit_bias: pairs of a token and the number added to its logit.
      grammar: `[S][V]` successor states, -1 where a token is forbidden; state 0 is where the new text begins.
      stop_tokens: token ids.

    Returns:
      `[V]`.
    """
    scores = np.array(logits, np.float64)
    new = list(text[prompt_length:])
    for token, bias in logit_bias:
        scores[token] += bias
    for token in set(text):
        scores[token] *= repetition_penalty if scores[token] < 0 else 1 / repetition_penalty
    for token in set(new):
        scores[token] -= presence_penalty + frequency_penalty * new.count(token)
    n = no_repeat_ngram_size
    for end in range(n, len(text) + 1) if n else ():
        if list(text[end - n : end - 1]) == list(text[len(text) - n + 1 :]):
            scores[text[end - 1]] = -np.inf
    if len(new) < min_new_tokens:
        scores[list(stop_tokens)] = -np.inf
    if grammar is not None:
        state = functools.reduce(lambda at, token: grammar[at][token], new, 0)
        scores[np.asarray(grammar[state]) < 0] = -np.inf
    return scores


_WARPERS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff")


def enumerate_texts(
    table: Any, prompt: Sequence[int], num_tokens: int, stop_tokens: Sequence[int] = (), **options: Any
) -> Float[np.ndarray, "*V"]:
    """The exact joint distribution of the next tokens of a `tabular` model.

    Args:
      table: `[vocab_size ** order, vocab_size]`, without padding.
      prompt: token ids.
      num_tokens: n.
      stop_tokens: after a stop token, a text only repeats it.
      **options: of `distribution` and `processed`.

    Returns:
      `[V] * n` float64: the probability of the text x_1 .. x_n at index `[x_1, .., x_n]`.
    """
    table = np.asarray(table, np.float64)
    contexts, vocab_size = table.shape
    order = 0
    while vocab_size**order < contexts:
        order += 1
    if vocab_size**order != contexts:
        raise ValueError(f"A table of shape {table.shape} has padding: cut it, or make the target without padding.")
    warpers = {name: value for name, value in options.items() if name in _WARPERS}
    others = {name: value for name, value in options.items() if name not in _WARPERS}

    def next_token(new: Sequence[int]) -> np.ndarray:
        if new and new[-1] in stop_tokens:
            return np.eye(vocab_size)[new[-1]]
        text = [*prompt, *new]
        digits = ([0] * order + text)[len(text) :]
        row = table[functools.reduce(lambda number, digit: number * vocab_size + digit, digits, 0)]
        return distribution(processed(row, text, len(prompt), stop_tokens=stop_tokens, **others), **warpers)

    joint = np.ones((vocab_size,) * num_tokens)
    for n in range(num_tokens):
        for new in itertools.product(range(vocab_size), repeat=n):
            if joint[new].any():
                joint[new] *= next_token(new).reshape((vocab_size,) + (1,) * (num_tokens - n - 1))
    return joint


def g_test(counts: np.ndarray, probs: np.ndarray, *, min_expected: float = 5.0) -> float:
    """The p-value of counts under the distribution `probs`, by a likelihood-ratio test (G-test).

    Args:
      counts: how often each outcome occurred, of any shape.
      probs: its probability, of the same shape.
      min_expected: outcomes expected less often are pooled into one.

    Returns:
      the p-value; 0 where an outcome of probability 0 occurred.
    """
    from scipy import stats  # A test dependency.

    counts, probs = np.ravel(counts).astype(np.float64), np.ravel(probs).astype(np.float64)
    if counts.shape != probs.shape:
        raise ValueError(f"{counts.size} counts for {probs.size} probabilities.")
    if abs(probs.sum() - 1) > 1e-6:
        raise ValueError(f"The probabilities sum to {probs.sum()}.")
    if counts[probs == 0].any():
        return 0.0
    expected = probs / probs.sum() * counts.sum()
    rare = expected < min_expected
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(observed) < 2:
        return 1.0
    ratio = np.where(observed > 0, observed, 1.0) / expected
    return float(stats.chi2.sf(2 * np.sum(observed * np.log(ratio)), len(observed) - 1))


def smallest_error(trials: int, outcomes: int, *, significance: float = 1e-5, power: float = 0.99) -> float:
    """The total-variation distance above which `g_test` detects every error.

    A distribution at distance d makes the statistic a noncentral chi-squared with a noncentrality of at least
    `4 trials d^2` (by Cauchy-Schwarz; more where the error concentrates on few outcomes).

    Args:
      trials: how many samples were counted.
      outcomes: how many different outcomes there are.
      significance: the p-value below which a test fails.
      power: the probability that it fails.
    """
    from scipy import optimize, stats  # A test dependency.

    freedom = outcomes - 1
    threshold = stats.chi2.isf(significance, freedom)
    needed = optimize.root_scalar(
        lambda x: stats.ncx2.sf(threshold, freedom, x) - power, bracket=(1e-3, 1e5), method="brentq"
    ).root
    return float(np.sqrt(needed / trials) / 2)


def tiny_decoder(
    seed: int = 0, *, vocab_size: int = 61, num_layers: int = 2, dtype: str = "float32", max_position: int = 512
) -> tuple[Model, Tree]:
    """A random decoder of a few thousand parameters, whose greedy text is not constant.

    Returns:
      the model and its parameters. The matrices have a standard deviation of one over the square root of their number
      of rows, so that attention and context matter; the default initialisation would leave the logits almost constant.
    """
    config = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position=max_position,
        dtype=dtype,
    )

    def scaled(leaf: Array) -> Array:
        # init_params draws with standard deviation 0.02; norms are vectors of ones, and are kept.
        return leaf if leaf.ndim < 2 else (leaf.astype(jnp.float32) * (50 / 32**0.5)).astype(leaf.dtype)

    return families.model(config), jax.tree.map(scaled, families.init_params(config, jax.random.key(seed)))


class Report(NamedTuple):
    """The findings about a drafter.

    Attributes:
      passed: what holds, in words.
      problems: what does not hold, each naming the drafter.
      notes: what the checks could not test.
    """

    passed: list[str]
    problems: list[str]
    notes: list[str]

    def __str__(self) -> str:
        """A line for each finding."""
        marked = {"FAILED": self.problems, "passed": self.passed, "note": self.notes}
        return "\n".join(f"{mark}: {line}" for mark, lines in marked.items() for line in lines)


def check_drafter(
    drafter: Any,
    target: Any = None,
    *,
    draft_params: Tree = None,
    num_texts: int | None = None,
    is_model: bool | None = None,
) -> Report:
    """Checks the whole contract of a drafter with the loop, in one line: `testing.check_drafter(my_drafter())`.

    Checked are the shapes, lengths, ids and probabilities of its proposals over several steps of a ragged batch; that
    tokens are drawn from the distributions that it states, and that lengths do not depend on them; that text is that of
    plain decoding, token for token (greedy, `coupled`) or in joint distribution (`rejection`, `block`); and that the
    drafts of a model that drafts for itself are always accepted, also after rejections and pauses.

    Args:
      drafter: a `Drafter`, or a `Draft`, which brings its parameters.
      target: what it drafts for: a `Pretrained`, or a `Model` and its parameters. None is a random table of five
        tokens, for drafters of any vocabulary. A real model takes minutes on a CPU: lower `num_texts`.
      draft_params: the drafter's parameters, where it does not bring them.
      num_texts: how many texts are sampled after one prompt; by default 8,192 from a vocabulary of at most 64 tokens,
        256 from a larger one. The report says how large an error would have been detected.
      is_model: False skips the test of a draft model that drafts for itself; by default a `Draft` that has a model is
        tested so.

    Returns:
      a report, for `print`: what holds, and what could not be tested.

    Raises:
      AssertionError: with all that is wrong, naming the drafter's function, its file and line.
      TypeError: for an object that is not a drafter or not a target.
      ValueError: for a drafter that needs a certain vocabulary, without its target, or hidden states that it lacks.
    """
    from specjax import conformance  # It imports this module.
    from specjax.drafters import contract

    draft = contract.check(drafter)
    needs_target = bool(jax.tree.leaves(draft.params)) or draft.tokenizer is not None
    if target is None and (needs_target or draft_params is not None):
        raise ValueError("The drafter knows one vocabulary: give the target that it drafts for, a Pretrained.")
    if target is None:
        target = tabular(0, vocab_size=5)
    if hasattr(target, "model"):
        model, params = target.model, target.params
    elif isinstance(target, tuple) and len(target) == 2 and isinstance(target[0], Model):
        model, params = target
    else:
        raise TypeError(f"target is a {type(target).__name__}: give a Pretrained, or a Model and its parameters.")
    if draft.drafter.taps:
        if model.with_taps is None:
            raise ValueError(
                f"The drafter reads hidden states (taps={draft.drafter.taps}), and this target has no taps."
            )
        model = model.with_taps(draft.drafter.taps)
    if num_texts is None:
        num_texts = 8192 if model.vocab_size <= conformance.SMALL else 256
    if draft_params is None:
        draft_params = draft.params
    alone = draft.model if is_model is None or is_model else None
    report = conformance.run(draft.drafter, model, Params(params, draft_params), alone, num_texts=num_texts)
    if report.problems:
        raise AssertionError(f"The drafter does not keep its contract.\n{report}")
    return report
