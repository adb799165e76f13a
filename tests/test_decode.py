"""The loop: exact rollback of caches, one program for all requests, buffers updated in place, clear errors."""

import functools
import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EMITTERS_OF_USERS, random_prompts, right_pad, texts, usual

from specjax import decoding, drafters, sampling, testing
from specjax.decoding import verify
from specjax.models import attention
from specjax.planning import hlo
from specjax.state import DecodeState
from specjax.types import Block, Drafter, Inputs, Model, Params

ADVANCE = cast(Any, decoding.advance)
"""For what a jitted function has and its type does not say."""

PROMPTS = random_prompts(5, 61, seed=5)


@functools.cache
def tiny(dtype: str = "float32"):
    """A tiny decoder, its parameters, and other parameters that are near enough for drafts to be accepted at times."""
    target, params = testing.tiny_decoder(0, dtype=dtype)
    keys = iter(jax.random.split(jax.random.key(9), 99))
    near = jax.tree.map(lambda x: x + (0.03 * jax.random.normal(next(keys), x.shape)).astype(x.dtype), params)
    return target, params, near


def drafter_of(name: str, k: int = 3, dtype: str = "float32") -> tuple[Drafter, Params]:
    target, params, near = tiny(dtype)
    if name == "none":
        return drafters.none(), Params(params, None)
    if name == "ngram":
        return drafters.ngram(num_draft_tokens=k, min_match=1), Params(params, None)
    return drafters.model(target, num_draft_tokens=k), Params(params, near)


def start(drafter: Drafter, params: Params, prompts=PROMPTS, dtype: str = "float32", **options) -> DecodeState:
    kwargs = {"max_new_tokens": 40, "step_cost": 0.0, "max_len": 64} | options
    return decoding.prefill(tiny(dtype)[0], drafter, params, right_pad(prompts, 16), **kwargs)


def advance(drafter: Drafter, params: Params, state: DecodeState, steps: int = 10**6, dtype: str = "float32"):
    return decoding.advance(tiny(dtype)[0], drafter, verify.rejection, params, state, np.int32(steps))


@functools.partial(jax.jit, static_argnums=0)
def fresh_prefill(target: Model, params: Any, inputs: Inputs):
    return target.prefill(params, inputs, target.init_cache(inputs.tokens.shape[0], 64))


