"""The experiment of Leviathan et al. 2022 (arXiv 2211.17192): one target, drafts of several sizes, K swept.

The stages, each of which a resumed run skips if it is done: the vocabulary, the models (`leviathan_models`), the n-gram
tables, then the cells of three tables:

  Table 3  alpha = E[sum_x min(target, draft)] of every draft on text that the target generates;
  Table 2  for every draft, temperature and K, the speedup that Theorem 3.8 predicts from alpha and c, and the measured
           one, with the quality of the text with and without speculation;
  Table 5  alpha of every draft at several degrees of lenience.

Where the trained target is too small for the paper's regime, `config.inflate` measures the times with a larger one that
computes the same logits (`models/inflate.py`).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
from ml_collections import ConfigDict

from specjax import drafters, files
from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.experiments import bench, cells, continuations, leviathan_models, prompts, tasks, texts
from specjax.experiments.bench import Workload
from specjax.experiments.cells import Cell
from specjax.experiments.reports import leviathan as report
from specjax.experiments.reports import tables
from specjax.experiments.reports.display import View
from specjax.experiments.reports.leviathan import Measured
from specjax.experiments.settings import Check, Config, at_least, one_of, parse
from specjax.experiments.store import Store
from specjax.types import AnyDrafter


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of the files in `configs/leviathan`."""

    name: str
    paper: str
    test: str
    train: str
    valid: str
    prefix: str
    prompt_words: Annotated[int, at_least(0)]
    metric: Annotated[str, one_of(*tasks.METRICS)]
    models: dict[str, dict[str, Any]]
    tables: tuple[int, ...]
    max_entries: int
    training: dict[str, Any]
    distilling: dict[str, Any]
    inflate: dict[str, int]
    temperatures: tuple[float, ...]
    num_draft_tokens: Annotated[tuple[int, ...], Check(lambda ks: all(k >= 1 for k in ks), "at least 1 each")]
    timed_drafts: tuple[str, ...]
    num_prompts: Annotated[int, at_least(1)]
    quality_prompts: Annotated[int, at_least(1)]
    alpha_tokens: Annotated[int, at_least(1)]
    alpha_top_k: Annotated[tuple[int, ...], Check(lambda ks: all(k >= 1 for k in ks), "at least 1 each")]
    quality_batch: int
    max_prompt_tokens: int
    max_new_tokens: int
    lenience: tuple[float, ...]
    lenience_draft_tokens: int
    repeats: Annotated[int, at_least(1)]
    seed: int
    dtype: str

    def check(self) -> None:
        """Refuses missing files, before anything is trained."""
        leviathan_models.check(self.models, self.training, self.inflate)
        trains = any(not model["source"] for model in self.models.values())
        needed = {"test": True, "train": trains or bool(self.tables), "valid": trains}
        remedy = "JSONL with `input` and `target`"
        for key in (key for key, is_needed in needed.items() if is_needed):
            value = getattr(self, key)
            if not value:
                raise ValueError(f"config.{key} is empty: give --config.{key}=FILE, {remedy}.")
            files.check_file(pathlib.Path(value).expanduser(), f"config.{key}: the file", f"give {remedy}")


class Draft(NamedTuple):
    """A draft: its name, its drafter as a function of K, and how many numbers it consists of."""

    name: str
    drafter: Callable[[int], AnyDrafter]
    num_params: int


