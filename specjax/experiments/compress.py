"""Smaller models of a target: what each is worth alone, and as a draft."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from specjax import drafters
from specjax.api import request
from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.experiments import bench, cells, choices, prompts, results, tasks
from specjax.experiments import texts as text_files
from specjax.experiments.bench import Bench, Decoded, Workload
from specjax.experiments.cells import Cell
from specjax.experiments.prompts import Prompt
from specjax.experiments.reports import compress as report
from specjax.experiments.reports.display import View
from specjax.experiments.results import Row
from specjax.experiments.settings import FINITE, Config, at_least, given, one_of, parse
from specjax.experiments.store import Store
from specjax.models import families, quantisation
from specjax.training import data
from specjax.training.data import Text
from specjax.training.perplexity import acceptance_rate, perplexity
from specjax.types import AnyDrafter

FILES = ("config.json", "results.json", "summary.md")

TIMED = ("ms_per_token", "target_ms_per_token", "num_identical", "num_prompts", "acceptance_rate")
"""What a row has from the prompts; None where nothing is timed."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `configs/compress.py`."""

    name: str
    target: Annotated[str, given("SOURCE")]
    dtype: Annotated[str, one_of("float32", "bfloat16")]
    students: tuple[str, ...]
    quantised: tuple[str, ...]
    pruned: tuple[str, ...]
    data: Annotated[str, given("PROMPTS")]
    num_prompts: Annotated[int, at_least(0, ", which reads all")]
    max_prompt_tokens: Annotated[int, at_least(1)]
    chat: Annotated[str, one_of("auto", "true", "false")]
    max_new_tokens: Annotated[int, at_least(1)]
    num_draft_tokens: Annotated[int, at_least(1), choices.DRAFT_TOKENS]
    step_cost: Annotated[float, FINITE]
    repeats: Annotated[int, at_least(0, ", which times nothing")]
    seed: int
    texts: Annotated[str, given("TEXTS")]
    field: str
    num_texts: Annotated[int, at_least(0, ", which reads all")]
    target_length: Annotated[int, at_least(2)]
    source_length: Annotated[int, at_least(1)]
    metric: Annotated[str, one_of("", *tasks.METRICS)]

    def check(self) -> None:
        """Refuses values that do not fit each other, before anything is loaded."""
        choices.check_seed(self.seed, self.num_prompts)
        names = [variant.name for variant in variants(self)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"config.students, config.quantised and config.pruned name {name} twice.")
        for how in self.quantised:
            if not quantisation.is_known(how):
                raise ValueError(f"config.quantised={how!r}: choose from {quantisation.EXAMPLES}.")


class Variant(NamedTuple):
    """A model of the table.

    Attributes:
      name: its name there.
      load: loads it, given the screen.
    """

    name: str
    load: Callable[[View], Pretrained]


def variants(chosen: Settings) -> list[Variant]:
    """The models that are compared with the target."""

    def from_source(kind: str, source: str) -> Variant:
        return Variant(f"{kind}, {source}", lambda view: bench.load(source, view, dtype=chosen.dtype))

    def in_precision(how: str) -> Variant:
        return Variant(
            f"quantised, {how}", lambda view: bench.load(chosen.target, view, dtype=chosen.dtype, quantise=how)
        )

    return [
        *(from_source("distilled", source) for source in chosen.students),
        *(in_precision(how) for how in chosen.quantised),
        *(from_source("pruned", source) for source in chosen.pruned),
    ]


class Material(NamedTuple):
    """What all cells read.

    Attributes:
      target: the target.
      prompts: the prompts that are timed.
      chat: whether they are put into the chat template.
      texts: the texts of the quality, with inputs for an encoder-decoder.
    """

    target: Pretrained
    prompts: Sequence[Prompt]
    chat: bool
    texts: Sequence[Text]


