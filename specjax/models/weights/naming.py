"""Where each family's files hold the tensors that `mapping` names after Llama and Gemma."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from jax.sharding import Mesh

from specjax.models import decoder
from specjax.models.config import DecoderConfig
from specjax.models.weights import mapping
from specjax.models.weights.lazy import Tensor
from specjax.parallel import sharding
from specjax.types import Tree


class Source(NamedTuple):
    """Where a file holds one of the decoder's tensors.

    Attributes:
      name: the tensor of the file; it may hold several of the decoder's.
      shape: its shape.
      read: extracts the decoder's tensor from it.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[Tensor], Tensor]


class Naming(NamedTuple):
    """A family's names.

    Attributes:
      bases: what names begin with, except the head's, in files of different versions; files of a model without its
        head leave it out.
      layers: what is between the base and the number of a layer.
      stems: the family's names by ours, without the base, or within a layer; the others are ours.
      adapt: `(config, our name, source) -> source`, for tensors that are stored in another way.
      ignored: the beginnings of the names of tensors that are no part of the decoder.
    """

    bases: tuple[str, ...]
    layers: str
    stems: Mapping[str, str]
    adapt: Callable[[DecoderConfig, str, Source], Source]
    ignored: tuple[str, ...] = ()


def _as_it_is(array: Tensor) -> Tensor:
    return array


def _fused(c: DecoderConfig, name: str, source: Source) -> Source:
    """Queries, keys and values are the rows of one tensor."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    begin = {"q_proj": 0, "k_proj": queries, "v_proj": queries + keys}.get(name.split(".")[-2])
    if begin is None:
        return source
    rows = slice(begin, begin + source.shape[0])
    return Source(source.name, (queries + 2 * keys, *source.shape[1:]), lambda array: array[rows])


def _phi3(c: DecoderConfig, name: str, source: Source) -> Source:
    """Gate and up are the rows of one tensor too."""
    begin = {"gate_proj": 0, "up_proj": c.intermediate_size}.get(name.split(".")[-2])
    if begin is None:
        return _fused(c, name, source)
    rows = slice(begin, begin + c.intermediate_size)
    return Source(source.name, (2 * c.intermediate_size, *source.shape[1:]), lambda array: array[rows])


def _mixtral(c: DecoderConfig, name: str, source: Source) -> Source:
    """The experts' matrices have numbers."""
    del c
    words = source.name.split(".")
    if "mlp" not in words:
        return source
    short = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "mlp": "block_sparse_moe"}
    return source._replace(name=".".join(short.get(word, word) for word in words))


def _unchanged(c: DecoderConfig, name: str, source: Source) -> Source:
    del c, name
    return source


def _gpt2(c: DecoderConfig, name: str, source: Source) -> Source:
    """The layers' matrices are stored `[in, out]`, too."""
    fused = _fused(c, name, source)
    if len(fused.shape) == 1 or ".layers." not in name:
        return fused
    return Source(fused.name, fused.shape[::-1], lambda array: fused.read(array.T))


def _gptj(c: DecoderConfig, name: str, source: Source) -> Source:
    """Neighbouring dimensions of a head are rotated together."""
    if name.split(".")[-2] not in ("q_proj", "k_proj"):
        return source
    return source._replace(read=lambda rows: mapping.unpermute(rows, c.num_heads, c.rotated))


def _opt(c: DecoderConfig, name: str, source: Source) -> Source:
    """Position 0 is row 2 of the table; the first two rows are for padding."""
    del c
    if name != "model.embed_positions.weight":
        return source
    return Source(source.name, (source.shape[0] + 2, *source.shape[1:]), lambda table: table[2:])