def _size(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _tables(chosen: Settings, target: Pretrained, view: View) -> list[Draft]:
    """Unigram, bigram ... tables of the targets of the training data, tokenised like the target's texts."""
    if not chosen.tables:
        return []
    tokenizer = target.tokenizer
    assert tokenizer is not None
    start = [] if target.model.start_token is None else [target.model.start_token]
    with view.status(f"Counting n-grams of {chosen.train}"):
        encoded = [start + tokenizer.encode(text) for text in texts.read(chosen.train)]
    found = []
    for order in chosen.tables:
        table = drafters.count_ngrams(
            encoded,
            vocab_size=target.model.vocab_size,
            order=order,
            context_tokens=len(start),
            max_entries=chosen.max_entries,
            tokenizer=tokenizer,
        )
        name = {1: "unigram", 2: "bigram"}.get(order, f"{order}-gram")
        found.append(Draft(name, lambda k, table=table: drafters.table(table, num_draft_tokens=k), _size(table.params)))
    return found


def _pairs(chosen: Settings, target: Pretrained) -> tuple[list[prompts.Prompt], list[str]]:
    """The prompts that are short enough, and their references."""
    found = [prompt._replace(text=chosen.prefix + prompt.text) for prompt in prompts.read(chosen.test)]
    references = texts.read(chosen.test, "target")
    if len(references) != len(found):
        raise ValueError(f"{chosen.test} has {len(found)} inputs, but {len(references)} targets.")
    fits = cells.fitting(target, [prompt.text for prompt in found], chosen.max_prompt_tokens)
    if len(fits) < max(chosen.num_prompts, chosen.quality_prompts):
        raise ValueError(
            f"{chosen.test} has {len(fits)} inputs of at most max_prompt_tokens={chosen.max_prompt_tokens} tokens, but "
            f"num_prompts={chosen.num_prompts} and quality_prompts={chosen.quality_prompts}: lower these, or "
            "raise max_prompt_tokens."
        )
    return [found[i] for i in fits], [references[i] for i in fits]


class Sweep(NamedTuple):
    """The settings, prompts and drafts that the cells measure, and the finished cells.

    `work` has the target; `clocked`, whose speed is measured, has the inflated one, or the same.
    """

    chosen: Settings
    work: Workload
    clocked: Workload
    drafts: Sequence[Draft]
    references: Sequence[str]
    store: Store

    @property
    def timed(self) -> list[Draft]:
        """The drafts whose speed is measured."""
        return [draft for draft in self.drafts if draft.name in self.chosen.timed_drafts] or list(self.drafts)

    def alpha(self, draft: Draft, temperature: float, top_k: int = 0) -> dict[str, float]:
        """Alpha of a draft on the target's own text: at least `alpha_tokens` tokens, where the prompts suffice."""
        number, batch, rule = self.chosen.quality_prompts, self.chosen.quality_batch, verify.observe
        while True:
            found = cells.texts(self.work, draft.drafter(1), temperature, range(number), batch, rule=rule, top_k=top_k)
            if found.num_tokens >= self.chosen.alpha_tokens or number == len(self.work.prompts):
                return {"alpha": found.acceptance_rate, "num_tokens": found.num_tokens}
            number = min(2 * number, len(self.work.prompts))

    def same_texts(self) -> float:
        """The share of the timed prompts of which the inflated target writes the target's own text at temperature 0."""
        number, batch = self.chosen.num_prompts, self.chosen.quality_batch
        both = [cells.texts(w, drafters.none(), 0.0, range(number), batch).text for w in (self.work, self.clocked)]
        return sum(a == b for a, b in zip(*both, strict=True)) / number

    def best(self, draft: Draft, temperature: float) -> int:
        """The fastest K of a draft, among the measured cells."""
        by_k = {k: self.store.cells[speed_key(draft, k, temperature)] for k in self.chosen.num_draft_tokens}
        return max(by_k, key=lambda k: by_k[k]["measured_speedup"])

    def quality(self, draft: Draft | None, temperature: float) -> float:
        """The metric of the texts of a draft at its best K, or of plain decoding."""
        drafter = drafters.none() if draft is None else draft.drafter(self.best(draft, temperature))
        number = self.chosen.quality_prompts
        found = cells.texts(self.work, drafter, temperature, range(number), self.chosen.quality_batch)
        return tasks.METRICS[self.chosen.metric](found.text, self.references[:number])

    def lenient(self, draft: Draft, degree: float) -> float:
        """Alpha of a draft at a degree of lenience, at temperature 1."""
        drafter, number = draft.drafter(self.chosen.lenience_draft_tokens), self.chosen.quality_prompts
        rule = verify.rejection if degree == 1 else verify.lenient(degree)
        found = cells.texts(self.work, drafter, 1.0, range(number), self.chosen.quality_batch, rule=rule)
        return found.acceptance_rate


SAME_TEXTS = "texts of the inflated target that are the target's own, T=0"
"""The key of the cell of `Sweep.same_texts`."""


def speed_key(draft: Draft, k: int, temperature: float) -> str:
    """The key of a timed cell."""
    return f"speed, {draft.name}, K={k}, T={temperature:g}"


def _shown_alpha(found: dict[str, float]) -> str:
    return f"{found['alpha']:.3f}"


def _measure(sweep: Sweep, view: View) -> dict[str, Any]:
    """All cells: the alphas, the timed rows, the quality, and alpha under lenience, as `Measured` has them."""
    chosen, store = sweep.chosen, sweep.store
    temperatures, metric = chosen.temperatures, chosen.metric
    alphas = {
        (draft.name, t): Cell(f"alpha, {draft.name}, T={t:g}", partial(sweep.alpha, draft, t), _shown_alpha)
        for draft in sweep.drafts
        for t in temperatures
    }
    truncated = {
        (draft.name, k): Cell(f"alpha, {draft.name}, T=1, top {k}", partial(sweep.alpha, draft, 1.0, k), _shown_alpha)
        for draft in sweep.drafts
        for k in chosen.alpha_top_k
    }
    speeds = [
        Cell(
            speed_key(draft, k, t),
            lambda d=draft, k=k, t=t: cells.timed(sweep.clocked, d.drafter(k), d.name, t, chosen.num_prompts),
            lambda row: f"{tables.speedup(row)} (c {row['cost_ratio']:.2f})",
        )
        for draft in sweep.timed
        for k in chosen.num_draft_tokens
        for t in temperatures
    ]
    qualities = {}
    for t in temperatures:
        plain = qualities[t, "plain"] = Cell(f"{metric}, plain, T={t:g}", partial(sweep.quality, None, t))
        for draft in sweep.timed:
            qualities[t, draft.name] = Cell(
                f"{metric}, {draft.name}, T={t:g}",
                partial(sweep.quality, draft, t),
                lambda found, plain=plain: f"{found:.2f} (plain {store.cells[plain.key]:.2f})",
            )
    lenience = {
        (draft.name, degree): Cell(f"lenience, {draft.name}, l={degree:g}", partial(sweep.lenient, draft, degree))
        for draft in sweep.drafts
        for degree in chosen.lenience
    }
    same = [Cell(SAME_TEXTS, sweep.same_texts, lambda share: f"{share:.0%}")] if sweep.clocked is not sweep.work else []
    cells.run(
        [*alphas.values(), *truncated.values(), *same, *speeds, *qualities.values(), *lenience.values()], store, view
    )

    def nested(of: dict[Any, Cell], shown: Callable[[Any], Any] = lambda found: found) -> dict[Any, dict[Any, Any]]:
        found: dict[Any, dict[Any, Any]] = {}
        for (outer, inner), cell in of.items():
            found.setdefault(outer, {})[inner] = shown(store.cells[cell.key])
        return found

    return {
        "alpha": nested(alphas, lambda found: (found["alpha"], found["num_tokens"])),
        "alpha_top_k": nested(truncated, lambda found: (found["alpha"], found["num_tokens"])),
        "rows": [store.cells[cell.key] for cell in speeds],
        "quality": nested(qualities),
        "lenience": nested(lenience),
    }


def _about(chosen: Settings, sizes: dict[str, int]) -> str:
    drafts = ", ".join(f"{name} ({size:,})" for name, size in sizes.items() if name != "target")
    return (
        f"A target of {sizes['target']:,} parameters; drafts {drafts} (parameters of models, numbers in tables). "
        f"{chosen.num_prompts} prompts timed at batch 1, {chosen.quality_prompts} for {chosen.metric}, at most "
        f"{chosen.max_new_tokens} new tokens each; {chosen.dtype} on {bench.device_name()} with jax {jax.__version__}."
    )


def _label(chosen: Settings, sizes: dict[str, int], large: Pretrained, store: Store) -> str:
    """Says which numbers are those of a larger model than the one that writes the text; empty if none are."""
    if SAME_TEXTS not in store.cells:
        return ""
    shapes = ", ".join(f"{name} {value}" for name, value in chosen.inflate.items() if value)
    return (
        f"The text of a model of {sizes['target']:,} parameters, at the cost of one of {_size(large.params):,}: where "
        f"times are measured, the target is inflated ({shapes}; models/inflate.py), so that it computes the same "
        f"logits in the time of a larger model. It writes the same text at temperature 0 for "
        f"{store.cells[SAME_TEXTS]:.0%} of the timed prompts. Alpha, {chosen.metric} and lenience are those of the "
        "target as it was trained."
    )


def _with_prompts(config: Config, chosen: Settings, directory: pathlib.Path) -> tuple[Config, Settings]:
    """The settings with files of texts whose first words are prompts, where `prompt_words` says so."""
    if not chosen.prompt_words:
        return config, chosen
    made, written = ConfigDict(config.to_dict()), {}
    for key in ("train", "valid", "test"):
        if source := getattr(chosen, key):
            path = directory / "texts" / f"{key}.jsonl"
            written[key] = continuations.write(source, path, chosen.prompt_words, whole=key != "test")
    made.update(written)
    return made, dataclasses.replace(chosen, **written)


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Runs the experiment, as `EXPERIMENTS` says; `overwrite` also deletes the trained models."""
    view, chosen = view or View(), parse(Settings, config)
    store = Store(workdir, config.to_dict(), overwrite=overwrite)
    store.write_config()
    config, chosen = _with_prompts(config, chosen, store.directory)
    models = leviathan_models.load(config, store.directory, view, overwrite)
    target = models.pop("target")
    found, references = _pairs(chosen, target)
    drafts = _tables(chosen, target, view)
    drafts += [
        Draft(name, lambda k, m=model: drafters.model(m, num_draft_tokens=k), _size(model.params))
        for name, model in models.items()
    ]
    name, largest = config.models.target.source or "target", max(*chosen.num_draft_tokens, chosen.lenience_draft_tokens)
    work = bench.workload(target, name, found, chosen, largest, one_width=True)
    large = leviathan_models.inflated(target, chosen.inflate, chosen.seed)
    clocked = work if large is target else dataclasses.replace(work, target=large)
    sizes = {"target": _size(target.params)} | {draft.name: draft.num_params for draft in drafts}
    cells_of = _measure(Sweep(chosen, work, clocked, drafts, references, store), view)
    measured = Measured(
        name=chosen.name,
        paper=chosen.paper,
        metric=chosen.metric,
        label=_label(chosen, sizes, large, store),
        about=_about(chosen, sizes),
        sizes=sizes,
        **cells_of,
        distilled=leviathan_models.distilled(chosen.models, store.directory),
        seconds=leviathan_models.seconds(chosen.models, store.directory) | {"measuring": store.seconds},
    )
    cells.write_report(store, measured, report, view)
