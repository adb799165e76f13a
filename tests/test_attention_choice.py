"""How a decoder attends to its cache: what is chosen, and the kernel within a model against XLA's products."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import right_pad, texts, usual

import specjax
from specjax import decoding, drafters, sampling
from specjax.decoding import verify
from specjax.models import attention_choice, attention_kernel, decoder, families, presets
from specjax.models.attention_choice import MAX_TOKENS, choose
from specjax.models.config import DecoderConfig, Experts
from specjax.types import Block, Params

TINY = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=128,
)
MODELS = {
    "plain": TINY,
    "a window in every other layer": dataclasses.replace(TINY, sliding_window=33, global_layers=(1,)),
    "a soft cap": dataclasses.replace(TINY, attention_softcap=5.0),
    "scanned, with a window in one layer": dataclasses.replace(
        TINY, scan_layers=True, sliding_window=33, global_layers=(1,)
    ),
    "one head for all": dataclasses.replace(TINY, num_kv_heads=1),
}
LENGTHS = (70, 3, 40, 64)


# --- What is chosen


def test_the_kernel_is_chosen_from_a_tenth_of_the_bytes_on():
    assert choose("auto", 1, MAX_TOKENS, 900, 100).name == "kernel"
    few = choose("auto", 1, MAX_TOKENS, 901, 99)
    assert few.name == "einsum"
    assert "10% of the bytes that a call reads, below 10%" in few.why
    assert choose("kernel", 1, MAX_TOKENS, 901, 99).name == "kernel"
    assert choose("einsum", 1, MAX_TOKENS, 1, 99).name == "einsum"


def test_what_the_kernel_does_not_take_is_left_to_xla():
    wide = choose("kernel", MAX_TOKENS + 1, MAX_TOKENS, 1, 99)
    assert (wide.name, "33 tokens of a row, and the kernel takes 32" in wide.why) == ("einsum", True)
    narrow = choose("kernel", 1, 31, 1, 99)
    assert (narrow.name, "a window of 31 tokens" in narrow.why) == ("einsum", True)


def test_an_8b_model_in_a_long_buffer_has_the_kernel_and_in_a_short_one_not():
    config = dataclasses.replace(presets.PRESETS["llama3_8b"], dtype="bfloat16", attention="auto")
    # 128 kB a token beside 15 GB of matrices: a tenth at 13,000 tokens.
    assert decoder.choice(config, 1, 5, 8192).name == "einsum"
    assert decoder.choice(config, 1, 5, 16384).name == "kernel"
    assert decoder.choice(config, 8, 5, 2048).name == "kernel"
    small = families.with_quantisation(config, "int4:64")
    assert decoder.choice(small, 1, 5, 8192).name == "kernel"


def test_only_the_experts_that_tokens_choose_count():
    config = dataclasses.replace(TINY, experts=Experts(64, 2), attention="auto")
    entries = next(n for n in range(16, 2**20, 16) if decoder.choice(config, 1, 1, n).name == "kernel")
    assert decoder.choice(config, 1, 32, entries).name == "einsum", "more tokens choose more experts"


def test_what_is_loaded_attends_as_asked(tmp_path):
    params = families.init_params(TINY, jax.random.key(0))
    specjax.save(specjax.Pretrained(families.model(TINY), params, None, TINY), tmp_path)
    loaded = specjax.load(tmp_path, attention="auto")
    assert loaded.config == dataclasses.replace(TINY, attention="auto")
    specjax.save(loaded, tmp_path / "again")
    assert specjax.load(tmp_path / "again").config == TINY
    with pytest.raises(ValueError, match="attention='flash': choose one of auto, einsum, kernel"):
        specjax.load(tmp_path, attention="flash")


def test_an_encoder_decoder_refuses_the_kernel():
    config = presets.PRESETS["t5_v1_1_small"]
    assert families.with_attention(config, "auto") == config
    with pytest.raises(ValueError, match=r"attention='kernel'.*has a bias.*leave it out"):
        families.with_attention(config, "kernel")


# --- The kernel in a model, interpreted


@pytest.fixture(params=usual(["tpu", "cuda"], "cuda"))
def on_cpu(request, monkeypatch):
    """The kernel of a chip, run as XLA operations on this one."""
    interpreted = functools.partial(attention_kernel.attend_ragged, block=32, interpret=True)
    monkeypatch.setattr(attention_kernel, "attend_ragged", interpreted)
    monkeypatch.setattr(attention_choice, "KERNELS", {"cpu": attention_choice.KERNELS[request.param]})
    # What was traced with another kernel is not seen again.
    jax.clear_caches()
    yield
    jax.clear_caches()


@functools.cache
def params_of(config: DecoderConfig) -> Any:
    params = families.init_params(config, jax.random.key(0))
    return jax.tree.map(lambda x: x * 9.0 if x.ndim > 1 else x, params)


def both(name: str) -> list[Any]:
    """The same model with XLA's products, and with the kernel."""
    return [families.model(dataclasses.replace(MODELS[name], attention=how)) for how in ("einsum", "kernel")]


