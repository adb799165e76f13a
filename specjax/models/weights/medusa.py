"""Medusa's published heads: files of tensors `{head}.{layer}.linear.weight|bias` and `{head}.{layers}.weight`.

`config.json` beside them states counts, which are not trusted: published ones say two heads where five are stored.
Heads without `{head}.{layers}.weight` share the target's output matrix, as text-generation-inference has them.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from specjax import files
from specjax.models import linear
from specjax.models.parallel_heads import MAX_HEADS, ParallelHeadsConfig
from specjax.models.weights import torch_file
from specjax.types import Tree

SAFE, PICKLED, CONFIG = "medusa_lm_head.safetensors", "medusa_lm_head.pt", "config.json"
"""The names of the files; the first is read where both are there."""

_BLOCK = re.compile(r"(?:medusa_heads?\.)?(\d+)\.(\d+)\.linear\.(weight|bias)")
_OUTPUT = re.compile(r"(?:medusa_heads?\.)?(\d+)\.(\d+)\.weight")


def find(directory: pathlib.Path) -> pathlib.Path:
    """The file of the heads in a directory, or the file itself.

    Raises:
      FileNotFoundError: where there is none.
    """
    if directory.is_file():
        return directory
    for name in (SAFE, PICKLED):
        if (directory / name).is_file():
            return directory / name
    raise FileNotFoundError(f"{directory} has neither {SAFE} nor {PICKLED}: give the directory of Medusa heads.")


def tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file.

    Raises:
      ValueError: for a file that is broken, or holds anything but tensors.
    """
    if path.suffix != ".safetensors":
        return torch_file.read(path)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): download it again.") from error


def _parse(found: Mapping[str, np.ndarray]) -> tuple[dict[tuple[int, int, str], np.ndarray], dict[int, np.ndarray]]:
    """The weights and biases by head, layer and kind, and the output matrices by head.

    Raises:
      ValueError: for a tensor of another name.
    """
    blocks: dict[tuple[int, int, str], np.ndarray] = {}
    outputs: dict[int, np.ndarray] = {}
    for name, tensor in found.items():
        if block := _BLOCK.fullmatch(name):
            blocks[int(block[1]), int(block[2]), block[3]] = tensor
        elif output := _OUTPUT.fullmatch(name):
            outputs[int(output[1])] = tensor
        else:
            raise ValueError(f"Tensor {name!r:.80} is not one of Medusa's heads (0.0.linear.weight, 0.1.weight ...).")
    return blocks, outputs


def shape(found: Mapping[str, np.ndarray], dtype: str) -> ParallelHeadsConfig:
    """The shape that the tensors have.

    Raises:
      ValueError: for tensors that are missing, or do not fit together.
    """
    blocks, outputs = _parse(found)
    if not blocks:
        raise ValueError("No tensor 0.0.linear.weight: this file holds no Medusa heads.")
    number, layers = 1 + max(head for head, _, _ in blocks), 1 + max(layer for _, layer, _ in blocks)
    if number > MAX_HEADS or layers > MAX_HEADS:
        raise ValueError(f"{number} heads of {layers} layers: more than {MAX_HEADS} of either are not loaded.")
    first = next(iter(blocks.values()))
    width = first.shape[0] if first.ndim else 0
    wanted = (
        f"{head}.{layer}.linear.{kind}"
        for head in range(number)
        for layer in range(layers)
        for kind in ("weight", "bias")
    )
    present = {f"{head}.{layer}.linear.{kind}" for head, layer, kind in blocks}
    if missing := [name for name in wanted if name not in present]:
        raise ValueError(f"Tensor {missing[0]} is missing: download the heads again.")
    for (head, layer, kind), tensor in blocks.items():
        if tensor.shape != ((width, width) if kind == "weight" else (width,)):
            raise ValueError(
                f"Tensor {head}.{layer}.linear.{kind} has shape {tensor.shape}, for heads of width {width}."
            )
    if outputs and set(outputs) != set(range(number)):
        raise ValueError(f"{len(outputs)} of {number} heads have output matrices: download the heads again.")
    rows = outputs[0].shape[0] if outputs and outputs[0].ndim else 0
    for head, tensor in outputs.items():
        if tensor.shape != (rows, width):
            raise ValueError(f"The output matrix of head {head} has shape {tensor.shape}, not {(rows, width)}.")
    return ParallelHeadsConfig("medusa", number, width, layers, output_size=rows, dtype=dtype)


def read(source: pathlib.Path, dtype: str) -> tuple[ParallelHeadsConfig, Tree]:
    """Reads published heads.

    Args:
      source: a directory or a file.
      dtype: "float32" or "bfloat16", that of the parameters.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for a file that is broken, or holds something else.
    """
    path = find(source)
    found = tensors(path)
    with files.naming(path):
        config = shape(found, dtype)
    blocks, outputs = _parse(found)

    def matrix(tensor: np.ndarray) -> dict[str, Any]:
        """torch keeps `[out, in]`."""
        return {"values": jnp.asarray(tensor if linear.outputs_first(dtype) else tensor.T, dtype)}

    def block(head: int, layer: int) -> dict[str, Any]:
        bias = jnp.asarray(blocks[head, layer, "bias"], dtype)
        return {"linear": matrix(blocks[head, layer, "weight"]), "bias": bias}

    heads = {k: {n: block(k, n) for n in range(config.num_layers)} for k in range(config.num_heads)}
    params: dict[str, Any] = {"states": {"heads": heads}}
    if config.output_size:
        params["outputs"] = {k: matrix(outputs[k]) for k in range(config.num_heads)}
    return config, params


def write(config: ParallelHeadsConfig, params: Tree, directory: pathlib.Path, info: Mapping[str, Any]) -> None:
    """Writes heads as Medusa's are published, with the true counts.

    Args:
      config: their shape.
      params: their parameters.
      directory: made if it does not exist.
      info: JSON values that `config.json` has besides.

    Raises:
      ValueError: for heads that are not Medusa's.
    """
    import json

    from safetensors.numpy import save_file

    if config.kind != "medusa":
        raise ValueError(f"kind={config.kind!r}: only Medusa's heads have this layout.")

    def weight(matrix: Mapping[str, Any]) -> np.ndarray:
        values = np.asarray(matrix["values"])
        return np.ascontiguousarray(values if linear.outputs_first(config.dtype) else values.T)

    found: dict[str, np.ndarray] = {}
    for head, blocks in params["states"]["heads"].items():
        for layer, block in blocks.items():
            found[f"{head}.{layer}.linear.weight"] = weight(block["linear"])
            found[f"{head}.{layer}.linear.bias"] = np.asarray(block["bias"])
    for head, output in params.get("outputs", {}).items():
        found[f"{head}.{config.num_layers}.weight"] = weight(output)
    counts = {"medusa_num_heads": config.num_heads, "medusa_num_layers": config.num_layers}
    directory.mkdir(parents=True, exist_ok=True)
    files.write(directory / CONFIG, json.dumps(counts | dict(info), indent=1) + "\n")
    with files.replacing(directory / SAFE) as unfinished:
        save_file(found, unfinished)
