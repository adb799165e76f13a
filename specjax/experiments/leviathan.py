"""The experiment of Leviathan et al. 2022 (arXiv 2211.17192): one target, drafts of several sizes, K swept.

The stages, each of which an interrupted run finds done: the vocabulary, the models (trained, or loaded from where they
are published), the n-gram tables, then the cells of three tables:

  Table 3  alpha = E[sum_x min(target, draft)] of every draft on text that the target generates;
  Table 2  for every draft, temperature and K, what Theorem 3.8 predicts from alpha and c, and what the clock says,
           with the quality of the text with and without speculation;
  Table 5  alpha of every draft at several degrees of lenience.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from specjax import drafters, files
from specjax.api import pretrained
from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.experiments import cells, compare, prompts, results, tasks, texts, train
from specjax.experiments.reports import plots, tables
from specjax.experiments.reports.display import View
from specjax.experiments.reports.leviathan import Measured, figures, findings, summary
from specjax.experiments.results import Row
from specjax.experiments.store import Store
from specjax.text.tokenizer import SPIECE
from specjax.training import fit
from specjax.types import Drafter

Config = Any
"""An `ml_collections.ConfigDict` with the keys of the files in `configs/leviathan`."""


class Draft(NamedTuple):
    """A draft: its name, the drafter that it gives at some K, and its size in numbers."""

    name: str
    drafter: Callable[[int], Drafter]
    num_params: int


def check(config: Config) -> None:
    """Refuses values that make no sense, before anything is trained.

    Raises:
      ValueError: naming the key, its value and the remedy.
    """
    if config.metric not in tasks.METRICS:
        raise ValueError(f"config.metric={config.metric!r}: choose one of {', '.join(tasks.METRICS)}.")
    if "target" not in config.models:
        raise ValueError(f"config.models has no 'target', only {', '.join(config.models)}.")
    for key, least in (("num_prompts", 1), ("quality_prompts", 1), ("alpha_tokens", 1), ("repeats", 1)):
        if config[key] < least:
            raise ValueError(f"config.{key}={config[key]}: at least {least}.")
    for k in config.num_draft_tokens:
        if k < 1:
            raise ValueError(f"config.num_draft_tokens={tuple(config.num_draft_tokens)}: at least 1 each.")
    needed = {"test": config.test}
    if config.tables or any(not model.source for model in config.models.values()):
        needed["train"] = config.train
    if any(not model.source for model in config.models.values()):
        needed["valid"] = config.valid
    for key, value in needed.items():
        if not value:
            raise ValueError(f"config.{key} is empty: give --config.{key}=FILE, JSONL with `input` and `target`.")
        if not pathlib.Path(value).expanduser().is_file():
            what = "is a directory" if pathlib.Path(value).expanduser().is_dir() else "does not exist"
            raise FileNotFoundError(f"config.{key}: the file {value} {what}: give JSONL with `input` and `target`.")


def _train(config: Config, name: str, workdir: pathlib.Path, view: View, overwrite: bool) -> str:
    """Trains a model, or finds it trained, or goes on; returns where it is. The target makes the vocabulary."""
    view.line(f"Training {name}", "bold")
    made: Any = ConfigDict(config.training.to_dict())
    model, target = config.models[name], config.models.target
    made.update(name=name, data=config.train, valid=config.valid, size=model.size, num_steps=model.num_steps)
    made.model.update(model.model.to_dict())
    if name != "target":
        made.vocabulary = target.source or str(workdir / "models" / "target" / SPIECE)
    train.run(made, workdir / "models" / name, overwrite=overwrite, view=view)
    return str(workdir / "models" / name / fit.MODEL)


def _models(config: Config, workdir: pathlib.Path, view: View, overwrite: bool) -> dict[str, Pretrained]:
    """All models, loaded from their sources, or trained here first."""
    loaded: dict[str, Pretrained] = {}
    for name, model in sorted(config.models.items(), key=lambda item: item[0] != "target"):
        source = model.source or _train(config, name, workdir, view, overwrite)
        with view.status(f"Loading {name} from {source}"):
            loaded[name] = pretrained.load(source, dtype=config.dtype)
    if loaded["target"].tokenizer is None:
        raise ValueError(f"The target {config.models.target.source} has no tokenizer: save one beside it.")
    return loaded


def _training_seconds(config: Config, workdir: pathlib.Path) -> dict[str, float]:
    """What training took, by model."""
    found = {}
    for name, model in config.models.items():
        if not model.source:
            lines = (workdir / "models" / name / fit.CURVE).read_text(encoding="utf-8").splitlines()
            found[f"training {name}"] = sum(json.loads(line).get("seconds", 0.0) for line in lines)
    return found


def _tables(config: Config, target: Pretrained, view: View) -> list[Draft]:
    """Unigram, bigram ... tables of the targets of the training data, as the target's texts have them."""
    if not config.tables:
        return []
    tokenizer = target.tokenizer
    assert tokenizer is not None
    start = [] if target.model.start_token is None else [target.model.start_token]
    with view.status(f"Counting n-grams of {config.train}"):
        encoded = [start + tokenizer.encode(text) for text in texts.read(config.train, "target")]
    found = []
    for order in config.tables:
        table = drafters.count_ngrams(
            encoded,
            vocab_size=target.model.vocab_size,
            order=order,
            context_tokens=len(start),
            max_entries=config.max_entries,
            tokenizer=tokenizer,
        )
        name = {1: "unigram", 2: "bigram"}.get(order, f"{order}-gram")
        size = sum(x.size for x in jax.tree.leaves(table.params))
        found.append(Draft(name, lambda k, table=table: drafters.table(table, num_draft_tokens=k), size))
    return found


