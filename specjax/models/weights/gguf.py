"""Reads GGUF, llama.cpp's file format: the shape of a model, its weights (dequantised), its tokenizer's metadata."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from specjax import files
from specjax.limits import check_number, check_size
from specjax.models import decoder
from specjax.models.config import LIMITS, DecoderConfig, LinearRopeScaling, Llama3RopeScaling
from specjax.models.quantisation import Quantisation
from specjax.models.weights import blocks, mapping
from specjax.parallel import sharding
from specjax.types import Tree

ARCHITECTURES = ("llama", "qwen2")
"""The values of `general.architecture` that `decoder` computes."""

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K")
"""The tensor types that are dequantised."""

MAGIC = b"GGUF"

MAX_ENTRIES = 2**22
"""The most entries that a file's metadata may have, array elements included; Llama 3's has half a million."""

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Stretching of the rotary angles, one factor for each: how llama.cpp stores Llama 3's scaling.
_ROPE_FACTORS = "rope_freqs.weight"


def huggingface_name(name: str) -> str:
    """A tensor's Hugging Face name: "blk.0.attn_q.weight" -> "model.layers.0.self_attn.q_proj.weight"."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{_NAMES.get(stem, stem)}.{kind}"
    _, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{_NAMES.get(part, part)}.{kind}"


class Tensor(NamedTuple):
    """One tensor of a file.

    Attributes:
      name: its name in llama.cpp.
      shape: its shape in numpy's order (the last axis is contiguous).
      kind: its type, e.g. "Q4_K".
      data: a view of the memory-mapped file: numbers for F32 and F16, else bytes `[rows..., bytes per row]`.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    data: np.ndarray


class File(NamedTuple):
    """An open GGUF file.

    Attributes:
      path: where it is.
      fields: the metadata as plain numbers, strings and lists.
      tensors: the tensors by name; their data stays on disk until it is used.
    """

    path: pathlib.Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]


@functools.cache
def _reader() -> Any:
    """gguf's reader, which trusts the lengths that a file gives, with bounds."""
    from gguf import GGUFReader

    class Bounded(GGUFReader):
        """Refuses lengths beyond the end of the file, for which gguf would read nothing, forever."""

        num_entries = 0

        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
            if int(count) * np.dtype(dtype).itemsize > len(self.data) - int(offset):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
            # Each entry becomes an array.
            self.num_entries += 1
            if self.num_entries > MAX_ENTRIES:
                raise ValueError(f"its metadata has more than {MAX_ENTRIES} entries")
            return super()._get_field_parts(orig_offs, raw_type)

    return Bounded


def open_file(path: str | pathlib.Path) -> File:
    """Opens a GGUF file and checks that it is whole.

    The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for another kind of file, or one that is truncated, broken or big-endian.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: give the path of a .gguf file.")
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise ValueError(f"{path} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}.")
    try:
        reader = _reader()(path)
        # The reader lists the file's version and its counts as fields too.
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        if sum(tensor.n_bytes for tensor in reader.tensors) > path.stat().st_size:
            raise ValueError("its tensors overlap")
    except OSError:
        raise
    except Exception as error:  # Whatever numpy and the package raise for damaged numbers.
        raise ValueError(f"{path} is truncated or broken ({files.shorten(error)}): download it again.") from error
    if reader.byte_order == "S":  # `quants.dequantize` would read the bytes in this machine's order
        raise ValueError(f"{path} is big-endian: convert it with gguf-convert-endian, or download a little-endian one.")
    tensors = {
        tensor.name: Tensor(
            tensor.name, tuple(tensor.shape.tolist())[::-1], tensor.tensor_type.name, np.asarray(tensor.data)
        )
        for tensor in reader.tensors
    }
    return File(path, fields, tensors)


def _decimal(value: float) -> float:
    """The decimal number that was rounded to float32: 1e-5 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(fields: Mapping[str, Any], architecture: str, has_factors: bool) -> LinearRopeScaling | None:
    kind = fields.get(f"{architecture}.rope.scaling.type", "none")
    factor = fields.get(f"{architecture}.rope.scaling.factor", 1.0)
    if kind not in ("none", "linear"):
        raise ValueError(f"Rope scaling {kind!r} is not supported in GGUF files: specjax knows 'none' and 'linear'.")
    if kind == "none" or factor == 1.0:
        return None
    if has_factors:
        raise ValueError(f"The file has both linear rope scaling and {_ROPE_FACTORS}: specjax knows one at a time.")
    return LinearRopeScaling(_decimal(factor))


