"""Prunes a target in rounds, with distillation from the whole target after each, and saves what is left."""

import dataclasses
import os
import pathlib
import shutil
from typing import Annotated

from jax.sharding import AbstractMesh, Mesh

from specjax.api import pretrained
from specjax.api.pretrained import Pretrained
from specjax.experiments import board, results, teaching
from specjax.experiments.reports import prune as report
from specjax.experiments.reports.display import View
from specjax.experiments.reports.train import perplexity
from specjax.experiments.results import Row
from specjax.experiments.settings import Config, at_least, parse
from specjax.experiments.store import Store, clear
from specjax.experiments.teaching import WRITTEN, Taught, Teaching
from specjax.experiments.training_progress import Progress
from specjax.models import families
from specjax.models.config import ModelConfig, T5Config
from specjax.models.weights import checkpoint
from specjax.parallel import sharding
from specjax.training import distill, divergences, fit, importance, optimizers, own_text, prune
from specjax.training.fit import Run, Task
from specjax.training.importance import Sizes
from specjax.training.own_text import OwnTexts
from specjax.types import Batch, Tree

START = "start"
"""The directory of a round's model as it was pruned, until the round is finished."""

FILES = ("config.json", "results.json", "summary.md", WRITTEN, fit.MODEL)


@dataclasses.dataclass(frozen=True)
class Settings(Teaching):
    """The keys of `configs/prune.py`."""

    prune: dict[str, float]
    fractions: tuple[float, ...]
    width_multiple: Annotated[int, at_least(1)]
    num_calibration: Annotated[int, at_least(1)]

    def check(self) -> None:
        """Refuses values that do not fit each other, before anything is loaded."""
        super().check()
        for name, share in self.prune.items():
            if not 0 <= share < 1:
                raise ValueError(f"config.prune.{name}={share}: a share from 0 to below 1.")
        if not any(self.prune.values()):
            raise ValueError("config.prune has only zeros, which prunes nothing: give one of its shares more than 0.")
        ordered = sorted(set(self.fractions))
        if not ordered or list(self.fractions) != ordered or ordered[0] <= 0 or ordered[-1] != 1:
            raise ValueError(
                f"config.fractions={self.fractions}: a number for each round, ascending from above 0 to 1, such as "
                "(0.7, 0.96, 1.0)."
            )


def sizes(chosen: Settings, config: ModelConfig, fraction: float) -> Sizes:
    """What is left of a model after a fraction of the way.

    Raises:
      ValueError: for layers of an encoder that it does not have.
    """
    shares = chosen.prune
    if not isinstance(config, T5Config) and shares["encoder_layers"]:
        raise ValueError(
            f"config.prune.encoder_layers={shares['encoder_layers']}: {chosen.target} has no encoder; leave it 0."
        )

    def left(whole: int, name: str) -> int:
        return max(whole - round(whole * shares[name] * fraction), 1)

    named = {"layers": "layers", "encoder": "encoder_layers", "decoder": "layers"}
    width, unit = config.intermediate_size, chosen.width_multiple
    if shares["width"]:
        width = min(max(round(left(width, "width") / unit), 1) * unit, width)
    return Sizes(
        {stack: left(number, named[stack]) for stack, number in prune.stacks(config).items()},
        left(prune.num_heads(config), "heads"),
        width,
        shares["weights"] * fraction,
    )


def check_placed(wanted: Sizes, mesh: Mesh | AbstractMesh | None) -> None:
    """Refuses sizes that do not divide over a mesh, before anything is measured.

    Raises:
      ValueError: naming the key.
    """
    devices = 1 if mesh is None else dict(mesh.shape)["model"]
    for name, size in (("heads", wanted.heads), ("width", wanted.width)):
        if size % devices:
            raise ValueError(
                f"config.prune.{name} leaves {size}, which do not divide over mesh_model={devices}: leave a multiple, "
                "or choose another mesh_model."
            )


def _calibration(chosen: Settings, texts: OwnTexts, taught: Taught) -> list[Batch]:
    """The target's continuations of the first training prompts, a batch for each row of every device."""
    numbers = range(min(chosen.num_calibration, len(texts.prompts)))
    tokens = texts.of_target(numbers)
    examples = [own_text.example(texts.prompts[n], tokens[n], texts.lengths) for n in numbers]
    packed = own_text.packed(examples, texts.lengths, chosen.seed)
    return list(packed.in_order(chosen.mesh_data, taught.mesh))