def _material(chosen: Settings, target: Pretrained, found: Sequence[Prompt]) -> Material:
    if target.tokenizer is None:
        raise ValueError(f"The target {chosen.target} has no tokenizer: save one beside it (tokenizer.json).")
    fits = cells.fitting(target, [prompt.text for prompt in found], chosen.max_prompt_tokens)
    picked = [found[i] for i in fits][: chosen.num_prompts or None]
    if not picked:
        raise ValueError(f"config.max_prompt_tokens={chosen.max_prompt_tokens}: every prompt of the file is longer.")
    if target.model.start_token is None:
        if chosen.metric:
            raise ValueError(f"config.metric={chosen.metric!r} is for an encoder-decoder: leave it out.")
        texts = [Text(None, text) for text in text_files.read(chosen.texts, chosen.field, chosen.num_texts)]
    else:
        texts = data.read(chosen.texts)[: chosen.num_texts or None]
        if any(text.input is None for text in texts):
            raise ValueError(f"config.texts={chosen.texts}: an encoder-decoder needs lines with input and target.")
    chat = target.tokenizer.has_chat_template if chosen.chat == "auto" else chosen.chat == "true"
    return Material(target, picked, chat, texts)


def _bytes(*models: Pretrained) -> int:
    """The bytes of the parameters of one or two models, those that they share counted once."""
    leaves = {id(leaf): leaf for model in models for leaf in jax.tree.leaves(model.params)}
    return families.num_bytes(list(leaves.values()))


class Side(NamedTuple):
    """One side of a measurement: a model that writes, and its drafter."""

    model: Pretrained
    drafter: AnyDrafter


class Cells:
    """The measurements of a run; a variant is loaded where a cell of it is missing, and one at a time is held."""

    def __init__(self, chosen: Settings, material: Material, view: View):
        """Measures nothing yet."""
        self.chosen, self.material, self.view = chosen, material, view
        self.loaded: tuple[str, Pretrained] | None = None
        lengths = {"target_length": chosen.target_length, "source_length": chosen.source_length}
        self.perplexity = functools.partial(perplexity, texts=material.texts, **lengths)
        self.alpha = functools.partial(acceptance_rate, material.target, texts=material.texts, **lengths)
        self.target_perplexity = functools.cache(lambda: self.perplexity(material.target))

    def model(self, variant: Variant) -> Pretrained:
        """The model of a variant.

        Raises:
          ValueError: where its vocabulary is not the target's.
        """
        if self.loaded is None or self.loaded[0] != variant.name:
            self.loaded = None
            model = variant.load(self.view)
            request.check_vocabularies(self.material.target, model)
            self.loaded = variant.name, model._replace(tokenizer=self.material.target.tokenizer)
        return self.loaded[1]

    def work(self, model: Pretrained, found: Sequence[Prompt], chat: bool) -> Workload:
        """Prompts for a model, in a buffer with room for the drafts of all cells."""
        chosen = self.chosen
        return bench.workload(model, chosen.target, found, chosen, chosen.num_draft_tokens, chat=chat, one_width=True)

    def bench(self, side: Side) -> Bench:
        """The timed prompts of one side, greedy."""
        sampling = dataclasses.asdict(results.Sampling())
        options = sampling | {"verify": verify.greedy, "fixed_shape": False, "step_cost": self.chosen.step_cost}
        return Bench(self.work(side.model, self.material.prompts, self.material.chat), side.drafter, options)

    def speed(self, side: Side) -> Row:
        """Milliseconds per token of a side and of the target's plain decoding, in turn; how many texts are equal."""
        if not self.chosen.repeats:
            return dict.fromkeys(TIMED)
        sides = [self.bench(Side(self.material.target, drafters.none())), self.bench(side)]
        batches = [one.work.batches(1) for one in sides]
        for one, own in zip(sides, batches, strict=True):
            one.compile(one.drafter, own[0])
        plain, ours = [], []
        for number in range(len(batches[0])):
            runs: list[list[Decoded]] = [[], []]
            for repeat in range(self.chosen.repeats):
                for i in (0, 1) if repeat % 2 == 0 else (1, 0):
                    runs[i].append(sides[i].decode(sides[i].drafter, batches[i][number]))
            plain.append(runs[0])
            ours.append(runs[1])
        same = sum(a[0].generation.tokens == b[0].generation.tokens for a, b in zip(plain, ours, strict=True))
        stats = [runs[0].state.rows.stats for runs in ours]
        judged = sum(int(one.proposed.sum()) for one in stats)
        return {
            "ms_per_token": _milliseconds(ours),
            "target_ms_per_token": _milliseconds(plain),
            "num_identical": same,
            "num_prompts": len(plain),
            "acceptance_rate": sum(int(one.accepted.sum()) for one in stats) / judged if judged else None,
        }

    def quality(self, side: Side) -> Row:
        """The perplexity of the model that writes, and the metric of the texts of a side."""
        chosen, texts = self.chosen, self.material.texts
        is_target = side.model is self.material.target
        found: Row = {"perplexity": self.target_perplexity() if is_target else self.perplexity(side.model)}
        found["metric"] = None
        if chosen.metric:
            asked = [Prompt(i, text.input or "", "", "") for i, text in enumerate(texts)]
            work = self.work(side.model, asked, False)
            written = cells.texts(work, side.drafter, 0.0, range(len(asked)), 8, rule=verify.greedy).text
            found["metric"] = tasks.METRICS[chosen.metric](written, [text.target for text in texts])
        return found

    def alone(self, name: str, model: Pretrained) -> Row:
        """The row of a model that writes by itself."""
        side = Side(model, drafters.none())
        return self.row(name, "alone", side, _bytes(model)) | {"alpha": None}

    def draft(self, variant: Variant) -> Row:
        """The row of the target with a draft."""
        model, target = self.model(variant), self.material.target
        side = Side(target, drafters.model(model, num_draft_tokens=self.chosen.num_draft_tokens))
        return self.row(variant.name, "draft", side, _bytes(target, model)) | {"alpha": self.alpha(model)}

    def row(self, name: str, role: str, side: Side, num_bytes: int) -> Row:
        """A row of the results."""
        return {"name": name, "role": role, "bytes": num_bytes} | self.speed(side) | self.quality(side)


