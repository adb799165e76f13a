"""Trains a model on texts, and leaves it where `specjax.load` and `configs/compare.py` read it."""

import collections
import contextlib
import dataclasses
import itertools
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jax.sharding import Mesh

from specjax import files
from specjax.experiments import results
from specjax.experiments.reports import plots
from specjax.experiments.reports import train as report
from specjax.experiments.reports.display import View
from specjax.models import families
from specjax.models.config import ModelConfig, T5Config
from specjax.parallel import sharding
from specjax.text.tokenizer import SPIECE, Tokenizer
from specjax.training import data, fit, sizes, vocabulary
from specjax.training.config import TrainConfig
from specjax.training.curve import Curve, Line
from specjax.training.data import Dataset, Text
from specjax.training.fit import Run

Config = Any
"""An `ml_collections.ConfigDict` with the keys of `configs/train.py`."""

FILES = (*fit.FILES, SPIECE, "config.json", "summary.md", "loss.png")
"""What a run leaves in its workdir."""

_LINE_EVERY = 20.0
"""Seconds between two lines of progress where there is no terminal."""


def check(config: Config) -> TrainConfig:
    """Refuses values that make no sense, before anything is read.

    Raises:
      ValueError: naming the key, its value and the remedy.
    """
    if not config.data:
        raise ValueError("config.data is empty: give --config.data=FILE.")
    for key in ("target_length", "source_length", "mesh_data", "mesh_model"):
        if config[key] < 1:
            raise ValueError(f"config.{key}={config[key]}: at least 1.")
    if not 0 <= config.extra_ids < config.vocab_size:
        raise ValueError(f"config.extra_ids={config.extra_ids}: at least 0, and fewer than config.vocab_size.")
    try:
        made = TrainConfig(**{field.name: config[field.name] for field in dataclasses.fields(TrainConfig)})
        sizes.model_config(config.kind, config.size, config.vocab_size, config.model.to_dict())
    except ValueError as error:
        raise ValueError(f"config.{error}") from error
    return made


def _clear(workdir: pathlib.Path, vocabulary: str) -> None:
    """Deletes an earlier run, but not the vocabulary that this one is told to use."""
    kept = pathlib.Path(vocabulary).expanduser().resolve() if vocabulary else None
    for name in FILES:
        path = workdir / name
        if kept is not None and path.resolve() in (kept, *kept.parents):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _vocabulary(config: Config, texts: Sequence[Text], workdir: pathlib.Path, view: View) -> Tokenizer:
    """The one that is given, that of the run in the workdir, or one trained on the texts."""
    path = workdir / SPIECE
    if config.vocabulary:
        return vocabulary.load(config.vocabulary)
    if path.is_file():
        return vocabulary.load(path)
    with view.status(f"Training a vocabulary of {config.vocab_size} tokens"):
        return vocabulary.train(
            filter(None, itertools.chain.from_iterable(texts)),
            path,
            vocab_size=config.vocab_size,
            extra_ids=config.extra_ids,
            byte_fallback=config.byte_fallback,
        )


def _dataset(name: str, config: Config, texts: Sequence[Text], tokenizer: Tokenizer, start: int | None, view: View):
    lengths = {"target_length": config.target_length, "source_length": config.source_length}
    with view.status(f"Tokenising and packing {len(texts)} texts"):
        encoded = data.encode(texts, tokenizer, start_token=start, **lengths)
        packed = data.dataset(encoded, start_token=start, seed=config.seed, **lengths)
    lost = [f"{encoded.num_cut} cut"] * bool(encoded.num_cut) + [f"{encoded.num_dropped} left out as too long"] * bool(
        encoded.num_dropped
    )
    view.line(
        f"{name}: {len(packed.examples)} texts, {packed.num_tokens} tokens in {len(packed.rows)} rows, "
        f"{packed.padding:.1%} padding{''.join(f', {part}' for part in lost)}."
    )
    return packed


def _mesh(config: Config) -> Mesh | None:
    if config.mesh_data * config.mesh_model == 1:
        return None
    return sharding.make_mesh(data=config.mesh_data, model=config.mesh_model)


