"""The experiment of Chen et al. 2023 (arXiv 2302.01318): one target, one draft, K swept, on summaries and on programs.

The cells, each of which a resumed run skips if it is done: for every sampling, batch size and K, the times of both
sides (Figure 1); then the texts of both sides over many prompts, and their quality (Table 1).
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, NamedTuple

import jax

from specjax import drafters
from specjax.api.pretrained import Pretrained
from specjax.experiments import bench, cells, choices, texts
from specjax.experiments.bench import Workload
from specjax.experiments.cells import Cell
from specjax.experiments.prompts import Prompt
from specjax.experiments.reports import chinchilla as report
from specjax.experiments.reports import tables
from specjax.experiments.reports.chinchilla import Measured, Sampling
from specjax.experiments.reports.display import View
from specjax.experiments.results import Row
from specjax.experiments.settings import POSITIVE, Check, Config, all_at_least, at_least, one_of, parse
from specjax.experiments.store import Store
from specjax.experiments.tasks import human_eval, prompting, quality, sandbox
from specjax.types import AnyDrafter

SUMMARY_END = ("\n",)
"""The end of a summary, which is one line."""

CHUNK = 4
"""Batches of texts that make one cell."""

Scores = dict[str, list[float]]
"""By metric, one score per problem."""

_PAIR = "each is (temperature, top_p), such as (1.0, 0.8)"


@dataclasses.dataclass(frozen=True)
class Settings(choices.Models):
    """The keys of the files in `configs/chinchilla`."""

    name: str
    paper: str
    task: Annotated[str, one_of("summaries", "humaneval")]
    data: str
    num_shots: Annotated[int, at_least(0)]
    template: str
    execute: Annotated[str, one_of("False", "True", "unsafe")]
    seconds: Annotated[float, POSITIVE]
    memory_gb: Annotated[float, POSITIVE]
    samplings: Annotated[
        tuple[tuple[float, ...], ...],
        Check(bool, "give pairs of temperature and top_p, such as ((1.0, 0.8),)"),
        Check(lambda pair: len(pair) == 2 and pair[0] >= 0 and 0 < pair[1] <= 1, _PAIR, each=True),
    ]
    num_draft_tokens: Annotated[tuple[int, ...], all_at_least(0), choices.DRAFT_TOKENS._replace(each=True)]
    batch_sizes: Annotated[tuple[int, ...], all_at_least(1)]
    num_timed: Annotated[int, at_least(1)]
    repeats: Annotated[int, at_least(1)]
    num_problems: Annotated[int, at_least(0)]
    num_samples: Annotated[int, at_least(1)]
    quality_draft_tokens: Annotated[int, at_least(1), choices.DRAFT_TOKENS]
    quality_batch: Annotated[int, at_least(1)]
    max_prompt_tokens: Annotated[int, at_least(1)]
    max_new_tokens: Annotated[int, at_least(1)]
    seed: int

    known_drafters = ("model", "ngram")

    @property
    def limits(self) -> sandbox.Limits:
        """The limits of a program."""
        return sandbox.Limits(self.seconds, int(self.memory_gb * 2**30))

    def judge(self) -> Callable[[sandbox.Exam, sandbox.Limits], str]:
        """The function that tests programs.

        Raises:
          OSError: where they cannot be isolated.
        """
        return sandbox.judge(self.limits, unsafe=self.execute == "unsafe")

    def check(self) -> None:
        """Refuses values that do not fit each other, and programs that cannot be isolated."""
        super().check()
        choices.check_seed(self.seed)
        if self.task == "summaries" and not self.data:
            raise ValueError("config.data is empty: give --config.data=FILE, JSONL with `input` and `target`.")
        if self.task == "humaneval" and self.execute != "False":
            # Now, rather than after hours of decoding.
            self.judge()


class Task(NamedTuple):
    """What is decoded, and how it is judged.

    Attributes:
      prompts: one per problem.
      stop_strings: what ends a text.
      judge: maps the samples of some problems, by problem number, to scores; None where nothing is judged.
    """

    prompts: list[str]
    stop_strings: tuple[str, ...]
    judge: Callable[[Mapping[int, Sequence[str]]], Scores] | None


def _summaries(chosen: Settings) -> Task:
    """The pairs of the data file; the first of them are shown as examples, and left out."""
    sources, references = texts.read(chosen.data, "input"), texts.read(chosen.data, "target")
    if len(sources) <= chosen.num_shots:
        raise ValueError(f"{chosen.data} has {len(sources)} pairs: num_shots={chosen.num_shots} leaves none to decode.")
    shots, first = list(zip(sources, references, strict=True))[: chosen.num_shots], chosen.num_shots

    def judge(samples: Mapping[int, Sequence[str]]) -> Scores:
        scores = []
        for problem, some in samples.items():
            ended = [prompting.truncate(text, SUMMARY_END).strip() for text in some]
            scores.append(quality.rouge2(ended, [references[first + problem]] * len(ended)))
        return {"ROUGE-2": scores}

    return Task([prompting.few_shot(chosen.template, shots, text) for text in sources[first:]], SUMMARY_END, judge)


def _human_eval(chosen: Settings) -> Task:
    problems = human_eval.problems()

    def judge(samples: Mapping[int, Sequence[str]]) -> Scores:
        asked = [problems[i] for i in samples]
        outcomes = human_eval.run(asked, list(samples.values()), chosen.limits, chosen.judge())
        correct = [sum(outcome == sandbox.PASSED for outcome in some) for some in outcomes]
        n = chosen.num_samples
        return {f"pass@{k}": human_eval.pass_at_k(correct, n, k) for k in sorted({1, 10, 100, n}) if k <= n}

    prompts = [problem.prompt for problem in problems]
    return Task(prompts, human_eval.STOP_STRINGS, judge if chosen.execute != "False" else None)


def _problems(chosen: Settings, task: Task, target: Pretrained) -> list[int]:
    """The first problems whose prompts are short enough: `num_problems`, or all."""
    found = cells.fitting(target, task.prompts, chosen.max_prompt_tokens)
    if len(found) < max(chosen.num_problems, 1):
        raise ValueError(
            f"{len(found)} of {len(task.prompts)} prompts have at most max_prompt_tokens={chosen.max_prompt_tokens} "
            f"tokens, but num_problems={chosen.num_problems}: lower that, or raise max_prompt_tokens."
        )
    return found[: chosen.num_problems] if chosen.num_problems else found


class Sweep(NamedTuple):
    """The settings and prompts that the cells measure, and the finished cells.

    Attributes:
      chosen: the settings.
      work: the prompts: all problems once, then all of them again.
      task: what is judged.
      problems: the numbers of the problems.
      drafter_of: makes the drafter for a K.
      store: the finished cells.
    """

    chosen: Settings
    work: Workload
    task: Task
    problems: list[int]
    drafter_of: Callable[[int], AnyDrafter]
    store: Store

    @property
    def num_texts(self) -> int:
        """The number of texts of each side that are judged."""
        return len(self.problems) * self.chosen.num_samples

    def timed(self, sampling: Sampling, batch_size: int, k: int) -> Row:
        """The row of a timed cell."""
        drafter = self.drafter_of(k) if k else drafters.none()
        options = {"top_p": sampling.top_p, "batch_size": batch_size}
        name, number = self.chosen.draft_name, self.chosen.num_timed
        row = cells.timed(self.work, drafter, name, sampling.temperature, number, **options)
        name = choices.name_of(self.chosen.drafter) if drafter.num_draft_tokens else "none"
        return row | {"task": self.chosen.task, "drafter": name}

    def texts(self, side: str, sampling: Sampling, prompts: range) -> list[str]:
        """The texts of some prompts by one side."""
        drafter = self.drafter_of(self.chosen.quality_draft_tokens) if side == "speculative" else drafters.none()
        temperature, top_p = sampling
        return cells.texts(self.work, drafter, temperature, prompts, self.chosen.quality_batch, top_p=top_p).text

    def chunks(self, side: str, sampling: Sampling) -> list[Cell]:
        """The cells of one side's texts, of a few batches each."""
        step = CHUNK * self.chosen.quality_batch
        ranges = [range(i, min(i + step, self.num_texts)) for i in range(0, self.num_texts, step)]
        key = f"texts, {side}, {sampling.name}"
        return [Cell(f"{key}, {part.start}", partial(self.texts, side, sampling, part)) for part in ranges]

    def decoded(self, side: str, sampling: Sampling) -> list[str]:
        """One side's texts, from the measured cells."""
        return [text for cell in self.chunks(side, sampling) for text in self.store.cells[cell.key]]

    def scores(self, side: str, sampling: Sampling) -> Scores:
        """The scores of one side's texts."""
        assert self.task.judge is not None
        decoded, number = self.decoded(side, sampling), len(self.problems)
        return self.task.judge({problem: decoded[i::number] for i, problem in enumerate(self.problems)})


