"""The training loop: steps, reports, validation, checkpoints, and the resulting model."""

import collections
import contextlib
import math
import pathlib
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple, Protocol

import jax
from jax.sharding import Mesh

from specjax.api import pretrained
from specjax.api.pretrained import Pretrained
from specjax.models import families
from specjax.models.config import ModelConfig
from specjax.models.weights import checkpoint
from specjax.parallel import sharding
from specjax.text.tokenizer import Tokenizer
from specjax.training import curve, train
from specjax.training.checkpoints import Checkpoints
from specjax.training.config import TrainConfig
from specjax.training.curve import Curve, Line, Rank
from specjax.training.data import Dataset
from specjax.training.train import Metrics, Objective, TrainState
from specjax.types import Tree

CHECKPOINTS, CURVE, MODEL = "checkpoints", "train.jsonl", "model"
"""What a run leaves in its directory."""

FILES = (CHECKPOINTS, CURVE, MODEL)

Report = Callable[[list[Line]], None]
"""Takes the new lines of the curve."""


class Learner(NamedTuple):
    """What the loop trains, whatever it is made of.

    Attributes:
      config: how it is trained.
      identity: what has to be unchanged for a run to resume, as JSON values.
      abstract: makes the state with each array replaced by a `jax.ShapeDtypeStruct`.
      init: makes the state that training begins from.
      step: `(number, state) -> (state, metrics)`, of the steps from 1 on; the state is donated.
      evaluate: the line of a validation, with `valid_loss`, from the parameters; None without held-out texts.
      export: `(params, directory)`, writes what the run is for.
      rank: least for the best validation.
      mesh: where it is trained; None for the default device.
      looks_first: whether what training begins from is worth a validation.
    """

    config: TrainConfig
    identity: Mapping[str, Any]
    abstract: Callable[[], TrainState]
    init: Callable[[], TrainState]
    step: Callable[[int, TrainState], tuple[TrainState, Metrics]]
    evaluate: Callable[[Tree], dict[str, Any]] | None
    export: Callable[[Tree, pathlib.Path], None]
    rank: Rank = curve.valid_loss
    mesh: Mesh | None = None
    looks_first: bool = False


class Source(Protocol):
    """The texts of a run: a `Dataset`, or texts that are made while it runs."""

    @property
    def checksum(self) -> int:
        """CRC-32 of the texts that are given."""
        ...

    @property
    def target_length(self) -> int:
        """T, the tokens of a row."""
        ...

    @property
    def source_length(self) -> int:
        """S, those of its source, or 0."""
        ...

    def at(self, step: int, params: Tree) -> Dataset:
        """The texts that a step reads, given the parameters before it."""
        ...


class Task(NamedTuple):
    """What a run minimises, and how its validations are compared.

    Attributes:
      objective: the loss.
      frozen: parameters that the objective reads and that are not trained.
      rank: least for the best validation.
      identity: what determines the objective, as JSON values; a run resumes only if it is unchanged.
    """

    objective: Objective = train.cross_entropy
    frozen: Tree = ()
    rank: Rank = curve.valid_loss
    identity: Mapping[str, Any] = {}


class Run(NamedTuple):
    """A training run: the model and its data.

    Attributes:
      model_config: the shape of the model, float32.
      config: how it is trained.
      data: the texts to learn.
      valid: held-out texts, or None.
      tokenizer: the vocabulary.
      mesh: where it is trained; None for the default device.
      task: what is minimised; cross-entropy by default.
      initial: the parameters to begin with; None for random ones.
    """

    model_config: ModelConfig
    config: TrainConfig
    data: Source
    valid: Dataset | None
    tokenizer: Tokenizer
    mesh: Mesh | None = None
    task: Task = Task()
    initial: Tree | None = None


def check(run: Run) -> None:
    """Refuses what does not fit together.

    Raises:
      ValueError: naming the value and the remedy.
    """
    width, size = run.model_config.vocab_size, max(run.tokenizer.vocab().values()) + 1
    if size > width:
        raise ValueError(
            f"The vocabulary has {size} tokens, but the model's logits are {width} wide: choose a smaller vocabulary, "
            f"or vocab_size={size}."
        )
    longest = families.model(run.model_config).max_len
    if run.data.target_length > longest:
        raise ValueError(
            f"target_length={run.data.target_length}, but the model knows {longest} positions: lower it, or raise "
            "model.max_position."
        )
    if run.mesh is not None:
        part, over = run.config.batch_size // run.config.num_microbatches, run.mesh.shape["data"]
        if part % over:
            raise ValueError(
                f"batch_size={run.config.batch_size} over num_microbatches={run.config.num_microbatches} is {part} "
                f"rows, which do not divide over the {over} devices of mesh axis 'data'."
            )


