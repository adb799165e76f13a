"""Trains a drafter that fills slots in one call (SpecDec), for an encoder-decoder."""

import dataclasses
import functools
import pathlib
from typing import Annotated

from specjax.experiments import one_call
from specjax.experiments.one_call import OneCall
from specjax.experiments.reports.display import View
from specjax.experiments.settings import Config, at_least, between, given, parse
from specjax.training import drafts, slots, specdec
from specjax.training.fit import Run, Task


@dataclasses.dataclass(frozen=True)
class Settings(OneCall):
    """The keys of `configs/specdec.py`."""

    target: Annotated[str, given("SOURCE")]
    num_layers: Annotated[int, at_least(1)]
    num_slots: Annotated[int, at_least(1)]
    num_points: Annotated[int, at_least(1)]
    copy_source: bool
    glance_first: Annotated[float, between(0, 1, ", a share")]
    glance_last: Annotated[float, between(0, 1, ", a share")]


def _prepare(chosen: Settings, view: View) -> Run:
    mesh = one_call.mesh_of(chosen)
    target = one_call.model_of(chosen.target, mesh, view)
    assert target.tokenizer is not None
    try:
        layers = drafts.spread(target.config.num_layers, chosen.num_layers)
        config, params = drafts.from_layers(target.config, target.params, layers)
        config = slots.adapted(config, chosen.mask_token)
        if chosen.copy_source:
            config, params = specdec.with_copies(config, params)
        training, held_out = (
            specdec.with_slots(texts, chosen.mask_token, chosen.num_slots, chosen.num_points)
            for texts in one_call.texts(chosen, target)
        )
    except ValueError as error:
        raise ValueError(f"config.{error}") from error
    steps = chosen.optimisation.num_steps
    glanced = specdec.glanced(training, config, steps, first=chosen.glance_first, last=chosen.glance_last)
    names = ("target", "mask_token", "num_layers", "num_slots", "num_points", "copy_source")
    names += ("glance_first", "glance_last")
    task = Task(training.objective, identity={"specdec": {name: getattr(chosen, name) for name in names}})
    return Run(config, chosen.optimisation, glanced, held_out, target.tokenizer, mesh, task, params)


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Trains a drafter, as `EXPERIMENTS` says; FloatingPointError where the loss is not finite."""
    chosen = parse(Settings, config)
    one_call.train(
        config,
        chosen,
        functools.partial(_prepare, chosen),
        workdir,
        overwrite=overwrite,
        view=view or View(),
        begins_with=chosen.target,
        drafter="nonautoregressive",
        num_draft_tokens=chosen.num_slots,
    )
