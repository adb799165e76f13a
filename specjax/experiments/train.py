"""Trains a model on texts, and saves it as `specjax.load` and `configs/compare.py` read it."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import Annotated

from jax.sharding import Mesh

from specjax.experiments import board
from specjax.experiments.reports import plots
from specjax.experiments.reports import train as report
from specjax.experiments.reports.display import View
from specjax.experiments.settings import Config, at_least, given, parse
from specjax.experiments.store import Store, clear
from specjax.experiments.training_progress import Progress
from specjax.models import families
from specjax.models.config import ModelConfig, T5Config
from specjax.parallel import sharding
from specjax.text.tokenizer import SPIECE, Tokenizer
from specjax.training import data, fit, sizes, vocabulary
from specjax.training.config import TrainConfig
from specjax.training.curve import Curve
from specjax.training.data import Dataset, Text
from specjax.training.fit import Run

FILES = (*fit.FILES, SPIECE, "config.json", "summary.md", "loss.png", board.DIRECTORY)
"""The files of a run in its work directory."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `configs/train.py`."""

    name: str
    data: Annotated[str, given("FILE")]
    valid: str
    vocabulary: str
    vocab_size: int
    extra_ids: int
    byte_fallback: bool
    kind: str
    size: str
    model: dict[str, int]
    target_length: Annotated[int, at_least(1)]
    source_length: Annotated[int, at_least(1)]
    mesh_data: Annotated[int, at_least(1)]
    mesh_model: Annotated[int, at_least(1)]
    tensorboard: Annotated[bool, board.INSTALLED]
    optimisation: TrainConfig

    def check(self) -> None:
        """Refuses an invalid shape."""
        if not 0 <= self.extra_ids < self.vocab_size:
            raise ValueError(f"config.extra_ids={self.extra_ids}: at least 0, and fewer than config.vocab_size.")
        try:
            sizes.model_config(self.kind, self.size, self.vocab_size, self.model)
        except ValueError as error:
            raise ValueError(f"config.{error}") from error


def _vocabulary(chosen: Settings, texts: Sequence[Text], workdir: pathlib.Path, view: View) -> Tokenizer:
    """The vocabulary: the given one, that of the run in the workdir, or one trained on the texts."""
    path = workdir / SPIECE
    if chosen.vocabulary:
        return vocabulary.load(chosen.vocabulary)
    if path.is_file():
        return vocabulary.load(path)
    with view.status(f"Training a vocabulary of {chosen.vocab_size} tokens"):
        return vocabulary.train(
            filter(None, itertools.chain.from_iterable(texts)),
            path,
            vocab_size=chosen.vocab_size,
            extra_ids=chosen.extra_ids,
            byte_fallback=chosen.byte_fallback,
        )


def _dataset(name: str, chosen: Settings, texts: Sequence[Text], tokenizer: Tokenizer, start: int | None, view: View):
    lengths = {"target_length": chosen.target_length, "source_length": chosen.source_length}
    with view.status(f"Tokenising and packing {len(texts)} texts"):
        encoded = data.encode(texts, tokenizer, start_token=start, **lengths)
        packed = data.dataset(encoded, start_token=start, seed=chosen.optimisation.seed, **lengths)
    cut = f", {encoded.num_cut} cut" if encoded.num_cut else ""
    dropped = f", {encoded.num_dropped} left out as too long" if encoded.num_dropped else ""
    view.line(
        f"{name}: {len(packed.examples)} texts, {packed.num_tokens} tokens in {len(packed.rows)} rows, "
        f"{packed.padding:.1%} padding{cut}{dropped}."
    )
    return packed


def _mesh(chosen: Settings) -> Mesh | None:
    if chosen.mesh_data * chosen.mesh_model == 1:
        return None
    return sharding.make_mesh(data=chosen.mesh_data, model=chosen.mesh_model)


def _prepare(chosen: Settings, workdir: pathlib.Path, view: View) -> Run:
    with view.status(f"Reading {chosen.data}"):
        texts = data.read(chosen.data)
        held_out = data.read(chosen.valid) if chosen.valid else []
    tokenizer = _vocabulary(chosen, texts, workdir, view)
    width = vocabulary.padded(max(tokenizer.vocab().values()) + 1)
    model_config: ModelConfig = sizes.model_config(chosen.kind, chosen.size, width, chosen.model)
    start = model_config.start_token if isinstance(model_config, T5Config) else None
    training = _dataset("Training", chosen, texts, tokenizer, start, view)
    valid: Dataset | None = None
    if held_out:
        valid = _dataset("Validation", chosen, held_out, tokenizer, start, view)
    return Run(model_config, chosen.optimisation, training, valid, tokenizer, _mesh(chosen))


def _finish(chosen: Settings, run: Run, curve: Curve, store: Store, view: View) -> None:
    shape = {
        "batch_size": run.config.batch_size,
        "data": len(run.data.at(0, ()).rows),
        "logits": run.model_config.vocab_size,
    }
    shape["parameters"] = families.num_params(run.model_config)
    found = report.facts(shape, curve.steps, curve.valid)
    for name, value in found:
        view.line(f"{name}: {value.replace('`', '')}", "bold")
    with view.status("Plotting"):
        plots.save(store.directory, {"loss.png": report.figure(curve.steps, curve.valid)})
    store.write("summary.md", report.summary(chosen.name, found))
    view.line(f"Results: {store.directory}{os.sep} ({', '.join(('summary.md', 'loss.png', *fit.FILES[1:]))})")
    view.line(f"The model: specjax.load({str(store.directory / fit.MODEL)!r})")


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Trains a model, as `EXPERIMENTS` says; FloatingPointError where the loss is not finite.

    `fit` resumes from the last checkpoint; some keys may change between runs.
    """
    view, chosen = view or View(), parse(Settings, config)
    store = Store(workdir, config.to_dict())
    store.directory.mkdir(parents=True, exist_ok=True)
    if overwrite:
        # But not the vocabulary that this run is told to use.
        clear(store.directory, FILES, kept=chosen.vocabulary)
    try:
        prepared = _prepare(chosen, store.directory, view)
    except ImportError as error:
        raise ValueError(str(error)) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt("no step was made") from None
    with (
        view.progress(prepared.config.num_steps, what="step", remaining=True) as bar,
        board.beside(Progress(view, prepared, bar), store.directory, chosen.tensorboard) as told,
    ):
        curve = fit.fit(prepared, store.directory, told)
    store.write_config()
    _finish(chosen, prepared, curve, store, view)
