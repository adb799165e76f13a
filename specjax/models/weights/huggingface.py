"""Reads a Hugging Face model, decoder-only or T5: a directory with `config.json` and safetensors, or a hub id."""

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from specjax import files
from specjax.models import families
from specjax.models.config import ModelConfig
from specjax.models.weights import lazy
from specjax.parallel import sharding
from specjax.types import Tree

_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""The files that are downloaded from a hub repository."""


def parse_config(raw: Mapping[str, Any], dtype: str = "float32", names: Collection[str] | None = None) -> ModelConfig:
    """The shape of a model from its `config.json`, as transformers 4 or 5 wrote it.

    Args:
      raw: the parsed file.
      dtype: "float32" or "bfloat16", that of the weights once loaded; the file's own is ignored.
      names: the names of its tensors, where they are known.

    Raises:
      ValueError: for a model type, rope type or option that no family computes.
    """
    family = families.published(raw.get("model_type"))
    if quantized := raw.get("quantization_config"):
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, Mapping) else "unknown"
        raise ValueError(
            f"The weights are quantised ({method}): load the original model, or a GGUF file, which specjax dequantises."
        )
    return family.parse(raw, names, dtype)


class Shards:
    """The tensors of one or several safetensors files, read from disk when they are requested."""

    def __init__(self, directory: pathlib.Path):
        """Finds the files and checks that all of them exist."""
        self._files = {name: self._open(directory / file) for name, file in self._index(directory).items()}

    def _index(self, directory: pathlib.Path) -> dict[str, str]:
        """The file name of each tensor."""
        single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
        self._handles: dict[pathlib.Path, Any] = {}
        if index.is_file():
            weight_map = files.read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index} has no 'weight_map': copy or download it again.")
            for name, file in weight_map.items():
                # A path would lead out of the directory.
                if (
                    not isinstance(file, str)
                    or pathlib.PurePath(file).name != file
                    or file in ("", "..")
                    or "\0" in file
                ):
                    shown = files.listed([file])
                    raise ValueError(f"{index} says that {name!r:.80} is in {shown}, which names no file beside it.")
            return weight_map
        if single.is_file():
            return dict.fromkeys(self._open(single).keys(), single.name)
        raise FileNotFoundError(
            f"{directory} has neither model.safetensors nor model.safetensors.index.json: download the model's "
            "safetensors files, or convert its weights with transformers' save_pretrained."
        )

    def _open(self, path: pathlib.Path) -> Any:
        if path not in self._handles:
            if not path.is_file():
                raise FileNotFoundError(
                    f"Shard {path} is missing, though the index beside it names it: download or copy that file again."
                )
            import safetensors

            try:
                self._handles[path] = safetensors.safe_open(str(path), framework="numpy")
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(f"{path} is not a whole safetensors file ({error}): download it again.") from error
        return self._handles[path]

    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._files)

    def get(self, name: str) -> lazy.LazyArray:
        """A tensor of floats; nothing is read yet."""
        import safetensors

        try:
            part = self._files[name].get_slice(name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"Tensor {name!r} is not where the index says ({error}): download it again.") from error
        if part.get_dtype() not in _DTYPES:
            raise ValueError(f"Tensor {name!r} is of dtype {part.get_dtype()}: specjax loads F16, BF16, F32 and F64.")

        def read(region: lazy.Region) -> np.ndarray:
            try:
                return part[region] if region else self._files[name].get_tensor(name)
            except safetensors.SafetensorError as error:
                raise ValueError(f"Tensor {name!r} cannot be read ({error}): download its file again.") from error

        return lazy.LazyArray(part.get_shape(), jnp.dtype(_DTYPES[part.get_dtype()]), read)

    def whole(self, name: str) -> np.ndarray:
        """A tensor of any type, read."""
        import safetensors

        try:
            return self._files[name].get_tensor(name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"Tensor {name!r} cannot be read ({error}): download its file again.") from error


def load(
    directory: str | pathlib.Path,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.RULES,
) -> tuple[ModelConfig, Tree]:
    """Loads a model that transformers' `save_pretrained` wrote, sharded or not.

    Args:
      directory: where `config.json` and the safetensors files are.
      dtype: "float32" or "bfloat16", that of the parameters.
      mesh: where to place the parameters; None for the default device.
      rules: logical to mesh axes.

    Returns:
      The model's shape and its parameters.

    Raises:
      FileNotFoundError: for a missing directory or file.
      ValueError: for a model that specjax does not compute, or files that are broken or do not belong together.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory: give one that holds config.json.")
    raw, shards = files.read_json(directory / "config.json"), Shards(directory)
    with files.naming(directory / "config.json"):
        config = parse_config(raw, dtype, shards.names())
    return families.of(config).read(
        config, raw["model_type"], shards.names(), shards.get, source=str(directory), mesh=mesh, rules=rules
    )


def is_cached(repo_id: str) -> bool:
    """Whether the hub's own cache has a repository; False for a string that is not a hub id."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return isinstance(huggingface_hub.try_to_load_from_cache(repo_id, "config.json"), str)
    except errors.HFValidationError:
        return False


def download(repo_id: str, patterns: Collection[str] = HUB_FILES) -> pathlib.Path:
    """Downloads the files of a hub repository that specjax reads, or finds them in the hub's own cache.

    Args:
      repo_id: e.g. "HuggingFaceTB/SmolLM2-135M-Instruct".
      patterns: the names of the files.

    Returns:
      The local directory.

    Raises:
      OSError: where the hub cannot be reached or does not give the repository.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=list(patterns)))
    except (OSError, ValueError, errors.HfHubHTTPError, errors.HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(
            f"{repo_id!r} is not a local file or directory, and the Hugging Face hub did not give it ({reason}): check "
            "the name and the network, or download the model elsewhere and give its directory."
        ) from error