def _describe(row: Row) -> str:
    return f"{tables.speedup(row)}, {row['block_efficiency']:.2f} tokens per call"


def _measure(sweep: Sweep, view: View) -> tuple[list[Row], dict[str, Scores], list[Row]]:
    """All cells: the timed rows, the scores, and the samples."""
    chosen, store = sweep.chosen, sweep.store
    samplings = [Sampling(*pair) for pair in chosen.samplings]
    speeds, scores, planned = [], {}, []
    for sampling in samplings:
        swept = [
            Cell(f"speed, {sampling.name}, batch {b}, K={k}", partial(sweep.timed, sampling, b, k), _describe)
            for b in chosen.batch_sizes
            for k in chosen.num_draft_tokens
        ]
        speeds, planned = [*speeds, *swept], [*planned, *swept]
        for side in ("plain", "speculative"):
            planned += sweep.chunks(side, sampling)
            key = f"{side}, {sampling.name}"
            if sweep.task.judge is not None:
                scores[key] = Cell(f"scores, {key}", partial(sweep.scores, side, sampling))
                planned.append(scores[key])
    cells.run(planned, store, view)
    samples = [
        {"sampling": sampling.name, "side": side, "problem": prompt.id, "prompt": prompt.text, "text": text}
        for sampling in samplings
        for side in ("plain", "speculative")
        for prompt, text in zip(sweep.work.prompts, sweep.decoded(side, sampling), strict=False)
    ]
    rows = [store.cells[cell.key] for cell in speeds]
    return rows, {key: store.cells[cell.key] for key, cell in scores.items()}, samples


