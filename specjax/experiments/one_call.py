"""What all runs share that train a model to predict several tokens in one call: texts, the loop, and the page."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Annotated

from jax.sharding import Mesh

from specjax.api.pretrained import Pretrained, load
from specjax.experiments import board
from specjax.experiments.reports import one_call as report
from specjax.experiments.reports import plots
from specjax.experiments.reports.display import View
from specjax.experiments.settings import Config, at_least, given
from specjax.experiments.store import Store, clear
from specjax.experiments.training_progress import Progress
from specjax.parallel import sharding
from specjax.training import data as data_lib
from specjax.training import fit
from specjax.training.config import TrainConfig
from specjax.training.data import Dataset
from specjax.training.fit import Run

PLOT = "acceptance.png"

FILES = (*fit.FILES, "config.json", "summary.md", PLOT, board.DIRECTORY)
"""The files of a run in its work directory."""


@dataclasses.dataclass(frozen=True)
class OneCall:
    """The keys that these runs share."""

    name: str
    mask_token: Annotated[int, at_least(0)]
    data: Annotated[str, given("FILE")]
    valid: Annotated[str, given("FILE")]
    num_valid: Annotated[int, at_least(1)]
    target_length: Annotated[int, at_least(2)]
    source_length: Annotated[int, at_least(1)]
    mesh_data: Annotated[int, at_least(1)]
    mesh_model: Annotated[int, at_least(1)]
    tensorboard: Annotated[bool, board.INSTALLED]
    optimisation: TrainConfig


def mesh_of(chosen: OneCall) -> Mesh | None:
    """The mesh that is asked for, or None for one device."""
    if chosen.mesh_data * chosen.mesh_model == 1:
        return None
    return sharding.make_mesh(data=chosen.mesh_data, model=chosen.mesh_model)


def model_of(source: str, mesh: Mesh | None, view: View) -> Pretrained:
    """A model with a tokenizer, in float32.

    Raises:
      ValueError: for a model without one.
    """
    with view.status(f"Loading {source}"):
        found = load(source, mesh=mesh)
    if found.tokenizer is None:
        raise ValueError(f"{source} has no tokenizer: save one beside it (tokenizer.json).")
    return found


def texts(chosen: OneCall, model: Pretrained) -> tuple[Dataset, Dataset]:
    """The texts to train on, and the held-out ones."""
    assert model.tokenizer is not None
    lengths = {"target_length": chosen.target_length, "source_length": chosen.source_length}
    start, found = model.model.start_token, []
    for path in (chosen.data, chosen.valid):
        encoded = data_lib.encode(data_lib.read(path), model.tokenizer, start_token=start, **lengths)
        found.append(data_lib.dataset(encoded, start_token=start, seed=chosen.optimisation.seed, **lengths))
    return found[0], dataclasses.replace(found[1], rows=found[1].rows[: chosen.num_valid])


def train(
    config: Config,
    chosen: OneCall,
    prepare: Callable[[View], Run],
    workdir: str | pathlib.Path,
    *,
    overwrite: bool,
    view: View,
    begins_with: str,
    drafter: str,
    num_draft_tokens: int,
) -> None:
    """Trains, and writes the page.

    Args:
      config: the run's.
      chosen: its settings.
      prepare: loads the model and the texts.
      workdir: the directory of the run.
      overwrite: whether to delete an earlier run there.
      view: the screen.
      begins_with: a model that `overwrite` spares.
      drafter: that of the model, for flags.
      num_draft_tokens: K of the drafter.

    Raises:
      KeyboardInterrupt: as `fit.fit`, which resumes from the last checkpoint.
      FloatingPointError: where the loss is not finite.
    """
    store = Store(workdir, config.to_dict())
    store.directory.mkdir(parents=True, exist_ok=True)
    if overwrite:
        clear(store.directory, FILES, kept=begins_with)
    try:
        prepared = prepare(view)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("no step was made") from None
    with (
        view.progress(prepared.config.num_steps, what="step", remaining=True) as bar,
        board.beside(Progress(view, prepared, bar, report.described), store.directory, chosen.tensorboard) as told,
    ):
        curve = fit.fit(prepared, store.directory, told)
    store.write_config()
    with view.status("Plotting"):
        plots.save(store.directory, {PLOT: report.figure(curve.valid)})
    store.write("summary.md", report.summary(chosen.name, PLOT, curve.valid))
    view.line(report.finding(curve.valid), "bold")
    view.line(f"Results: {store.directory}{os.sep} ({', '.join(('summary.md', PLOT, *fit.FILES[1:]))})")
    view.line(
        f"The draft: --config.drafter={drafter} --config.draft={store.directory / fit.MODEL} "
        f"--config.num_draft_tokens={num_draft_tokens} of configs/compare.py"
    )
