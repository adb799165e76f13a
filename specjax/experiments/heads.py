"""Trains heads over a target's hidden states, by kind, and saves them as `configs/compare.py` reads them."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Annotated, NamedTuple

from specjax import drafters
from specjax.experiments import board, teaching
from specjax.experiments.reports import heads as report
from specjax.experiments.reports import plots
from specjax.experiments.reports.display import View
from specjax.experiments.settings import POSITIVE, Check, Config, at_least, parse
from specjax.experiments.store import Store, clear
from specjax.experiments.teaching import WRITTEN, Taught, Teaching
from specjax.experiments.training_progress import Progress
from specjax.models import families
from specjax.models.parallel_heads import ParallelHeadsConfig
from specjax.training import divergences, fit, joint_heads, parallel_heads
from specjax.training.curve import Curve
from specjax.training.data import Dataset
from specjax.training.fit import Learner, Source
from specjax.training.joint_heads import Joint
from specjax.training.parallel_heads import HeadLoss, Run

FILES = (*fit.FILES, WRITTEN, "config.json", "summary.md", "heads.png", board.DIRECTORY)
"""The files of a run in its work directory."""


EVERY_KIND = ("medusa", "blockwise", "eagle", "feature_head", "pard", "pass", "specdec")
"""What `config.kind` may be; all but the first two are experiments of their own, which the config's file knows."""


@dataclasses.dataclass(frozen=True)
class Settings(Teaching):
    """The keys of `configs/heads.py`."""

    kind: Annotated[str, Check(lambda kind: kind in KINDS, f"choose one of {', '.join(EVERY_KIND)}")]
    num_heads: Annotated[int, at_least(1)]
    num_layers: Annotated[int, at_least(1)]
    inner_size: Annotated[int, at_least(0)]
    own_output: bool
    joint: bool
    head_weight: Annotated[float, POSITIVE]
    target_rate: Annotated[float, POSITIVE]
    head_steps: Annotated[int, at_least(0)]
    target_loss: str

    @property
    def jointly(self) -> Joint:
        """How the target is trained, where it is."""
        return Joint(self.head_weight, self.target_rate, self.head_steps, self.target_loss)

    def _check_joint(self) -> None:
        if self.target_dtype != "float32":
            raise ValueError(
                f"config.target_dtype={self.target_dtype}: a target that is trained is float32; set config.dtype."
            )
        if self.head_steps >= self.optimisation.num_steps:
            raise ValueError(
                f"config.head_steps={self.head_steps} of config.num_steps={self.optimisation.num_steps}: fewer, or the "
                "target is not trained."
            )
        if self.optimisation.remat:
            raise ValueError("config.remat=True is not done for config.joint=True: set it to False.")
        if self.target_loss != parallel_heads.TEXT:
            try:
                divergences.named(self.target_loss)
            except ValueError as error:
                raise ValueError(
                    f"config.target_loss={self.target_loss!r}: {parallel_heads.TEXT}, or {error}"
                ) from None

    def check_divergence(self) -> None:
        """Refuses a name that is not known."""
        if self.divergence != parallel_heads.TEXT:
            super().check_divergence()

    def check(self) -> None:
        """Refuses values that do not fit each other, before anything is loaded."""
        super().check()
        if self.shares.draft:
            raise ValueError(f"config.mix.draft={self.mix['draft']}: heads write no text of their own; set it to 0.")
        if self.optimisation.dropout:
            raise ValueError(f"config.dropout={self.optimisation.dropout}: heads are trained without; set it to 0.")
        if self.kind == "medusa" and self.inner_size:
            raise ValueError(f"config.inner_size={self.inner_size} is that of kind=blockwise: leave it 0.")
        if self.kind == "blockwise" and self.num_layers != 1:
            raise ValueError(f"config.num_layers={self.num_layers} is that of kind=medusa: leave it 1.")
        if self.joint:
            self._check_joint()


class Prepared(NamedTuple):
    """What every kind of head is trained with.

    Attributes:
      taught: the target, and where it is.
      texts: the texts to learn.
      valid: the held-out texts.
    """

    taught: Taught
    texts: Source
    valid: Dataset


