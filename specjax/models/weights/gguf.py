"""Reads GGUF, llama.cpp's file format: the shape of a model, its weights (dequantised), its tokenizer's metadata."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from specjax import files
from specjax.models import decoder
from specjax.models.config import DecoderConfig
from specjax.models.quantisation import Quantisation
from specjax.models.weights import blocks, gguf_configs, mapping
from specjax.parallel import sharding
from specjax.types import Tree

FLOATS = ("F32", "F16", "BF16")
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
SUPERBLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
TYPES = (*FLOATS, *BLOCKS, *SUPERBLOCKS)
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
    "ffn_gate_inp": "mlp.gate",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_EXPERTS = {f"ffn_{name}_exps": f"{name}_proj" for name in ("gate", "up", "down")}
"""Tensors that hold the matrices of all experts."""


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


def _parts(config: DecoderConfig, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors of the model that a tensor of the file holds, by their Hugging Face names.

    "blk.0.attn_q.weight" is "model.layers.0.self_attn.q_proj.weight"; a fused projection has several, one after the
    other, and so has a stack of experts.
    """
    stem, _, kind = tensor.name.rpartition(".")
    if not stem.startswith("blk."):
        return {f"{_NAMES.get(stem, stem)}.{kind}": tensor}
    _, layer, part = stem.split(".", 2)
    prefix = f"model.layers.{layer}."
    if part in _EXPERTS and len(tensor.shape) == 3:
        names = [f"{prefix}mlp.experts.{number}.{_EXPERTS[part]}.{kind}" for number in range(len(tensor.data))]
        each = zip(names, tensor.data, strict=True)
        return {name: tensor._replace(shape=tensor.shape[1:], data=data) for name, data in each}
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows: dict[str, int] = {}
    if part == "attn_qkv":
        rows = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
    elif part == "ffn_up" and tensor.shape[0] == 2 * config.intermediate_size:
        inner = config.intermediate_size
        rows = {"mlp.gate_proj": inner, "mlp.up_proj": inner}
    if not rows or sum(rows.values()) != tensor.shape[0]:
        own = "pre_feedforward_layernorm" if part == "ffn_norm" and config.post_norms else _NAMES.get(part, part)
        return {f"{prefix}{own}.{kind}": tensor}
    found, begin = {}, 0
    for name, number in rows.items():
        data = tensor.data[begin : begin + number]
        found[f"{prefix}{name}.{kind}"] = tensor._replace(shape=(number, *tensor.shape[1:]), data=data)
        begin += number
    return found


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
    matrices = [name for name, tensor in tensors.items() if len(tensor.shape) == 2]
    layers = [name for name in matrices if name.startswith("model.layers.") and ".mlp.gate." not in name]
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
    by_name, factors = dict(file.tensors), {}
    for name in gguf_configs.ROPE_FACTORS:
        if name in by_name:
            factors[name] = dequantize(by_name.pop(name))
    with files.naming(file.path):
        shapes = {name: tensor.shape for name, tensor in by_name.items()}
        config = gguf_configs.parse_config(file.fields, shapes, factors, dtype)
    tensors: dict[str, Tensor] = {}
    for tensor in by_name.values():
        tensors |= _parts(config, tensor)
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
        if config.norm == "rms_plus_one" and array.ndim == 1:
            return array - 1.0  # llama.cpp stores 1 + w.
        heads = permuted.get(name.split(".")[-2])
        return array if heads is None else mapping.unpermute(array, heads)

    placed = decoder.repeat_kv_heads(config, mesh, rules)
    return placed, mapping.from_huggingface(
        placed, mapping.repeat_kv_heads(config, placed, get), mesh=mesh, rules=rules
    )
