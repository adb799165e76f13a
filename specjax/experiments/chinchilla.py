"""The experiment of Chen et al. 2023 (arXiv 2302.01318): one target, one draft, K swept, on summaries and on programs.

The cells, each of which an interrupted run finds done: for every way to sample, batch size and K the times of both
sides (Figure 1), then the texts of both sides over many prompts, and how good they are (Table 1).
"""

import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from specjax import drafters, files
from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.experiments import cells, choices, compare, results, texts
from specjax.experiments.prompts import Prompt
from specjax.experiments.reports import plots, tables
from specjax.experiments.reports.chinchilla import Measured, Sampling, figures, findings, summary
from specjax.experiments.reports.display import View
from specjax.experiments.results import Row
from specjax.experiments.store import Store
from specjax.experiments.tasks import human_eval, prompting, quality, sandbox
from specjax.parallel import sharding
from specjax.types import Drafter

Config = Any
"""An `ml_collections.ConfigDict` with the keys of the files in `configs/chinchilla`."""

TASKS = ("summaries", "humaneval")

EXECUTE = ("False", "True", "unsafe")
"""Whether programs are run: not, in isolation, or also where isolation is not whole."""

SUMMARY_END = ("\n",)
"""What ends a summary: it is one line."""

CHUNK = 4
"""Batches of texts that make one cell."""

Scores = dict[str, list[float]]
"""By metric, one score a problem."""


class Task(NamedTuple):
    """What is decoded, and how it is judged.

    Attributes:
      prompts: one a problem.
      stop_strings: what ends a text.
      judge: from the samples of some problems, by their numbers, to their scores; None where nothing is judged.
    """

    prompts: list[str]
    stop_strings: tuple[str, ...]
    judge: Callable[[Mapping[int, Sequence[str]]], Scores] | None


def check(config: Config) -> None:
    """Refuses values that make no sense, before anything is loaded.

    Raises:
      ValueError: naming the key, its value and the remedy.
      OSError: where programs should be run that cannot be isolated.
    """
    choices_of = {"task": TASKS, "execute": EXECUTE}
    choices_of |= {key: compare.CHOICES[key] for key in ("dtype", "draft_sharding")}
    for key, known in choices_of.items():
        if config[key] not in known:
            raise ValueError(f"config.{key}={config[key]!r}: choose one of {', '.join(known)}.")
    choices.check_drafter(config, ("model", "ngram"))
    sharding.with_whole(config.mesh_whole)
    if not config.target:
        raise ValueError("config.target is empty: give --config.target=SOURCE.")
    if config.task == "summaries" and not config.data:
        raise ValueError("config.data is empty: give --config.data=FILE, JSONL with `input` and `target`.")
    least = {"num_timed": 1, "num_problems": 0, "num_samples": 1, "quality_batch": 1, "max_new_tokens": 1}
    least |= {"repeats": 1, "quality_draft_tokens": 1, "max_prompt_tokens": 1, "num_shots": 0}
    for key, low in least.items():
        if config[key] < low:
            raise ValueError(f"config.{key}={config[key]}: at least {low}.")
    for key, low in (("num_draft_tokens", 0), ("batch_sizes", 1)):
        if not config[key] or min(config[key]) < low:
            raise ValueError(f"config.{key}={tuple(config[key])}: one at least, and each at least {low}.")
    choices.check_num_draft_tokens(*config.num_draft_tokens, config.quality_draft_tokens)
    choices.check_seed(config.seed)
    if not config.samplings:
        raise ValueError("config.samplings is empty: give pairs of temperature and top_p, such as ((1.0, 0.8),).")
    for pair in config.samplings:
        if len(pair) != 2 or pair[0] < 0 or not 0 < pair[1] <= 1:
            raise ValueError(f"config.samplings has {pair!r}: each is (temperature, top_p), such as (1.0, 0.8).")
    if config.memory_gb <= 0 or config.seconds <= 0:
        raise ValueError(f"config.seconds={config.seconds}, config.memory_gb={config.memory_gb}: both more than 0.")
    if config.task == "humaneval" and config.execute != "False":
        # Not after hours of decoding.
        sandbox.judge(_limits(config), unsafe=config.execute == "unsafe")


