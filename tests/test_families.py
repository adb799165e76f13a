"""What holds for every shape of the one decoder, with random weights; `test_parity` holds them against transformers."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compiled, random_prompts, right_pad, save_tiny_decoder, texts, usual
from jax.sharding import AbstractMesh

import specjax
from specjax import decoding, drafters, sampling
from specjax.decoding import verify
from specjax.models import families, layers, presets
from specjax.models.config import DecoderConfig, Experts, LinearRopeScaling, LongRopeScaling, T5Config
from specjax.parallel import sharding
from specjax.planning import hlo
from specjax.types import Batch, Block, Params

ADVANCE: Any = decoding.advance
TINY = DecoderConfig(
    vocab_size=61, hidden_size=32, intermediate_size=40, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8,
    max_position=64,
)  # fmt: skip
GPT = dataclasses.replace(TINY, positions="learned", norm="layer", gated=False, tie_embeddings=True, qkv_bias=True,
                          output_bias=True, mlp_bias=True, activation="gelu_new")  # fmt: skip
GEMMA = dataclasses.replace(TINY, num_kv_heads=2, norm="rms_plus_one", activation="gelu_new", post_norms=True,
                            scale_embeddings=True, tie_embeddings=True, query_scale=0.3, sliding_window=5,
                            global_layers=(1,), logit_softcap=30.0)  # fmt: skip
CONFIGS = {
    "gpt2": GPT,
    "opt": dataclasses.replace(GPT, activation="relu", tie_embeddings=False),
    "gptj": dataclasses.replace(TINY, norm="layer", gated=False, activation="gelu_new", mlp_bias=True, rotary_dim=4,
                                parallel=True, head_bias=True),
    "gemma2": dataclasses.replace(GEMMA, attention_softcap=2.0),
    "gemma3": dataclasses.replace(GEMMA, num_layers=3, qk_norm=True, local_rope_theta=50.0, global_layers=(2,),
                                  rope_scaling=LinearRopeScaling(8.0)),
    "phi3": dataclasses.replace(TINY, num_kv_heads=2, rotary_dim=6, sliding_window=5,
                                rope_scaling=LongRopeScaling((1.0, 1.5, 2.0), (2.0, 3.0, 4.0), 32, 1.2)),
    "olmo2": dataclasses.replace(TINY, num_kv_heads=2, pre_norms=False, post_norms=True, qk_norm=True,
                                 qk_norm_whole=True),
    "qwen3-moe": dataclasses.replace(TINY, num_kv_heads=2, qk_norm=True, experts=Experts(6, 2)),
    "multi-query": dataclasses.replace(GPT, num_kv_heads=1),
    "chinchilla": dataclasses.replace(TINY, gated=False, activation="gelu", tie_embeddings=True),
}  # fmt: skip


@functools.cache
def tiny(name, dtype="float32"):
    """A model whose matrices make contexts matter and whose norms and biases do too, and its parameters."""
    config = dataclasses.replace(CONFIGS[name], dtype=dtype)
    noise = iter(jax.random.split(jax.random.key(1), 1000))

    def spread(x):
        scaled = x * (50 / 32**0.5) if x.ndim > 1 else x + 0.3 * jax.random.normal(next(noise), x.shape)
        return scaled.astype(x.dtype)

    return families.model(config), jax.tree.map(spread, families.init_params(config, jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=(0, 3))
def prefill(model, params, inputs, size):
    return model.prefill(params, inputs, model.init_cache(inputs.tokens.shape[0], size))


@pytest.mark.parametrize("name", usual(CONFIGS, "gpt2", "gemma2"))
def test_prefill_then_apply_after_a_rollback_is_one_prefill(name):
    model, params = tiny(name)
    model = compiled(model)
    apply = jax.jit(lambda params, tokens, cache: model.apply(params, Block(tokens), cache))
    tokens = np.random.default_rng(0).integers(0, 61, (3, 20))
    lengths = np.array([12, 5, 1])
    prompts = [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)]
    _, cache = prefill(model, params, right_pad(prompts, 20), 24)
    # Four wrong tokens, of which none, one and three are kept.
    keep = np.array([0, 1, 3])
    at = [np.arange(n, n + 4) for n in lengths]
    drafted = np.stack([row[places] for row, places in zip(tokens, at, strict=True)])
    wrong = np.where(np.arange(4) < keep[:, None], drafted, (drafted + 1) % 61)
    _, cache = apply(params, jnp.asarray(wrong), cache)
    lengths = lengths + keep
    rest = np.stack([row[n : n + 4] for row, n in zip(tokens, lengths, strict=True)])
    cache = model.commit(cache, None, jnp.asarray(keep))
    output, cache = apply(params, jnp.asarray(rest), cache)
    cache = model.commit(cache, None, jnp.full(3, 4))
    lengths = lengths + 4
    longer = [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)]
    fresh, fresh_cache = prefill(model, params, right_pad(longer, 20), 24)
    np.testing.assert_array_equal(cache.length, fresh_cache.length)
    np.testing.assert_allclose(output.logits[:, -1], fresh.logits[:, 0], atol=1e-4)
    for ours, wanted in zip((*cache.keys, *cache.values), (*fresh_cache.keys, *fresh_cache.values), strict=True):
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(ours[row, :, :n], wanted[row, :, :n], atol=1e-5)


PROMPTS = [2 * prompt for prompt in random_prompts(4, 61, longest=6)]


def decoded(model, params, drafter, draft_params=None):
    """Greedy and sampled rows, up to the last position; no cache is copied."""
    both = Params(params, draft_params)
    state = decoding.prefill(
        model,
        drafter,
        both,
        decoding.pad_prompts(PROMPTS),
        max_new_tokens=[model.max_len - len(prompt) for prompt in PROMPTS],
        options=sampling.options(4, temperature=[0.0, 0.0, 0.5, 1.0]),
        step_cost=0.0,
        max_len=80,
    )
    compiled = ADVANCE.lower(model, drafter, verify.coupled, both, state, np.int32(80)).compile()
    assert not hlo.copies(compiled.as_text(), [state.rows.cache.keys[0].shape])
    return compiled(both, state, np.int32(80))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_speculation_writes_the_text_of_plain_decoding(name):
    """The greedy rows, and with the coupled rule the sampled ones too."""
    model, params = tiny(name)
    plain, drafted = (decoded(model, params, d) for d in (drafters.none(), drafters.ngram(num_draft_tokens=4)))
    assert texts(drafted) == texts(plain)
    assert [len(text) for text in texts(plain)] == [model.max_len] * 4
    assert int(np.asarray(drafted.rows.stats.accepted)[:2].sum()) > 0
    assert len({tuple(text[-20:]) for text in texts(plain)}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_that_are_scanned_write_the_text_of_those_that_are_not(name):
    model, params = tiny(name)
    config, stacked = families.stack_layers(CONFIGS[name], params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), stacked) == jax.tree.map(
        lambda x: (x.shape, x.dtype), families.abstract_params(config)
    )
    scanned = families.model(config)
    (one, _), (other, _) = (
        prefill(*which, right_pad(PROMPTS, 20), 24) for which in ((model, params), (scanned, stacked))
    )
    np.testing.assert_allclose(one.logits, other.logits, atol=1e-4)
    drafter = drafters.ngram(num_draft_tokens=4)
    assert texts(decoded(scanned, stacked, drafter)) == texts(decoded(model, params, drafters.none()))


def test_scanned_layers_are_cast_and_split_as_they_are():
    """Each is what it would be if the layers were cast or split first, and stacked then."""
    for name in ("gemma3", "qwen3-moe"):
        _, params = tiny(name)
        got_config, got = families.cast(*families.stack_layers(CONFIGS[name], params), "bfloat16")
        wanted_config, wanted = families.stack_layers(*families.cast(CONFIGS[name], params, "bfloat16"))
        assert got_config == wanted_config
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
    config, _ = families.stack_layers(CONFIGS["gemma3"], tiny("gemma3")[1])
    mesh, rules = AbstractMesh((2,), ("model",)), sharding.override(sharding.RULES, vocab=None)

    def down(config):
        tree = sharding.abstract(families.abstract_params(config), families.param_axes(config), mesh, rules)["layers"]
        return (tree if config.scan_layers else tree[0])["mlp"]["down"]["values"].sharding.spec

    assert "model" in down(CONFIGS["gemma3"])
    assert tuple(down(config)) == (None, *down(CONFIGS["gemma3"]))


@pytest.mark.parametrize("name", ["gptj", "gemma3"])
def test_layers_of_one_structure_are_traced_once(name):
    model, params = tiny(name)
    apply: Any = compiled(model).apply
    lowered = apply.lower(params, Block(jnp.zeros((2, 3), jnp.int32)), model.init_cache(2, 16)).as_text()
    assert lowered.count("func.func private @_call") == 1
    assert lowered.count("call @_call") == CONFIGS[name].num_layers > 1


@pytest.mark.slow
def test_a_model_is_loaded_with_scanned_layers_and_saved_with_them(tmp_path):
    source = save_tiny_decoder(tmp_path / "source", 0)
    plain, scanned = (specjax.load(source, scan_layers=scan) for scan in (False, True))
    specjax.save(scanned, tmp_path / "saved")
    again = specjax.load(tmp_path / "saved")
    assert again.config == scanned.config
    assert scanned.config != plain.config
    wanted, *found = (specjax.generate(m, [[5, 6, 7]], max_new_tokens=8).tokens for m in (plain, scanned, again))
    assert found == [wanted, wanted]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["int8", "int4:32,head=int8", "int8:32:offset+int8"])
@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "chinchilla", "qwen3-moe"])
def test_a_quantised_draft_is_nearly_its_target_and_its_text_is_exact(name, scanned, how):
    if how.endswith("+int8") and CONFIGS[name].experts:
        pytest.skip("refused: test_experts")
    # 64 wide, so that everything divides into groups of 32.
    base = dataclasses.replace(CONFIGS[name], intermediate_size=64)
    model, params = (
        families.model(base),
        jax.tree.map(lambda x: x * (50 / 32**0.5) if x.ndim > 1 else x, families.init_params(base, jax.random.key(0))),
    )
    config, small = families.quantise(base, params, how)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), small) == jax.tree.map(
        lambda x: (x.shape, x.dtype), families.abstract_params(config)
    )
    if scanned:
        config, small = families.stack_layers(config, small)
    plain = decoded(model, params, drafters.none())
    drafted = decoded(model, params, drafters.model(families.model(config), num_draft_tokens=3), small)
    assert texts(drafted) == texts(plain)
    least = 0.9 if how == "int8" else 0.4
    assert float(drafted.rows.stats.overlap.sum() / drafted.rows.stats.proposed.sum()) > least


def test_an_encoder_decoder_is_not_scanned():
    with pytest.raises(ValueError, match="scan_layers=True"):
        families.stack_layers(T5Config(8, 8, 4, 8, 1, 1, 2), {})


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_texts_score_as_they_would_alone(name):
    model, params = tiny(name)
    assert model.score is not None
    first, second = (np.random.default_rng(seed).integers(0, 61, 9 - seed).tolist() for seed in (0, 1))
    width, size = 20, len(first) + len(second)
    tokens, segments, positions = np.zeros((3, 1, width), np.int32)
    tokens[0, :size] = [*first, *second]
    segments[0, :size] = [1] * len(first) + [2] * len(second)
    positions[0, :size] = [*range(len(first)), *range(len(second))]
    tokens, segments, positions = map(jnp.asarray, (tokens, segments, positions))
    batch = Batch(tokens, tokens, segments, positions, jnp.ones((1, width)), None, None)
    logits = jax.jit(model.score)(params, batch)[0]
    alone, _ = prefill(model, params, right_pad([first, second, first], width), 24)
    np.testing.assert_allclose(logits[len(first) - 1], alone.logits[0, 0], atol=1e-4)
    np.testing.assert_allclose(logits[size - 1], alone.logits[1, 0], atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_name_axes_that_have_a_rule(name):
    config = CONFIGS[name]
    mesh = jax.sharding.AbstractMesh((1, 1), ("data", "model"))
    jax.tree.map(
        lambda x, axes: sharding.named_sharding(mesh, x.shape, axes),
        families.abstract_params(config),
        families.param_axes(config),
    )


def test_texts_beyond_the_learned_positions_are_refused():
    model, params = tiny("gpt2")
    prompt = decoding.pad_prompts([[1] * 30])
    with pytest.raises(ValueError, match=r"makes 65, but the target knows 64 positions"):
        decoding.prefill(model, drafters.none(), Params(params, None), prompt, max_new_tokens=35)


def test_padding_beyond_the_learned_positions_does_no_harm():
    model, params = tiny("gpt2")
    wide, _ = prefill(model, params, right_pad([[5, 6, 7]], 80), 96)
    narrow, _ = prefill(model, params, right_pad([[5, 6, 7]], 3), 96)
    np.testing.assert_allclose(wide.logits, narrow.logits, atol=1e-5)


def test_one_plus_w_is_summed_in_float32():
    config = dataclasses.replace(CONFIGS["gemma2"], dtype="bfloat16")
    assert float(layers.scale_of(jnp.asarray([2**-9], jnp.bfloat16), config)[0]) == 1 + 2**-9


@pytest.mark.parametrize("name", usual(["gpt2", "gemma3"], "gpt2"))
def test_bfloat16_is_near_float32(name):
    """Rounded weights in both, so that only the products and the cache differ."""
    model, params = tiny(name, "bfloat16")
    config = dataclasses.replace(CONFIGS[name], dtype="bfloat16")
    full_config, full = families.cast(config, params, "float32")
    inputs = right_pad(random_prompts(4, 61), 12)
    rounded, _ = prefill(model, params, inputs, 16)
    exact, _ = prefill(families.model(full_config), full, inputs, 16)
    error = np.abs(rounded.logits - exact.logits).max() / np.abs(exact.logits).max()
    assert error < 0.05


# What the papers and releases call the models, in the digits that they give.
PUBLISHED = {
    "chinchilla_70b": "70e9",
    "chinchilla_draft_4b": "4e9",
    "gopher_7b": "7.1e9",
    "gpt2": "124e6",
    "opt_125m": "125e6",
    "opt_66b": "66e9",
    "opt_175b": "175e9",
    "llama3_8b": "8.0e9",
    "llama3_70b": "70.6e9",
    "llama3_2_1b": "1.24e9",
    "llama3_2_3b": "3.21e9",
    "qwen3_0_6b": "0.6e9",
    "qwen3_1_7b": "1.7e9",
    "qwen3_4b": "4.0e9",
    "qwen3_8b": "8.2e9",
    "qwen3_14b": "14.8e9",
    "qwen3_32b": "32.8e9",
    "qwen3_30b_a3b": "30.5e9",
    "mixtral_8x7b": "46.7e9",
    "phi4_mini": "3.8e9",
    "olmo2_7b": "7.3e9",
    "gemma2_2b": "2.6e9",
    "t5_v1_1_small": "77e6",
    "t5_v1_1_base": "248e6",
    "t5_v1_1_large": "783e6",
    "t5_v1_1_xl": "2.85e9",
    "t5_v1_1_xxl": "11.1e9",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    config, number = presets.get(name), PUBLISHED[name]
    count = families.num_params(config)
    if name.startswith(("chinchilla", "gopher")):
        # Relative positions, which these shapes replace: one projection a layer.
        count += config.num_layers * config.hidden_size**2
    mantissa = number.split("e")[0]
    unit = float(number) / float(mantissa) * 10.0 ** -len(mantissa.partition(".")[2])
    assert math.floor(count / unit + 0.5) * unit == pytest.approx(float(number))


def test_presets_by_name():
    assert set(PUBLISHED) == set(presets.PRESETS)
    for name, config in presets.PRESETS.items():
        assert getattr(presets, name) is presets.get(name) is config
        others = ("gemma2_2b", "t5_v1_1_small", "qwen3_0_6b", "qwen3_4b", "qwen3_32b", "qwen3_30b_a3b")
        assert config.num_heads * config.head_dim == config.hidden_size or name in others
    with pytest.raises(ValueError, match=r"'llama9'.*chinchilla_70b, chinchilla_draft_4b"):
        presets.get("llama9")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "alibi"}, r"positions='alibi': choose one of rotary, learned"),
        ({"norm": "batch"}, r"norm='batch': choose one of rms"),
        ({"activation": "tanh"}, r"activation='tanh': choose one of relu"),
        ({"dtype": "float16"}, r"dtype='float16': choose one of float32, bfloat16"),
        ({"rotary_dim": 3}, r"rotary_dim=3 with head_dim=8"),
        ({"rotary_dim": 10}, r"rotary_dim=10 with head_dim=8"),
        ({"rotary_dim": 0}, r"rotary_dim=0 is out of range"),
        ({"global_layers": (1,)}, r"sliding_window is None"),
        ({"local_rope_theta": 1e4}, r"sliding_window is None"),
        ({"sliding_window": 4, "global_layers": (2,)}, r"\(2,\): the 2 layers are counted from 0"),
    ],
)
def test_shapes_that_make_no_model_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)
