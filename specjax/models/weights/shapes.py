"""The shape of a published model, without its weights."""

import dataclasses
import pathlib

from specjax import files
from specjax.models import presets
from specjax.models.config import ModelConfig
from specjax.models.weights import checkpoint, huggingface


def _download(repo_id: str) -> pathlib.Path:
    """The directory of a hub repository's `config.json`, the only file that is downloaded."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(repo_id, "config.json")).parent
    except (OSError, ValueError, errors.HfHubHTTPError, errors.HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(
            f"{repo_id!r} is neither a preset ({', '.join(presets.PRESETS)}) nor a directory, and the Hugging Face hub "
            f"did not give its config.json ({reason}): check the name and the network."
        ) from error


def directory(source: str | pathlib.Path) -> pathlib.Path:
    """The directory of a model's `config.json`: the one that is named, or where that of a hub repository lies.

    Raises:
      OSError: where the hub does not give the file.
    """
    path = pathlib.Path(source).expanduser()
    return path if path.is_dir() else _download(str(source))


def read(source: str | pathlib.Path, dtype: str = "bfloat16") -> ModelConfig:
    """Reads the shape of a model.

    Args:
      source: the name of a preset (`models.presets`), a directory with `config.json` or one that `save` wrote, or a hub
        id.
      dtype: "float32" or "bfloat16", that of the parameters, the products and the cache.

    Raises:
      FileNotFoundError: for a directory without either file.
      OSError: where the hub does not give the file.
      ValueError: for a model that specjax does not compute, or a broken file.
    """
    if str(source) in presets.PRESETS:
        return dataclasses.replace(presets.get(str(source)), dtype=dtype)
    path = directory(source)
    if (path / checkpoint.CONFIG_FILE).is_file():
        config = checkpoint.read_description(path)[0]
        return dataclasses.replace(config, dtype=dtype)
    return huggingface.parse_config(files.read_json(path / "config.json"), dtype)