def _size(model: Pretrained) -> int:
    return sum(x.size for x in jax.tree.leaves(model.params))


def _alpha(config: Config, setting: cells.Setting, draft: Draft, temperature: float) -> dict[str, float]:
    """Alpha of a draft on the target's own text: at least `alpha_tokens` of it, where the prompts suffice."""
    number, found = config.quality_prompts, None
    while found is None or found.num_tokens < config.alpha_tokens:
        found = cells.texts(setting, draft.drafter(1), temperature, number, verify.observe, config.quality_batch)
        if number == len(setting.prompts):
            break
        number = min(2 * number, len(setting.prompts))
    return {"alpha": found.acceptance_rate, "num_tokens": found.num_tokens}


def _quality(
    config: Config, setting: cells.Setting, drafter: Drafter, temperature: float, references: Sequence[str]
) -> float:
    number = config.quality_prompts
    found = cells.texts(setting, drafter, temperature, number, verify.rejection, config.quality_batch)
    return tasks.METRICS[config.metric](found.text, references[:number])


def _about(config: Config, sizes: dict[str, int], num_prompts: int) -> str:
    target = f"a target of {sizes['target']:,} parameters"
    drafts = ", ".join(f"{name} ({size:,})" for name, size in sizes.items() if name != "target")
    place = f"{config.dtype} on {compare.device_name()} with jax {jax.__version__}"
    return (
        f"{target[0].upper()}{target[1:]}; drafts {drafts} (parameters of models, numbers in tables). {num_prompts} "
        f"prompts timed at batch 1, {config.quality_prompts} for {config.metric}, at most {config.max_new_tokens} new "
        f"tokens each; {place}."
    )