def _llama3_scaling(factors: np.ndarray, config: DecoderConfig) -> Llama3RopeScaling:
    """Recovers Llama 3's scaling from the factors that divide each angle.

    Files do not hold its four numbers. All but the factor are the same for every Llama 3.1, 3.2 and 3.3; whether they
    explain the factors is checked.
    """
    half = config.head_dim // 2
    if factors.shape != (half,) or not np.isfinite(factors).all() or factors.min() <= 0:
        raise ValueError(f"{_ROPE_FACTORS} is not {half} numbers above 0: download the file again.")
    scaling = Llama3RopeScaling(float(factors.max()), 1.0, 4.0, 8192)
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    turns = scaling.original_max_position * frequencies / (2 * np.pi)
    keep = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    expected = 1.0 / (keep + (1.0 - keep) / scaling.factor)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise ValueError(
            f"{_ROPE_FACTORS} is not Llama 3's scaling by {scaling.factor:g} from {scaling.original_max_position} "
            "positions: specjax knows no other. Load the model's safetensors instead."
        )
    return scaling


_SIZES = {
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "block_count": "num_layers",
    "context_length": "max_position",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "rope.dimension_count": "head_dim",
}
"""The entries that are sizes, and the configuration fields whose limits apply to them."""


def _check_fields(fields: Mapping[str, Any], arch: str) -> None:
    """Checks the entries that are used, where the file has them."""
    for name, field in _SIZES.items():
        if (value := fields.get(f"{arch}.{name}")) is not None:
            check_size(f"{arch}.{name}", value, high=LIMITS[field])
    for name in ("rope.freq_base", "rope.scaling.factor", "attention.layer_norm_rms_epsilon"):
        if (value := fields.get(f"{arch}.{name}")) is not None:
            check_number(f"{arch}.{name}", value, positive=not name.endswith("epsilon"))


