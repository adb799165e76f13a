"""The rows of a run, the files that hold them, and what adds rows up.

A workdir has `config.json` (resolved), `samples.jsonl`, `results.json`, `summary.md` and plots. Rows are written after
every batch, each file at once, so that an interrupted run leaves whole files and can be continued.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from specjax import files, metrics
from specjax.experiments import noise
from specjax.types import Stats

Row = dict[str, Any]

FIRST = (
    "task",
    "target",
    "draft",
    "drafter",
    "verify",
    "exact",
    "temperature",
    "num_draft_tokens",
    "batch_size",
    "num_prompts",
    "num_tokens",
    "acceptance_rate",
    "block_efficiency",
    "cost_ratio",
    "predicted_speedup",
    "measured_speedup",
    "tokens_per_second",
    "baseline_tokens_per_second",
    "identical",
    "device",
    "jax_version",
)
"""Fields that a row begins with; a row has more."""

OF_BATCH = (
    "batch_tokens",
    "baseline_batch_tokens",
    "seconds",
    "baseline_seconds",
    "prefill_seconds",
    "baseline_prefill_seconds",
    "compile_seconds",
    "baseline_compile_seconds",
)
"""Fields that all rows of a batch share; the first row of each batch counts when rows are added up."""

REPEATS = ("seconds_of_repeats", "baseline_seconds_of_repeats")
"""Fields of a batch that list the seconds of each repeat; rows that are added up have none."""

OF_PROMPT = ("num_prompts", "num_tokens", "num_identical", "target_calls", "draft_steps", "overlap")
"""Fields that are added up over rows. So are, position by position, those of `_BY_POSITION`."""

_BY_POSITION = ("proposed_by_position", "accepted_by_position", "accepted_histogram")

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
)
"""Keys of a config that are options of `sampling.options`."""

COMMON = (
    *SAMPLING,
    "target",
    "draft",
    "drafter",
    "verify",
    "exact",
    "fixed_shape",
    "num_draft_tokens",
    "batch_size",
    "max_new_tokens",
    "max_len",
    "seed",
    "dtype",
    "repeats",
    "cost_ratio",
    "score_cost",
    "step_cost",
    "device",
    "jax_version",
)
"""Fields that all rows of a run share."""


def counters(stats: Stats, row: int) -> Row:
    """The counters of one row of a batch as plain numbers."""
    return {
        "target_calls": int(stats.target_calls[row]),
        "draft_steps": int(stats.draft_steps[row]),
        "overlap": float(stats.overlap[row]),
        "proposed_by_position": np.asarray(stats.proposed)[row].tolist(),
        "accepted_by_position": np.asarray(stats.accepted)[row].tolist(),
        "accepted_histogram": np.asarray(stats.histogram)[row].tolist(),
    }


def _summary(row: Row) -> metrics.Summary:
    fields = ("target_calls", "draft_steps", "proposed_by_position", "accepted_by_position", "accepted_histogram")
    stats = Stats(*(np.asarray([row[name]]) for name in (*fields, "overlap")))  # pyright: ignore[reportArgumentType]
    return metrics.summarise(stats, np.asarray([row["num_tokens"]]))[0]


def costs_of(row: Row) -> metrics.Costs:
    """The measured costs that a row holds, in plain steps in the place of seconds."""
    k = row["num_draft_tokens"]
    return metrics.Costs(1.0, row["score_cost"], row["cost_ratio"] * k, k)


def _batches(rows: Sequence[Row]) -> list[Row]:
    """The first row of each batch."""
    return list({row["batch"]: row for row in reversed(rows)}.values())


def _timings(rows: Sequence[Row]) -> list[noise.Timings]:
    return [
        noise.Timings(row["baseline_seconds_of_repeats"], row["seconds_of_repeats"], row["baseline_batch_tokens"])
        for row in _batches(rows)
    ]


def _judgement(row: Row, rows: Sequence[Row], scatter: noise.Scatter | None) -> Row:
    """The fields that say whether a row's speedup is believed, from the rows of the batches it is of."""
    costs = costs_of(row)
    drafting = row["draft_steps"] * max(costs.step_cost, 1.0)
    spent = row["target_calls"] - row["draft_steps"] + drafting
    explained = row["num_tokens"] / spent if spent else 1.0
    return noise.judge(row["measured_speedup"], explained, _timings(rows), scatter, check_size=row["batch_size"] == 1)


