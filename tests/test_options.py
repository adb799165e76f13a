"""Options of a request beyond its distribution: log-probabilities, stops, texts a prompt, seeds, fixed shapes."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from helpers import random_prompts, right_pad, texts, usual

from specjax import api, decoding, drafters, sampling, testing
from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.decoding.verify import Rule
from specjax.sampling import automaton
from specjax.state import DecodeState
from specjax.types import Drafter, Model, Params

TARGET, TABLE = testing.tabular(0, order=3)
DRAFT, DRAFT_TABLE = testing.tabular(1, order=2)

TABULAR = {
    "none": drafters.none(),
    "ngram": drafters.ngram(num_draft_tokens=3, min_match=1),
    "model": drafters.model(DRAFT, num_draft_tokens=3),
}


def tabular_run(
    drafter: str,
    *,
    rule: Rule = verify.coupled,
    rows: Sequence[int] = range(12),
    temperature: float = 1.0,
    suppress_tokens: tuple[int, ...] | list[int] = (),
    **options: Any,
) -> DecodeState:
    """Twelve ragged requests, each with its own seed and budget, or some of them."""
    prompts = random_prompts(12, 4)
    chosen = [prompts[i] for i in rows]
    state = decoding.prefill(
        TARGET,
        TABULAR[drafter],
        Params(TABLE, DRAFT_TABLE),
        right_pad(chosen, 16),
        max_new_tokens=[20 + i for i in rows],
        options=sampling.options(len(chosen), temperature=temperature, top_p=0.9, suppress_tokens=suppress_tokens),
        seeds=[50 + i for i in rows],
        step_cost=0.0,
        max_len=64,
        **options,
    )
    return decoding.generate(TARGET, TABULAR[drafter], rule, Params(TABLE, DRAFT_TABLE), state)


# Log-probabilities.


@pytest.mark.parametrize("temperature", usual([0.0, 1.0], 1.0))
@pytest.mark.parametrize("drafter", usual(TABULAR, "model"))
def test_log_probabilities_are_the_targets_own_and_those_of_plain_decoding(drafter: str, temperature: float):
    state = tabular_run(drafter, temperature=temperature, top_logprobs=2)
    plain = tabular_run("none", temperature=temperature, top_logprobs=2)
    assert texts(state) == texts(plain)
    assert state.rows.logprobs is not None
    assert plain.rows.logprobs is not None
    log_probs = np.asarray(jax.nn.log_softmax(TABLE, axis=-1))
    for row, text in enumerate(texts(state)):
        for place in range(int(state.rows.prompt_length[row]), len(text)):
            a, b, c = [0, 0, 0, *text[:place]][-3:]
            exact = log_probs[a * 16 + b * 4 + c]
            assert float(state.rows.logprobs.token[row, place]) == pytest.approx(exact[text[place]], abs=1e-6)
            assert state.rows.logprobs.top_tokens[row, place].tolist() == np.argsort(-exact)[:2].tolist()
            np.testing.assert_allclose(state.rows.logprobs.top[row, place], np.sort(exact)[::-1][:2], atol=1e-6)
            np.testing.assert_array_equal(state.rows.logprobs.token[row, place], plain.rows.logprobs.token[row, place])


@pytest.mark.slow
def test_log_probabilities_of_no_further_tokens():
    state = tabular_run("model", top_logprobs=0)
    assert state.rows.logprobs is not None
    assert state.rows.logprobs.top.shape[2] == 0
    assert tabular_run("model").rows.logprobs is None


# Stop strings and grammars, as automata over tokens.

THREE_ONE = automaton.from_table(np.array([[0, 0, 0, 1], [0, 2, 0, 1], [2, 2, 2, 2]]))
"""Ends a text that has token 3 followed by token 1."""


@pytest.mark.slow
@pytest.mark.parametrize("drafter", TABULAR)
def test_a_row_ends_where_a_stop_string_does_and_nowhere_else(drafter: str):
    state = tabular_run(drafter, stop_strings=THREE_ONE)
    assert texts(state) == texts(tabular_run("none", stop_strings=THREE_ONE))
    whole = texts(tabular_run("none"))
    stopped = 0
    for row, text in enumerate(texts(state)):
        begin = int(state.rows.prompt_length[row])
        new = whole[row][begin:]
        ends = [i + 2 for i in range(len(new) - 1) if new[i : i + 2] == [3, 1]]
        assert text[begin:] == (new[: ends[0]] if ends else new)
        assert (int(state.rows.stop_state[row]) == 2) == bool(ends)
        stopped += bool(ends)
    assert 3 < stopped <= 12


@pytest.mark.slow
@pytest.mark.parametrize("drafter", TABULAR)
def test_rows_may_have_grammars_of_their_own(drafter: str):
    # Twice the same token is forbidden; or 0 and 1 alternate; or nothing is asked.
    no_repeats = automaton.from_table(
        np.array([[1, 2, 3, 4], *[[j + 1 if j != i else -1 for j in range(4)] for i in range(4)]])
    )
    alternating = automaton.from_table(np.array([[1, 0, -1, -1], [-1, 0, -1, -1]]))
    grammars = [[no_repeats, alternating, None][i % 3] for i in range(12)]
    state = tabular_run(drafter, grammar=grammars)
    assert texts(state) == texts(tabular_run("none", grammar=grammars))
    free = texts(tabular_run("none"))
    for row, text in enumerate(texts(state)):
        new = text[int(state.rows.prompt_length[row]) :]
        if row % 3 == 0:
            assert all(a != b for a, b in itertools.pairwise(new))
        elif row % 3 == 1:
            assert set(new) <= {0, 1}
            assert all((a, b) != (0, 0) for a, b in itertools.pairwise(new))
        else:
            assert text == free[row]


def test_an_automaton_of_another_vocabulary_is_refused():
    wide = automaton.from_table(np.zeros((1, 5), int))
    for name in ("grammar", "stop_strings"):
        with pytest.raises(ValueError, match=rf"{name} knows 5 tokens, but .* has 4: build it with vocab_size=4"):
            tabular_run("none", **{name: wide})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="2 grammars for 12 rows"):
        tabular_run("none", grammar=[None, None])


def test_options_that_forbid_every_token_are_named():
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="or the options forbid every token there"):
            tabular_run("model", temperature=temperature, suppress_tokens=[0, 1, 2, 3])


# Several texts of a prompt, and seeds.


def pretrained(model: Model, params: Any) -> Pretrained:
    return Pretrained(model, params, None, None)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.parametrize("drafter", TABULAR)
def test_several_texts_of_a_prompt_are_those_of_the_prompt_repeated(drafter: str):
    target = pretrained(TARGET, TABLE)
    chosen = TABULAR[drafter]
    if drafter == "model":
        chosen = drafters.model(pretrained(DRAFT, DRAFT_TABLE), num_draft_tokens=3)
    prompts = random_prompts(3, 4)
    options: dict[str, Any] = {"drafter": chosen, "temperature": [0.7, 1.0, 1.3], "max_new_tokens": [9, 12, 15]}
    options |= {"repetition_penalty": 1.2, "seed": 7, "logprobs": 1, "stop_tokens": (3,)}
    several = api.generate(target, prompts, num_return_sequences=4, **options)
    assert len(several.tokens) == 12
    options |= {name: np.repeat(options[name], 4).tolist() for name in ("temperature", "max_new_tokens")}
    alone = api.generate(target, [p for p in prompts for _ in range(4)], **options)
    assert several.tokens == alone.tokens
    assert several.logprobs == alone.logprobs
    assert several.finish_reason == alone.finish_reason
    assert len({tuple(t) for t in several.tokens[:4]}) > 1


def test_several_texts_need_as_many_seeds_and_are_at_least_one():
    target = pretrained(TARGET, TABLE)
    with pytest.raises(ValueError, match="2 seeds for 6 sequences: give one, or one for each"):
        api.generate(target, [[1], [2]], num_return_sequences=3, seed=[1, 2])
    with pytest.raises(ValueError, match="num_return_sequences=0: at least 1"):
        api.generate(target, [[1]], num_return_sequences=0)


@pytest.mark.parametrize(
    ("drafter", "rule"),
    usual(
        [(drafter, rule) for drafter in ("ngram", "model") for rule in ("rejection", "block", "coupled")],
        ("model", "coupled"),
    ),
)
def test_a_text_depends_on_its_own_seed_and_not_on_its_neighbours(drafter: str, rule: str):
    chosen = verify.parse(rule)
    together = texts(tabular_run(drafter, rule=chosen))
    # Other neighbours, at other places of a batch of the same size, which compiles nothing.
    order = [7, 7, 3, 0, 11, 3, 5, 5, 5, 1, 2, 9]
    assert texts(tabular_run(drafter, rule=chosen, rows=order)) == [together[i] for i in order]


@pytest.mark.slow
@pytest.mark.parametrize("drafter", TABULAR)
def test_a_text_does_not_depend_on_the_batch_size(drafter: str):
    together = texts(tabular_run(drafter))
    for rows in ([4], [2, 3, 4, 5, 6, 7, 8]):
        assert texts(tabular_run(drafter, rows=rows)) == [together[i] for i in rows]


@pytest.mark.slow
def test_plain_decoding_draws_the_same_text_under_every_exact_rule():
    wanted = texts(tabular_run("none", rule=verify.coupled))
    for rule in (verify.rejection, verify.block):
        assert texts(tabular_run("none", rule=rule)) == wanted


# Coupled text on a real architecture, and fixed shapes.


@functools.cache
def tiny(dtype: str) -> tuple[Model, Any, Model, Any]:
    return *testing.tiny_decoder(0, dtype=dtype), *testing.tiny_decoder(1, dtype=dtype, num_layers=1)


def tiny_run(drafter: Drafter, dtype: str, batch: int, temperature: float, fixed_shape: bool) -> list[list[int]]:
    target, params, _, draft_params = tiny(dtype)
    both, prompts, found = Params(params, draft_params), random_prompts(6, 61), []
    for begin in range(0, 6, batch):
        chosen = prompts[begin : begin + batch]
        state = decoding.prefill(
            target,
            drafter,
            both,
            right_pad(chosen, 16),
            max_new_tokens=30,
            options=sampling.options(len(chosen), temperature=temperature),
            seeds=list(range(begin, begin + batch)),
            step_cost=1.5,
            max_len=64,
        )
        found += texts(decoding.generate(target, drafter, verify.coupled, both, state, fixed_shape=fixed_shape))
    return found


@functools.cache
def plain_text() -> list[list[int]]:
    return tiny_run(drafters.none(), "float32", 6, 1.0, False)


@pytest.mark.parametrize(
    ("drafter", "k", "batch"),
    usual([(drafter, *cell) for drafter in ("ngram", "model") for cell in ((1, 6), (4, 6), (3, 1))], ("model", 4, 6)),
)
def test_coupled_text_is_that_of_plain_decoding_for_every_drafter_k_and_batch(drafter: str, k: int, batch: int):
    chosen = (
        drafters.ngram(num_draft_tokens=k, min_match=1)
        if drafter == "ngram"
        else drafters.model(tiny("float32")[2], num_draft_tokens=k)
    )
    assert tiny_run(chosen, "float32", batch, 1.0, False) == plain_text()


@pytest.mark.parametrize(
    ("k", "temperature"), [pytest.param(*cell, marks=pytest.mark.slow) for cell in ((4, 0.0), (1, 1.0), (4, 1.0))]
)
def test_at_a_fixed_shape_text_is_identical_in_bfloat16(k: int, temperature: float):
    wanted = tiny_run(drafters.none(num_draft_tokens=k), "bfloat16", 6, temperature, True)
    for drafter in (
        drafters.ngram(num_draft_tokens=k, min_match=1),
        drafters.model(tiny("bfloat16")[2], num_draft_tokens=k),
    ):
        assert tiny_run(drafter, "bfloat16", 6, temperature, True) == wanted


def test_a_fixed_shape_scores_k_plus_one_tokens_in_every_call():
    target, params, _, _ = tiny("float32")
    widths = []

    def apply(*args: Any) -> Any:
        widths.append(args[1].tokens.shape[1])
        return target.apply(*args)

    drafter = drafters.ngram(num_draft_tokens=4)
    both = Params(params, ())
    state = decoding.prefill(target, drafter, both, right_pad([[1, 2]], 16), max_new_tokens=4, max_len=64)
    for fixed_shape, wanted in ((True, {5}), (False, {1, 5})):
        widths.clear()
        jax.make_jaxpr(
            lambda p, s, fixed=fixed_shape: decoding.decode_step(
                target._replace(apply=apply), drafter, verify.coupled, p, s, fixed
            )
        )(both, state)
        assert set(widths) == wanted


def test_options_of_xla_reach_the_loop_and_unknown_ones_are_refused():
    target = Pretrained(TARGET, TABLE, None, None)  # pyright: ignore[reportArgumentType]
    plain = api.generate(target, [[1, 2]], max_new_tokens=5)
    options: dict[str, Any] = {"xla_cpu_enable_fast_math": False}
    assert api.generate(target, [[1, 2]], max_new_tokens=5, compiler_options=options).tokens == plain.tokens
    with pytest.raises(ValueError, match=r"compiler_options=.'xla_no_such_option': '1'.: XLA refuses them"):
        api.generate(target, [[1, 2]], max_new_tokens=5, compiler_options={"xla_no_such_option": "1"})