def assert_fresh(cache, tokens: np.ndarray, params, atol: float = 1e-5) -> None:
    """Entries below each row's length are those of a prefill of the same tokens."""
    # What is stale in the text is not in the prompt: zeros instead.
    text = np.where(np.arange(64) < np.asarray(cache.length)[:, None], tokens, 0)
    _, fresh = fresh_prefill(tiny()[0], params, Inputs(jnp.asarray(text), cache.length))
    for row, n in enumerate(np.asarray(cache.length)):
        for got, wanted in zip((*cache.keys, *cache.values), (*fresh.keys, *fresh.values), strict=True):
            np.testing.assert_allclose(got[row, :, :n], wanted[row, :, :n], atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafter", ["none", "ngram", "model"])
def test_the_rolled_back_cache_is_that_of_a_fresh_prefill(drafter: str, temperature: float):
    chosen, params = drafter_of(drafter)
    state = start(chosen, params, options=sampling.options(5, temperature=temperature))
    state = advance(chosen, params, state, 6)
    histogram = np.asarray(state.rows.stats.histogram).sum(axis=0)
    if drafter == "model":
        assert (histogram > 0).sum() >= 3, f"too few kinds of rollback: {histogram}"
    tokens, length = np.asarray(state.rows.tokens), np.asarray(state.rows.length)
    assert np.asarray(state.rows.cache.length).tolist() == (length - 1).tolist()
    assert_fresh(state.rows.cache, tokens, params.target)
    if drafter == "model":
        assert (np.asarray(state.rows.drafter.length) >= length - 2).all()
        assert_fresh(state.rows.drafter, tokens, params.draft)

    target = tiny()[0]
    last = jnp.take_along_axis(state.rows.tokens, (state.rows.length - 1)[:, None], axis=1)
    output, _ = jax.jit(target.apply)(params.target, Block(last), state.rows.cache)
    fresh, _ = fresh_prefill(target, params.target, Inputs(state.rows.tokens, state.rows.length))
    np.testing.assert_allclose(output.logits, fresh.logits, atol=1e-4)


def test_a_ragged_prefill_equals_one_without_padding():
    target, params, _ = tiny()
    inputs = right_pad(PROMPTS, 16)
    assert len(set(np.asarray(inputs.length).tolist())) > 2
    inputs = inputs._replace(tokens=jnp.where(jnp.arange(16) < inputs.length[:, None], inputs.tokens, 60))
    output, cache = fresh_prefill(target, params, inputs)
    assert np.asarray(cache.length).tolist() == [len(p) for p in PROMPTS]
    for row, prompt in enumerate(PROMPTS):
        alone, fresh = fresh_prefill(target, params, right_pad([prompt], len(prompt)))
        np.testing.assert_allclose(output.logits[row], alone.logits[0], atol=1e-5)
        for got, wanted in zip(cache.keys, fresh.keys, strict=True):
            np.testing.assert_allclose(got[row, :, : len(prompt)], wanted[0, :, : len(prompt)], atol=1e-5)


@pytest.mark.parametrize("drafter", usual(["ngram", "model"], "model"))
def test_other_options_do_not_compile_or_trace_again(drafter: str):
    target, table = testing.tabular(0, order=3)
    traces = []

    def apply(*args):
        traces.append(args)
        return target.apply(*args)

    counted = target._replace(apply=apply)
    chosen = drafters.ngram(num_draft_tokens=2) if drafter == "ngram" else drafters.model(target, num_draft_tokens=2)
    params = Params(table, None if drafter == "ngram" else table)

    def decoded(**options) -> DecodeState:
        keywords = {name: options.pop(name) for name in ("temperature", "top_k", "top_p", "min_p") if name in options}
        state = decoding.prefill(
            counted,
            chosen,
            params,
            right_pad(random_prompts(3, 4, seed=len(options)), 16),
            options=sampling.options(3, **keywords),
            max_len=64,
            **options,
        )
        return decoding.generate(counted, chosen, verify.rejection, params, state)

    decoded(max_new_tokens=5)
    compiled, traced = decoding.advance._cache_size(), len(traces)  # pyright: ignore[reportAttributeAccessIssue]
    assert traced > 0
    decoded(max_new_tokens=[9, 1, 30], temperature=0.7, top_p=0.9, top_k=3, min_p=0.1)
    decoded(max_new_tokens=7, temperature=[0.0, 1.0, 2.0], seeds=[5, 6, 7], stop_tokens=[3], step_cost=3.0)
    decoded(max_new_tokens=0)
    assert ADVANCE._cache_size() == compiled
    assert len(traces) == traced


def test_a_program_is_the_same_whatever_was_lowered_before():
    # Otherwise no later process finds it among the programs that are kept.
    target, table = testing.tabular(0, order=3)
    chosen = drafters.model(target, topology=(2, 1))
    params = Params(table, table)
    state = decoding.prefill(target, chosen, params, right_pad(random_prompts(3, 4), 16), max_new_tokens=9, max_len=64)

    def text() -> str:
        traced = jax.jit(lambda: decoding.decode_step(target, chosen, verify.rejection, params, state))
        return traced.lower().as_text()

    assert text() == text()


@pytest.mark.slow
def test_stream_and_generate_run_one_program():
    chosen, params = drafter_of("ngram", 2)
    target = tiny()[0]
    decoding.generate(target, chosen, verify.rejection, params, start(chosen, params))
    compiled = ADVANCE._cache_size()
    for steps in (1, 5):
        for _ in decoding.stream(target, chosen, verify.rejection, params, start(chosen, params), steps=steps):
            pass
    assert ADVANCE._cache_size() == compiled


DTYPES = ("float32", "bfloat16")


@pytest.mark.parametrize("dtype", usual(DTYPES, "bfloat16"))
@pytest.mark.parametrize("drafter", usual(["none", "ngram", "model"], "model"))
def test_a_step_keeps_structure_shapes_and_dtypes_of_the_state(drafter: str, dtype: str):
    chosen, params = drafter_of(drafter, dtype=dtype)
    state = start(chosen, params, dtype=dtype)
    after = jax.eval_shape(
        lambda p, s: decoding.decode_step(tiny(dtype)[0], chosen, verify.rejection, p, s), params, state
    )
    before = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert jax.tree.leaves(after) == jax.tree.leaves(before)


def cache_bytes(state: DecodeState) -> int:
    caches = [state.rows.cache] + ([state.rows.drafter] if hasattr(state.rows.drafter, "keys") else [])
    return sum(x.nbytes for cache in caches for x in (*cache.keys, *cache.values))


IN_PLACE = [
    (drafter, rows, dtype, size)
    for drafter in ("none", "ngram", "model")
    for rows in (1, 2)
    for dtype in DTYPES
    for size in (64, 2 * attention.BLOCK)
]


@pytest.mark.parametrize(
    ("drafter", "rows", "dtype", "size"),
    usual(IN_PLACE, ("model", 1, "bfloat16", 2 * attention.BLOCK)),
)
def test_the_compiled_loop_updates_caches_in_place_and_sorts_nothing(drafter: str, rows: int, dtype: str, size: int):
    chosen, params = drafter_of(drafter, dtype=dtype)
    state = start(chosen, params, PROMPTS[:rows], dtype=dtype, max_len=size)
    compiled = ADVANCE.lower(tiny(dtype)[0], chosen, verify.rejection, params, state, np.int32(4)).compile(
        EMITTERS_OF_USERS
    )
    text = compiled.as_text()
    copies = hlo.copies(text, [state.rows.cache.keys[0].shape])
    assert not copies, f"{len(copies)} copies of a cache, such as {copies[0][:200]}"
    if rows > 1 or size > attention.BLOCK:
        # XLA:CPU would convert a whole bfloat16 cache in every write; see `models.bfloat16`.
        shape = ",".join(map(str, state.rows.cache.keys[0].shape))
        assert dtype == "float32" or f"f32[{shape}]" not in text
    assert not re.findall(r"\bsort\(", text)
    assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes(state)


def test_the_state_is_donated():
    chosen, params = drafter_of("none")
    state = start(chosen, params)
    keys = state.rows.cache.keys[0]
    advance(chosen, params, state, 1)
    assert keys.is_deleted()


@pytest.mark.slow
def test_a_budget_of_nothing_returns_the_prompt():
    chosen, params = drafter_of("ngram")
    state = advance(chosen, params, start(chosen, params, max_new_tokens=[0, 3, 0, 1, 0]))
    got = texts(state)
    assert [len(t) - len(p) for t, p in zip(got, PROMPTS, strict=True)] == [0, 3, 0, 1, 0]
    assert all(t[: len(p)] == p for t, p in zip(got, PROMPTS, strict=True))
    assert np.asarray(state.rows.stats.target_calls)[[0, 2, 4]].tolist() == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_a_text_may_fill_its_buffer_to_the_last_slot(drafter: str):
    chosen, params = drafter_of(drafter)
    prompts = [[1, 2, 3], [4]]
    wanted = texts(advance(chosen, params, start(chosen, params, prompts, max_new_tokens=[17, 19])))
    tight = start(chosen, params, prompts, max_new_tokens=[17, 19], max_len=20 + 3 + 1)
    assert texts(advance(chosen, params, tight)) == wanted


def test_pad_prompts_keeps_the_tokens_and_pads_long_prompts_little():
    inputs = decoding.pad_prompts([[5, 6, 7], [8]])
    assert np.asarray(inputs.length).tolist() == [3, 1]
    assert np.asarray(inputs.tokens)[0, :3].tolist() == [5, 6, 7]
    widths = [decoding.pad_prompts([[1] * n]).tokens.shape[1] for n in range(1, 600, 7)]
    assert all(n <= w for n, w in zip(range(1, 600, 7), widths, strict=True))
    assert widths == sorted(widths)
    assert len(set(widths)) < 50
    assert all(w <= max(16, 1.5 * n) for n, w in zip(range(1, 600, 7), widths, strict=True))


# Errors.


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "no prompts: give at least one"), ([[1], []], "Prompt 1 is empty: give at least one token")],
)
def test_prompts_of_nothing_are_refused(prompts, message: str):
    with pytest.raises(ValueError, match=message):
        decoding.pad_prompts(prompts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_len": 20}, r"prompt of 12 tokens .* with 40 new .* 4 more .* buffer of 20 .* raise max_len"),
        ({"max_len": 12, "max_new_tokens": 0}, r"padded to 16.* buffer of 12 tokens: raise max_len"),
        ({"max_new_tokens": 600, "max_len": None}, r"makes 612, .* 512 positions: shorten the prompt or lower"),
        ({"max_new_tokens": -1}, r"max_new_tokens=-1"),
        ({"seeds": [1, 2]}, r"2 seeds for 5 sequences: give one, or one for each"),
    ],
)
def test_texts_that_do_not_fit_are_refused_with_the_numbers_and_a_remedy(options: dict, message: str):
    chosen, params = drafter_of("ngram")
    prompts = [[1] * 12, *PROMPTS[:4]]
    with pytest.raises(ValueError, match=message):
        start(chosen, params, prompts, **options)