def _run(config: Config, made: TrainConfig, workdir: pathlib.Path, view: View) -> Run:
    with view.status(f"Reading {config.data}"):
        texts = data.read(config.data)
        held_out = data.read(config.valid) if config.valid else []
    tokenizer = _vocabulary(config, texts, workdir, view)
    width = vocabulary.padded(max(tokenizer.vocab().values()) + 1)
    model_config: ModelConfig = sizes.model_config(config.kind, config.size, width, config.model.to_dict())
    start = model_config.start_token if isinstance(model_config, T5Config) else None
    train = _dataset("Training", config, texts, tokenizer, start, view)
    valid: Dataset | None = None
    if held_out:
        valid = _dataset("Validation", config, held_out, tokenizer, start, view)
    return Run(model_config, made, train, valid, tokenizer, _mesh(config))


class _Progress:
    """A bar on a terminal, else a line now and then; a line for every validation."""

    def __init__(self, view: View, run: Run, bar: Any):
        self.view, self.run, self.bar = view, run, bar
        self.losses: collections.deque[float] = collections.deque(maxlen=report.RECENT)
        self.shown = time.monotonic()
        self.is_first = True

    def __call__(self, lines: list[Line]) -> None:
        steps = [line for line in lines if "loss" in line]
        self.losses.extend(line["loss"] for line in steps)
        if steps:
            self._step(steps[-1])
        if self.is_first:
            # What an earlier run has written is history, not progress.
            self.is_first = False
            if steps:
                self.view.line(f"Going on after step {steps[-1]['step']} of {self.run.config.num_steps}.")
            return
        for line in lines:
            if "valid_loss" in line:
                loss = line["valid_loss"]
                self.view.line(
                    f"Step {line['step']}: validation loss {loss:.4f}, perplexity {report.perplexity(loss):.2f}."
                )

    def _step(self, line: Line) -> None:
        loss = sum(self.losses) / len(self.losses)
        status = f"loss {loss:.3f}, {line['tokens_per_second']:.0f} tokens/s"
        self.bar.update(self.bar.task_ids[0], completed=line["step"], status=status)
        now = time.monotonic()
        if not self.view.console.is_terminal and not self.is_first and now - self.shown > _LINE_EVERY:
            self.shown = now
            left = (self.run.config.num_steps - line["step"]) * line["seconds"]
            self.view.line(
                f"Step {line['step']} of {self.run.config.num_steps}: {status}, {left / 60:.1f} minutes left"
            )


def _finish(config: Config, run: Run, curve: Curve, workdir: pathlib.Path, view: View) -> None:
    shape = {"batch_size": run.config.batch_size, "data": len(run.data.rows), "logits": run.model_config.vocab_size}
    shape["parameters"] = families.num_params(run.model_config)
    found = report.facts(shape, curve.steps, curve.valid)
    for name, value in found:
        view.line(f"{name}: {value.replace('`', '')}", "bold")
    with view.status("Plotting"):
        plots.save(workdir, {"loss.png": report.figure(curve.steps, curve.valid)})
    files.write(workdir / "summary.md", report.summary(config.name, found))
    view.line(f"Results: {workdir}{os.sep} ({', '.join(('summary.md', 'loss.png', *fit.FILES[1:]))})")
    view.line(f"The model: specjax.load({str(workdir / fit.MODEL)!r})")


@contextlib.contextmanager
def _progress(view: View, run: Run) -> Iterator[_Progress]:
    with view.training(run.config.num_steps) as bar:
        yield _Progress(view, run, bar)


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Trains a model and writes its files.

    Args:
      config: as `configs/train.py` has it.
      workdir: where the files go; a run that was interrupted there is continued.
      overwrite: delete an earlier run in the workdir first.
      view: the screen; by default standard output.

    Raises:
      KeyboardInterrupt: after Ctrl-C, once the state is saved; its message says where.
      FloatingPointError: where the loss is not finite.
      ValueError: for values that make no sense, or a workdir that holds another run or a broken one.
      OSError: for files that cannot be read or written.
    """
    view, workdir = view or View(), pathlib.Path(workdir)
    made = check(config)
    workdir.mkdir(parents=True, exist_ok=True)
    if overwrite:
        _clear(workdir, config.vocabulary)
    try:
        prepared = _run(config, made, workdir, view)
    except ImportError as error:
        raise ValueError(str(error)) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt("no step was made") from None
    with _progress(view, prepared) as progress:
        curve = fit.fit(prepared, workdir, progress)
    files.write(workdir / "config.json", results.to_json(config.to_dict()))
    _finish(config, prepared, curve, workdir, view)
