"""Reads published EAGLE heads (`models.eagle`): `config.json`, and safetensors or `pytorch_model.bin`.

Three layouts of the same tensors are read:

- that of the authors (`yuhuili/*`): the layer is `midlayer.*` for EAGLE-3, `layers.0.*` for EAGLE and EAGLE-2;
- that of speculators: `layers.0.*`, and the layer's shape nested in `config.json` as `transformer_layer_config`;
- that of Model-Optimizer and SpecForge: either name, and `eagle_config` in `config.json`.

What a file holds is told from the names and shapes of its tensors wherever they say it, since entries of `config.json`
are often those of another head. The rotary base is the head's own: 10000 where the file does not say, whatever the
target's is.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from specjax import files
from specjax.limits import check_number, check_size
from specjax.models import eagle, modules
from specjax.models.config import DecoderConfig
from specjax.models.eagle import EagleConfig, EagleHead, YarnScaling
from specjax.models.weights import decoder_configs, huggingface, mapping, torch_file
from specjax.models.weights.lazy import Tensor
from specjax.parallel import sharding
from specjax.types import Tree

BIN = "pytorch_model.bin"

PADDING = 1024
"""By how many entries the vocabularies of a head and its target may differ where they are the same but for padding."""

_OTHER = "this is a head of another target: give the one that it was trained for"

_LEFT_OUT = ("rotary_emb.inv_freq", "verifier_lm_head.weight", "verifier_norm.weight")
"""Endings of tensors that some files hold although the head does not read them."""

LAYER = "layer."
"""How the names of the layer's tensors begin, once they are those of `_plain`."""

NORMS = {
    "mlp_norm": f"{LAYER}post_attention_layernorm.weight",
    "embedding_norm": f"{LAYER}input_layernorm.weight",
    "hidden_norm": f"{LAYER}hidden_norm.weight",
    "norm": "norm.weight",
}
"""The tensors of the norms; version 1 has the first alone."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "qwen3": {"num_attention_heads": 32, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "head_dim": 128},
}
"""What transformers takes for entries that a nested configuration leaves out, by `model_type`."""


_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")
"""The entries that say how a head rotates its queries and keys."""


def _plain(name: str) -> str:
    """The name of a tensor, whichever layout it has."""
    name = name.removeprefix("model.")
    for prefix in ("midlayer.", "layers.0."):
        if name.startswith(prefix):
            return LAYER + name.removeprefix(prefix)
    return name


class _Tensors:
    """The tensors of a file, by plain names."""

    def __init__(self, directory: pathlib.Path):
        """Finds the file.

        Raises:
          FileNotFoundError: where there is none.
        """
        has_safetensors = any(directory.glob("model*.safetensors*"))
        if has_safetensors or not (directory / BIN).is_file():
            shards = huggingface.Shards(directory)
            names, self._float, self._whole = shards.names(), shards.get, shards.whole
        else:
            arrays = torch_file.read(directory / BIN)
            names, self._float, self._whole = set(arrays), arrays.__getitem__, arrays.__getitem__
        self.names = {_plain(name): name for name in names if not name.endswith(_LEFT_OUT)}

    def get(self, name: str) -> Tensor:
        """A tensor of floats."""
        return self._float(self.names[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that a head has to have."""
        if name not in self.names:
            raise ValueError(f"The file lacks the tensor {name!r}: it is not whole, or no EAGLE head.")
        return tuple(self.get(name).shape)

    def whole(self, name: str) -> np.ndarray | None:
        """A tensor of integers or truth values, if it is there."""
        return np.asarray(self._whole(self.names[name])) if name in self.names else None


def is_eagle(directory: str | pathlib.Path) -> bool:
    """Whether a directory holds an EAGLE head, rather than a model: one layer, and the matrix `fc` before it."""
    directory = pathlib.Path(directory)
    if not (directory / "config.json").is_file():
        return False
    if not (directory / BIN).is_file() and not any(directory.glob("model*.safetensors*")):
        return False
    names = _Tensors(directory).names
    return "fc.weight" in names and f"{LAYER}self_attn.q_proj.weight" in names


