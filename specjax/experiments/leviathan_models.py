"""The models of the experiment of Leviathan et al. 2022: trained, distilled, loaded or inflated."""

import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from specjax import files
from specjax.api.pretrained import Pretrained
from specjax.experiments import bench, distill, train
from specjax.experiments.reports.display import View
from specjax.experiments.settings import Config
from specjax.models import families, inflate
from specjax.text.tokenizer import SPIECE
from specjax.training import fit, sizes

LAYERS = "layers"
"""The value of a model's `distil` for a draft that begins as some of the target's layers."""


def check(
    models: Mapping[str, Mapping[str, Any]], training: Mapping[str, Any], sizes_of_large: Mapping[str, int]
) -> None:
    """Refuses models that cannot be made, before anything is trained.

    Args:
      models: the models of the experiment by name, as `configs/leviathan/experiment.py` has them.
      training: how those without a source are trained.
      sizes_of_large: what the target is inflated to, or zeros.

    Raises:
      ValueError: naming the key, its value and the remedy.
    """
    if "target" not in models:
        raise ValueError(f"config.models has no 'target', only {', '.join(models)}.")
    target = models["target"]
    for name, model in models.items():
        begin = model["distil"]
        others = [other for other, made in models.items() if other != "target" and not made["distil"]]
        if begin and (name == "target" or model["source"] or begin not in (LAYERS, *others)):
            known = ", ".join((LAYERS, *others))
            raise ValueError(
                f"config.models.{name}.distil={begin!r}: a draft without a source begins as one of {known}; else leave "
                "it empty."
            )
        if begin == LAYERS and model["model"]["num_layers"] < 1:
            raise ValueError(f"config.models.{name}.model.num_layers=0: say how many layers of the target it keeps.")
    if any(sizes_of_large.values()) and not target["source"]:
        kind, size = training["kind"], target["size"]
        shape = sizes.model_config(kind, size, training["vocab_size"], target["model"])
        try:
            inflate.shape(shape, sizes_of_large)
        except ValueError as error:
            raise ValueError(f"config.{error}") from error


def _directory(directory: pathlib.Path, name: str) -> pathlib.Path:
    return directory / "models" / name


def _source(config: Config, directory: pathlib.Path, name: str) -> str:
    """Where a model is loaded from: its source, or where this run saves it."""
    return config.models[name].source or str(_directory(directory, name) / fit.MODEL)


def _train(config: Config, name: str, directory: pathlib.Path, view: View, overwrite: bool) -> None:
    """Trains a model, resumes, or finds it trained. The target's run makes the vocabulary."""
    view.line(f"Training {name}", "bold")
    made: Any = ConfigDict(config.training.to_dict())
    model, target = config.models[name], config.models.target
    made.update(name=name, data=config.train, valid=config.valid, size=model.size, num_steps=model.num_steps)
    made.model.update(model.model.to_dict())
    if name != "target":
        made.vocabulary = target.source or str(_directory(directory, "target") / SPIECE)
    train.run(made, _directory(directory, name), overwrite=overwrite, view=view)


def _distil(config: Config, name: str, directory: pathlib.Path, view: View, overwrite: bool) -> None:
    """Distils a draft from the target, resumes, or finds it distilled."""
    view.line(f"Distilling {name}", "bold")
    made: Any = ConfigDict(config.distilling.to_dict())
    model = config.models[name]
    made.update(name=name, data=config.train, valid=config.valid, num_steps=model.num_steps)
    made.target = _source(config, directory, "target")
    if model.distil == LAYERS:
        made.model.num_layers = model.model.num_layers
    else:
        made.draft = _source(config, directory, model.distil)
    distill.run(made, _directory(directory, name), overwrite=overwrite, view=view)


def load(config: Config, directory: pathlib.Path, view: View, overwrite: bool) -> dict[str, Pretrained]:
    """All models, the target first: loaded from their sources, or trained or distilled here first."""
    loaded: dict[str, Pretrained] = {}
    # A distilled draft needs the target, or another draft.
    for name, model in sorted(config.models.items(), key=lambda item: (item[0] != "target", bool(item[1].distil))):
        if not model.source:
            (_distil if model.distil else _train)(config, name, directory, view, overwrite)
        loaded[name] = bench.load(_source(config, directory, name), view, dtype=config.dtype)
    if loaded["target"].tokenizer is None:
        raise ValueError(f"The target {config.models.target.source} has no tokenizer: save one beside it.")
    return loaded


def seconds(models: Mapping[str, Mapping[str, Any]], directory: pathlib.Path) -> dict[str, float]:
    """The seconds of training, by model."""
    found = {}
    for name, model in models.items():
        if not model["source"]:
            curve = files.read_json_lines(_directory(directory, name) / fit.CURVE)
            found[f"training {name}"] = sum(line.get("seconds", 0.0) for _, line in curve)
    return found


def distilled(models: Mapping[str, Mapping[str, Any]], directory: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """By distilled draft: the validations before its training and of the greatest acceptance rate."""
    found = {}
    for name, model in models.items():
        if model["distil"]:
            curve = [line for _, line in files.read_json_lines(_directory(directory, name) / fit.CURVE)]
            valid = [line for line in curve if "alpha" in line and "valid_loss" in line]
            found[name] = [valid[0], max(valid, key=lambda line: line["alpha"])]
    return found


def inflated(target: Pretrained, sizes_of_large: Mapping[str, int], seed: int) -> Pretrained:
    """The target with the same logits and the cost of a larger model, or as it is where all sizes are 0.

    Raises:
      ValueError: for sizes that are below the target's, or a target that is no T5.
    """
    if not any(sizes_of_large.values()):
        return target
    try:
        config, params = inflate.inflate(target.config, target.params, sizes_of_large, seed=seed)
    except ValueError as error:
        raise ValueError(f"config.{error}") from error
    return target._replace(model=families.model(config), params=params, config=config)
