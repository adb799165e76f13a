"""The rows of `results.json`: their fields, the values derived from counters and times, and sums of rows."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specjax import metrics
from specjax.experiments import noise
from specjax.state import Stats

Row = dict[str, Any]

FIRST = (
    "task", "target", "draft", "drafter", "verify", "exact", "temperature", "num_draft_tokens", "batch_size",
    "num_prompts", "num_tokens", "acceptance_rate", "block_efficiency", "cost_ratio", "predicted_speedup",
    "measured_speedup", "tokens_per_second", "baseline_tokens_per_second", "identical", "device", "jax_version",
)  # fmt: skip
"""Fields that a row begins with; a row has more."""

SIDES = ("", "baseline_")
"""The prefixes of the fields of speculative and of plain decoding."""

OF_BATCH = tuple(
    f"{side}{name}" for name in ("batch_tokens", "seconds", "prefill_seconds", "compile_seconds") for side in SIDES
)
"""Fields that all rows of a batch share; the first row of each batch counts when rows are added up."""

REPEATS = tuple(f"{side}seconds_of_repeats" for side in SIDES)
"""Fields of a batch that list the seconds of each repeat; rows that are added up have none."""

OF_PROMPT = ("num_prompts", "num_tokens", "num_identical", "target_calls", "draft_steps", "overlap")
"""Fields that are added up over rows, as are those of `BY_POSITION`, position by position."""

BY_POSITION = ("proposed_by_position", "accepted_by_position", "accepted_histogram", "steps_by_length")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The keys of a config that are options of `sampling.options`; by default, all are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0


SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))

COMMON = (
    *SAMPLING, "target", "draft", "drafter", "verify", "exact", "fixed_shape", "num_draft_tokens", "batch_size",
    "max_new_tokens", "max_len", "seed", "dtype", "repeats", "cost_ratio", "score_cost", "shorter_costs",
    "step_cost", "device", "jax_version",
)  # fmt: skip
"""Fields that all rows of a run share."""


COUNTERS = {
    "target_calls": "target_calls",
    "draft_steps": "draft_steps",
    "overlap": "overlap",
    "proposed_by_position": "proposed",
    "accepted_by_position": "accepted",
    "accepted_histogram": "histogram",
    "steps_by_length": "steps_by_length",
}
"""The fields of a row that are counters of the loop, and what `Stats` calls them."""


def counters(stats: Stats, index: int) -> Row:
    """The counters of one sequence of a batch as plain numbers."""
    return {name: np.asarray(getattr(stats, counter))[index].tolist() for name, counter in COUNTERS.items()}


def _summary(row: Row) -> metrics.Summary:
    stats: dict[str, Any] = {counter: np.asarray([row[name]]) for name, counter in COUNTERS.items()}
    return metrics.summarise(Stats(**stats), np.asarray([row["num_tokens"]]))[0]


def costs_of(row: Row) -> metrics.Costs:
    """The measured costs that a row holds, in plain steps instead of seconds."""
    k, shorter = row["num_draft_tokens"], tuple((int(n), draft, score) for n, draft, score in row["shorter_costs"])
    return metrics.Costs(1.0, row["score_cost"], row["cost_ratio"] * k, k, shorter)


def _batches(rows: Sequence[Row]) -> list[Row]:
    """The first row of each batch."""
    return list({row["batch"]: row for row in reversed(rows)}.values())


def _timings(rows: Sequence[Row]) -> list[noise.Timings]:
    return [
        noise.Timings(row["baseline_seconds_of_repeats"], row["seconds_of_repeats"], row["baseline_batch_tokens"])
        for row in _batches(rows)
    ]


def _judgement(row: Row, rows: Sequence[Row], scatter: noise.Scatter | None) -> Row:
    """The fields that say whether a row's speedup is believed, from the rows of its batches."""
    spent = costs_of(row).spent(_summary(row), least=1.0)
    explained = row["num_tokens"] / spent if spent else 1.0
    return noise.judge(row["measured_speedup"], explained, _timings(rows), scatter, check_size=row["batch_size"] == 1)


def judged(rows: Sequence[Row]) -> list[Row]:
    """The rows of a run with `speedup_low`, `speedup_high` and `verdict`, by the scatter of all its timings.

    What the calls explain is computed over all rows of a batch, which share its time.
    """
    scatter = noise.scatter(_timings(rows))
    together: dict[Any, list[Row]] = {}
    for row in rows:
        together.setdefault(row["batch"], []).append(row)
    found: dict[Any, Row] = {}
    for batch, some in together.items():
        whole = combine(some, "") if len(some) > 1 else some[0]
        found[batch] = _judgement(whole, some, scatter)
    return [row | found[row["batch"]] for row in rows]


def derive(row: Row) -> Row:
    """The row with everything that follows from its counters, times and costs."""
    summary, costs = _summary(row), costs_of(row)
    speed = row["batch_tokens"] / row["seconds"]
    plain = row["baseline_batch_tokens"] / row["baseline_seconds"]
    full = row | {
        "acceptance_rate": summary.acceptance_rate,
        "acceptance_by_position": summary.acceptance_by_position,
        "block_efficiency": summary.block_efficiency,
        "predicted_speedup": costs.predicted_speedup(summary.acceptance_rate),
        "accounted_speedup": costs.accounted_speedup(summary),
        "tokens_per_second": speed,
        "baseline_tokens_per_second": plain,
        "measured_speedup": speed / plain,
        # Sampled text equals that of plain decoding only by chance, except with the rule that shares the noise.
        "identical": row["num_identical"] / row["num_prompts"]
        if row["temperature"] == 0 or row["verify"] == "coupled"
        else None,
    }
    return {name: full[name] for name in FIRST} | full


def combine(rows: Sequence[Row], task: str, run: Sequence[Row] | None = None) -> Row:
    """One row for many prompts, called `task`, with its speedup judged by the timings of a whole run (see `noise`).

    Without `run`, the rows are the whole run.
    """
    batches = _batches(rows)
    total: Row = {"task": task, "prompt": None, "id": "", "batch": None} | {name: rows[0][name] for name in COMMON}
    total |= {name: sum(row[name] for row in rows) for name in OF_PROMPT}
    total |= {name: sum(row[name] for row in batches) for name in OF_BATCH}
    total |= {name: np.sum([row[name] for row in rows], axis=0).astype(int).tolist() for name in BY_POSITION}
    total = derive(total)
    return total | _judgement(total, rows, noise.scatter(_timings(rows if run is None else run)))


def by_task(rows: Sequence[Row]) -> list[Row]:
    """One row per task, in order of appearance."""
    return [combine([r for r in rows if r["task"] == t], t, rows) for t in dict.fromkeys(row["task"] for row in rows)]


def to_json(value: Any) -> str:
    """JSON in the format of all files of a workdir; numbers that are not finite become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return value if np.isfinite(value) else None
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n"