def _raw(directory: pathlib.Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What `config.json` says of the head, and of its layer."""
    raw = files.read_json(directory / "config.json")
    nested = raw.get("transformer_layer_config")
    layer = dict(nested) if isinstance(nested, Mapping) else dict(raw)
    layer = {key: value for key, value in layer.items() if value is not None}
    defaults = _DEFAULTS.get(str(layer.get("model_type", "llama")), _DEFAULTS["llama"])
    if "max_sequence_length" in layer:
        layer.setdefault("max_position_embeddings", layer["max_sequence_length"])
    inner = raw.get("eagle_config")
    return {**(inner if isinstance(inner, Mapping) else {}), **raw}, {**defaults, **layer}


def _layer(raw: Mapping[str, Any], tensors: _Tensors, vocab_size: int, dtype: str) -> DecoderConfig:
    """The shape of the layer: sizes from its tensors, the rest from `config.json`, as of a Llama of one layer."""
    attention = f"{LAYER}self_attn."
    queries, keys = (tensors.shape(f"{attention}{name}_proj.weight")[0] for name in "qk")
    with decoder_configs.naming_errors(raw):
        heads = int(raw["num_attention_heads"])
        head_dim = int(raw.get("head_dim") or queries // heads)
    if queries != heads * head_dim or keys % head_dim:
        raise ValueError(
            f"config.json says num_attention_heads={heads} and head_dim={head_dim}, but the tensors have {queries} "
            f"queries and {keys} keys: configuration and weights are not of the same head."
        )
    sizes = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": tensors.shape("fc.weight")[0],
        "intermediate_size": tensors.shape(f"{LAYER}mlp.gate_proj.weight")[0],
        "num_hidden_layers": 1,
        "num_key_value_heads": keys // head_dim,
        "head_dim": head_dim,
    }
    known = ("num_attention_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act", *_ROPE)
    layer = {key: raw[key] for key in known if key in raw} | sizes
    if _yarn(raw) is not None:
        theta = _rope_of(raw).get("rope_theta", raw.get("rope_theta", 1e4))
        layer = {key: value for key, value in layer.items() if key not in _ROPE} | {"rope_theta": theta}
    return dataclasses.replace(
        decoder_configs.parse_config(layer, dtype=dtype),
        qkv_bias=f"{attention}q_proj.bias" in tensors.names,
        output_bias=f"{attention}o_proj.bias" in tensors.names,
        mlp_bias=f"{LAYER}mlp.up_proj.bias" in tensors.names,
        qk_norm=f"{attention}q_norm.weight" in tensors.names,
    )


def _rope_of(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling")
    return rope if isinstance(rope, Mapping) else {}


def _yarn(raw: Mapping[str, Any]) -> YarnScaling | None:
    """The stretching of the rotary angles, if it is that of YaRN.

    Raises:
      ValueError: for a variant of it.
    """
    rope = _rope_of(raw)
    if rope.get("rope_type", rope.get("type")) != "yarn":
        return None
    if more := sorted(set(rope) & {"mscale", "mscale_all_dim", "truncate"}):
        raise ValueError(f"The head's rotary angles have {more[0]}={rope[more[0]]}, which specjax does not compute.")
    entries = {name: rope[name] for name in ("beta_fast", "beta_slow", "attention_factor") if rope.get(name)}
    for name, value in {"factor": rope.get("factor"), **entries}.items():
        check_number(name, value)
    original = rope.get("original_max_position_embeddings") or raw["max_position_embeddings"]
    check_size("original_max_position_embeddings", original)
    return YarnScaling(float(rope["factor"]), original, **{name: float(value) for name, value in entries.items()})


def _taps(raw: Mapping[str, Any], number: int, target: DecoderConfig) -> tuple[int, ...]:
    """The hidden states that EAGLE-3 reads, as `types.Model.with_taps` counts them.

    The entry of the authors and of speculators counts the layers whose input a hidden state is; that within
    `eagle_config` counts the layers whose output it is.
    """
    inner = raw.get("eagle_config")
    ids, begin = raw.get("eagle_aux_hidden_state_layer_ids"), 0
    if isinstance(inner, Mapping) and inner.get("eagle_aux_hidden_state_layer_ids") == ids:
        begin = 1
    taps = tuple(int(i) + begin for i in ids) if ids else eagle.default_taps(target.num_layers)
    if len(taps) != number or not all(0 <= tap <= target.num_layers for tap in taps):
        raise ValueError(
            f"The head reads {number} hidden states of width {target.hidden_size}, those with the indices {taps}; this "
            f"target has the indices 0 to {target.num_layers}: {_OTHER}, or give taps=."
        )
    return taps


def _check_vocabulary(raw: Mapping[str, Any], target: DecoderConfig) -> None:
    size = raw.get("vocab_size")
    if isinstance(size, int) and abs(size - target.vocab_size) > PADDING:
        raise ValueError(
            f"The head's config.json says vocab_size={size}, but the target has {target.vocab_size} tokens: {_OTHER}."
        )


def _tokens(tensors: _Tensors, size: int, target: DecoderConfig) -> Int[np.ndarray, " W"] | None:
    """The target's ids of the head's tokens, from `d2t`; None where the vocabularies are the same."""
    d2t, t2d = tensors.whole("d2t"), tensors.whole("t2d")
    is_same = abs(size - target.vocab_size) <= PADDING
    # Heads of the whole vocabulary may have a d2t of zeros, and a t2d that was never filled.
    if d2t is None or (size == target.vocab_size and not d2t.any()):
        if not is_same:
            raise ValueError(
                f"The head drafts {size} tokens, the target has {target.vocab_size}, and the file has no d2t, which "
                f"would say which they are: {_OTHER}."
            )
        return None
    tokens = eagle.token_ids(d2t)
    if len(tokens) != size or tokens.min() < 0 or tokens.max() >= target.vocab_size:
        raise ValueError(
            f"d2t names {len(tokens)} tokens from {tokens.min()} to {tokens.max()}; the head drafts {size}, and the "
            f"target has {target.vocab_size}: {_OTHER}."
        )
    if len(set(tokens.tolist())) != len(tokens) or (t2d is not None and set(np.flatnonzero(t2d)) != set(tokens)):
        raise ValueError("d2t and t2d do not name the same tokens, each once: the file is damaged. Download it again.")
    return tokens.astype(np.int32)


def _config(
    directory: pathlib.Path, tensors: _Tensors, target: DecoderConfig, taps: tuple[int, ...] | None, dtype: str
) -> EagleConfig:
    """The shape of the head in a directory."""
    raw, inner = _raw(directory)
    more = sorted(name for name in tensors.names if name.startswith("layers."))
    if more:
        raise ValueError(f"The head has more than one layer ({more[0]}): specjax computes heads of one layer.")
    _check_vocabulary(inner, target)
    version = 3 if f"{LAYER}hidden_norm.weight" in tensors.names else 1
    own_head = version == 3 and "lm_head.weight" in tensors.names
    size = tensors.shape("lm_head.weight")[0] if own_head else target.vocab_size
    layer = _layer(inner, tensors, size, dtype)
    width, inputs = tensors.shape("fc.weight")
    embeddings = tensors.shape("embed_tokens.weight")[0] if "embed_tokens.weight" in tensors.names else 0
    if version == 1:
        reads = inputs - width
        number = 1
    else:
        reads = target.hidden_size
        number, rest = divmod(inputs, reads)
        reads = inputs if rest else reads
    if reads != target.hidden_size or (not embeddings and width != target.hidden_size):
        raise ValueError(
            f"The head of width {width} reads {inputs} numbers of each token, but the target's hidden states have "
            f"{target.hidden_size}: {_OTHER}."
        )
    if taps is None:
        taps = (target.num_layers,) if version == 1 else _taps(raw, number, target)
    elif len(taps) != number:
        raise ValueError(f"taps={taps}: the head reads {number} hidden states.")
    return EagleConfig(
        layer,
        taps,
        target.hidden_size,
        version,
        num_embeddings=embeddings,
        own_head=own_head,
        fc_bias="fc.bias" in tensors.names,
        norm_before_residual=version == 3 and bool(raw.get("norm_before_residual", False)),
        norm_before_fc="input_norm.weight" in tensors.names,
        norm_features="fc_norm.0.weight" in tensors.names,
        norm_output=version == 3 and bool(raw.get("norm_output", False)),
        yarn=_yarn(inner),
    )


def _shapes(config: EagleConfig) -> dict[str, tuple[int, ...]]:
    """The plain name and the shape of every tensor of a head, apart from those of its vocabulary."""
    c, width = config.layer, config.layer.hidden_size
    shapes = {
        name.replace("model.layers.0.", LAYER): shape
        for name, shape in mapping.tensor_shapes(c).items()
        if name.startswith("model.layers.0.") and not name.endswith("layernorm.weight")
    }
    inputs = width if config.version == 1 else 2 * width
    for name in "qkv":
        name = f"{LAYER}self_attn.{name}_proj.weight"
        shapes[name] = (shapes[name][0], inputs)
    shapes["fc.weight"] = (width, config.fc_inputs)
    norms = list(NORMS.values())[: 1 if config.version == 1 else None]
    optional = {
        "fc.bias": (config.fc_bias, (width,)),
        "input_norm.weight": (config.norm_before_fc, (config.fc_inputs,)),
        "embed_tokens.weight": (config.num_embeddings > 0, (config.num_embeddings, width)),
        "lm_head.weight": (config.own_head, (c.vocab_size, width)),
    }
    shapes |= {name: shape for name, (has, shape) in optional.items() if has} | dict.fromkeys(norms, (width,))
    if config.norm_features:
        shapes |= {f"fc_norm.{i}.weight": (config.target_size,) for i in range(len(config.taps))}
    return shapes


def _params(config: EagleConfig, get: Callable[[str], Tensor], mesh: Mesh | None, rules: sharding.Rules) -> Tree:
    """The parameters from the tensors by plain names."""
    c = config.layer
    axes, contracted = (modules.metadata(EagleHead, config, name) for name in ("axes", "num_contracted"))
    place = mapping.placer(c, mesh, rules)

    def part(name: str) -> Callable[[str], Tensor]:
        return lambda end: get(f"{LAYER}{name}.{end}")

    parts = {"attention": mapping.attention_parts(c, part("self_attn")), "mlp": mapping.mlp_parts(c, part("mlp"))}
    params: Tree = {
        name: {n: place(x, axes[name][n], contracted[name][n]) for (n,), x in found} for name, found in parts.items()
    }
    top: dict[str, Tensor] = {"fc": get("fc.weight").T}
    top |= {name: get(tensor) for name, tensor in NORMS.items() if name in axes}
    for name, tensor in (
        ("fc_bias", "fc.bias"),
        ("input_norm", "input_norm.weight"),
        ("embedding", "embed_tokens.weight"),
    ):
        if name in axes:
            top[name] = get(tensor)
    if config.own_head:
        top["head"] = get("lm_head.weight").T
    if config.norm_features:
        top["feature_norms"] = np.stack([get(f"fc_norm.{i}.weight") for i in range(len(config.taps))])
    return params | {name: place(x, axes[name], contracted[name]) for name, x in top.items()}


def read(
    directory: str | pathlib.Path,
    target: DecoderConfig,
    *,
    taps: tuple[int, ...] | None = None,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.RULES,
) -> tuple[EagleConfig, Tree, Int[np.ndarray, " W"] | None]:
    """Reads a head.

    Args:
      directory: what `is_eagle` accepts.
      target: the shape of its target.
      taps: the hidden states that it reads, where the file is wrong about them; None: as the file says, or else the
        published ones.
      dtype: that of the parameters.
      mesh: where to place them; None for the default device.
      rules: logical to mesh axes.

    Returns:
      the shape, the parameters, and the target's ids of the tokens that it can draft; None for all of them.

    Raises:
      FileNotFoundError: for a missing file.
      ValueError: for a file that is broken, or a head of another target.
    """
    directory = pathlib.Path(directory)
    tensors = _Tensors(directory)
    with files.naming(directory / "config.json"):
        config = _config(directory, tensors, target, taps, dtype)
        tokens = _tokens(tensors, config.layer.vocab_size, target) if config.own_head else None
    shapes = _shapes(config)
    ignored = {"d2t", "t2d"} | (set() if config.own_head else {"lm_head.weight"})
    mapping.check_names(shapes, set(tensors.names) - ignored, str(directory))
    return config, _params(config, mapping.checked(tensors.get, shapes), mesh, rules), tokens
