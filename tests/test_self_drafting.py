"""Drafters that need the target alone: Jacobi, lookahead and mask tokens.

Each is held against plain decoding on a transformer, and what it drafts against the published algorithm, computed here
from prefills of whole texts.
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EMITTERS_OF_USERS, Pair, random_prompts, right_pad, run, texts

from specjax import decoding, drafters, sampling, testing
from specjax.decoding import verify
from specjax.drafters import contract, pool
from specjax.drafters.lookahead import guesses_of
from specjax.models import families
from specjax.models.config import T5Config
from specjax.planning import hlo
from specjax.sampling import tree
from specjax.state import DecodeState
from specjax.types import Block, Drafter, Inputs, Params, Probes, Topology

JACOBI, LOOKAHEAD, MASKS = (
    importlib.import_module(f"specjax.drafters.{name}") for name in ("jacobi", "lookahead", "mask_tokens")
)
V = 7
TARGET, PARAMS = testing.tiny_decoder(3, vocab_size=V, num_layers=1)
WINDOW, NGRAM, GUESSES = 3, 4, 2
K, MASK = 2, V - 1

DRAFTERS = {
    "jacobi": drafters.jacobi(num_draft_tokens=4),
    "lookahead": drafters.lookahead(window=WINDOW, ngram=NGRAM, guesses=GUESSES, num_buckets=4),
    "mask_tokens": drafters.mask_tokens(mask_token=MASK, num_draft_tokens=K),
}
CALLS_OF_ITS_OWN: dict[str, dict[str, Any]] = {
    "parallel_masks": {"num_draft_tokens": 3},
    "parallel_masks, tree": {"topology": (2, 2, 1)},
}
NAMES = [*DRAFTERS, *CALLS_OF_ITS_OWN]
BUFFER = 64


def made(name: str, target: Any = TARGET) -> Drafter:
    """The drafter of this name; some of them call the target."""
    if name in DRAFTERS:
        return DRAFTERS[name]
    return drafters.parallel_masks(target, mask_token=1, **CALLS_OF_ITS_OWN[name])


def start(drafter: Drafter, target: Any = TARGET, params: Any = PARAMS, **options: Any) -> DecodeState:
    """Six ragged rows of different budgets and temperatures, which stop tokens end."""
    return decoding.prefill(
        target,
        drafter,
        Params(params, None),
        right_pad(random_prompts(6, V, seed=1), 16),
        max_new_tokens=[20, 14, 20, 1, 17, 20],
        options=sampling.options(6, temperature=[0.0, 1.0, 0.0, 0.0, 0.7, 1.3], **options),
        stop_tokens=[[], [], [], [], [5], [2]],
        step_cost=0.0,
        max_len=BUFFER,
    )


@functools.cache
def plain_text(**options: Any) -> list[list[int]]:
    pair = Pair(TARGET, PARAMS, drafters.none())
    return texts(run(pair, verify.coupled, start(pair.drafter, **options)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_text_is_that_of_plain_decoding(name: str):
    """At temperature 0, and at others with the noise of the positions."""
    pair = Pair(TARGET, PARAMS, made(name))
    state = run(pair, verify.coupled, start(pair.drafter))
    assert texts(state) == plain_text()
    accepted = np.asarray(state.rows.stats.accepted)
    assert accepted[:, 0].sum() > 0, "nothing was accepted, so nothing was tested"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_text_with_penalties_is_that_of_plain_decoding(name: str):
    options = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "no_repeat_ngram_size": 3}
    pair = Pair(TARGET, PARAMS, made(name))
    assert texts(run(pair, verify.coupled, start(pair.drafter, **options))) == plain_text(**options)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_contract_is_kept(name: str):
    target = testing.tabular(0, vocab_size=5)
    report = testing.check_drafter(made(name, target[0]), target, num_texts=4096)
    assert not report.notes


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_pause_keep_the_text_of_plain_decoding(name: str):
    """A row that may not draft learns nothing from a call in which its neighbours do."""
    drafter = made(name)
    pair, state = Pair(TARGET, PARAMS, drafter), start(drafter)
    step = jax.jit(lambda state: decoding.decode_step(TARGET, drafter, verify.coupled, pair.params, state))
    for turn in range(40):
        pause = jnp.asarray([(turn + row) % 3 == 0 for row in range(6)], jnp.int32)
        state = state._replace(rows=state.rows._replace(adaptation=state.rows.adaptation._replace(pause=pause)))
        state = step(state)
    assert texts(state) == plain_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", 1), ("float32", 2)])
def test_the_compiled_loop_copies_neither_cache_nor_pool(name: str, dtype: str, rows: int):
    model, params = testing.tiny_decoder(0, dtype=dtype)
    drafter, both = made(name, model), Params(params, None)
    state = decoding.prefill(
        model, drafter, both, decoding.pad_prompts([[1, 2, 3]] * rows), max_new_tokens=8, max_len=BUFFER
    )
    lowered = decoding.advance.lower(model, drafter, verify.coupled, both, state, np.int32(4))
    large = [state.rows.cache.keys[0].shape]
    large += [state.rows.drafter.pool.shape] if name == "lookahead" else []
    copies = hlo.copies(lowered.compile(EMITTERS_OF_USERS).as_text() or "", large)
    assert not copies, f"{len(copies)} copies, such as {copies[0][:200]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_text_of_an_encoder_decoder_is_that_of_plain_decoding(name: str):
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4, "head_dim": 8}
    config = T5Config(vocab_size=V, num_encoder_layers=1, num_buckets=8, max_distance=12, **sizes)
    model, params = families.model(config), families.init_params(config, jax.random.key(0))

    def decode(drafter: Drafter) -> DecodeState:
        pair = Pair(model, params, drafter)
        state = decoding.prefill(
            model,
            drafter,
            pair.params,
            decoding.read_inputs(model, random_prompts(4, V, seed=2)),
            max_new_tokens=16,
            options=sampling.options(4, temperature=[0.0, 1.0, 0.0, 0.7]),
            step_cost=0.0,
            max_len=BUFFER,
        )
        return run(pair, verify.coupled, state)

    state = decode(made(name, model))
    assert texts(state) == texts(decode(drafters.none()))
    assert np.asarray(state.rows.stats.accepted).sum() > 0


def steps_of(
    drafter: Drafter, state: DecodeState, target: Any, params: Any, rule: verify.Rule = verify.greedy
) -> Iterator[tuple[DecodeState, DecodeState]]:
    """The states before and after each step, until one of the rows has no room for a whole draft."""
    both = Params(params, None)
    step = jax.jit(lambda state: decoding.decode_step(target, drafter, rule, both, state, fixed_shape=True))
    while True:
        after = step(state)
        if bool(jnp.any(after.rows.done | (state.rows.length + drafter.topology.depth >= state.rows.limit))):
            return
        yield state, after
        state = after


# Jacobi.

LOOSE, LOOSE_TABLE = testing.tabular(4, order=0)
FORBIDDEN = int(np.argmax(np.asarray(LOOSE_TABLE)[0]))


def converges(drafter: Drafter) -> None:
    """Where no token depends on those before it, one iteration solves every equation whose noise it knows."""
    k, rows = drafter.topology.depth, 8
    state = decoding.prefill(
        LOOSE,
        drafter,
        Params(LOOSE_TABLE, None),
        right_pad(random_prompts(rows, 4), 16),
        max_new_tokens=40,
        options=sampling.options(rows, temperature=[0.0, 1.0] * 4, logit_bias={FORBIDDEN: -np.inf}),
        step_cost=0.0,
        max_len=BUFFER,
    )
    before = None
    for old, new in steps_of(drafter, state, LOOSE, LOOSE_TABLE, verify.coupled):
        committed = np.asarray(new.rows.length - old.rows.length)
        if before is not None:
            least = np.maximum(k - before, 0)
            assert (committed - 1 >= least).all(), f"a solved guess is rejected: {committed - 1} accepted of {least}"
        before = committed
    assert before is not None


def test_a_guess_that_has_converged_is_accepted_whole():
    converges(DRAFTERS["jacobi"])


def _options_for_the_first_token_only(logits: Any, history: Any, context: Any) -> Any:
    first = sampling.probabilities(logits[:, :1], context.sampling, history)
    probs = jnp.concatenate([first, sampling.warp.warp(logits[:, 1:], context.sampling)], axis=1)
    draw = jax.vmap(lambda key, p: sampling.sample(key, p, context.sampling), in_axes=1, out_axes=1)
    return jnp.concatenate([draw(context.keys, probs[:, :-1]), sampling.argmax(probs[:, -1:])], axis=1)


def _without_noise(logits: Any, history: Any, context: Any) -> Any:
    return sampling.argmax(sampling.probabilities(logits, context.sampling, history))


JACOBI_BUGS: dict[str, Callable[..., Any]] = {
    "Jacobi applies processors to the first token of the block alone": _options_for_the_first_token_only,
    "Jacobi iterates without the noise of the positions": _without_noise,
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", JACOBI_BUGS)
def test_convergence_catches_jacobi(bug: str, monkeypatch: pytest.MonkeyPatch, catches: Any):
    monkeypatch.setattr(JACOBI, "own_tokens", JACOBI_BUGS[bug])
    with catches(bug, "converged guesses", "a solved guess is rejected"):
        converges(JACOBI.jacobi.__wrapped__(num_draft_tokens=4))


Decoded = tuple[list[int], int]
"""The new tokens of a text, and the calls of the target that they took."""


def pgj(prompt: list[int], block: int, length: int, stop: int = -1, guessed: int | None = 0) -> Decoded:
    """Parallel Jacobi iteration, block by block (Santilli et al. 2023, algorithm 2), up to the block of a stop token.

    A block is finished as soon as it is known to be right: all tokens but its last are what they were before the call.
    The published stop, two equal iterates, takes a call more.

    Args:
      prompt: the text to continue.
      block: tokens of a block.
      length: the most new tokens.
      stop: the token after whose block nothing follows.
      guessed: the first guess of all tokens of a block, as published a token of padding; None: the text's last token.
    """
    new, calls = [], 0
    while len(new) < length and stop not in new:
        guess = [(prompt + new)[-1] if guessed is None else guessed] * block
        while True:
            own = greedy_tokens([[*prompt, *new, *guess[:i]] for i in range(block)])
            calls, known, guess = calls + 1, own[:-1] == guess[:-1], own
            if known:
                break
        new += guess
    return new[:length], calls


def hgj(prompt: list[int], block: int, cap: int, length: int, stop: int, guessed: int | None = 0) -> Decoded:
    """The hybrid for texts of unknown length (algorithm 3): blocks up to the cap, then plain decoding."""
    new, calls = pgj(prompt, block, cap, stop, guessed)
    while len(new) < length and stop not in new:
        new, calls = new + greedy_tokens([[*prompt, *new]]), calls + 1
    return new[: new.index(stop) + 1] if stop in new else new, calls


BLOCK_PROMPTS = [[3, 6, 0, 2], [5, 1], [0, 1, 2, 3, 0, 1, 2, 4], [3, 1, 4, 1, 5], [4, 2, 1, 1, 2]]


def jacobi_texts(drafter: Drafter, length: int, stop: int = -1) -> list[Decoded]:
    """What the drafter's texts are, and how many calls each took."""
    state = decoding.prefill(
        TARGET,
        drafter,
        Params(PARAMS, None),
        right_pad(BLOCK_PROMPTS, 16),
        max_new_tokens=length,
        stop_tokens=[[stop]] * len(BLOCK_PROMPTS),
        step_cost=0.0,
        max_len=BUFFER,
    )
    state = run(Pair(TARGET, PARAMS, drafter), verify.greedy, state)
    new = [text[len(prompt) :] for text, prompt in zip(texts(state), BLOCK_PROMPTS, strict=True)]
    return list(zip(new, np.asarray(state.rows.stats.target_calls).tolist(), strict=True))