def _measure(
    config: Config, store: Store, setting: cells.Setting, drafts: Sequence[Draft], references: Sequence[str], view: View
) -> tuple[list[Row], dict[str, Any], dict[float, dict[str, float]], dict[str, dict[float, float]]]:
    """All cells: the timed rows, the alphas, the quality, and the alphas under lenience."""
    timed = [draft for draft in drafts if draft.name in config.timed_drafts] or list(drafts)
    temperatures, sweep = list(config.temperatures), list(config.num_draft_tokens)
    total = len(drafts) * len(temperatures) + len(timed) * len(temperatures) * (len(sweep) + 1)
    total += len(temperatures) + len(drafts) * len(config.lenience)
    rows: list[Row] = []
    alpha: dict[str, Any] = {}
    quality: dict[float, dict[str, float]] = {t: {} for t in temperatures}
    lenience: dict[str, dict[float, float]] = {}
    with view.progress(total, what="cells") as bar:

        def get(key: str, compute: Callable[[], Any]) -> Any:
            found = store.get(key, compute)
            bar.advance(bar.task_ids[0])
            return found

        for draft in drafts:
            for t in temperatures:
                key = f"alpha, {draft.name}, T={t:g}"
                found = get(key, lambda d=draft, t=t: _alpha(config, setting, d, t))
                alpha.setdefault(draft.name, {})[t] = found["alpha"], found["num_tokens"]
                view.line(f"{key}: {found['alpha']:.3f}")
        for draft in timed:
            for k in sweep:
                for t in temperatures:
                    key = f"speed, {draft.name}, K={k}, T={t:g}"
                    row = get(
                        key,
                        lambda d=draft, k=k, t=t: cells.timed(
                            setting, d.drafter(k), d.name, t, config.num_prompts, verify.rejection
                        ),
                    )
                    rows.append(row)
                    view.line(f"{key}: {tables.speedup(row)} (c {row['cost_ratio']:.2f})")
        for t in temperatures:
            quality[t]["plain"] = get(
                f"{config.metric}, plain, T={t:g}",
                lambda t=t: _quality(config, setting, drafters.none(), t, references),
            )
            for draft in timed:
                best = max(
                    (row for row in rows if (row["draft"], row["temperature"]) == (draft.name, t)),
                    key=lambda row: row["measured_speedup"],
                )["num_draft_tokens"]
                key = f"{config.metric}, {draft.name}, T={t:g}"
                quality[t][draft.name] = get(
                    key, lambda d=draft, k=best, t=t: _quality(config, setting, d.drafter(k), t, references)
                )
                view.line(f"{key}: {quality[t][draft.name]:.2f} (plain {quality[t]['plain']:.2f})")
        for draft in drafts:
            for degree in config.lenience:
                key = f"lenience, {draft.name}, l={degree:g}"
                rule = verify.rejection if degree == 1 else verify.lenient(degree)
                number = config.quality_prompts
                lenience.setdefault(draft.name, {})[degree] = get(
                    key,
                    lambda d=draft, rule=rule, number=number: (
                        cells.texts(
                            setting, d.drafter(config.lenience_draft_tokens), 1.0, number, rule, config.quality_batch
                        ).acceptance_rate
                    ),
                )
    return rows, alpha, quality, lenience


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Runs the experiment and writes its files; an interrupted run is continued by the same call.

    Args:
      config: as the files in `configs/leviathan` have it.
      workdir: where the files go.
      overwrite: delete an earlier run in the workdir first, trained models and all.
      view: the screen; by default standard output.

    Raises:
      ValueError: for values that make no sense, files that are broken, or a workdir of another run.
      OSError: for files that cannot be read or written.
    """
    view = view or View()
    check(config)
    directory = pathlib.Path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    store = Store(directory, config.to_dict(), overwrite=overwrite)
    files.write(directory / "config.json", results.to_json(config.to_dict()))
    models = _models(config, directory, view, overwrite)
    target = models.pop("target")
    chosen = [p._replace(text=config.prefix + p.text) for p in prompts.read(config.test)]
    references = texts.read(config.test, "target")
    if len(references) != len(chosen):
        raise ValueError(f"{config.test} has {len(chosen)} inputs, but {len(references)} targets.")
    tokenizer = target.tokenizer
    assert tokenizer is not None
    fits = [i for i, p in enumerate(chosen) if len(tokenizer.encode(p.text)) <= config.max_prompt_tokens]
    if len(fits) < max(config.num_prompts, config.quality_prompts):
        raise ValueError(
            f"{config.test} has {len(fits)} inputs of at most max_prompt_tokens={config.max_prompt_tokens} tokens, but "
            f"num_prompts={config.num_prompts} and quality_prompts={config.quality_prompts}: lower these, or raise it."
        )
    chosen, references = [chosen[i] for i in fits], [references[i] for i in fits]
    drafts = _tables(config, target, view)
    drafts += [
        Draft(name, lambda k, m=model: drafters.model(m, num_draft_tokens=k), _size(model))
        for name, model in models.items()
    ]
    sizes = {"target": _size(target)} | {draft.name: draft.num_params for draft in drafts}
    setting = cells.setting(
        target,
        chosen,
        max_draft_tokens=max(*config.num_draft_tokens, config.lenience_draft_tokens),
        max_new_tokens=config.max_new_tokens,
        name=config.models.target.source or "target",
        repeats=config.repeats,
        seed=config.seed,
        dtype=config.dtype,
    )
    rows, alpha, quality, lenience = _measure(config, store, setting, drafts, references, view)
    spent = _training_seconds(config, directory) | {"measuring": store.seconds}
    measured = Measured(
        config.name,
        config.paper,
        config.metric,
        _about(config, sizes, config.num_prompts),
        sizes,
        alpha,
        rows,
        quality,
        lenience,
        spent,
    )
    files.write(directory / "results.json", results.to_json(measured.rows))
    images = plots.save(directory, figures(measured))
    files.write(directory / "summary.md", summary(measured))
    for text in findings(measured):
        view.line(text.replace("**", ""), "bold")
    view.line(f"{', '.join(('results.json', 'summary.md', *images))} are in {directory}.")