def _milliseconds(prompts: Sequence[Sequence[Decoded]]) -> float:
    """The time of whole calls over their new tokens: of each prompt the median of its repeats."""
    seconds = [np.median([run.prefill_seconds + run.seconds for run in runs]) for runs in prompts]
    return float(1e3 * sum(seconds) / sum(runs[0].generation.stats.num_tokens for runs in prompts))


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Measures, as `EXPERIMENTS` says."""
    view, chosen = view or View(), parse(Settings, config)
    store = Store(workdir, config.to_dict(), overwrite=overwrite, names=FILES)
    store.write_config()
    found = prompts.read(chosen.data)
    text_files.check(chosen.texts)
    target = bench.load(chosen.target, view, dtype=chosen.dtype)
    for how in chosen.quantised:
        # What does not divide is refused before anything is measured.
        families.with_quantisation(target.config, "" if how == quantisation.KEEP else how)
    measured = Cells(chosen, _material(chosen, target, found), view)
    todo = [Cell("the target", lambda: measured.alone("the target", target), report.line)]
    for variant in variants(chosen):
        todo += [
            Cell(
                f"{variant.name}, alone",
                lambda variant=variant: measured.alone(variant.name, measured.model(variant)),
                report.line,
            ),
            Cell(f"{variant.name}, as draft", lambda variant=variant: measured.draft(variant), report.line),
        ]
    cells.run(todo, store, view)
    rows: list[Any] = [store.cells[cell.key] for cell in todo]
    store.write("results.json", results.to_json(rows))
    about = {"device": bench.device_name(), "jax_version": jax.__version__}
    store.write("summary.md", report.summary(dataclasses.asdict(chosen) | about, rows))
    view.line(f"Results: {store.directory}{os.sep} (summary.md, results.json)")