def a_block_takes_the_calls_of_the_paper(drafter: Drafter) -> None:
    """From the same guess, the tokens of one block are known after as many calls as in the published iteration."""
    k = drafter.topology.depth
    first = greedy_tokens(BLOCK_PROMPTS)
    for prompt, guessed, ours in zip(BLOCK_PROMPTS, first, jacobi_texts(drafter, k), strict=True):
        assert ours == pgj(prompt, k, k, guessed=guessed), "a block takes another number of calls"


def takes_no_more_calls_than_blocks(drafter: Drafter) -> None:
    """The texts of PGJ and HGJ, each in as many calls or fewer, and all together in fewer."""
    k, length, cap, stop = drafter.topology.depth, 18, 12, 5
    for ends in (-1, stop):
        ours, total = jacobi_texts(drafter, length, ends), 0
        for prompt, (new, calls) in zip(BLOCK_PROMPTS, ours, strict=True):
            for guessed in (0, None):
                published = (
                    pgj(prompt, k, length, guessed=guessed) if ends < 0 else hgj(prompt, k, cap, length, stop, guessed)
                )
                assert new == published[0], "another text than the published algorithm's"
                assert calls <= published[1], f"{calls} calls, where blocks take {published[1]}"
                total += published[1]
        assert 2 * sum(calls for _, calls in ours) < total, "blocks take no more calls"