def test_negative_k_is_refused():
    with pytest.raises(ValueError, match="num_draft_tokens=-1"):
        drafters.ngram(num_draft_tokens=-1)
    with pytest.raises(ValueError, match="num_draft_tokens=-2"):
        drafters.model(tiny()[0], num_draft_tokens=-2)
    with pytest.raises(ValueError, match="min_match=3 and max_match=2"):
        drafters.ngram(min_match=3, max_match=2)


def test_stream_refuses_no_steps():
    chosen, params = drafter_of("none")
    with pytest.raises(ValueError, match="steps=0"):
        next(decoding.stream(tiny()[0], chosen, verify.rejection, params, start(chosen, params), steps=0))


# Logits that are not numbers. 0 -> 1 -> 2 -> not a number; 3 -> 3.
NAN_TABLE = jnp.asarray([[0, 9, 0, 0], [0, 0, 9, 0], [jnp.nan] * 4, [0, 0, 0, 9]], jnp.float32)
SOUND_TABLE = jnp.asarray([[0, 9, 0, 0], [0, 0, 9, 0], [9, 0, 0, 0], [0, 0, 0, 9]], jnp.float32)


def nan_run(drafter: str, temperature: float, target_table, draft_table):
    target, _ = testing.tabular(order=1)
    chosen = {
        "none": drafters.none(),
        "ngram": drafters.ngram(num_draft_tokens=3, min_match=1),
        "model": drafters.model(target, num_draft_tokens=3),
    }[drafter]
    params = Params(target_table, draft_table if drafter == "model" else None)

    def state() -> DecodeState:
        return decoding.prefill(
            target,
            chosen,
            params,
            right_pad([[3], [1, 2, 0, 1, 2, 0, 1], [3, 3]], 16),
            max_new_tokens=8,
            options=sampling.options(3, temperature=temperature),
            step_cost=0.0,
            max_len=32,
        )

    return target, chosen, params, state