class Kind(NamedTuple):
    """A kind of head.

    Attributes:
      learner: makes what `fit.learn` trains.
      size: how many parameters the heads have.
    """

    learner: Callable[[Settings, Prepared], Learner]
    size: Callable[[Settings, Prepared], int]


def _shape(chosen: Settings, prepared: Prepared) -> ParallelHeadsConfig:
    """The shape of parallel heads."""
    target = prepared.taught.target.config
    # As wide for each head as the target's own feed-forward.
    inner = chosen.inner_size or chosen.num_heads * target.intermediate_size
    return ParallelHeadsConfig(
        chosen.kind,
        chosen.num_heads,
        target.hidden_size,
        num_layers=chosen.num_layers,
        inner_size=inner if chosen.kind == "blockwise" else 0,
        output_size=target.head_size if chosen.own_output else 0,
    )


def _parallel(save: Callable[..., None]) -> Kind:
    """Parallel heads, which `save` writes."""

    def learner(chosen: Settings, prepared: Prepared) -> Learner:
        (target, mesh, _, _), config = prepared.taught, _shape(chosen, prepared)
        dtype = chosen.optimisation.dtype
        loss = HeadLoss(config, target.config, chosen.divergence, dtype, chosen.temperature)
        identity = chosen.identity(target)
        run = Run(config, target, chosen.optimisation, loss, prepared.texts, prepared.valid, save, identity, mesh)
        return joint_heads.learner(run, chosen.jointly) if chosen.joint else parallel_heads.learner(run)

    def size(chosen: Settings, prepared: Prepared) -> int:
        return parallel_heads.num_params(_shape(chosen, prepared))

    return Kind(learner, size)


KINDS = {"medusa": _parallel(drafters.save_medusa), "blockwise": _parallel(drafters.save_blockwise)}
"""By `config.kind`. Another kind of parallel head is added here, and to `EVERY_KIND`."""


def _prepare(chosen: Settings, workdir: pathlib.Path, view: View) -> Prepared:
    taught = teaching.load(chosen, view)
    # No draft writes: the share of its texts is 0.
    texts, valid = teaching.texts(chosen, taught, taught.target, workdir, view)
    return Prepared(taught, texts, valid)


def _finish(chosen: Settings, prepared: Prepared, curve: Curve, store: Store, view: View) -> None:
    shape = {"batch_size": chosen.optimisation.batch_size, "parameters": KINDS[chosen.kind].size(chosen, prepared)}
    shape["target_parameters"] = families.num_params(prepared.taught.target.config)
    found = report.facts(shape, curve.steps, curve.valid, chosen.joint)
    for name, value in found:
        view.line(f"{name}: {value.replace('`', '')}", "bold")
    with view.status("Plotting"):
        plots.save(store.directory, {"heads.png": report.figure(curve.steps, curve.valid)})
    store.write("summary.md", report.summary(chosen.name, found, chosen.joint))
    view.line(f"Results: {store.directory}{os.sep} ({', '.join(('summary.md', 'heads.png', *fit.FILES[1:]))})")
    model = store.directory / fit.MODEL
    of_target = f" --config.target={model / joint_heads.TARGET}, the new target," if chosen.joint else ""
    view.line(f"The heads: --config.drafter={chosen.kind} --config.draft={model}{of_target} of configs/compare.py")


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Trains heads, as `EXPERIMENTS` says; FloatingPointError where the loss is not finite.

    `fit` resumes from the last checkpoint; some keys may change between runs.
    """
    view, chosen = view or View(), parse(Settings, config)
    store = Store(workdir, config.to_dict())
    store.directory.mkdir(parents=True, exist_ok=True)
    if overwrite:
        clear(store.directory, FILES)
    try:
        prepared = _prepare(chosen, store.directory, view)
        learner = KINDS[chosen.kind].learner(chosen, prepared)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("no step was made; the texts that are written are kept") from None
    total = learner.config.num_steps
    with (
        view.progress(total, what="step", remaining=True) as bar,
        board.beside(Progress(view, learner, bar, report.described), store.directory, chosen.tensorboard) as told,
    ):
        curve = fit.learn(learner, store.directory, told)
    store.write_config()
    _finish(chosen, prepared, curve, store, view)