def identity(run: Run) -> dict[str, Any]:
    """What has to be unchanged for a run to resume, as JSON values."""
    return {
        "train": run.config.identity(),
        "model": checkpoint.config_to_json(run.model_config),
        "vocabulary_checksum": zlib.crc32(run.tokenizer.backend.to_str().encode()),
        "data_checksum": run.data.checksum,
        "valid_checksum": None if run.valid is None else run.valid.checksum,
        "target_length": run.data.target_length,
        "source_length": run.data.source_length,
        **run.task.identity,
    }


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether the run was asked to end, by Ctrl-C or by the system; a second Ctrl-C ends it at once.

    An exception in the middle of a step would lose the state, which is donated to it.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def evaluate(run: Run, data: Dataset, params: Tree) -> dict[str, float]:
    """The mean loss of all targets, `valid_loss`, and the means of what else the objective measures."""
    totals: dict[str, float] = collections.defaultdict(float)
    for batch in data.in_order(run.config.batch_size // run.config.num_microbatches, run.mesh):
        part = train.eval_step(
            run.model_config, run.config.dtype, params, batch, run.task.frozen, objective=run.task.objective
        )
        for name, value in {"weight": part.weight, "valid_loss": part.loss, **part.measures}.items():
            totals[name] += float(value)
    weight = totals.pop("weight")
    return {name: total / weight for name, total in totals.items()}


def _lines(first: int, metrics: list[Metrics], seconds: float) -> list[Line]:
    """The lines of the steps after `first`, and how fast they were."""
    values = jax.device_get(metrics)
    speed = sum(int(value.num_tokens) for value in values) / seconds
    lines = []
    for step, value in enumerate(values, start=first + 1):
        fields = value._replace(measures={})._asdict() | value.measures
        numbers = {name: float(number) for name, number in fields.items() if name != "measures"}
        if not math.isfinite(numbers["loss"]) or not math.isfinite(numbers["grad_norm"]):
            raise FloatingPointError(
                f"Step {step} has loss {numbers['loss']} and gradient norm {numbers['grad_norm']}: lower "
                "learning_rate, raise warmup_steps, or set clip_norm, and begin again with --overwrite."
            )
        numbers |= {"seconds": round(seconds / len(values), 6), "tokens_per_second": round(speed, 1)}
        lines.append({"step": step} | numbers)
    return lines


class _Loop:
    """The files of a run, and what is done between steps."""

    def __init__(self, learner: Learner, directory: pathlib.Path, report: Report):
        self.learner, self.directory, self.report = learner, directory, report
        self.checkpoints = Checkpoints(directory / CHECKPOINTS, learner.identity, learner.config.keep)

    def restore(self) -> TrainState:
        """The newest checkpoint, or a fresh state; reports what the curve has."""
        learner = self.learner
        state = self.checkpoints.restore(learner.abstract())
        if state is None and (self.directory / CURVE).is_file():
            self._check_beginning()
        self.curve = Curve(self.directory / CURVE, 0 if state is None else int(state.step), learner.rank)
        self.report(self.curve.lines)
        if state is not None:
            return state
        state = learner.init()
        if learner.looks_first and not self.curve.valid:
            self.look(0, state.params)
        return state

    def _check_beginning(self) -> None:
        """Refuses to start over next to the curve of a run that had made a checkpoint."""
        with (self.directory / CURVE).open("rb") as file:
            made = sum(1 for line in file if b'"loss"' in line)
        if made > self.learner.config.save_every:
            raise ValueError(
                f"{self.checkpoints.directory} holds no checkpoint, but {CURVE} beside it has {made} steps, of which "
                "one was saved: restore that checkpoint, choose another --workdir, or give --overwrite to start over."
            )

    def add(self, lines: list[Line]) -> None:
        self.curve.add(lines)
        self.report(lines)

    def export(self, params: Tree) -> None:
        self.learner.export(params, self.directory / MODEL)

    def look(self, step: int, params: Tree) -> None:
        """Measures the validation loss, and keeps the best model so far."""
        if self.learner.evaluate is None:
            return
        self.add([{"step": step, **self.learner.evaluate(params)}])
        if self.curve.best is not None and self.curve.best["step"] == step:
            self.export(params)

    @property
    def is_settled(self) -> bool:
        """Whether the validations no longer improve."""
        return 0 < self.learner.config.patience <= self.curve.num_worse

    def step(self, step: int, state: TrainState) -> tuple[TrainState, Metrics]:
        return self.learner.step(step, state)

    def steps(self, state: TrainState, asked: Callable[[], bool]) -> TrainState:
        config, first = self.learner.config, int(state.step)
        pending: list[Metrics] = []
        begin = time.perf_counter()
        for step in range(first + 1, config.num_steps + 1):
            if self.is_settled:
                self.checkpoints.save(state)
                break
            state, metrics = self.step(step, state)
            pending.append(metrics)
            finished = step == config.num_steps
            stop = asked() and not finished
            look = finished or step % config.eval_every == 0
            save = finished or stop or step % config.save_every == 0
            if not (look or save or step % config.log_every == 0):
                continue
            jax.block_until_ready(metrics)
            self.add(_lines(step - len(pending), pending, time.perf_counter() - begin))
            pending = []
            if look:
                self.look(step, state.params)
            if save:
                self.checkpoints.save(state)
            if stop:
                raise KeyboardInterrupt(f"step {step} is saved in {self.checkpoints.directory}")
            begin = time.perf_counter()
        return state


def learner(run: Run) -> Learner:
    """The model of a run as the loop trains it."""
    config, task, valid = run.config, run.task, run.valid

    def step(number: int, state: TrainState) -> tuple[TrainState, Metrics]:
        batch = run.data.at(number - 1, state.params).batch(number - 1, config.batch_size, run.mesh)
        return train.train_step(run.model_config, config, state, batch, task.frozen, objective=task.objective)

    def export(params: Tree, directory: pathlib.Path) -> None:
        model = Pretrained(families.model(run.model_config), params, run.tokenizer, run.model_config)
        pretrained.save(model, directory)

    return Learner(
        config,
        identity(run),
        lambda: train.abstract_state(run.model_config, config, run.mesh),
        lambda: train.init(run.model_config, config, run.mesh, params=run.initial),
        step,
        None if valid is None else lambda params: evaluate(run, valid, params),
        export,
        task.rank,
        run.mesh,
        run.initial is not None,
    )


def fit(run: Run, directory: str | pathlib.Path, report: Report | None = None) -> Curve:
    """Trains a model, from the beginning or from where a run in the directory stopped.

    What is left in the directory: `checkpoints/`, `train.jsonl` (see `curve`), and `model/`, which `specjax.load`
    reads: the parameters of least validation loss, or, without held-out texts, the last.

    Args:
      run: what is trained.
      directory: used by this run alone.
      report: called with the new lines of the curve every `log_every` steps and with every validation.

    Returns:
      The curve.

    Raises:
      KeyboardInterrupt: after Ctrl-C, once the step is saved; its message says where.
      FloatingPointError: where a loss is not finite.
      ValueError: for what does not fit together, a checkpoint that is corrupt, or one of another run.
    """
    check(run)
    return learn(learner(run), directory, report)


def learn(learner: Learner, directory: str | pathlib.Path, report: Report | None = None) -> Curve:
    """`fit` of anything that can be trained; `model/` is what `Learner.export` writes.

    Args:
      learner: what is trained.
      directory: used by this run alone.
      report: as in `fit`.

    Raises:
      KeyboardInterrupt, FloatingPointError, ValueError: as `fit` does.
    """
    loop = _Loop(learner, pathlib.Path(directory), report or (lambda lines: None))
    with contextlib.closing(loop.checkpoints), sharding.on_mesh(learner.mesh), _interrupts() as asked:
        state = loop.restore()
        state = loop.steps(state, asked)
        if learner.evaluate is None or not (loop.directory / MODEL).is_dir():
            loop.export(state.params)
    return loop.curve