def _about(chosen: Settings, num_problems: int) -> str:
    draft = "n-gram lookup" if chosen.drafter == "ngram" else choices.name_of(chosen.drafter)
    if chosen.drafter == "model":
        draft = chosen.draft_name
        if chosen.min_confidence:
            draft += f" that stops where less than {chosen.min_confidence:g} sure"
    device = f"{chosen.dtype} on {bench.device_name()} with jax {jax.__version__}"
    return (
        f"Target {chosen.target_name}, draft {draft}, {device}; task {chosen.task}: {chosen.num_timed} texts timed, "
        f"each {chosen.repeats} times by both sides; {chosen.num_samples} of each of {num_problems} problems judged; "
        f"at most {chosen.max_new_tokens} new tokens."
    )


def _about_programs(chosen: Settings, number: int) -> str:
    """Says whether and how the programs that the model writes are run."""
    limits = f"each in a jail, {chosen.seconds:g} s and {chosen.memory_gb:g} GB"
    if chosen.execute == "False":
        return f"No program is run, so there is no pass@k: --config.execute=True would run {number}, {limits}."
    jail, _ = sandbox.isolation(chosen.limits)
    gaps = f", in which programs CAN {', '.join(jail.missing)}" if jail.missing else ""
    return f"{number} programs that the model writes will be run, {limits} ({jail.name}{gaps})."


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Runs the experiment, as `EXPERIMENTS` says."""
    view, chosen = view or View(), parse(Settings, config)
    store = Store(workdir, config.to_dict(), overwrite=overwrite)
    task = _human_eval(chosen) if chosen.task == "humaneval" else _summaries(chosen)
    target, drafter_of = bench.load_both(chosen, view)
    problems = _problems(chosen, task, target)
    number = len(problems) * chosen.num_samples
    cycle = itertools.islice(itertools.cycle(problems), max(number, chosen.num_timed))
    prompts = [Prompt(i, task.prompts[problem], chosen.task, str(problem)) for i, problem in enumerate(cycle)]
    largest = max(*chosen.num_draft_tokens, chosen.quality_draft_tokens)
    options = {"one_width": True, "stop_strings": task.stop_strings}
    work = bench.workload(target, chosen.target_name, prompts, chosen, largest, **options)
    if chosen.task == "humaneval":
        view.line(_about_programs(chosen, 2 * len(chosen.samplings) * number))
    rows, scores, samples = _measure(Sweep(chosen, work, task, problems, drafter_of, store), view)
    about, k = _about(chosen, len(problems)), chosen.quality_draft_tokens
    measured = Measured(chosen.name, chosen.paper, about, rows, scores, k, store.seconds)
    store.write_config()
    store.write_samples(samples)
    cells.write_report(store, measured, report, view)