def _summaries(config: Config) -> Task:
    """The pairs of the data file; the first of them are shown as examples, and left out."""
    sources, references = texts.read(config.data, "input"), texts.read(config.data, "target")
    if len(sources) <= config.num_shots:
        raise ValueError(f"{config.data} has {len(sources)} pairs: num_shots={config.num_shots} leave none over.")
    shots, first = list(zip(sources, references, strict=True))[: config.num_shots], config.num_shots

    def judge(samples: Mapping[int, Sequence[str]]) -> Scores:
        scores = []
        for problem, some in samples.items():
            ended = [prompting.truncate(text, SUMMARY_END).strip() for text in some]
            scores.append(quality.rouge2(ended, [references[first + problem]] * len(ended)))
        return {"ROUGE-2": scores}

    return Task([prompting.few_shot(config.template, shots, text) for text in sources[first:]], SUMMARY_END, judge)


def _limits(config: Config) -> sandbox.Limits:
    return sandbox.Limits(config.seconds, int(config.memory_gb * 2**30))


def _human_eval(config: Config) -> Task:
    chosen = human_eval.problems()

    def scores(samples: Mapping[int, Sequence[str]]) -> Scores:
        limits = _limits(config)
        judge = sandbox.judge(limits, unsafe=config.execute == "unsafe")
        outcomes = human_eval.run([chosen[i] for i in samples], list(samples.values()), limits, judge)
        correct = [sum(outcome == sandbox.PASSED for outcome in row) for row in outcomes]
        n = config.num_samples
        return {f"pass@{k}": human_eval.pass_at_k(correct, n, k) for k in sorted({1, 10, 100, n}) if k <= n}

    return Task([p.prompt for p in chosen], human_eval.STOP_STRINGS, scores if config.execute != "False" else None)


def _fitting(config: Config, task: Task, target: Pretrained) -> list[int]:
    """The first problems whose prompts are short enough: `num_problems`, or all.

    Raises:
      ValueError: where they do not suffice.
    """
    tokenizer = target.tokenizer
    assert tokenizer is not None
    found: list[int] = []
    for i, text in enumerate(task.prompts):
        if len(tokenizer.encode(text)) <= config.max_prompt_tokens:
            found.append(i)
        if len(found) == config.num_problems:
            return found
    if len(found) < max(config.num_problems, 1):
        raise ValueError(
            f"{len(found)} of {len(task.prompts)} prompts have at most max_prompt_tokens={config.max_prompt_tokens} "
            f"tokens, but num_problems={config.num_problems}: lower this, or raise that."
        )
    return found


def _decode(
    config: Config, store: Store, setting: cells.Setting, drafter: Drafter, key: str, sampling: Sampling, total: int
) -> list[str]:
    """The texts of the first prompts, found or decoded a few batches at a time."""
    found: list[str] = []
    step = CHUNK * config.quality_batch
    for begin in range(0, total, step):
        number = min(step, total - begin)
        found += store.get(
            f"{key}, {begin}",
            lambda b=begin, n=number: (
                cells.texts(
                    setting,
                    drafter,
                    sampling.temperature,
                    n,
                    verify.rejection,
                    config.quality_batch,
                    top_p=sampling.top_p,
                    begin=b,
                ).text
            ),
        )
    return found


def _timed(config: Config, setting: cells.Setting, drafter: Drafter, sampling: Sampling, batch_size: int) -> Row:
    row = cells.timed(
        setting,
        drafter,
        config.draft,
        sampling.temperature,
        config.num_timed,
        verify.rejection,
        top_p=sampling.top_p,
        batch_size=batch_size,
    )
    return row | {
        "task": config.task,
        "drafter": choices.name_of(config.drafter) if drafter.num_draft_tokens else "none",
    }


def _about(config: Config, num_problems: int) -> str:
    draft = "n-gram lookup" if config.drafter == "ngram" else choices.name_of(config.drafter)
    if config.drafter == "model":
        draft = f"{config.draft}{' in int8' if config.draft_int8 else ''}"
        if config.min_confidence:
            draft += f" that stops where less than {config.min_confidence:g} sure"
    place = f"{config.dtype} on {compare.device_name()} with jax {jax.__version__}"
    return (
        f"Target {config.target}, draft {draft}, {place}; task {config.task}: {config.num_timed} texts timed, each "
        f"{config.repeats} times by both sides; {config.num_samples} of each of {num_problems} problems judged; at "
        f"most {config.max_new_tokens} new tokens."
    )