_GPT2 = {
    "model.embed_tokens": "wte",
    "model.embed_positions": "wpe",
    "model.norm": "ln_f",
    "input_layernorm": "ln_1",
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_PHI3 = {
    **dict.fromkeys([f"self_attn.{name}_proj" for name in "qkv"], "self_attn.qkv_proj"),
    **dict.fromkeys(["mlp.gate_proj", "mlp.up_proj"], "mlp.gate_up_proj"),
}
_GPTJ = {
    "model.embed_tokens": "wte",
    "model.norm": "ln_f",
    "input_layernorm": "ln_1",
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.out_proj",
    "mlp.up_proj": "mlp.fc_in",
    "mlp.down_proj": "mlp.fc_out",
}
_OPT = {
    "model.embed_tokens": "decoder.embed_tokens",
    "model.embed_positions": "decoder.embed_positions",
    "model.norm": "decoder.final_layer_norm",
    "input_layernorm": "self_attn_layer_norm",
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.k_proj",
    "self_attn.v_proj": "self_attn.v_proj",
    "self_attn.o_proj": "self_attn.out_proj",
    "post_attention_layernorm": "final_layer_norm",
    "mlp.up_proj": "fc1",
    "mlp.down_proj": "fc2",
}

_IMAGES = tuple(base + part for base in ("", "model.") for part in ("vision_tower.", "multi_modal_projector."))
"""The parts of a model for text and images that texts do not pass through."""

NAMINGS = {
    "gpt2": Naming(("transformer.",), "h.", _GPT2, _gpt2),
    "gpt_bigcode": Naming(("transformer.",), "h.", _GPT2, _fused),
    "gptj": Naming(("transformer.",), "h.", _GPTJ, _gptj),
    "opt": Naming(("model.",), "decoder.layers.", _OPT, _opt),
    "phi3": Naming(("model.",), "layers.", _PHI3, _phi3),
    "mixtral": Naming(("model.",), "layers.", {}, _mixtral),
    # As published, and as transformers 5 names them.
    "gemma3": Naming(("language_model.model.", "model.language_model."), "layers.", {}, _unchanged, _IMAGES),
}
"""Names by `model_type`; the other families use `mapping`'s names."""


def sources(model_type: str, config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    """Where a file holds each tensor of the decoder.

    Args:
      model_type: that of `config.json`.
      config: the shape.
      names: the names of the file's tensors, which show whether they have the base.

    Returns:
      The sources by the names of `mapping.tensor_shapes`.
    """
    shapes = mapping.tensor_shapes(config)
    if model_type not in NAMINGS:
        return {name: Source(name, shape, _as_it_is) for name, shape in shapes.items()}
    naming = NAMINGS[model_type]
    base = next((base for base in naming.bases if any(name.startswith(base) for name in names)), "")

    def stored(name: str) -> str:
        stem, _, kind = name.rpartition(".")
        if stem == "lm_head":
            return name
        if not stem.startswith("model.layers."):
            return f"{base}{naming.stems.get(stem, stem.removeprefix('model.'))}.{kind}"
        _, _, layer, part = stem.split(".", 3)
        return f"{base}{naming.layers}{layer}.{naming.stems.get(part, part)}.{kind}"

    return {n: naming.adapt(config, n, Source(stored(n), shape, _as_it_is)) for n, shape in shapes.items()}


def reader(sources: Mapping[str, Source], tensors: mapping.Tensors) -> Callable[[str], Tensor]:
    """Reads the decoder's tensors by name.

    Args:
      sources: where the file holds them.
      tensors: the file's tensors, whose shapes are checked.
    """
    stored = mapping.checked(tensors, {source.name: source.shape for source in sources.values()})

    def get(name: str) -> Tensor:
        source = sources[name]
        return source.read(stored(source.name))

    return get


def read(
    config: DecoderConfig,
    model_type: str,
    names: Collection[str],
    tensors: Callable[[str], Tensor],
    *,
    source: str,
    mesh: Mesh | None,
    rules: sharding.Rules,
) -> tuple[DecoderConfig, Tree]:
    """The parameters of a published decoder, and its shape as it is placed on the mesh.

    Args:
      config: the shape of the tensors.
      model_type: that of `config.json`.
      names: the names of all tensors.
      tensors: the tensors by name.
      source: what to call the files in an error.
      mesh: where to place the parameters; None for the default device.
      rules: logical to mesh axes.

    Raises:
      ValueError: for tensors that are not those of the model.
    """
    found = sources(model_type, config, names)
    ignored = NAMINGS[model_type].ignored if model_type in NAMINGS else ()
    used = [name for name in names if not name.startswith(ignored)]
    mapping.check_names({source.name for source in found.values()}, used, source)
    placed = decoder.repeat_kv_heads(config, mesh, rules)
    repeated = mapping.repeat_kv_heads(config, placed, reader(found, tensors))
    return placed, mapping.from_huggingface(placed, repeated, mesh=mesh, rules=rules)
