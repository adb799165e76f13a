"""Beam search: plain against enumeration, a search in plain Python and transformers; speculative against plain."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from helpers import random_prompts, texts, usual
from tokenizers import decoders, models, pre_tokenizers

import specjax
from specjax import decoding, drafters, testing
from specjax.api.pretrained import Pretrained
from specjax.decoding import beam, beam_tree, verify
from specjax.decoding.beam import Beams
from specjax.models import families
from specjax.models.weights import huggingface
from specjax.text.tokenizer import Tokenizer
from specjax.types import Model, Params

SEARCH = cast(Any, beam._search)
"""For what a jitted function has and its type does not say."""

# Contexts of four tokens hardly recur in a short text; where they did, beams of equal scores would abound.
VOCAB, ORDER, WIDTH = 6, 4, 3
TARGET, TABLE = testing.tabular(0, vocab_size=VOCAB, order=ORDER, scale=1.5)
OTHER = testing.tabular(1, vocab_size=VOCAB, order=ORDER, scale=1.5)[1]
NEAR = TABLE + 0.3 * OTHER
PROMPTS = random_prompts(6, VOCAB, seed=3)
BUDGETS = [12, 5, 1, 0, 14, 9]
STOPS = [[], [4], [0, 4]]


def run(
    table: Any = TABLE,
    draft: Model | None = None,
    draft_table: Any = None,
    *,
    target: Model = TARGET,
    prompts: Sequence[Sequence[int]] = tuple(PROMPTS),
    **options: Any,
) -> Beams:
    inputs = decoding.pad_prompts(prompts)
    defaults = {"num_beams": WIDTH, "max_new_tokens": BUDGETS, "max_len": 64}
    return beam.search(target, draft, Params(table, draft_table), inputs, **(defaults | options))


def found(beams: Beams, prompts: Sequence[Sequence[int]] = tuple(PROMPTS)) -> list[list[tuple[float, list[int]]]]:
    """The new tokens and score of every text of every row."""
    tokens, length, score = (np.asarray(x) for x in beams[:3])
    return [
        [
            (float(score[row, i]), tokens[row, i, len(prompt) : length[row, i]].tolist())
            for i in np.flatnonzero(score[row] > -np.inf)
        ]
        for row, prompt in enumerate(prompts)
    ]


def assert_same(got: Beams, wanted: Beams) -> None:
    """The texts, their order and their scores, and what the search did to find them."""
    np.testing.assert_array_equal(got.length, wanted.length, "a length differs")
    np.testing.assert_array_equal(got.tokens, wanted.tokens, "a text differs")
    np.testing.assert_allclose(got.score, wanted.score, rtol=1e-5, err_msg="a score differs")
    np.testing.assert_array_equal(steps(got), steps(wanted), "the number of steps differs")


def steps(beams: Beams) -> np.ndarray:
    histogram = np.asarray(beams.histogram)
    return histogram @ np.arange(1, histogram.shape[1] + 1)


# Plain beam search.


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    top = logits.max()
    return logits - top - np.log(np.exp(logits - top).sum())


def tabular_log_probs(table: Any, vocab_size: int, order: int) -> Callable[[list[int]], np.ndarray]:
    rows = np.asarray(table)

    def next_log_probs(text: list[int]) -> np.ndarray:
        context = functools.reduce(lambda n, digit: n * vocab_size + digit, ([0] * order + text)[-order:] or [0], 0)
        return log_softmax(rows[context])

    return next_log_probs


def searched(
    next_log_probs: Callable[[list[int]], np.ndarray],
    prompt: list[int],
    width: int,
    budget: int,
    stops: Sequence[int] = (),
    penalty: float = 1.0,
    early: bool | str = False,
) -> tuple[list[tuple[float, list[int]]], int]:
    """Beam search over lists, in float64: what it finds, and its number of steps."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    pool = list(live) if budget == 0 else []
    n = 0
    for n in range(1, budget + 1):
        grown = [
            (score + float(more), [*text, token])
            for score, text in live
            for token, more in enumerate(next_log_probs([*prompt, *text]))
            if more > -np.inf
        ]
        grown.sort(key=lambda beam: -beam[0])
        pool += [(s / n**penalty, text) for s, text in grown[:width] if text[-1] in stops or n == budget]
        pool = sorted(pool, key=lambda beam: -beam[0])[:width]
        live = [(s, text) for s, text in grown if text[-1] not in stops][:width]
        if not live:
            break
        if len(pool) == width:
            horizon = budget if early == "never" and penalty > 0 else n
            if early is True or live[0][0] / horizon**penalty <= pool[-1][0]:
                break
    return pool, n


