"""Distils a draft for a target, and saves it as `specjax.load` and `configs/compare.py` read it."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
from jax.sharding import Mesh

from specjax.api import pretrained, request
from specjax.api.pretrained import Pretrained
from specjax.experiments import distill_data
from specjax.experiments.distill_data import Line
from specjax.experiments.reports import distill as report
from specjax.experiments.reports import plots
from specjax.experiments.reports.display import View
from specjax.experiments.settings import POSITIVE, Check, Config, at_least, given, one_of, parse
from specjax.experiments.store import Store, clear
from specjax.experiments.training_progress import Progress
from specjax.models import families
from specjax.models.weights import checkpoint
from specjax.parallel import sharding
from specjax.training import distill, divergences, drafts, fit, own_text
from specjax.training.config import TrainConfig
from specjax.training.curve import Curve
from specjax.training.fit import Run, Task
from specjax.training.own_text import Lengths, OwnTexts, Shares, Writing

WRITTEN = "written"
"""The directory of the texts that models wrote."""

FILES = (*fit.FILES, WRITTEN, "config.json", "summary.md", "distill.png")
"""The files of a run in its work directory."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `configs/distill.py`."""

    name: str
    target: Annotated[str, given("SOURCE")]
    target_dtype: Annotated[str, one_of("float32", "bfloat16")]
    data: Annotated[str, given("FILE")]
    num_prompts: Annotated[int, at_least(0)]
    valid: str
    num_valid: Annotated[int, at_least(1)]
    chat: Annotated[str, one_of("auto", "true", "false")]
    prompt_length: Annotated[int, at_least(1)]
    draft: str
    init: Annotated[str, one_of("layers", "random")]
    init_layers: tuple[int, ...]
    init_encoder_layers: tuple[int, ...]
    model: dict[str, int]
    draft_vocab_size: Annotated[int, at_least(0)]
    divergence: str
    temperature: Annotated[float, POSITIVE]
    mix: dict[str, float]
    max_new_tokens: Annotated[int, at_least(1)]
    write_batch_size: Annotated[int, at_least(1)]
    regenerate_every: Annotated[int, at_least(1)]
    texts_per_round: Annotated[int, at_least(1)]
    target_length: Annotated[int, at_least(2)]
    source_length: Annotated[int, at_least(1)]
    mesh_data: Annotated[int, at_least(1)]
    mesh_model: Annotated[int, at_least(1)]
    seed: Annotated[int, Check(lambda value: 0 <= value < 2**32, "from 0 to 4294967295")]
    optimisation: TrainConfig

    @property
    def shares(self) -> Shares:
        """The shares of the kinds of text, which add up to one."""
        total = sum(self.mix.values())
        return Shares(**{name: value / total for name, value in self.mix.items()})

    def check(self) -> None:
        """Refuses values that do not fit each other, before anything is loaded."""
        try:
            divergences.named(self.divergence)
        except ValueError as error:
            raise ValueError(f"config.{error}") from error
        if not all(math.isfinite(value) and value >= 0 for value in self.mix.values()) or not sum(self.mix.values()):
            shown = ", ".join(f"mix.{name}={value}" for name, value in self.mix.items())
            raise ValueError(f"config.{shown}: shares of 0 or more, and one of them more than 0.")
        if self.write_batch_size % self.mesh_data:
            raise ValueError(
                f"config.write_batch_size={self.write_batch_size} is not a multiple of mesh_data={self.mesh_data}."
            )
        if self.draft and (self.init != "layers" or self.init_layers or self.init_encoder_layers):
            raise ValueError(f"config.draft={self.draft!r} has its own layers: leave init and init_layers out.")
        if self.init == "random" and (self.init_layers or self.init_encoder_layers):
            raise ValueError(f"config.init_layers={self.init_layers}: of init=layers; with init=random, leave it out.")
        widths = {name: value for name, value in self.model.items() if value and name != "num_layers"}
        if self.init == "layers" and widths:
            name, value = next(iter(widths.items()))
            raise ValueError(f"config.model.{name}={value}: the target's layers have its widths; give init=random.")


def _mesh(chosen: Settings) -> Mesh | None:
    if chosen.mesh_data * chosen.mesh_model == 1:
        return None
    return sharding.make_mesh(data=chosen.mesh_data, model=chosen.mesh_model)


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


