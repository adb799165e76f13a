"""Distils a draft for a target, and saves it as `specjax.load` and `configs/compare.py` read it."""

import dataclasses
import os
import pathlib
from typing import Annotated, NamedTuple

from jax.sharding import Mesh

from specjax.api import pretrained, request
from specjax.api.pretrained import Pretrained
from specjax.experiments import board, teaching
from specjax.experiments.reports import distill as report
from specjax.experiments.reports import plots
from specjax.experiments.reports.display import View
from specjax.experiments.settings import Config, at_least, one_of, parse
from specjax.experiments.store import Store, clear
from specjax.experiments.teaching import WRITTEN, Teaching
from specjax.experiments.training_progress import Progress
from specjax.models import families
from specjax.training import distill, divergences, drafts, fit
from specjax.training.curve import Curve
from specjax.training.fit import Run, Task
from specjax.training.own_text import OwnTexts

FILES = (*fit.FILES, WRITTEN, "config.json", "summary.md", "distill.png", board.DIRECTORY)
"""The files of a run in its work directory."""


@dataclasses.dataclass(frozen=True)
class Settings(Teaching):
    """The keys of `configs/distill.py`."""

    draft: str
    init: Annotated[str, one_of("layers", "random")]
    init_layers: tuple[int, ...]
    init_encoder_layers: tuple[int, ...]
    model: dict[str, int]
    draft_vocab_size: Annotated[int, at_least(0)]

    def check(self) -> None:
        """Refuses values that do not fit each other, before anything is loaded."""
        super().check()
        if self.draft and (self.init != "layers" or self.init_layers or self.init_encoder_layers):
            raise ValueError(f"config.draft={self.draft!r} has its own layers: leave init and init_layers out.")
        if self.init == "random" and (self.init_layers or self.init_encoder_layers):
            raise ValueError(f"config.init_layers={self.init_layers}: of init=layers; with init=random, leave it out.")
        widths = {name: value for name, value in self.model.items() if value and name != "num_layers"}
        if self.init == "layers" and widths:
            name, value = next(iter(widths.items()))
            raise ValueError(f"config.model.{name}={value}: the target's layers have its widths; give init=random.")


def _draft(chosen: Settings, target: Pretrained, mesh: Mesh | None) -> Pretrained:
    """The draft as it begins; parameters of None are random ones."""
    if chosen.draft:
        draft = pretrained.load(chosen.draft, mesh=mesh)
        request.check_vocabularies(target, draft)
        return draft._replace(tokenizer=target.tokenizer)
    params = None
    try:
        if chosen.init == "random":
            config = drafts.with_changes(target.config, chosen.model)
        else:
            layers = chosen.init_layers or drafts.spread(target.config.num_layers, chosen.model["num_layers"])
            config, params = drafts.from_layers(target.config, target.params, layers, chosen.init_encoder_layers)
    except ValueError as error:
        raise ValueError(f"config.{error}") from error
    return Pretrained(families.model(config), params, target.tokenizer, config)


def _reduced(chosen: Settings, draft: Pretrained, texts: OwnTexts) -> Pretrained:
    """The draft with a head over the most frequent tokens of the texts, and those that end a text."""
    size, config, tokenizer = chosen.draft_vocab_size, draft.config, draft.tokenizer
    assert tokenizer is not None
    if config.head_tokens or size > config.vocab_size:
        raise ValueError(f"config.draft_vocab_size={size}: the head has {config.head_size} tokens already; leave it 0.")
    tokens = drafts.most_frequent(texts.to_count(), size, tokenizer.eos_token_ids, config.vocab_size)
    config, params = drafts.with_head(config, draft.params, tokens)
    return Pretrained(families.model(config), params, tokenizer, config)


class _Prepared(NamedTuple):
    """A run, and the target that it is for."""

    run: Run
    target: Pretrained


def _prepare(chosen: Settings, workdir: pathlib.Path, view: View) -> _Prepared:
    taught = teaching.load(chosen, view)
    target, mesh = taught.target, taught.mesh
    assert target.tokenizer is not None
    with view.status("Making the draft" if not chosen.draft else f"Loading {chosen.draft}"):
        draft = _draft(chosen, target, mesh)
    texts, valid = teaching.texts(chosen, taught, draft, workdir, view)
    if chosen.draft_vocab_size:
        draft = texts.draft = _reduced(chosen, draft, texts)
    objective = distill.Distillation(target.config, divergences.named(chosen.divergence), chosen.temperature)
    identity = chosen.identity(target, "draft", "init", "init_layers", "init_encoder_layers", "draft_vocab_size")
    task = Task(objective, target.params, distill.by_alpha, identity)
    run = Run(draft.config, chosen.optimisation, texts, valid, target.tokenizer, mesh, task, draft.params)
    return _Prepared(run, target)


def _finish(chosen: Settings, prepared: _Prepared, curve: Curve, store: Store, view: View) -> None:
    run, target = prepared
    shape = {"batch_size": run.config.batch_size, "parameters": families.num_params(run.model_config)}
    shape["target_parameters"] = families.num_params(target.config)
    found = report.facts(shape, curve.steps, curve.valid)
    for name, value in found:
        view.line(f"{name}: {value.replace('`', '')}", "bold")
    with view.status("Plotting"):
        plots.save(store.directory, {"distill.png": report.figure(curve.steps, curve.valid)})
    store.write("summary.md", report.summary(chosen.name, found))
    view.line(f"Results: {store.directory}{os.sep} ({', '.join(('summary.md', 'distill.png', *fit.FILES[1:]))})")
    model = store.directory / fit.MODEL
    view.line(f"The draft: --config.drafter=model --config.draft={model} of configs/compare.py")


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Distils a draft, as `EXPERIMENTS` says; FloatingPointError where the loss is not finite.

    `fit` resumes from the last checkpoint; some keys may change between runs.
    """
    view, chosen = view or View(), parse(Settings, config)
    store = Store(workdir, config.to_dict())
    store.directory.mkdir(parents=True, exist_ok=True)
    if overwrite:
        # But not the draft that this run begins with.
        clear(store.directory, FILES, kept=chosen.draft)
    try:
        prepared = _prepare(chosen, store.directory, view)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("no step was made; the texts that are written are kept") from None
    total = prepared.run.config.num_steps
    with (
        view.progress(total, what="step", remaining=True) as bar,
        board.beside(Progress(view, prepared.run, bar, report.described), store.directory, chosen.tensorboard) as told,
    ):
        curve = fit.fit(prepared.run, store.directory, told)
    store.write_config()
    _finish(chosen, prepared, curve, store, view)