BLOCKS = {
    "a token": Block(jnp.full((4, 1), 5)),
    "a chain": Block(jnp.arange(20).reshape(4, 5)),
    # The root, two children, and a child of each.
    "a tree": Block(
        jnp.arange(20).reshape(4, 5),
        jnp.broadcast_to(jnp.asarray([0, 1, 1, 2, 2]), (4, 5)),
        jnp.broadcast_to(
            jnp.asarray([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]], bool),
            (4, 5, 5),
        ),
    ),
    # The last level of that tree, whose ancestors are in the cache already.
    "a level": Block(
        jnp.arange(8).reshape(4, 2),
        jnp.full((4, 2), 2),
        jnp.broadcast_to(jnp.asarray([[1, 1, 0, 1, 0], [1, 0, 1, 0, 1]], bool), (4, 2, 5)),
    ),
}


@pytest.mark.parametrize("name", usual(MODELS, "plain", "scanned, with a window in one layer"))
def test_the_logits_are_those_of_the_einsum(name: str, on_cpu):
    """Of rows of several lengths; the tree is read before its last level is read again."""
    prompts = [np.random.default_rng(n).integers(0, 61, n).tolist() for n in LENGTHS]
    found = []
    for model in both(name):
        params, inputs = params_of(MODELS[name]), right_pad(prompts, 70)
        cache = jax.jit(model.prefill)(params, inputs, model.init_cache(4, 96))[1]
        logits = []
        apply = jax.jit(model.apply)
        for block in BLOCKS.values():
            output, cache = apply(params, block, cache)
            logits.append(np.asarray(output.logits))
        found.append(logits)
        called = "attend_ragged" in str(jax.make_jaxpr(model.apply)(params, BLOCKS["a tree"], cache))
        assert called is (len(found) == 2), "the kernel is in the program where it was asked for, and nowhere else"
    for wanted, got in zip(*found, strict=True):
        assert np.abs(wanted).max() > 1
        np.testing.assert_allclose(got, wanted, atol=2e-3, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("topology", [None, (2, 2, 1)])
@pytest.mark.parametrize("name", MODELS)
def test_speculation_writes_the_text_of_the_einsum(name: str, topology: Any, on_cpu):
    prompts = [np.random.default_rng(n).integers(0, 61, n).tolist() for n in LENGTHS]
    found = []
    for model in both(name):
        shape: Any = {"num_draft_tokens": 4} if topology is None else {"topology": topology}
        drafter = drafters.model(model, **shape)
        params = Params(params_of(MODELS[name]), params_of(MODELS[name]))
        state = decoding.prefill(
            model,
            drafter,
            params,
            decoding.pad_prompts(prompts),
            max_new_tokens=20,
            options=sampling.options(4, temperature=[0.0, 0.0, 1.0, 1.0]),
            step_cost=0.0,
        )
        state = decoding.generate(model, drafter, verify.coupled, params, state)
        assert int(state.rows.stats.accepted.sum()) > 10
        found.append(texts(state))
    assert found[0] == found[1]