@pytest.mark.parametrize("temperature", [0.0, 0.01])
@pytest.mark.parametrize("drafter", usual(["none", "ngram", "model"], "none"))
def test_a_target_that_is_not_a_number_ends_the_row_and_is_named(drafter: str, temperature: float):
    target, chosen, params, state = nan_run(drafter, temperature, NAN_TABLE, SOUND_TABLE)
    with pytest.raises(
        FloatingPointError, match=r"target's logits .* position 8 of row 1, or the options .*: the text before it"
    ):
        decoding.generate(target, chosen, verify.rejection, params, state())
    with pytest.raises(FloatingPointError, match="position 8 of row 1"):
        list(decoding.stream(target, chosen, verify.rejection, params, state()))
    final = decoding.advance(target, chosen, verify.rejection, params, state(), np.int32(99))
    assert texts(final) == [[3] * 9, [1, 2, 0, 1, 2, 0, 1, 2], [3] * 10]
    assert np.asarray(final.rows.failed_at).tolist() == [-1, 8, -1]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_a_draft_that_is_not_a_number_ends_the_row_and_is_named(temperature: float):
    target, chosen, params, state = nan_run("model", temperature, SOUND_TABLE, NAN_TABLE)
    with pytest.raises(FloatingPointError, match=r"draft's logits .* position \d+ of row 1, .*: the text before it"):
        decoding.generate(target, chosen, verify.rejection, params, state())
    final = decoding.advance(target, chosen, verify.rejection, params, state(), np.int32(99))
    healthy, failed = texts(final)[::2], texts(final)[1]
    assert healthy == [[3] * 9, [3] * 10]
    assert failed == ([1, 2, 0] * 5)[: len(failed)]
    assert 8 <= len(failed) < 15
    assert np.asarray(final.rows.draft_failed).tolist() == [False, True, False]
    assert int(final.rows.failed_at[1]) == len(failed)