def _lines(chosen: Settings) -> tuple[list[Line], list[Line]]:
    """The lines to train on, and those that are held out."""
    lines = distill_data.read(chosen.data)
    if chosen.valid:
        held_out = distill_data.choose(distill_data.read(chosen.valid), chosen.num_valid, chosen.seed)
        return distill_data.choose(lines, chosen.num_prompts, chosen.seed), held_out
    if len(lines) <= chosen.num_valid:
        raise ValueError(
            f"{chosen.data} has {len(lines)} lines, of which config.num_valid={chosen.num_valid} are held out: give "
            "more lines, or lower it."
        )
    wanted = chosen.num_prompts + chosen.num_valid if chosen.num_prompts else 0
    both = distill_data.choose(lines, wanted, chosen.seed)
    return both[chosen.num_valid :], both[: chosen.num_valid]


class _Prepared(NamedTuple):
    """A run, and the target that it is for."""

    run: Run
    target: Pretrained


def _prompts(chosen: Settings, target: Pretrained, lengths: Lengths, lines: Sequence[Line], view: View, what: str):
    """Tokenised prompts that leave room for a text."""
    assert target.tokenizer is not None
    chat = target.tokenizer.has_chat_template if chosen.chat == "auto" else chosen.chat == "true"
    is_decoder = lengths.start_token is None
    longest = chosen.target_length - min(chosen.max_new_tokens, chosen.target_length // 2)
    found = distill_data.encode(
        lines,
        target,
        lengths,
        chat=chat and is_decoder,
        prompt_length=chosen.prompt_length,
        max_prompt=longest if is_decoder else chosen.source_length,
    )
    if chosen.shares.fixed and what == "Training":
        found = [prompt for prompt in found if prompt.given is not None]
    left_out = len(lines) - len(found)
    note = f", {left_out} left out as too long, or without the text that mix.fixed needs" if left_out else ""
    view.line(f"{what}: {len(found)} prompts{note}.")
    if not found:
        raise ValueError(f"{what}: none of {len(lines)} prompts fits: raise config.target_length, or shorten them.")
    return found


def _identity(chosen: Settings, target: Pretrained) -> dict[str, Any]:
    """What determines the objective and the texts, besides what `fit.identity` has."""
    names = ("target", "draft", "init", "init_layers", "init_encoder_layers", "draft_vocab_size")
    names += ("divergence", "temperature", "mix")
    names += ("max_new_tokens", "write_batch_size", "regenerate_every", "texts_per_round")
    values = {name: getattr(chosen, name) for name in names}
    return {"distill": values, "target_model": checkpoint.config_to_json(target.config)}


def _prepare(chosen: Settings, workdir: pathlib.Path, view: View) -> _Prepared:
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes: a draft is distilled by one, on all devices of its host.")
    mesh = _mesh(chosen)
    with view.status(f"Reading {chosen.data}"):
        lines, held_out = _lines(chosen)
    with view.status(f"Loading {chosen.target}{pretrained.download_note(chosen.target)}"):
        target = pretrained.load(chosen.target, dtype=chosen.target_dtype, mesh=mesh)
        draft = _draft(chosen, target, mesh)
    if target.tokenizer is None:
        raise ValueError(f"{chosen.target} has no tokenizer, which turns the prompts into tokens: give one that has.")
    lengths = Lengths(chosen.target_length, chosen.source_length, target.model.start_token)
    prompts = _prompts(chosen, target, lengths, lines, view, "Training")
    asked = _prompts(chosen, target, lengths, held_out, view, "Held out")
    width = max(len(prompt.tokens) for prompt in [*prompts, *asked])
    writing = Writing(chosen.temperature, chosen.max_new_tokens, chosen.write_batch_size, width, chosen.seed)
    texts = OwnTexts(
        prompts,
        chosen.shares,
        target,
        draft,
        writing,
        lengths,
        workdir / WRITTEN,
        chosen.regenerate_every,
        chosen.texts_per_round,
        _Written(view),
    )
    if chosen.draft_vocab_size:
        draft = texts.draft = _reduced(chosen, draft, texts)
    valid = own_text.held_out(asked, target, writing, lengths, workdir / WRITTEN / "held_out.jsonl", _Written(view))
    objective = distill.Distillation(target.config, divergences.named(chosen.divergence), chosen.temperature)
    task = Task(objective, target.params, distill.by_alpha, _identity(chosen, target))
    run = Run(draft.config, chosen.optimisation, texts, valid, target.tokenizer, mesh, task, draft.params)
    return _Prepared(run, target)


class _Written:
    """Says how many texts are written, at the first and then at every tenth."""

    def __init__(self, view: View):
        self.view, self.shown = view, -1

    def __call__(self, done: int, total: int) -> None:
        if self.shown != (tenth := 10 * done // max(total, 1)):
            self.shown = tenth
            self.view.line(f"Writing texts: {done} of {total}.")


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
    with view.progress(total, what="step", remaining=True) as bar:
        curve = fit.fit(prepared.run, store.directory, Progress(view, prepared.run, bar, report.described))
    store.write_config()
    _finish(chosen, prepared, curve, store, view)