@pytest.mark.slow
def test_a_block_takes_the_calls_of_the_published_iteration():
    a_block_takes_the_calls_of_the_paper(DRAFTERS["jacobi"])


@pytest.mark.slow
def test_jacobi_takes_no_more_calls_than_the_published_blocks():
    takes_no_more_calls_than_blocks(DRAFTERS["jacobi"])


@pytest.mark.slow
def test_blocks_catch_a_jacobi_guess_that_is_one_place_off(catches: Any):
    made = DRAFTERS["jacobi"]

    def update(params: Any, state: Any, feedback: Any) -> Any:
        after = made.update(params, state, feedback)
        return after if feedback.inputs is not None else jnp.roll(after, -1, axis=1)

    with catches("the Jacobi guess is moved by a token too many", "published blocks", "another number of calls"):
        a_block_takes_the_calls_of_the_paper(made._replace(update=update))


# What the others draft, by the target's prefill of whole texts.


@jax.jit
def _after(tokens: Any, length: Any) -> Any:
    cache = TARGET.init_cache(*tokens.shape)
    return sampling.argmax(TARGET.prefill(PARAMS, Inputs(tokens, length), cache)[0].logits[:, 0])


def greedy_tokens(of: Sequence[Sequence[int]]) -> list[int]:
    """The target's next token after each of at most 16 texts."""
    tokens = np.zeros((16, BUFFER), np.int32)
    for row, text in zip(tokens, of, strict=False):
        row[: len(text)] = text
    length = np.asarray([len(text) for text in of] + [1] * (16 - len(of)), np.int32)
    return np.asarray(_after(tokens, length))[: len(of)].tolist()


