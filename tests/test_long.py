"""Long prompts: read in chunks, in few programs, in memory that grows no faster than the buffer."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_prompts, texts, usual

from specjax import decoding, drafters, testing
from specjax.decoding import verify
from specjax.models import decoder, families
from specjax.models.config import DecoderConfig
from specjax.types import Inputs, Params

CONFIG = DecoderConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    max_position=65536,
)


@functools.cache
def tiny():
    return testing.tiny_decoder(3)


@pytest.mark.parametrize("width", usual([16, 17, 31], 17))
def test_a_prompt_read_in_chunks_is_the_prompt_read_whole(monkeypatch, width):
    model, params = tiny()
    lengths = jnp.asarray([width, 3, 9], jnp.int32)
    tokens = jax.random.randint(jax.random.key(width), (3, width), 0, model.vocab_size)
    inputs = Inputs(jnp.asarray(tokens, jnp.int32), lengths)
    whole, whole_cache = model.prefill(params, inputs, model.init_cache(3, 40))
    monkeypatch.setattr(decoder, "PREFILL_CHUNK", 6)
    chunked, cache = model.prefill(params, inputs, model.init_cache(3, 40))
    np.testing.assert_allclose(chunked.logits, whole.logits, atol=2e-5)
    np.testing.assert_allclose(chunked.features, whole.features, atol=2e-5)
    for got, wanted in zip((*cache.keys, *cache.values), (*whole_cache.keys, *whole_cache.values), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)
    np.testing.assert_array_equal(cache.length, lengths)


@pytest.mark.slow
def test_text_after_a_prompt_of_several_chunks(monkeypatch):
    """Both sides' caches: text and acceptances are those after the same prompts read whole."""
    model, params = tiny()
    near = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape), params)
    prompts = random_prompts(3, model.vocab_size, longest=36)
    drafter = drafters.model(model, num_draft_tokens=3)

    def run():
        inputs = decoding.pad_prompts(prompts)
        state = decoding.prefill(model, drafter, Params(params, near), inputs, max_new_tokens=12, step_cost=0.0)
        state = decoding.generate(model, drafter, verify.rejection, Params(params, near), state)
        return texts(state), np.asarray(state.rows.stats.accepted)

    reading: Any = importlib.import_module("specjax.decoding.prefill")._prefill
    reading.clear_cache()
    text, accepted = run()
    monkeypatch.setattr(decoder, "PREFILL_CHUNK", 7)
    reading.clear_cache()
    again, accepted_again = run()
    reading.clear_cache()
    assert again == text
    np.testing.assert_array_equal(accepted_again, accepted)
    assert accepted.sum() > 0


def test_few_buffers_serve_all_lengths():
    sizes = [decoding.buffer_length(n, 4) for n in range(1, 32768)]
    assert len(set(sizes)) < 60
    assert all(n + 5 <= size < 1.13 * (n + 5) + 64 for n, size in enumerate(sizes, start=1))
    assert {decoding.pad_prompts([[1] * n]).tokens.shape[1] for n in (513, 520, 570)} == {576}


def programs(length: int, rows: int):
    """What the compiled prefill and the compiled loop need for texts of `length` tokens."""
    model, drafter = families.model(CONFIG), drafters.ngram(num_draft_tokens=4)
    params = Params(families.init_params(CONFIG, jax.random.key(0)), ())
    inputs = Inputs(jnp.zeros((rows, length - 64), jnp.int32), jnp.ones(rows, jnp.int32))
    read = jax.jit(lambda params, inputs: model.prefill(params, inputs, model.init_cache(rows, length))[1])
    prefill: Any = read.lower(params.target, inputs).compile()
    prompts = decoding.pad_prompts([[1] * 8] * rows)
    state = decoding.prefill(model, drafter, params, prompts, max_new_tokens=32, max_len=length)
    loop: Any = decoding.advance.lower(model, drafter, verify.rejection, params, state, np.int32(1)).compile()
    return prefill.memory_analysis(), loop.memory_analysis()


@pytest.mark.slow
def test_memory_grows_linearly_to_32k():
    read_short, short = programs(8192, 1)
    read_long, long = programs(32768, 1)
    assert read_long.temp_size_in_bytes < 4.4 * read_short.temp_size_in_bytes
    assert long.temp_size_in_bytes < 4.4 * short.temp_size_in_bytes
    assert long.alias_size_in_bytes < 4.1 * short.alias_size_in_bytes
    read_two, two = programs(8192, 2)
    assert read_two.temp_size_in_bytes < 2.2 * read_short.temp_size_in_bytes
    assert two.temp_size_in_bytes < 2.2 * short.temp_size_in_bytes
    assert two.alias_size_in_bytes < 2.1 * short.alias_size_in_bytes
