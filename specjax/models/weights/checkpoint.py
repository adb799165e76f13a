"""Saves and restores a model: orbax for the parameters, `specjax.json` for the shape.

    directory/
      specjax.json    format version, shape, size and CRC-32 of every file of the parameters; written last, so that a
                      directory with it was written to the end
      params/         orbax

The checksums are looked at before orbax reads: it takes a flipped byte for data, and reports a missing file from a
dozen threads.
"""

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from specjax import sharding
from specjax.models import families
from specjax.models.config import DecoderConfig, LinearRopeScaling, Llama3RopeScaling, ModelConfig, T5Config
from specjax.types import Tree

CONFIG_FILE = "specjax.json"
FORMAT = 2
"""The version that this code writes, and the only one that it reads."""

_PARAMS = "params"
_SCALINGS = {"llama3": Llama3RopeScaling, "linear": LinearRopeScaling}
_FAMILIES = {"decoder": DecoderConfig, "t5": T5Config}


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The shape as JSON values."""
    values = dataclasses.asdict(config)
    for kind, scaling in _SCALINGS.items():
        if isinstance(config, DecoderConfig) and isinstance(config.rope_scaling, scaling):
            values["rope_scaling"] = {"type": kind, **values["rope_scaling"]}
    (family,) = (name for name, cls in _FAMILIES.items() if isinstance(config, cls))
    return {"family": family, **values}


def config_from_json(values: Mapping[str, Any]) -> ModelConfig:
    """The shape from what `config_to_json` gave.

    Raises:
      ValueError: for a family that specjax does not know.
    """
    values = dict(values)
    family = values.pop("family", None)
    if family not in _FAMILIES:
        raise ValueError(f"family {family!r} is unknown: specjax reads {', '.join(_FAMILIES)}")
    if scaling := values.get("rope_scaling"):
        entries = dict(scaling)
        values["rope_scaling"] = _SCALINGS[entries.pop("type")](**entries)
    if "global_layers" in values:  # JSON knows no tuples
        values["global_layers"] = tuple(values["global_layers"])
    return _FAMILIES[family](**values)


def _crc32(path: pathlib.Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _manifest(directory: pathlib.Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file of the parameters."""
    files = sorted(path for path in (directory / _PARAMS).rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): [path.stat().st_size, _crc32(path)] for path in files}


def _check_files(directory: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    for name, (size, crc) in manifest.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found != size or _crc32(path) != crc:
            what = "is missing" if found is None else f"has {found} bytes of {size}" if found != size else "is damaged"
            raise ValueError(f"{directory} is corrupt: {name} {what}. Copy or save the checkpoint again.")


def save(directory: str | pathlib.Path, config: ModelConfig, params: Tree) -> None:
    """Writes a model into a directory, in place of what specjax wrote there before.

    Args:
      directory: made if it does not exist.
      config: the shape.
      params: the parameters, on one device or sharded.

    Raises:
      ValueError: where `params` is not the tree of `config`.
    """
    import orbax.checkpoint as ocp

    expected = families.abstract_params(config)
    if jax.tree.structure(expected) != jax.tree.structure(params):
        raise ValueError("The parameters are not the tree of this configuration: save a model as it was loaded.")
    directory = pathlib.Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / _PARAMS, params, force=True)
    content = {"format": FORMAT, "config": config_to_json(config), "files": _manifest(directory)}
    (directory / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_config(directory: pathlib.Path) -> ModelConfig:
    """The shape, once all files have been found whole."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} is not a complete specjax checkpoint: {CONFIG_FILE} is missing, which is written last. "
            "Save the model again."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, values, manifest = content["format"], content["config"], dict(content["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is corrupt ({error!r}): save the model again.") from error
    if version != FORMAT:
        raise ValueError(f"{path} is of format {version}, this specjax reads {FORMAT}: use a matching release.")
    _check_files(directory, manifest)
    try:
        return config_from_json(values)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} describes no model ({error}): save the model again.") from error


def restore(
    directory: str | pathlib.Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.RULES,
) -> tuple[ModelConfig, Tree]:
    """Reads a model that `save` wrote; each device reads its own part.

    Args:
      directory: where it is.
      dtype: "float32" or "bfloat16" to convert the parameters; None for the dtype that was saved.
      mesh: where to place the parameters; None for the default device.
      rules: logical to mesh axes.

    Returns:
      The model's shape and its parameters.

    Raises:
      FileNotFoundError: where the directory holds no complete checkpoint.
      ValueError: for a corrupt one.
    """
    import orbax.checkpoint as ocp

    directory = pathlib.Path(directory).absolute()
    config = _read_config(directory)
    device = jax.devices()[0]

    def place(shape: tuple[int, ...], axes: sharding.Axes) -> jax.sharding.Sharding:
        return SingleDeviceSharding(device) if mesh is None else sharding.named_sharding(mesh, shape, axes, rules)

    def target(leaf: jax.ShapeDtypeStruct, axes: sharding.Axes) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf.shape, axes))

    abstract = jax.tree.map(target, families.abstract_params(config), families.param_axes(config))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(directory / _PARAMS, abstract)
    except Exception as error:  # orbax and tensorstore raise a dozen types for a damaged directory
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{directory} is corrupt or incomplete ({reason[:200]}): copy or save the checkpoint again."
        ) from error
    if dtype is not None and dtype != config.dtype:
        config, params = families.cast(config, params, dtype)
        params = jax.tree.map(
            lambda x, axes: jax.device_put(x, place(x.shape, axes)), params, families.param_axes(config)
        )
    return config, params