def assert_searched(beams: Beams, log_probs: Callable[[list[int]], np.ndarray], **options: Any) -> None:
    for row, (prompt, texts_of_row) in enumerate(zip(PROMPTS, found(beams), strict=True)):
        wanted, num_steps = searched(log_probs, prompt, WIDTH, BUDGETS[row], **options)
        assert beams.target_calls[row] == num_steps
        assert [text for _, text in texts_of_row] == [text for _, text in wanted], f"row {row}"
        np.testing.assert_allclose([s for s, _ in texts_of_row], [s for s, _ in wanted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5, -0.5])
@pytest.mark.parametrize("stops", STOPS)
def test_plain_beam_search_equals_a_search_over_lists(stops: list[int], penalty: float, early: bool | str):
    beams = run(stop_tokens=stops, length_penalty=penalty, early_stopping=early)
    log_probs = tabular_log_probs(TABLE, VOCAB, ORDER)
    assert_searched(beams, log_probs, stops=stops, penalty=penalty, early=early)
    assert np.asarray(beams.tokens)[np.arange(64) >= np.asarray(beams.length)[..., None]].max() == 0


def test_early_stopping_and_the_penalty_matter():
    """Otherwise the comparison above would say nothing of them."""

    def search(penalty: float, early: bool | str) -> list:
        beams = run(stop_tokens=[4], length_penalty=penalty, early_stopping=early)
        return [np.asarray(beams.target_calls).tolist(), [text for row in found(beams) for _, text in row]]

    results = [search(*case) for case in [(1.0, False), (1.0, True), (1.0, "never"), (0.0, False), (2.5, False)]]
    assert all(a != b for a, b in itertools.combinations(results, 2))


def test_rows_with_fewer_texts_than_beams_leave_places_empty():
    table = testing.tabular(5, vocab_size=VOCAB, order=ORDER, zeros=0.7)[1]
    beams = run(table, stop_tokens=[4])
    assert_searched(beams, tabular_log_probs(table, VOCAB, ORDER), stops=[4])
    score, length = np.asarray(beams.score), np.asarray(beams.length)
    assert (score[np.asarray(BUDGETS) > 1] == -np.inf).any()
    prompt_length = np.broadcast_to([[len(p)] for p in PROMPTS], length.shape)
    assert (length == prompt_length)[score == -np.inf].all()
    assert_same(run(table, TARGET, NEAR, num_draft_tokens=3, stop_tokens=[4]), beams)


def test_a_beam_of_every_prefix_finds_every_text_in_order():
    target, table = testing.tabular(3, vocab_size=3, order=2)
    prompt = [2, 0, 1]
    joint = testing.enumerate_texts(table, prompt, 3)
    beams = run(table, target=target, prompts=[prompt], num_beams=27, max_new_tokens=3, length_penalty=0.0)
    wanted = sorted(itertools.product(range(3), repeat=3), key=lambda text: -joint[text])
    (got,) = found(beams, [prompt])
    assert [tuple(text) for _, text in got] == wanted
    np.testing.assert_allclose([s for s, _ in got], [math.log(joint[text]) for text in wanted], rtol=1e-4)


@pytest.mark.parametrize("stops", STOPS)
def test_one_beam_is_greedy_decoding(stops: list[int]):
    inputs = decoding.pad_prompts(PROMPTS)
    options = {"max_new_tokens": BUDGETS, "stop_tokens": stops, "max_len": 64}
    state = decoding.prefill(TARGET, drafters.none(), Params(TABLE, None), inputs, **options)
    wanted = texts(decoding.generate(TARGET, drafters.none(), verify.greedy, Params(TABLE, None), state))
    for draft in ({}, {"draft": TARGET, "draft_table": NEAR, "num_draft_tokens": 2}):
        got = run(num_beams=1, stop_tokens=stops, **draft)
        assert [[*p, *row[0][1]] for p, row in zip(PROMPTS, found(got), strict=True)] == wanted


