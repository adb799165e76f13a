"""The T5 family against transformers (torch, float32), and through the loop that knows nothing of encoders."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from helpers import EMITTERS_OF_USERS, compiled, feed, usual, with_rows

import specjax
from specjax import decoding
from specjax.decoding import verify
from specjax.drafters import contract
from specjax.models import families, linear, quantisation, t5
from specjax.models.config import T5Config
from specjax.models.weights import huggingface, t5_mapping
from specjax.planning import hlo
from specjax.types import Batch, Block, Context, Params

torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

TOLERANCE = 2e-4
VOCAB = 67

# Model type, changes of its configuration, and whether the head is the embedding's table.
CASES = {
    "t5": ("t5", {}, True),
    "t5-unscaled-tied": ("t5", {"tie_word_embeddings": False, "feed_forward_proj": "gelu"}, True),
    "t5-v1.1": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, False),
    "t5-deep-encoder": ("t5", {"num_layers": 3, "num_decoder_layers": 1, "num_heads": 3, "d_kv": 5}, True),
    "t5-buckets": ("t5", {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}, True),
    "t5-gated-silu": ("t5", {"feed_forward_proj": "gated-silu"}, False),
    "t5-gated-relu": ("t5", {"feed_forward_proj": "gated-relu", "layer_norm_epsilon": 1e-2}, True),
    "mt5": ("mt5", {}, False),
    "mt5-relu": ("mt5", {"feed_forward_proj": "relu"}, True),
    "umt5": ("umt5", {}, True),
    "umt5-wide": (
        "umt5",
        {"d_kv": 16, "num_layers": 1, "num_decoder_layers": 3, "relative_attention_num_buckets": 16},
        True,
    ),
}


def tiny(model_type="t5", changes=None, tied=True, seed=0):
    """A random model of transformers whose norms, positions and head all matter."""
    settings = {
        "vocab_size": VOCAB,
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 36,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
    }
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **(settings | (changes or {})))
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, config.d_model) * 0.4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "relative_attention_bias" in name:
                parameter.copy_(torch.randn_like(parameter))
            elif not name.endswith(("shared.weight", "lm_head.weight")):
                parameter.mul_(1.5)
    return model.eval()


def write(model, directory, changes=None, tied=True):
    """What a published directory holds: a v1.1 configuration says that its head is not tied."""
    model.config.save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (changes or {})))
    tensors = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("coder.embed_tokens.weight")}
    if tied:
        tensors.pop("lm_head.weight")
    safetensors_torch.save_file(tensors, str(directory / "model.safetensors"))


WIDE = {"d_model": 32, "d_ff": 64}
"""Changes with which everything divides into groups of 32."""


def load(tmp_path, name="t5", seed=0, more=None):
    """A case on both sides."""
    model_type, changes, tied = CASES[name]
    reference = tiny(model_type, changes | (more or {}), tied, seed)
    directory = tmp_path / f"{name}-{seed}"
    directory.mkdir()
    write(reference, directory, tied=tied)
    return reference, specjax.load(directory)


SOURCES = [[5, 9, 33, 2, 60, 7, 41], [12], list(range(3, 40))]


@torch.no_grad()
def reference_logits(model, source, text):
    return model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor(text[None])).logits[0].numpy()


@pytest.mark.parametrize("name", usual(CASES, "t5", "umt5"))
def test_logits_match_transformers(name, tmp_path):
    reference, loaded = load(tmp_path, name)
    model, params = loaded.model, loaded.params
    expected = families.abstract_params(loaded.config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    text = np.random.default_rng(1).integers(0, VOCAB, (3, 60))
    text[:, 0] = 0
    inputs = decoding.read_inputs(model, SOURCES)
    output, cache = jax.jit(model.prefill)(params, inputs, model.init_cache(3, 64))
    wanted = [reference_logits(reference, source, row) for source, row in zip(SOURCES, text, strict=True)]
    wanted = np.stack(wanted)
    errors, at, apply = [np.abs(output.logits - wanted[:, :1]).max()], 1, jax.jit(feed(model))
    for size in (3, 56):
        output, cache = apply(params, jnp.asarray(text[:, at : at + size]), cache)
        errors.append(np.abs(output.logits - wanted[:, at : at + size]).max())
        at += size
    assert max(errors) < TOLERANCE
    assert np.std(wanted) > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["t5-v1.1", "umt5"])
def test_the_way_to_hugging_face_and_back(name, dtype, tmp_path):
    load(tmp_path, name)
    config, params = huggingface.load(tmp_path / f"{name}-0", dtype=dtype)
    assert isinstance(config, T5Config)
    tensors = t5_mapping.to_huggingface(config, params)
    assert {k: v.shape for k, v in tensors.items()} == t5_mapping.tensor_shapes(config)
    jax.tree.map(np.testing.assert_array_equal, t5_mapping.from_huggingface(config, tensors), params)


@pytest.mark.slow
def test_the_cases_cover_what_they_name(tmp_path):
    configs = {name: load(tmp_path, name)[1].config for name in CASES}
    configs = {name: c for name, c in configs.items() if isinstance(c, T5Config)}
    assert len(configs) == len(CASES)
    assert {name for name, c in configs.items() if not c.tie_embeddings} == {"t5-v1.1", "t5-gated-silu", "mt5"}
    unscaled = {"t5-unscaled-tied", "t5-v1.1", "mt5", "mt5-relu"}
    assert {name for name, c in configs.items() if not c.scale_outputs} == unscaled
    assert {name for name, c in configs.items() if c.bias_per_layer} == {"umt5", "umt5-wide"}
    assert {c.gated for c in configs.values()} == {True, False}
    assert {c.activation for c in configs.values()} == {"relu", "gelu", "gelu_new", "silu"}
    assert (configs["t5-deep-encoder"].num_encoder_layers, configs["t5-deep-encoder"].num_layers) == (3, 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("number", "far"), [(32, 128), (8, 12), (16, 64), (64, 256)])
def test_buckets_are_those_of_transformers(bidirectional, number, far):
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(VOCAB, 8, 4, 8, 1, 1, 2, num_buckets=number, max_distance=far)
    table = jnp.arange(number, dtype=jnp.float32)[:, None]
    places = np.arange(3 * far)
    ours = t5.relative_bias(config, table, jnp.asarray(places[:, None] - places)[None], bidirectional=bidirectional)
    distance = torch.tensor(places[None] - places[:, None])
    theirs = T5Attention._relative_position_bucket(distance, bidirectional, number, far)
    np.testing.assert_array_equal(ours[0, 0], theirs)


def generate_reference(model, source, **options):
    out = model.generate(torch.tensor([source]), do_sample=False, max_new_tokens=24, **options)
    return out[:, 1:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_greedy_and_beam_text_is_that_of_transformers(name, tmp_path):
    reference, target = load(tmp_path, name)
    _, draft = load(tmp_path, "t5-deep-encoder")
    # The stop token is one that the texts contain.
    free = specjax.generate(target, SOURCES, max_new_tokens=24).tokens
    stop = free[0][9]
    reference.generation_config.eos_token_id, reference.generation_config.pad_token_id = stop, 0
    greedy = [generate_reference(reference, source)[0] for source in SOURCES]
    ours = specjax.generate(target, SOURCES, max_new_tokens=24, stop_tokens=[stop])
    assert ours.tokens == greedy
    options = {"max_new_tokens": 24, "stop_tokens": [stop], "num_beams": 3}
    for beams in (
        specjax.beam_search(target, SOURCES, **options),
        specjax.beam_search(target, SOURCES, draft=draft, num_draft_tokens=2, **options),
    ):
        for source, found in zip(SOURCES, beams.tokens, strict=True):
            (wanted,) = generate_reference(reference, source, num_beams=3)
            while wanted and wanted[-1] == 0 and wanted[-1] != stop:
                wanted.pop()
            assert found[0][: len(wanted)] == wanted


def drafters(tmp_path, target):
    """Every kind of draft: an encoder-decoder with an encoder of its own, one that never errs, a decoder, lookup."""
    decoder_config = specjax.DecoderConfig(VOCAB, 16, 24, 1, 2, 1, 8, 256)
    decoder = specjax.Pretrained(
        families.model(decoder_config), families.init_params(decoder_config, jax.random.key(3)), None, decoder_config
    )
    _, other = load(tmp_path, "t5-deep-encoder", seed=1)
    return {
        "encoder-decoder": specjax.drafters.model(other, num_draft_tokens=3),
        "itself": specjax.drafters.model(target, num_draft_tokens=4),
        "decoder": specjax.drafters.model(decoder, num_draft_tokens=2),
        "ngram": specjax.drafters.ngram(num_draft_tokens=5),
    }


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["block", "coupled"])
def test_every_drafter_keeps_the_text(rule, tmp_path):
    _, target = load(tmp_path)
    options = {"max_new_tokens": 20, "step_cost": 0.0, "verify": verify.parse(rule), "max_len": 64}
    temperature = [0.0, 1.0 if rule == "coupled" else 0.0, 0.0]
    plain = specjax.generate(target, SOURCES, temperature=temperature, **options)
    for name, drafter in drafters(tmp_path, target).items():
        ours = specjax.generate(target, SOURCES, drafter=drafter, temperature=temperature, **options)
        assert ours.tokens == plain.tokens, name
        if name == "itself":
            assert ours.stats.acceptance_rate == pytest.approx(1.0, abs=1e-5)


@pytest.mark.slow
def test_a_row_is_that_of_its_source_alone(tmp_path):
    _, target = load(tmp_path)
    together = specjax.generate(target, SOURCES, max_new_tokens=20, max_len=64).tokens
    alone = [specjax.generate(target, [source], max_new_tokens=20, max_len=64).tokens[0] for source in SOURCES]
    assert together == alone
    assert len({tuple(text) for text in together}) == 3


def test_the_rolled_back_cache_is_a_fresh_prefill(tmp_path):
    _, target = load(tmp_path)
    model, params = compiled(target.model), target.params
    inputs = decoding.read_inputs(model, SOURCES)
    _, cache = model.prefill(params, inputs, model.init_cache(3, 32))
    text = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (3, 6)))
    _, cache = jax.jit(feed(model))(params, text, cache)
    kept = jnp.asarray([3, 1, 6])
    again, _ = model.apply(params, Block(text[:, 5:]), cache._replace(length=kept))
    whole = jnp.concatenate([jnp.zeros((3, 1), jnp.int32), text], axis=1)
    fresh = inputs._replace(tokens=whole, length=kept)
    _, cache = model.prefill(params, fresh, model.init_cache(3, 32))
    wanted, _ = model.apply(params, Block(text[:, 5:]), cache)
    np.testing.assert_allclose(again.logits, wanted.logits, atol=1e-5)


def test_an_encoder_decoder_draft_needs_an_encoder_decoder_target(tmp_path):
    _, draft = load(tmp_path)
    config = specjax.DecoderConfig(VOCAB, 16, 24, 1, 2, 1, 8, 256)
    target = specjax.Pretrained(families.model(config), families.init_params(config, jax.random.key(3)), None, config)
    with pytest.raises(ValueError, match="encoder-decoder target"):
        specjax.generate(target, [[1, 2]], drafter=specjax.drafters.model(draft, num_draft_tokens=2))


def in_floats(tree, contracted):
    """The parameters with every quantised matrix as the float32 matrix that it stands for."""
    if not isinstance(tree, dict):
        return tree
    if not linear.is_matrix(contracted):
        return {name: in_floats(x, contracted[name]) for name, x in tree.items()}
    number = contracted["values"]
    weight = quantisation.dequantise(quantisation.Rounded(tree["values"], tree["scale"], tree.get("offset")), number)
    return {"values": jnp.transpose(weight, linear.rotated(weight.ndim, weight.ndim - number))}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["int8", "int4:32,head=int4"])
@pytest.mark.parametrize("name", ["t5", "t5-v1.1"])
def test_a_quantised_t5_computes_with_the_rounded_matrices(name, how, tmp_path):
    _, target = load(tmp_path, name, more=WIDE)
    small = specjax.load(tmp_path / f"{name}-0", quantise=how)
    assert isinstance(small.config, T5Config)
    assert dataclasses.replace(small.config, quantisation=None, head_quantisation=None) == target.config
    assert jax.tree.map(lambda x: (x.shape, x.dtype), small.params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), families.abstract_params(small.config)
    )
    # The same numbers in float32, to which activations are rounded on CPUs.
    rounded = in_floats(small.params, families.num_contracted(small.config))
    inputs = decoding.read_inputs(target.model, SOURCES)
    wanted, found = (
        compiled(model).prefill(params, inputs, model.init_cache(3, 16))[0].logits
        for model, params in ((target.model, rounded), (small.model, small.params))
    )
    assert float(jnp.max(jnp.abs(found - wanted))) < 0.01 * float(jnp.std(wanted))
    specjax.save(small, tmp_path / "saved")
    again = specjax.load(tmp_path / "saved")
    assert again.config == small.config
    jax.tree.map(np.testing.assert_array_equal, again.params, small.params)
    with pytest.raises(ValueError, match="quantised T5"):
        t5_mapping.to_huggingface(small.config, small.params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "t5-v1.1"])
def test_a_quantised_t5_drafts_exactly(name, tmp_path):
    _, target = load(tmp_path, name, more=WIDE)
    small = specjax.load(tmp_path / f"{name}-0", quantise="int4:32,head=int8")
    plain = specjax.generate(target, SOURCES, drafter=specjax.drafters.none(), max_new_tokens=8)
    drafter = specjax.drafters.model(small, num_draft_tokens=3)
    drafted = specjax.generate(target, SOURCES, drafter=drafter, max_new_tokens=8)
    assert drafted.tokens == plain.tokens


def test_a_checkpoint_of_specjax_holds_a_t5(tmp_path):
    _, target = load(tmp_path, "umt5")
    specjax.save(target, tmp_path / "saved")
    restored = specjax.load(tmp_path / "saved")
    assert restored.config == target.config
    jax.tree.map(np.testing.assert_array_equal, restored.params, target.params)
    narrow = specjax.load(tmp_path / "saved", dtype="bfloat16")
    direct = specjax.load(tmp_path / "umt5-0", dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, narrow.params, direct.params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "gated-tanh"}, "gated-tanh"),
        ({"d_kv": 9}, "shape"),
        ({"relative_attention_num_buckets": 7}, "num_buckets=7"),
        ({"model_type": "bart"}, "bart"),
        ({"num_layers": 3}, "lacks"),
        ({"num_decoder_layers": 1}, "unexpected"),
    ],
)
def test_what_cannot_be_computed_is_an_error(change, message, tmp_path):
    write(tiny(), tmp_path, change)
    with pytest.raises(ValueError, match=message):
        huggingface.load(tmp_path)


def test_packed_texts_do_not_see_each_other(tmp_path):
    """Each text of a packed row has the logits that it has alone."""
    _, target = load(tmp_path)
    texts = [([5, 6, 7], [0, 8, 9]), ([10, 11], [0, 12, 13, 14])]
    source = np.asarray([[5, 6, 7, 10, 11, 0]])
    tokens = np.asarray([[0, 8, 9, 0, 12, 13, 14, 0]])
    segments = np.asarray([[1, 1, 1, 2, 2, 2, 2, 0]])
    batch = Batch(
        tokens=jnp.asarray(tokens),
        targets=jnp.asarray(tokens),
        segments=jnp.asarray(segments),
        positions=jnp.zeros((1, 8), jnp.int32),
        weights=jnp.ones((1, 8)),
        source=jnp.asarray(source),
        source_segments=jnp.asarray([[1, 1, 1, 2, 2, 0]]),
    )
    assert target.model.score is not None
    logits = jax.jit(target.model.score)(target.params, batch)
    model = compiled(target.model)
    at = 0
    for prompt, text in texts:
        inputs = decoding.read_inputs(target.model, [prompt])
        first, cache = model.prefill(target.params, inputs, model.init_cache(1, 16))
        rest, _ = model.apply(target.params, Block(jnp.asarray([text[1:]])), cache)
        wanted = jnp.concatenate([first.logits, rest.logits], axis=1)[0]
        np.testing.assert_allclose(logits[0, at : at + len(text)], wanted, atol=1e-5)
        at += len(text)


@pytest.mark.slow
def test_bfloat16_stays_close(tmp_path):
    _, target = load(tmp_path)
    narrow = specjax.load(tmp_path / "t5-0", dtype="bfloat16")
    inputs = decoding.read_inputs(target.model, SOURCES)
    exact, _ = compiled(target.model).prefill(target.params, inputs, target.model.init_cache(3, 8))
    close, _ = compiled(narrow.model).prefill(narrow.params, inputs, narrow.model.init_cache(3, 8))
    assert np.abs(exact.logits - close.logits).max() < 0.3 * np.abs(exact.logits).max()
    assert close.logits.dtype == jnp.float32


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", usual(["none", "encoder-decoder"], "none"))
def test_the_compiled_loop_copies_no_cache(name, rows, tmp_path):
    """Neither the text's keys and values nor the source's are copied in the loop, and all are given back in place."""
    _, target = load(tmp_path)
    drafter = specjax.drafters.none() if name == "none" else drafters(tmp_path, target)[name]
    draft = contract.check(drafter)
    params, drafter = Params(target.params, draft.params), draft.drafter
    inputs = decoding.read_inputs(target.model, SOURCES[:rows])
    state = decoding.prefill(target.model, drafter, params, inputs, max_new_tokens=20)
    args = target.model, drafter, verify.rejection, params, state, np.int32(4)
    compiled: Any = decoding.advance.lower(*args).compile(EMITTERS_OF_USERS)
    shapes = [x.shape for x in (state.rows.cache.keys[0], state.rows.cache.source_keys[0])]
    copies = hlo.copies(compiled.as_text(), shapes)
    assert not copies, f"{len(copies)} copies, such as {copies[0][:200]}"
    cache = sum(x.nbytes for x in jax.tree.leaves(state.rows.cache))
    assert compiled.memory_analysis().alias_size_in_bytes >= cache


def test_lookup_copies_from_the_source(tmp_path):
    """What editing needs (Sun et al. 2021, arXiv 2106.04970): the text begins like its source and goes on so."""
    _, target = load(tmp_path)
    source = [9, 5, 31, 22, 9, 40, 17, 3]
    inputs = decoding.read_inputs(target.model, [source])

    def proposed(text, k=3):
        drafter = specjax.drafters.ngram(num_draft_tokens=k, min_match=2)
        state = decoding.prefill(target.model, drafter, Params(target.params, ()), inputs, max_new_tokens=20)
        tokens = state.rows.tokens.at[0, : len(text)].set(jnp.asarray(text))
        state = with_rows(state, tokens=tokens, length=jnp.asarray([len(text)]))
        context = Context(
            decoding.history_of(state), jnp.zeros((1, k, 2), jnp.uint32), jnp.asarray([k]), state.rows.sampling, VOCAB
        )
        proposal = drafter.propose(Params((), ()), state.rows.drafter, (), context)[0]
        return proposal.tokens[0, : int(proposal.length[0])].tolist()

    assert proposed([0]) == [9, 5, 31]
    assert proposed([0, 9, 5]) == [31, 22, 9]
    assert proposed([0, 1, 22, 9]) == [40, 17, 3]
    assert proposed([0, 1, 40, 17]) == [3]
    assert proposed([0, 1, 17, 3]) == []
    assert proposed([0, 50, 9]) == []
    # The text itself is looked up as well, and the more recent of two equal matches is taken.
    assert proposed([0, 5, 31, 60, 61, 5, 31]) == [60, 61, 5]
    assert proposed([0, 22, 9, 40, 7, 50, 22, 9, 40]) == [7, 50, 22]