@pytest.mark.slow
def test_text_that_is_healthy_raises_nothing():
    target, chosen, params, state = nan_run("model", 0.0, SOUND_TABLE, SOUND_TABLE)
    decoding.check(decoding.generate(target, chosen, verify.rejection, params, state()))


# The n-gram drafter's look-up, against a plain search.


def searched(text: list[int], k: int, min_match: int, max_match: int) -> tuple[list[int], int]:
    """The longest match of the text's end that ends earlier, the most recent of equals, continued periodically."""
    n = len(text)
    best, at = 0, -1
    for end in range(n - 1):
        match = 0
        while match < max_match and match <= end and text[end - match] == text[n - 1 - match]:
            match += 1
        if match >= max(best, 1):
            best, at = match, end
    if best < min_match:
        return [], 0
    grown = list(text)
    for i in range(k):
        grown.append(grown[at + 1 + i])
    return grown[n:], best


@pytest.mark.parametrize(("min_match", "max_match"), [(1, 1), (1, 4), (2, 3), (3, 8)])
def test_lookup_equals_a_plain_search(min_match: int, max_match: int):
    from specjax.drafters.ngram import lookup

    rng = np.random.default_rng(0)
    jitted = jax.jit(lookup, static_argnums=(2, 3, 4))
    nothing = jnp.zeros(0, jnp.int32), jnp.asarray(0)
    found = 0
    for _ in range(150):
        text = rng.integers(0, 3, rng.integers(1, 24)).tolist()
        # What lies beyond the text is stale and must not match.
        buffer = jnp.asarray(text + rng.integers(0, 3, 32 - len(text)).tolist(), jnp.int32)
        draft, available = jitted(buffer, jnp.asarray(len(text)), 4, min_match, max_match, *nothing)
        wanted, length = searched(text, 4, min_match, max_match)
        assert int(available) == (4 if length else 0)
        if length:
            assert draft.tolist() == wanted
            found += 1
    assert found > 20


def test_rows_that_are_done_do_not_keep_others_from_drafting():
    """Four of five rows have no budget; the fifth drafts with the target itself, which pays at this cost."""
    chosen, _ = drafter_of("model")
    params = tiny()[1]
    both = Params(params, params)
    state = start(chosen, both, max_new_tokens=[0, 0, 0, 0, 40], step_cost=2.5)
    stats = advance(chosen, both, state).rows.stats
    assert np.asarray(stats.draft_steps).tolist()[:4] == [0] * 4
    assert stats.draft_steps[4] == stats.target_calls[4] == 10