# Against transformers.


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory):
    """A random Llama of transformers, and the same for specjax."""
    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "llama",
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    directory = tmp_path_factory.mktemp("llama")
    reference.save_pretrained(directory)
    config, params = huggingface.load(directory)
    return reference, families.model(config), params


@pytest.mark.parametrize(
    ("stops", "penalty", "early"),
    [
        pytest.param([], 1.0, False, marks=pytest.mark.slow),
        pytest.param([3, 17, 29, 41, 50, 5, 8, 11], 1.0, False, marks=pytest.mark.slow),
        ([3, 17, 29, 41, 50, 5, 8, 11], 0.0, True),
        ([3, 17, 29, 41, 50, 5, 8, 11], 2.0, "never"),
        pytest.param([3, 17, 29], -0.5, False, marks=pytest.mark.slow),
        pytest.param([3, 17, 29], 0.6, "never", marks=pytest.mark.slow),
    ],
)
def test_transformers_finds_the_same(llama, stops: list[int], penalty: float, early: bool | str):
    import torch

    reference, target, params = llama
    prompts = random_prompts(3, 61, seed=8)
    beams = run(
        params,
        target=target,
        prompts=prompts,
        num_beams=4,
        max_new_tokens=14,
        stop_tokens=stops,
        length_penalty=penalty,
        early_stopping=early,
    )
    for prompt, row in zip(prompts, found(beams, prompts), strict=True):
        out = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            num_beams=4,
            num_return_sequences=4,
            max_new_tokens=14,
            length_penalty=penalty,
            early_stopping=early,
            eos_token_id=stops or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        wanted = []
        for text in out.sequences[:, len(prompt) :].tolist():
            end = next((i + 1 for i, token in enumerate(text) if token in stops), len(text))
            wanted.append(text[:end])
        assert [text for _, text in row] == wanted
        np.testing.assert_allclose([s for s, _ in row], out.sequences_scores.numpy(), rtol=1e-4)


# Speculative against plain.

DRAFTS = {"same": TABLE, "near": NEAR, "other": OTHER}


@functools.cache
def plain(stops: tuple[int, ...] = (), penalty: float = 1.0) -> Beams:
    return run(stop_tokens=stops, length_penalty=penalty)