def parse_config(fields: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], dtype: str) -> DecoderConfig:
    """The shape of a model from a GGUF's metadata, apart from Llama 3's rope scaling.

    Args:
      fields: the metadata.
      tensors: the GGUF name and shape of each tensor.
      dtype: "float32" or "bfloat16", that of the weights once loaded.

    Raises:
      ValueError: for an architecture or option that the decoder does not compute, or a missing entry.
    """
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"GGUF architecture {arch!r:.80} is not supported: specjax loads {', '.join(ARCHITECTURES)} (Mistral and "
            "SmolLM2 are stored as llama)."
        )
    _check_fields(fields, arch)
    try:
        heads, hidden = fields[f"{arch}.attention.head_count"], fields[f"{arch}.embedding_length"]
        head_dim = fields.get(f"{arch}.attention.key_length") or hidden // heads
        for key in ("attention.value_length", "rope.dimension_count"):
            if (value := fields.get(f"{arch}.{key}", head_dim)) != head_dim:
                raise ValueError(f"{arch}.{key}={value}, but heads are {head_dim} wide: specjax needs them equal.")
        if experts := fields.get(f"{arch}.expert_count", 0):
            raise ValueError(f"{arch}.expert_count={experts}: specjax knows no mixtures of experts.")
        return DecoderConfig(
            vocab_size=next(iter(tensors["token_embd.weight"]), 0),
            hidden_size=hidden,
            intermediate_size=fields[f"{arch}.feed_forward_length"],
            num_layers=fields[f"{arch}.block_count"],
            num_heads=heads,
            num_kv_heads=fields.get(f"{arch}.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position=fields[f"{arch}.context_length"],
            rope_theta=_decimal(fields.get(f"{arch}.rope.freq_base", 10000.0)),
            rope_scaling=_rope_scaling(fields, arch, _ROPE_FACTORS in tensors),
            norm_eps=_decimal(fields[f"{arch}.attention.layer_norm_rms_epsilon"]),
            tie_embeddings="output.weight" not in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
            output_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_gate.bias" in tensors,
            sliding_window=fields.get(f"{arch}.attention.sliding_window") or None,
            dtype=dtype,
        )
    except KeyError as error:
        raise ValueError(f"The GGUF file lacks {error.args[0]!r}.") from None


def dequantize(tensor: Tensor) -> np.ndarray:
    """A tensor of the file in float32 (a view of the file where it is stored in float32).

    Raises:
      ValueError: for a type outside `TYPES`.
    """
    from gguf import constants, quants

    if tensor.kind not in TYPES:
        raise ValueError(
            f"Tensor {tensor.name!r} is of type {tensor.kind}: specjax dequantises {', '.join(TYPES)}. Convert the "
            "file with llama.cpp's llama-quantize."
        )
    return quants.dequantize(tensor.data, constants.GGMLQuantizationType[tensor.kind])


def _kept(
    config: DecoderConfig, tensors: Mapping[str, Tensor], path: pathlib.Path
) -> tuple[DecoderConfig, dict[str, Quantisation]]:
    """The shape with the quantisation of the file's own blocks, and how each tensor that keeps its blocks is stored."""
    head = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    layers = [name for name, tensor in tensors.items() if name.startswith("model.layers.") and len(tensor.shape) == 2]
    found: dict[str, Quantisation | None] = {}
    for part, names in (("quantisation", layers), ("head_quantisation", [head])):
        found[part] = blocks.common({tensors[name].kind for name in names})
    if not any(found.values()):
        kinds = ", ".join(sorted({tensors[name].kind for name in [*layers, head]}))
        raise ValueError(
            f"quantise='keep': {path} has matrices of {kinds}; of layers or head, all have to be "
            f"{', '.join(blocks.KEPT)}. Give another quantisation, such as int8, or leave it out."
        )
    kept = {name: how for name in layers if (how := found["quantisation"])}
    if how := found["head_quantisation"]:
        kept[head] = how
    return dataclasses.replace(config, **found), kept


def load(
    source: str | pathlib.Path | File,
    *,
    dtype: str = "float32",
    keep: bool = False,
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.RULES,
) -> tuple[DecoderConfig, Tree]:
    """Loads the model of a GGUF file, one tensor at a time, dequantised or as it is.

    Args:
      source: its path, or the file from `open_file`.
      dtype: "float32" or "bfloat16", that of the parameters.
      keep: whether matrices stay in the file's eight or four bits, where all of the layers', or the head, are of the
        types `blocks.KEPT`.
      mesh: where to place the parameters; None for the default device.
      rules: logical to mesh axes.

    Returns:
      The model's shape and its parameters.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for a broken file, or a model or tensor type that specjax does not know.
    """
    file = source if isinstance(source, File) else open_file(source)
    by_name = dict(file.tensors)
    with files.naming(file.path):
        config = parse_config(file.fields, {name: tensor.shape for name, tensor in by_name.items()}, dtype)
    if _ROPE_FACTORS in by_name:
        scaling = _llama3_scaling(dequantize(by_name.pop(_ROPE_FACTORS)), config)
        config = dataclasses.replace(config, rope_scaling=scaling)
    tensors = {huggingface_name(name): tensor for name, tensor in by_name.items()}
    mapping.check_names(mapping.tensor_shapes(config), tensors, str(file.path))
    permuted = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    if file.fields["general.architecture"] != "llama":
        permuted = {}

    kept: dict[str, Quantisation] = {}
    if keep:
        config, kept = _kept(config, tensors, file.path)

    def get(name: str) -> np.ndarray:
        tensor = tensors[name]
        array = blocks.read(tensor.data, tensor.kind, kept[name]) if name in kept else dequantize(tensor)
        heads = permuted.get(name.split(".")[-2])
        return array if heads is None else mapping.unpermute(array, heads)

    placed = decoder.repeat_kv_heads(config, mesh, rules)
    return placed, mapping.from_huggingface(
        placed, mapping.repeat_kv_heads(config, placed, get), mesh=mesh, rules=rules
    )
