"""Saves and restores a model: orbax for the parameters, `specjax.json` for the shape.

    directory/
      specjax.json    format version, shape, size and CRC-32 of every file of the parameters, and a CRC-32 of all this;
                      written last, so that a directory that has it is complete
      params/         orbax

The checksums are checked before the shape is used, and before orbax reads: an edited `rope_theta` would change the
text, an edited size would be allocated, and orbax reads a flipped byte as data and reports a missing file from a dozen
threads.
"""

import collections
import dataclasses
import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from specjax import files
from specjax.models import families
from specjax.models.config import Experts, LinearRopeScaling, Llama3RopeScaling, LongRopeScaling, ModelConfig
from specjax.models.quantisation import Quantisation
from specjax.parallel import sharding
from specjax.types import Tree

CONFIG_FILE = "specjax.json"
FORMAT = 5
"""The version that this code writes, and the only one that it reads."""

_PARAMS = "params"
_SCALINGS = {"llama3": Llama3RopeScaling, "linear": LinearRopeScaling, "longrope": LongRopeScaling}


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The shape as JSON values."""
    values = dataclasses.asdict(config)
    for kind, scaling in _SCALINGS.items():
        if isinstance(getattr(config, "rope_scaling", None), scaling):
            values["rope_scaling"] = {"type": kind, **values["rope_scaling"]}
    return {"family": families.name_of(config), **values}


def config_from_json(values: Mapping[str, Any]) -> ModelConfig:
    """The shape from the values of `config_to_json`.

    Raises:
      ValueError: for a family that specjax does not know.
    """
    values = dict(values)
    family = values.pop("family", None)
    if family not in families.FAMILIES:
        raise ValueError(f"family {family!r} is unknown: specjax reads {', '.join(families.FAMILIES)}")
    if scaling := values.get("rope_scaling"):
        entries = {name: tuple(x) if isinstance(x, list) else x for name, x in scaling.items()}
        kind = str(entries.pop("type"))
        values["rope_scaling"] = _SCALINGS[kind](**entries)
    if values.get("experts"):
        values["experts"] = Experts(**values["experts"])
    for name in ("quantisation", "head_quantisation"):
        if values.get(name):
            values[name] = Quantisation(**values[name])
    for name in ("global_layers", "head_tokens"):
        if name in values:  # JSON has no tuples
            values[name] = tuple(values[name])
    return families.FAMILIES[family].config(**values)


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
      OSError: where the files cannot be written, naming them.
    """
    import orbax.checkpoint as ocp

    expected = families.abstract_params(config)
    if jax.tree.structure(expected) != jax.tree.structure(params):
        raise ValueError("The parameters are not the tree of this configuration: save a model as it was loaded.")
    directory = pathlib.Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory / _PARAMS, params, force=True)
    except OSError as error:
        raise files.cannot_write(directory / _PARAMS, error) from error
    text = json.dumps(describe(config, _manifest(directory)), indent=2) + "\n"
    files.write(directory / CONFIG_FILE, text)


def _checksum(content: Mapping[str, Any]) -> int:
    """CRC-32 of what a description says, apart from the checksum itself."""
    values = {key: value for key, value in content.items() if key != "crc32"}
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def describe(config: ModelConfig, manifest: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What `specjax.json` says, as JSON values.

    Args:
      config: the shape.
      manifest: size and CRC-32 of every file of the parameters, by its path.
    """
    content = {"format": FORMAT, "config": config_to_json(config), "files": dict(manifest)}
    return content | {"crc32": _checksum(content)}


def read_description(directory: str | pathlib.Path) -> tuple[ModelConfig, dict[str, list[int]]]:
    """The shape, and size and CRC-32 of every file of the parameters; these files are not read.

    Raises:
      FileNotFoundError: where the directory holds no complete checkpoint.
      ValueError: where the description is damaged or was edited.
    """
    path = pathlib.Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} is not a complete specjax checkpoint: {CONFIG_FILE} is missing, which is written last. "
            "Save the model again."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is corrupt ({error!r}): save the model again.") from error
    if version != FORMAT:
        raise ValueError(
            f"{path} is of format {version!r}, this specjax reads {FORMAT}: use a matching release, or save again."
        )
    if content.get("crc32") != _checksum(content):
        raise ValueError(
            f"{path} is corrupt: its checksum does not match its content. Save the model again with the "
            "configuration that it should have (`specjax.save`); an edited file may not fit the weights."
        )
    try:
        return config_from_json(content["config"]), content["files"]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not describe a model ({error}): save the model again.") from error


def _differ(expected: Tree, stored: Tree) -> str:
    """How the shapes of the arrays differ from those in the files; empty where they are the same."""
    wanted, found = (collections.Counter(tuple(x.shape) for x in jax.tree.leaves(tree)) for tree in (expected, stored))
    missing, more = (sorted(a - b) for a, b in ((wanted, found), (found, wanted)))
    if not missing and not more:
        return ""
    shown = [", ".join(map(str, shapes[:3])) or "nothing" for shapes in (missing, more)]
    return f"it has arrays of shape {shown[0]}, they have {shown[1]}"


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
    config, manifest = read_description(directory)
    _check_files(directory, manifest)
    device = jax.devices()[0]

    def place(shape: tuple[int, ...], axes: sharding.Axes) -> jax.sharding.Sharding:
        return SingleDeviceSharding(device) if mesh is None else sharding.named_sharding(mesh, shape, axes, rules)

    def target(leaf: jax.ShapeDtypeStruct, axes: sharding.Axes) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf.shape, axes))

    abstract = jax.tree.map(target, families.abstract_params(config), families.param_axes(config))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored: Any = checkpointer.metadata(directory / _PARAMS)
            unlike = _differ(abstract, stored.item_metadata.tree)
            # orbax would report it from as many threads as there are arrays.
            params = None if unlike else checkpointer.restore(directory / _PARAMS, abstract)
    except Exception as error:  # orbax and tensorstore raise a dozen types for a damaged directory
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{directory} is corrupt or incomplete ({reason[:200]}): copy or save the checkpoint again."
        ) from error
    if unlike:
        raise ValueError(
            f"{directory} is corrupt: {CONFIG_FILE} does not fit the weights ({unlike}). Save the checkpoint again."
        )
    if dtype is not None and dtype != config.dtype:
        config, params = families.cast(config, params, dtype)
        params = jax.tree.map(
            lambda x, axes: jax.device_put(x, place(x.shape, axes)), params, families.param_axes(config)
        )
    return config, params