def _said_of_programs(config: Config, number: int) -> str:
    """What a run does, or would do, with programs that the model writes."""
    limits = f"each in a jail, {config.seconds:g} s and {config.memory_gb:g} GB"
    if config.execute == "False":
        return f"No program is run, so there is no pass@k: --config.execute=True would run {number}, {limits}."
    jail, _ = sandbox.isolation(_limits(config))
    gaps = f", in which programs CAN {', '.join(jail.missing)}" if jail.missing else ""
    return f"{number} programs that the model writes will be run, {limits} ({jail.name}{gaps})."


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Runs the experiment and writes its files; an interrupted run is continued by the same call.

    Args:
      config: as the files in `configs/chinchilla` have it.
      workdir: where the files go.
      overwrite: delete an earlier run in the workdir first.
      view: the screen; by default standard output.

    Raises:
      ValueError: for values that make no sense, files that are broken, or a workdir of another run.
      OSError: for files that cannot be read or written.
      KeyboardInterrupt: with what is finished.
    """
    view = view or View()
    check(config)
    directory = pathlib.Path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    store = Store(directory, config.to_dict(), overwrite=overwrite)
    try:
        measured, samples = _measure(config, store, view)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"{len(store.cells)} finished cells are in {store.path}") from error
    files.write(directory / "config.json", results.to_json(config.to_dict()))
    lines = [json.dumps(sample, ensure_ascii=False) for sample in samples]
    files.write(directory / "samples.jsonl", "".join(f"{line}\n" for line in lines))
    files.write(directory / "results.json", results.to_json(measured.rows))
    images = plots.save(directory, figures(measured))
    files.write(directory / "summary.md", summary(measured))
    for text in findings(measured):
        view.line(text.replace("**", ""), "bold")
    view.line(f"{', '.join(('results.json', 'summary.md', *images))} are in {directory}.")


def _measure(config: Config, store: Store, view: View) -> tuple[Measured, list[Row]]:
    """All cells, and the samples."""
    task = _human_eval(config) if config.task == "humaneval" else _summaries(config)
    loading: Any = ConfigDict(config.to_dict())
    target, drafter_of = compare.load(loading, view)
    fits = _fitting(config, task, target)
    n = len(fits)
    num_texts = n * config.num_samples
    # All problems once, then all of them again.
    cycle = itertools.islice(itertools.cycle(fits), max(num_texts, config.num_timed))
    chosen = [Prompt(i, task.prompts[problem], config.task, str(problem)) for i, problem in enumerate(cycle)]
    k = config.quality_draft_tokens
    setting = cells.setting(
        target,
        chosen,
        max_draft_tokens=max(*config.num_draft_tokens, k),
        max_new_tokens=config.max_new_tokens,
        name=config.target,
        repeats=config.repeats,
        seed=config.seed,
        dtype=config.dtype,
        stop_strings=task.stop_strings,
    )
    samplings = [Sampling(*pair) for pair in config.samplings]
    if config.task == "humaneval":
        view.line(_said_of_programs(config, 2 * len(samplings) * num_texts))
    rows: list[Row] = []
    scores: dict[str, Scores] = {}
    samples: list[Row] = []
    sides = {"plain": drafters.none(), "speculative": drafter_of(k)}
    total = len(samplings) * (len(config.batch_sizes) * len(config.num_draft_tokens) + len(sides))
    with view.progress(total, what="cells") as bar:
        for sampling in samplings:
            for batch_size in config.batch_sizes:
                for draft_tokens in config.num_draft_tokens:
                    key = f"speed, {sampling.name}, batch {batch_size}, K={draft_tokens}"
                    drafter = drafter_of(draft_tokens) if draft_tokens else drafters.none()
                    row = store.get(key, lambda d=drafter, s=sampling, b=batch_size: _timed(config, setting, d, s, b))
                    rows.append(row)
                    view.line(f"{key}: {tables.speedup(row)}, {row['block_efficiency']:.2f} tokens a call")
                    bar.advance(bar.task_ids[0])
            for side, drafter in sides.items():
                key = f"{side}, {sampling.name}"
                decoded = _decode(config, store, setting, drafter, f"texts, {key}", sampling, num_texts)
                by_problem = {problem: decoded[i::n] for i, problem in enumerate(fits)}
                if task.judge is not None:
                    scores[key] = store.get(f"scores, {key}", lambda j=task.judge, t=by_problem: j(t))
                samples += [
                    {"sampling": sampling.name, "side": side, "problem": p.id, "prompt": p.text, "text": text}
                    for p, text in zip(chosen, decoded, strict=False)
                ]
                bar.advance(bar.task_ids[0])
    return Measured(config.name, config.paper, _about(config, n), rows, scores, k, store.seconds), samples