@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("k", [1, 3])
def test_speculative_beam_search_equals_plain(k: int, extra: int, name: str, stops: list[int]):
    wanted = plain(tuple(stops))
    got = run(draft=TARGET, draft_table=DRAFTS[name], num_draft_tokens=k, draft_beams=WIDTH + extra, stop_tokens=stops)
    assert_same(got, wanted)
    np.testing.assert_array_equal(steps(wanted), wanted.target_calls)
    np.testing.assert_array_equal(np.asarray(got.histogram).sum(axis=1), got.target_calls)
    histogram, calls = np.asarray(got.histogram).sum(axis=0), np.asarray(got.target_calls)
    if name == "same" and extra == 0:
        # The draft's beams are the target's: every call but the last advances by K + 1.
        np.testing.assert_array_equal(calls, -(-np.asarray(wanted.target_calls) // (k + 1)))
    elif name == "near":
        assert (histogram[[0, -1]] > 0).all(), f"only one kind of step: {histogram}"
        assert calls.sum() < 0.8 * np.asarray(wanted.target_calls).sum()


@pytest.mark.parametrize("padding", [0, 3])
def test_a_draft_of_another_vocabulary_size_changes_nothing(padding: int):
    """Wider than the target's, or narrower."""
    draft, table = testing.tabular(0, vocab_size=VOCAB - 1, order=ORDER, padding=padding, scale=1.5)
    assert draft.vocab_size != TARGET.vocab_size
    for stops in STOPS:
        got = run(draft=draft, draft_table=table, num_draft_tokens=2, draft_beams=WIDTH + 1, stop_tokens=stops)
        assert_same(got, plain(tuple(stops)))


def test_ties_break_alike():
    (target, table), (_, other) = (testing.tabular(s, vocab_size=VOCAB, order=1, ties=True) for s in (1, 10))
    wanted = run(table, target=target, stop_tokens=[4])
    score = np.asarray(wanted.score)
    assert (score[:, 1:] == score[:, :-1])[score[:, 1:] > -np.inf].sum() > 4, "hardly any ties among the results"
    got = run(table, target, table + other, target=target, num_draft_tokens=3, stop_tokens=[4])
    assert_same(got, wanted)
    assert (np.asarray(got.histogram).sum(axis=0)[:2] > 4).all()


@functools.cache
def tiny():
    """A tiny decoder, its parameters, and others that are near enough for drafts to be accepted at times."""
    target, params = testing.tiny_decoder(0)
    keys = iter(jax.random.split(jax.random.key(9), 99))
    return target, params, jax.tree.map(lambda x: x + 0.01 * jax.random.normal(next(keys), x.shape), params)


@pytest.mark.slow
def test_speculative_beam_search_of_a_decoder_equals_plain():
    target, params, near = tiny()
    options = {
        "target": target,
        "prompts": random_prompts(3, 61, seed=5),
        "num_beams": 4,
        "max_new_tokens": [20, 13, 7],
    }
    drafted = {"draft": target, "num_draft_tokens": 3, "draft_beams": 5}
    for stops in ([], list(range(0, 61, 7))):
        wanted = run(params, stop_tokens=stops, **options)
        for draft_params in (params, near):
            got = run(params, draft_table=draft_params, stop_tokens=stops, **drafted, **options)
            assert_same(got, wanted)
            assert np.asarray(got.target_calls).sum() < 0.7 * np.asarray(wanted.target_calls).sum()


def test_rows_do_not_depend_on_their_neighbours():
    options = {"draft": TARGET, "draft_table": NEAR, "num_draft_tokens": 3, "stop_tokens": [4]}
    together = run(**options)
    for row in (0, 4):
        same = run(prompts=[PROMPTS[row]] * 6, max_new_tokens=BUDGETS[row], **options)
        for got, wanted in zip(same, together, strict=True):
            np.testing.assert_array_equal(got[2], wanted[row])


def test_other_options_do_not_compile_again():
    options = {"draft": TARGET, "num_draft_tokens": 3}
    run(draft_table=NEAR, **options)
    compiled = SEARCH._cache_size()
    run(draft_table=OTHER, stop_tokens=[1, 2, 3], length_penalty=0.3, early_stopping="never", **options)
    run(draft_table=NEAR, stop_tokens=[5], early_stopping=True, max_new_tokens=3, **options)
    assert SEARCH._cache_size() == compiled


# Bugs planted one by one, which the comparison with plain beam search must catch.


def traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the search see what a test has patched, and forget it afterwards."""
    sound = SEARCH.__wrapped__
    widths = ("num_beams", "num_draft_tokens", "draft_beams", "max_len")
    monkeypatch.setattr(
        beam,
        "_search",
        jax.jit(
            lambda *args, **kwargs: sound(*args, **kwargs),
            static_argnums=(0, 1),
            static_argnames=widths,
            compiler_options={"xla_backend_optimization_level": 0},
        ),
    )


def everything_is_found(sound: Any) -> Any:
    def find(beams, root, node, token):
        return sound(beams, root, node, token)[0], jnp.ones(token.shape, bool)

    return find


def any_path_with_that_token(sound: Any) -> Any:
    del sound

    def find(beams, root, node, token):
        here = jnp.pad(beams.tokens[:, None] == token[..., None], ((0, 0), (0, 0), (1, 0)))
        return jnp.argmax(here, axis=-1).astype(jnp.int32), jnp.any(here, axis=-1)

    return find


def beams_keep_their_place_in_the_cache(sound: Any) -> Any:
    def gather(cache, rows):
        return sound(cache, jnp.broadcast_to(jnp.arange(WIDTH), rows.shape) if rows.shape[1] == WIDTH else rows)

    return gather


def scores_of_the_draft_carried_over(sound: Any) -> Any:
    drafted = []

    def expand(score, log_probs, width):
        best, parent, token = sound(score, log_probs, width)
        if width > WIDTH:
            if score.shape[1] == WIDTH:  # The first drafts: later ones are traced inside a scan.
                drafted[:] = [best[:, :WIDTH]]
            return best, parent, token
        return jnp.where(best > -jnp.inf, drafted[0], best), parent, token

    return expand


def only_the_first_step_may_stop(sound: Any) -> Any:
    def advance(request, beams, logits, search):
        is_first = jnp.all(search.node == 0)
        return sound(request._replace(stops=request.stops & is_first), beams, logits, search)

    return advance


def paths_of_another_text(sound: Any) -> Any:
    def advance(request, beams, logits, search):
        after = sound(request, beams, logits, search)
        return after._replace(root=after.root[::-1], node=after.node[::-1])

    return advance


BUGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "accepted without a look whether the beam is in the tree": ("find", everything_is_found),
    "looked up by the last token alone": ("find", any_path_with_that_token),
    "caches not gathered by parent": ("gather", beams_keep_their_place_in_the_cache),
    "scores of the draft carried over": ("expand", scores_of_the_draft_carried_over),
    "a stop token that was drafted does not stop": ("_advance", only_the_first_step_may_stop),
    "paths of another text": ("_advance", paths_of_another_text),
}


def compare_afresh() -> None:
    for draft_table in (NEAR, OTHER):
        options = {"draft": TARGET, "draft_table": draft_table, "num_draft_tokens": 2, "draft_beams": WIDTH + 1}
        assert_same(run(stop_tokens=[4], **options), plain((4,)))


def test_the_search_without_a_bug_passes(monkeypatch: pytest.MonkeyPatch):
    plain((4,))
    traced_anew(monkeypatch)
    compare_afresh()


@pytest.mark.parametrize("bug", usual(BUGS, "caches not gathered by parent", "looked up by the last token alone"))
def test_the_comparison_catches(bug: str, monkeypatch: pytest.MonkeyPatch):
    plain((4,))
    traced_anew(monkeypatch)
    name, plant = BUGS[bug]
    module = beam_tree if hasattr(beam_tree, name) else beam
    monkeypatch.setattr(module, name, plant(getattr(module, name)))
    with pytest.raises(AssertionError, match="differs"):
        compare_afresh()


# The front door.


@pytest.fixture(scope="module")
def pretrained() -> tuple[Pretrained, Pretrained]:
    """A target and a draft that share a tokenizer of words."""
    vocab = {f"\u2581w{i}": i for i in range(60)} | {"[unk]": 60}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, "[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend, eos_token_ids=range(0, 61, 9))
    model, *both = tiny()
    target, draft = (Pretrained(model, params, tokenizer, cast(Any, None)) for params in both)
    return target, draft


def test_beam_search_returns_texts_scores_and_counters(pretrained):
    target, draft = pretrained
    options: dict[str, Any] = {"num_return_sequences": 2, "max_new_tokens": 12}
    drafted: dict[str, Any] = {"draft_beams": 5, "num_draft_tokens": 3}
    prompts = ["w1 w2 w3", [4, 5], "w7 w1"]
    out = specjax.beam_search(target, prompts, **options)
    assert out.steps_per_call == 1.0
    assert out.text is not None
    assert [len(texts) for texts in out.text] == [2, 2, 2]
    stops = set(target.tokenizer.eos_token_ids)
    for texts_of_prompt, tokens, scores, reasons in zip(
        out.text, out.tokens, out.scores, out.finish_reason, strict=True
    ):
        assert scores == sorted(scores, reverse=True)
        for text, ids, reason in zip(texts_of_prompt, tokens, reasons, strict=True):
            assert text == target.tokenizer.decode(ids)
            assert 1 <= len(ids) <= 12
            assert not stops & set(ids[:-1])
            assert reason == ("stop" if ids[-1] in stops else "length")
    assert "stop" in {reason for reasons in out.finish_reason for reason in reasons}

    same = specjax.beam_search(target, prompts, draft=target, **drafted, **options)
    assert same.tokens == out.tokens
    assert same.steps_per_call > 1.5
    assert sum(same.target_calls) < sum(out.target_calls)
    assert [sum(row) for row in same.histogram] == same.target_calls
    other = specjax.beam_search(target, prompts, draft=draft, **drafted, **options)
    assert other.tokens == out.tokens
    np.testing.assert_allclose(other.scores, out.scores, rtol=1e-4)

    options["max_new_tokens"] = 0
    nothing = specjax.beam_search(target, prompts, **options)
    assert nothing.tokens == [[[]]] * 3
    assert nothing.steps_per_call == 0.0


def test_vocabularies_that_differ_are_refused(pretrained):
    target, draft = pretrained
    backend = tokenizers.Tokenizer(models.WordLevel({"[unk]": 0, "w": 1}, "[unk]"))
    with pytest.raises(ValueError, match="vocabularies do not match"):
        specjax.beam_search(target, ["w1"], draft=draft._replace(tokenizer=Tokenizer(backend)))


@pytest.mark.parametrize(("wanted", "beams"), [(5, 4), (0, 4), (2, 1)])
def test_more_texts_than_beams_are_refused(pretrained, wanted: int, beams: int):
    with pytest.raises(ValueError, match=rf"num_return_sequences={wanted}, but num_beams={beams} .* between 1 and"):
        specjax.beam_search(pretrained[0], [[1]], num_return_sequences=wanted, num_beams=beams)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams=0: at least 1"),
        ({"num_draft_tokens": -1}, "num_draft_tokens=-1 is negative; 0 is plain"),
        ({"num_draft_tokens": 2, "draft": None}, "num_draft_tokens=2, but there is no draft: give one"),
        ({"draft_beams": 2}, "draft_beams=2 is less than num_beams=3.* Raise draft_beams"),
        ({"draft_beams": 19}, "draft_beams=19, but 3 beams have 18 continuations by one of 6 tokens: lower"),
        ({"early_stopping": "always"}, "early_stopping='always': choose True, False"),
        ({"length_penalty": math.nan}, "length_penalty=nan is not a finite number"),
        ({"max_new_tokens": [1, 2]}, "2 values of max_new_tokens for 6 rows: give one, or one per row"),
        ({"max_new_tokens": -3}, "max_new_tokens=-3 is outside"),
        (
            {"max_new_tokens": 60, "draft": TARGET},
            r"with 60 new tokens and \d+ more .* buffer of 64 tokens: raise max_len",
        ),
        ({"max_new_tokens": 99, "max_len": None}, r"with 99 new tokens makes \d+, but the target knows 80 positions"),
        ({"max_new_tokens": 50, "max_len": None}, r"the draft knows 40 positions: shorten the prompt or lower"),
        ({"max_len": 8, "max_new_tokens": 0}, "padded to 16.* buffer of 8 tokens: raise max_len"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_numbers_and_a_remedy(options: dict, message: str):
    target, draft = TARGET._replace(max_len=80), TARGET._replace(max_len=40)
    defaults = {"target": target, "draft": draft, "draft_table": NEAR, "num_draft_tokens": 2}
    with pytest.raises(ValueError, match=message):
        run(**(defaults | options))


# 0 -> 1 -> 2 -> 0, 3 -> 3, ..., each with certainty: one beam lives. Or 2 -> not a number, where dead beams are too.
SOUND_TABLE = jnp.log(jax.nn.one_hot(jnp.asarray([1, 2, 0, 3, 2, 2]), VOCAB))
NAN_TABLE = SOUND_TABLE.at[2].set(jnp.nan)


@pytest.mark.parametrize("k", [0, 3])
def test_logits_that_are_not_numbers_are_named(k: int):
    target, _ = testing.tabular(vocab_size=VOCAB, order=1)
    prompts = [[3], [1, 2, 0], [3, 3], [3], [3], [2, 3]]

    def searching(table: Any, draft_table: Any) -> Beams:
        draft = target if k > 0 else None
        return run(table, draft, draft_table, target=target, prompts=prompts, max_new_tokens=6, num_draft_tokens=k)

    assert found(searching(SOUND_TABLE, SOUND_TABLE), prompts)[:2] == [[(0.0, [3] * 6)], [(0.0, [1, 2, 0] * 2)]]
    with pytest.raises(FloatingPointError, match=r"target's logits .* position 5 of a beam of row 1"):
        searching(NAN_TABLE, SOUND_TABLE)
    if k > 0:
        with pytest.raises(FloatingPointError, match=r"draft's logits .* position 5 of a beam of row 1"):
            searching(SOUND_TABLE, NAN_TABLE)