def greedy_start(drafter: Drafter) -> DecodeState:
    return decoding.prefill(
        TARGET,
        drafter,
        Params(PARAMS, None),
        right_pad([[0, 1, 2, 3, 0, 1, 2, 4], [3, 1, 4, 1, 5]], 16),
        max_new_tokens=24,
        step_cost=0.0,
        max_len=BUFFER,
    )


class Lookahead:
    """Lookahead decoding of one text, by the paper: the window, and a list of n-grams for each token."""

    def __init__(self, prompt: list[int]):
        self.pool: dict[int, list[list[int]]] = {}
        for begin in range(len(prompt) - NGRAM + 1):
            self.add(prompt[begin : begin + NGRAM])
        begin = [i * len(prompt) // WINDOW for i in range(WINDOW)]
        self.window = [[prompt[(b + row) % len(prompt)] for b in begin] for row in range(NGRAM - 1)]

    def add(self, ngram: list[int]) -> None:
        # Buckets of the drafter hold the n-grams of several tokens.
        bucket = self.pool.setdefault(ngram[0] % 4, [])
        if ngram in bucket:
            bucket.remove(ngram)
        bucket.insert(0, ngram)
        del bucket[GUESSES:]

    def accepted(self, current: int, own: list[int]) -> int:
        """How many tokens of the best guess are those that the target writes."""
        guesses = [ngram[1:] for ngram in self.pool.get(current % 4, []) if ngram[0] == current]
        matches = [next((i for i, (a, b) in enumerate(zip(g, own, strict=False)) if a != b), len(g)) for g in guesses]
        return max(matches, default=0)

    def step(self, text: list[int]) -> None:
        self.window[0][0] = text[-1]
        paths = [text + self.window[0][1 : i + 1] + [row[i] for row in self.window[1:]] for i in range(WINDOW)]
        self.window.append(greedy_tokens(paths))
        for i in range(WINDOW):
            self.add([row[i] for row in self.window])
        del self.window[0]


def follows_the_paper(drafter: Drafter) -> None:
    """Window, pool and number of accepted tokens of each step are the paper's."""
    state = greedy_start(drafter)
    published = [Lookahead(text) for text in texts(state)]
    accepted = 0
    for old, new in steps_of(drafter, state, TARGET, PARAMS):
        # The window is read whether or not there is a guess: such a step costs what a drafting one does.
        has_room = ~old.rows.done & (old.rows.limit - old.rows.length > 1)
        read = new.rows.stats.draft_steps - old.rows.stats.draft_steps
        np.testing.assert_array_equal(read, has_room)
        for row, (before, after) in enumerate(zip(texts(old), texts(new), strict=True)):
            own, ours = after[len(before) :], published[row]
            assert own[:1] == greedy_tokens([before]), "the text is not the target's"
            assert len(own) - 1 == ours.accepted(before[-1], own), "another number of tokens is accepted"
            ours.step(before)
            window = np.array(new.rows.drafter.window[row])
            window[0, 0] = ours.window[0][0]
            assert window.tolist() == ours.window, "the window is not the published one"
            for bucket, ngrams in ours.pool.items():
                kept = np.asarray(new.rows.drafter.pool[row, bucket]).tolist()
                assert kept[: len(ngrams)] == ngrams, "the pool is not the published one"
            accepted += len(own) - 1
    assert accepted > 2, "too few guesses were accepted to test anything"


def test_lookahead_follows_the_paper():
    follows_the_paper(DRAFTERS["lookahead"])


def _lookahead(**changes: Any) -> Drafter:
    made = DRAFTERS["lookahead"]
    return made._replace(**{name: change(getattr(made, name)) for name, change in changes.items()})


def _seeing_a_guess(propose: Any) -> Any:
    def changed(params, state, cache, context):
        proposal, *rest = propose(params, state, cache, context)
        sees = proposal.probes.sees.at[:, :, 1].set(True)
        return proposal._replace(probes=proposal.probes._replace(sees=sees)), *rest

    return changed


def _moved_by_what_was_accepted(update: Any) -> Any:
    def changed(params, state, feedback):
        after = update(params, state, feedback)
        if feedback.inputs is not None:
            return after
        more = jax.vmap(lambda rows, n: jnp.roll(rows, -n, axis=0))(after.window, feedback.num_tokens - 1)
        return after._replace(window=more)

    return changed


LOOKAHEAD_BUGS = {
    "a token of the lookahead window sees a guess": lambda: _lookahead(propose=_seeing_a_guess),
    "the lookahead window moves by the number of accepted tokens": lambda: _lookahead(
        update=_moved_by_what_was_accepted
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", LOOKAHEAD_BUGS)
def test_the_paper_catches_lookahead(bug: str, catches: Any):
    with catches(bug, "published window", "the window is not"):
        follows_the_paper(LOOKAHEAD_BUGS[bug]())


@pytest.mark.slow
def test_the_paper_catches_a_window_that_sees_whole_rows(monkeypatch: pytest.MonkeyPatch, catches: Any):
    def whole_rows(window: int, ngram: int) -> np.ndarray:
        row, _, other_row, _ = np.ogrid[: ngram - 1, :window, : ngram - 1, :window]
        return np.broadcast_to(other_row <= row, (ngram - 1, window) * 2)

    monkeypatch.setattr(LOOKAHEAD, "mask", whole_rows)
    sizes = {"window": WINDOW, "ngram": NGRAM, "guesses": GUESSES, "num_buckets": 4}
    bug = "a token of the lookahead window sees the rows above it whole"
    with catches(bug, "published window", "the window is not"):
        follows_the_paper(LOOKAHEAD.lookahead.__wrapped__(**sizes))


def drafts_behind_the_text(drafter: Drafter) -> None:
    """After each step, draft j is the target's token behind the text without its last token, then j + 1 masks."""
    checked = 0
    for _, new in steps_of(drafter, greedy_start(drafter), TARGET, PARAMS):
        for row, text in enumerate(texts(new)):
            wanted = greedy_tokens([text[:-1] + [MASK] * (j + 1) for j in range(K)])
            assert new.rows.drafter[row].tolist() == wanted, "the draft is not what the target says behind the masks"
            checked += 1
    assert checked > 10


def test_mask_tokens_draft_what_the_target_says_behind_them():
    drafts_behind_the_text(DRAFTERS["mask_tokens"])


@pytest.mark.slow
def test_prefills_catch_masks_behind_another_token(monkeypatch: pytest.MonkeyPatch, catches: Any):
    sound = MASKS._masks

    def behind_the_root(tokens: tuple[int, ...]) -> Any:
        masks, k = sound(tokens), len(tokens)
        sees = masks.sees.copy()
        sees[:, 1 : k + 1] = False
        return masks._replace(sees=sees)

    monkeypatch.setattr(MASKS, "_masks", behind_the_root)
    with catches("all masks follow the last committed token", "prefills", "the draft is not"):
        drafts_behind_the_text(MASKS._drafter.__wrapped__(MASKS.Ids((MASK,) * K)))


# Probes and the pool.


@pytest.mark.parametrize("is_chain", [True, False])
def test_no_node_sees_a_probe(is_chain: bool):
    block = Block(jnp.asarray([[4, 1, 2]]))
    if not is_chain:
        shape = tree.shape(jnp.asarray([[-1, -1]]), 1)
        block = Block(block.tokens, shape.depth, shape.sees)
    probes = Probes(jnp.asarray([[5]]), jnp.asarray([[2]]), jnp.asarray([[[True, True, False, True]]]))
    found = tree.with_probes(block, probes)
    nodes = [[1, 0, 0, 0], [1, 1, 0, 0], [1, int(is_chain), 1, 0]]
    assert found.sees is not None
    assert found.sees[0].astype(int).tolist() == [*nodes, [1, 1, 0, 1]]
    assert found.depth is not None
    assert found.depth[0].tolist() == [0, 1, 2 if is_chain else 1, 2]
    assert found.tokens[0].tolist() == [4, 1, 2, 5]


def test_a_bucket_keeps_the_latest_ngrams():
    kept = pool.empty(1, 2, 2, 3)
    for ngram in ([1, 2, 3], [3, 0, 0], [1, 2, 3]):
        kept = pool.insert(kept, jnp.asarray([[ngram]]), jnp.asarray([[True]]))
    assert kept[0, 1].tolist() == [[1, 2, 3], [3, 0, 0]]
    kept = pool.insert(kept, jnp.asarray([[[1, 4, 4], [1, 5, 5]]]), jnp.asarray([[True, False]]))
    assert kept[0, 1].tolist() == [[1, 4, 4], [1, 2, 3]]
    found, count = pool.find(kept, jnp.asarray([1]))
    assert (found.tolist(), count.tolist()) == ([[[4, 4], [2, 3]]], [2])
    found, count = pool.find(kept, jnp.asarray([5]))
    assert (found.tolist(), count.tolist()) == ([[[-1, -1], [-1, -1]]], [0])


def test_guesses_share_the_nodes_of_their_common_beginning():
    nodes = guesses_of(jnp.asarray([[1, 2, 3], [1, 2, 4], [1, 5, 3], [-1, -1, -1]]), jnp.asarray(3))
    assert nodes.tokens[:6].tolist() == [1, 2, 5, 3, 4, 3]
    assert nodes.parent[:6].tolist() == [-1, 0, 0, 1, 1, 2]
    assert int(nodes.number) == 6


def test_a_single_guess_is_a_chain():
    drafter = drafters.lookahead(window=3, ngram=3, guesses=1, num_buckets=4)
    assert drafter.topology.is_chain
    # What the loop refuses, it refuses while it is traced.
    step = functools.partial(decoding.decode_step, TARGET, drafter, verify.block, Params(PARAMS, None))
    jax.eval_shape(step, start(drafter))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: drafters.jacobi(num_draft_tokens=0), "num_draft_tokens=0: at least 1"),
        (lambda: drafters.lookahead(ngram=2), "ngram=2 is out of range"),
        (lambda: drafters.lookahead(window=500), "would read 1520 tokens"),
        (lambda: drafters.mask_tokens(mask_token=-1), "mask_token=-1 is out of range"),
        (lambda: drafters.mask_tokens(mask_token=(1, 2)), "names 2 tokens"),
        (lambda: drafters.mask_tokens(), "mask_token=None, embeddings=None: give one of them"),
        (lambda: drafters.mask_tokens(mask_token=1, embeddings=jnp.ones((3, 8))), "embeddings=an array: give one"),
        (lambda: drafters.mask_tokens(embeddings=jnp.ones((2, 8))), r"shape \[2, 8\]: one row for each of 3 masks"),
        (lambda: drafters.parallel_masks(TARGET, mask_token=0, num_draft_tokens=0), "num_draft_tokens=0: at least 1"),
        (lambda: drafters.parallel_masks(TARGET, mask_token=(1, 2), num_draft_tokens=2), "names 2 tokens"),
        (lambda: drafters.parallel_masks(TARGET, mask_token=0, num_draft_tokens=2, topology=(2,)), "leave out num"),
        (lambda: drafters.mask_tokens(mask_token=0, num_draft_tokens=40), "from 1 to 31"),
    ],
)
def test_numbers_that_make_no_sense_are_named(make: Callable[[], Any], words: str):
    with pytest.raises(ValueError, match=words):
        make()


def test_probes_that_the_topology_does_not_announce_are_an_error():
    probes = Probes(jnp.zeros((2, 6), jnp.int32), jnp.zeros((2, 6), jnp.int32), jnp.zeros((2, 6, 9), bool))
    drafter = DRAFTERS["mask_tokens"]
    contract.check_probes(probes, drafter, 2)
    with pytest.raises(TypeError, match="as probes, but its topology has num_probes=0"):
        contract.check_probes(probes, drafter._replace(topology=Topology.chain(K)), 2)
    with pytest.raises(TypeError, match="proposes None as probes, but its topology has num_probes=6"):
        contract.check_probes(None, drafter, 2)
    with pytest.raises(ValueError, match=r"probes whose sees are bool\[2, 6, 6\], not \[B, M, N \+ 1 \+ M\]"):
        contract.check_probes(probes._replace(sees=probes.sees[:, :, :6]), drafter, 2)