def judged(rows: Sequence[Row]) -> list[Row]:
    """The rows of a run with `speedup_low`, `speedup_high` and `verdict`, by the scatter of all its timings.

    What the calls explain is that of all rows of a batch, which share its time.
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
    """The row with everything that follows from its counters, times and costs filled in."""
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
        # Sampled text is that of plain decoding by luck alone, but for the rule that shares the noise.
        "identical": row["num_identical"] / row["num_prompts"]
        if row["temperature"] == 0 or row["verify"] == "coupled"
        else None,
    }
    return {name: full[name] for name in FIRST} | full


def combine(rows: Sequence[Row], task: str, run: Sequence[Row] | None = None) -> Row:
    """One row for many prompts, its speedup judged (see `noise`).

    Args:
      rows: of one run, one a prompt.
      task: what the new row is called.
      run: all rows of the run, by whose timings the speedup is judged; by default `rows`.
    """
    batches = _batches(rows)
    total: Row = {"task": task, "prompt": None, "id": "", "batch": None} | {name: rows[0][name] for name in COMMON}
    total |= {name: sum(row[name] for row in rows) for name in OF_PROMPT}
    total |= {name: sum(row[name] for row in batches) for name in OF_BATCH}
    total |= {name: np.sum([row[name] for row in rows], axis=0).astype(int).tolist() for name in _BY_POSITION}
    total = derive(total)
    return total | _judgement(total, rows, noise.scatter(_timings(rows if run is None else run)))


def by_task(rows: Sequence[Row]) -> list[Row]:
    """One row a task, in order of appearance."""
    return [combine([r for r in rows if r["task"] == t], t, rows) for t in dict.fromkeys(row["task"] for row in rows)]


def to_json(value: Any) -> str:
    """JSON as all files of a workdir have it; a number that is not finite becomes null."""

    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return value if np.isfinite(value) else None
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n"


_REMEDY = "choose another --workdir, or give --overwrite to delete that run"

_NUMBERS = (*OF_BATCH, *OF_PROMPT, "prompt", "batch", "num_draft_tokens", "batch_size", "temperature")
_COSTS = ("cost_ratio", "score_cost", "step_cost")
_LISTS = (*_BY_POSITION, *REPEATS)
_TEXTS = ("task", "id", "target", "draft", "drafter", "verify", "dtype", "device", "jax_version")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < float("inf")


def _check_row(row: Row, number: int) -> None:
    """Checks what derived fields, tables and plots are computed from.

    Raises:
      ValueError: naming the field.
    """
    wrong = [name for name in (*_NUMBERS, *_COSTS) if not _is_number(row[name])]
    wrong += [name for name in _LISTS if type(row[name]) is not list or not all(map(_is_number, row[name]))]
    wrong += [name for name in _TEXTS if type(row[name]) is not str]
    wrong += [name for name in COMMON if name not in row]
    wrong += [name for name in REPEATS if not row[name] or min(row[name]) <= 0]
    if row["prompt"] != number:
        wrong.append("prompt")
    if wrong:
        raise ValueError(f"row {number}: {wrong[0]}={row.get(wrong[0])!r}")


def _parse_rows(text: str) -> list[Row]:
    """The rows of prompts, in order; the last row, of all prompts, has to follow from them."""
    *rows, total = json.loads(text)
    for number, row in enumerate(rows):
        _check_row(row, number)
    if total["task"] != "all" or total["num_prompts"] != len(rows):
        raise ValueError("the row of all prompts is missing")
    # What follows from counters and times is not believed but derived anew.
    rows = judged([derive(row) for row in rows])
    combine(rows, "all")
    return rows


def _parse_samples(text: str) -> list[Row]:
    samples = [json.loads(line) for line in text.split("\n") if line]
    for number, sample in enumerate(samples):
        if type(sample["prompt"]) is not str:
            raise ValueError(f"sample {number}: prompt={sample['prompt']!r}")
    return samples


def _parse_config(text: str) -> Row:
    config = json.loads(text)
    if not isinstance(config, dict) or not config:
        raise ValueError(f"it says {config!r}")
    return config


class Workdir:
    """A directory of results that can be continued.

    Attributes:
      path: the directory.
      rows: finished rows, one a prompt.
      samples: the texts of the same prompts.
    """

    FILES = ("config.json", "samples.jsonl", "results.json", "summary.md", "acceptance.png", "speedup.png")

    def __init__(self, path: str | pathlib.Path, config: Mapping[str, Any], *, overwrite: bool = False):
        """Opens or makes the directory.

        Args:
          path: the directory.
          config: the resolved config; that of an earlier run in the same directory must be equal.
          overwrite: delete the files of an earlier run first.

        Raises:
          ValueError: where an earlier run had another config, or its files are broken.
        """
        self.path = pathlib.Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for name in self.FILES:
                (self.path / name).unlink(missing_ok=True)
        text = to_json(dict(config))
        if (self.path / "results.json").exists():
            self._check_config(json.loads(text))
        files.write(self.path / "config.json", text)
        self.rows: list[Row] = self._read("results.json", _parse_rows) if self._has("results.json") else []
        self.samples: list[Row] = self._read("samples.jsonl", _parse_samples) if self._has("samples.jsonl") else []
        # The rows are written last: samples without their rows are of a batch that was not finished.
        missing = len(self.samples) - len(self.rows)
        if not 0 <= missing <= max(int(config.get("batch_size", 1)), 1):
            name = "samples.jsonl" if missing < 0 else "results.json"
            found = f"{len(self.rows)} prompts in results.json, {len(self.samples)} in samples.jsonl"
            raise ValueError(f"{self.path / name} is broken, since prompts are missing in it ({found}): {_REMEDY}.")
        self.samples = self.samples[: len(self.rows)]

    def _has(self, name: str) -> bool:
        return (self.path / name).exists()

    def _read(self, name: str, parse: Callable[[str], Any]) -> Any:
        path = self.path / name
        try:
            return parse(path.read_text(encoding="utf-8"))
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{path} is broken ({error!r}): {_REMEDY}.") from error

    def _check_config(self, config: Mapping[str, Any]) -> None:
        if not self._has("config.json"):
            raise ValueError(
                f"{self.path / 'config.json'} is missing, so that nothing says what results.json is of: {_REMEDY}."
            )
        before = self._read("config.json", _parse_config)
        differ = [key for key in sorted({*before, *config}) if before.get(key) != config.get(key)]
        if differ:
            changes = ", ".join(f"{key}: {before.get(key)!r} before, {config.get(key)!r} now" for key in differ[:4])
            raise ValueError(
                f"{self.path} holds a run with another config ({changes}): choose another --workdir, or give "
                "--overwrite to delete that run."
            )

    def add(self, rows: Sequence[Row], samples: Sequence[Row]) -> None:
        """Writes the rows of a batch, and the row of all prompts so far."""
        self.rows = judged([*self.rows, *rows])
        self.samples += samples
        lines = [json.dumps(sample, ensure_ascii=False) for sample in self.samples]
        files.write(self.path / "samples.jsonl", "\n".join(lines) + "\n")
        files.write(self.path / "results.json", to_json([*self.rows, combine(self.rows, "all")]))

    def check_resumable(self, prompts: Sequence[str], device: str) -> None:
        """Makes sure that what is here was made from the same prompts on the same device.

        Raises:
          ValueError: where it was not.
        """
        remedy = f"{_REMEDY}."
        if len(self.rows) > len(prompts):
            raise ValueError(f"{self.path} holds a run over more prompts; the data file has changed: {remedy}")
        for row, sample in zip(self.rows, self.samples, strict=True):
            if row["device"] != device:
                raise ValueError(f"{self.path} holds rows measured on {row['device']}, and this is {device}: {remedy}")
            if sample["prompt"] != prompts[row["prompt"]]:
                raise ValueError(f"{self.path} holds a run over other prompts; the data file has changed: {remedy}")