class _Rounds:
    """The rounds of a run, each in a directory of its own."""

    def __init__(self, chosen: Settings, taught: Taught, store: Store, view: View):
        self.chosen, self.taught, self.store, self.view = chosen, taught, store, view
        self.texts, self.valid = teaching.texts(chosen, taught, taught.target, store.directory, view)
        self.total = len(chosen.fractions)

    def directory(self, number: int) -> pathlib.Path:
        """The files of a round, from 1."""
        return self.store.directory / f"round-{number}"

    def load(self, path: pathlib.Path) -> Pretrained:
        return pretrained.load(path, mesh=self.taught.mesh)

    def pruned(self, number: int) -> Pretrained:
        """The model that a round begins with: that of the round before, pruned further."""
        start = self.directory(number) / START
        if not (start / checkpoint.CONFIG_FILE).exists():
            chosen, target, mesh = self.chosen, self.taught.target, self.taught.mesh
            before = target if number == 1 else self.load(self.directory(number - 1) / fit.MODEL)
            wanted = sizes(chosen, target.config, chosen.fractions[number - 1])
            batches = _calibration(chosen, self.texts, self.taught)
            self.view.line(f"Round {number} of {self.total}: measuring what the target can do without ...")
            layers = sum(prune.stacks(before.config).values())
            with self.view.progress(layers, what="layers") as bar, sharding.on_mesh(mesh):
                config, params = importance.shrink(
                    before.config,
                    before.params,
                    wanted,
                    batches,
                    dtype=chosen.optimisation.dtype,
                    report=lambda done, total: bar.update(bar.task_ids[0], completed=done),
                )
            pretrained.save(Pretrained(families.model(config), params, target.tokenizer, config), start)
        return self.load(start)

    def run_of(self, number: int, model: Pretrained) -> Run:
        """The distillation of a round."""
        chosen, target = self.chosen, self.taught.target
        assert target.tokenizer is not None
        texts = dataclasses.replace(self.texts, draft=model, name=f"round-{number}")
        objective = distill.Distillation(target.config, divergences.named(chosen.divergence), chosen.temperature)
        identity = chosen.identity(target, "prune", "fractions", "width_multiple", "num_calibration") | {
            "round": number
        }
        task = Task(objective, target.params, distill.by_alpha, identity)
        optimisation = chosen.optimisation
        if chosen.prune["weights"]:
            optimizer = optimizers.keeping_zeros(str(optimisation.optimizer))
            optimisation = dataclasses.replace(optimisation, optimizer=optimizer)
        return Run(
            model.config, optimisation, texts, self.valid, target.tokenizer, self.taught.mesh, task, model.params
        )

    def __call__(self, number: int) -> Row:
        """Prunes and distils; returns what came of it."""
        model, directory = self.pruned(number), self.directory(number)
        run = self.run_of(number, model)
        self.view.line(f"Round {number} of {self.total}: {families.num_params(model.config) / 1e6:.1f}M parameters.")
        with (
            self.view.progress(run.config.num_steps, what="step", remaining=True) as bar,
            board.beside(Progress(self.view, run, bar, _described), directory, self.chosen.tensorboard) as told,
        ):
            curve = fit.fit(run, directory, told)
        first, best = curve.valid[0], curve.best
        assert best is not None
        after = self.load(directory / fit.MODEL)
        return {
            **described(after.config, after.params),
            "round": number,
            "fraction": self.chosen.fractions[number - 1],
            "steps": len(curve.steps),
            "alpha_pruned": first["alpha"],
            "alpha": best["alpha"],
            "agreement": best["agreement"],
            "divergence_pruned": first["valid_loss"],
            "divergence": best["valid_loss"],
            "perplexity_pruned": self.perplexity(run, model.params),
            "perplexity": self.perplexity(run, after.params),
        }

    def perplexity(self, run: Run, params: Tree) -> float:
        """That of the held-out texts."""
        with sharding.on_mesh(self.taught.mesh):
            return perplexity(fit.evaluate(run._replace(task=Task()), self.valid, params)["valid_loss"])

    def tidy(self, number: int) -> None:
        """Deletes what a finished round needs no longer."""
        for name in (START, fit.CHECKPOINTS):
            shutil.rmtree(self.directory(number) / name, ignore_errors=True)


def _described(line: Row) -> str:
    return f"alpha {line['alpha']:.4f}, greedy agreement {line['agreement']:.4f}, divergence {line['valid_loss']:.4f}"


def described(config: ModelConfig, params: Tree) -> Row:
    """The shape of a model, as a row of the results has it."""
    return {
        "layers": prune.stacks(config),
        "heads": prune.num_heads(config),
        "width": config.intermediate_size,
        "sparsity": prune.sparsity(config, params),
        "parameters": families.num_params(config),
    }


def _whole(rounds: _Rounds) -> Row:
    """The row of the target, which accepts all that it drafts itself."""
    target = rounds.taught.target
    run = rounds.run_of(0, target._replace(config=dataclasses.replace(target.config, dtype="float32")))
    config, params = families.cast(target.config, target.params, "float32")
    value = rounds.perplexity(run, params)
    same = {"alpha_pruned": 1.0, "alpha": 1.0, "agreement": 1.0, "perplexity_pruned": value, "perplexity": value}
    return {**described(config, params), "round": 0, "fraction": 0.0, "steps": 0, **same}


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Prunes, as `EXPERIMENTS` says."""
    view, chosen = view or View(), parse(Settings, config)
    store = Store(workdir, config.to_dict(), overwrite=overwrite)
    if overwrite:
        # But not the target of this run.
        rounds = [path.name for path in store.directory.glob("round-*")]
        clear(store.directory, (*FILES, *rounds), kept=chosen.target)
    store.write_config()
    taught = teaching.load(chosen, view)
    prune.check(taught.target.config)
    for fraction in chosen.fractions:
        check_placed(sizes(chosen, taught.target.config, fraction), taught.mesh)
    rounds = _Rounds(chosen, taught, store, view)
    rows = [store.get("round 0", lambda: _whole(rounds))]
    for number in range(1, rounds.total + 1):
        rows.append(store.get(f"round {number}", lambda number=number: rounds(number)))
        rounds.tidy(number)
        view.line(report.line(rows[-1]), "bold")
    model = store.directory / fit.MODEL
    pretrained.save(rounds.load(rounds.directory(rounds.total) / fit.MODEL), model)
    store.write("results.json", results.to_json(rows))
    store.write("summary.md", report.summary(chosen.name, chosen.target, rows))
    view.line(f"Results: {store.directory}{os.sep} (summary.md, results.json, {fit.MODEL})")
    view.line(
        f"The pruned target as its own draft: --config.drafter=model --config.draft={model} of configs/compare.py"
    )
