"""Experiments as lists of cells. Each cell is measured once, so an interrupted run continues after its last cell."""

import dataclasses
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.experiments import bench, results
from specjax.experiments.bench import Bench, Workload
from specjax.experiments.reports import plots
from specjax.experiments.reports.display import View
from specjax.experiments.results import Row
from specjax.experiments.store import Store
from specjax.types import AnyDrafter, Draft


class Cell(NamedTuple):
    """One measurement of a sweep.

    Attributes:
      key: what it measures, in words; no two cells have the same key.
      compute: measures it, and returns a JSON value; it may read the cells before it.
      describe: maps the value to what the run prints after the key; None prints nothing.
    """

    key: str
    compute: Callable[[], Any]
    describe: Callable[[Any], str] | None = None


def run(cells: Sequence[Cell], store: Store, view: View) -> None:
    """Measures the cells that the store does not have.

    Raises:
      KeyboardInterrupt: saying what is finished.
    """
    try:
        with view.progress(len(cells), what="cells") as bar:
            for cell in cells:
                found = store.get(cell.key, cell.compute)
                if cell.describe is not None:
                    view.line(f"{cell.key}: {cell.describe(found)}")
                bar.advance(bar.task_ids[0])
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"{len(store.cells)} finished cells are in {store.path}") from error


def write_report(store: Store, measured: Any, report: types.ModuleType, view: View) -> None:
    """Writes `results.json`, `summary.md` and the plots, and prints what the run shows.

    The module `report` makes `figures`, `summary` and `findings` from what was measured.
    """
    store.write("results.json", results.to_json(measured.rows))
    images = plots.save(store.directory, report.figures(measured))
    store.write("summary.md", report.summary(measured))
    for text in report.findings(measured):
        view.line(text.replace("**", ""), "bold")
    view.line(f"{', '.join(('results.json', 'summary.md', *images))} are in {store.directory}.")


def fitting(target: Pretrained, prompts: Iterable[str], max_tokens: int) -> list[int]:
    """The numbers of the prompts that have at most `max_tokens` tokens."""
    assert target.tokenizer is not None
    return [i for i, text in enumerate(prompts) if len(target.tokenizer.encode(text)) <= max_tokens]


def _bench(work: Workload, drafter: AnyDrafter, rule: verify.Rule, **options: Any) -> Bench:
    sampling = dataclasses.asdict(results.Sampling(**options))
    # As in the papers, every step drafts.
    return Bench(work, drafter, {"verify": rule, **sampling, "fixed_shape": False, "step_cost": 0.0})


def _clock(num_texts: int, sides: dict[str, list[bench.Decoded]]) -> Row:
    """The seconds (median of the repeats), all new tokens and the steps of a batch, for both sides."""
    clock: Row = {"rows": num_texts}
    for side, runs in sides.items():
        clock |= {
            f"{side}seconds": float(np.median([run.seconds for run in runs])),
            f"{side}tokens": runs[0].generation.stats.num_tokens,
            f"{side}steps": int(runs[0].state.rows.stats.target_calls.max()),
        }
    return clock


def timed(
    work: Workload,
    drafter: AnyDrafter,
    name: str,
    temperature: float,
    num_prompts: int,
    *,
    top_p: float = 1.0,
    batch_size: int = 1,
) -> Row:
    """The row of a cell over the first prompts, which both sides decode in turn. `name` is that of the draft.

    Its `clock` has the times of each batch.
    """
    side = _bench(work, drafter, verify.rejection, temperature=temperature, top_p=top_p)
    batches = work.batches(batch_size, end=num_prompts)
    seconds = side.compile_sides(batches[0])
    kind = "model" if isinstance(drafter, Draft) and drafter.model is not None else "table"
    names = {"draft": name, "drafter": kind, "batch_size": batch_size}
    common = side.common(side.measure_costs(batches[0]), bench.device_name(), **names)
    rows: list[Row] = []
    clock: list[Row] = []
    for batch in batches:
        sides = side.measure(batch)
        rows += bench.rows_of(common, batch, sides, seconds)
        clock.append(_clock(len(batch.prompts), sides))
    return results.combine(rows, name) | {"clock": clock}


class Texts(NamedTuple):
    """The texts of prompts, in their order, with alpha and the number of tokens of all texts."""

    text: list[str]
    acceptance_rate: float
    num_tokens: int


def texts(
    work: Workload,
    drafter: AnyDrafter,
    temperature: float,
    prompts: range,
    batch_size: int,
    *,
    rule: verify.Rule = verify.rejection,
    top_p: float = 1.0,
    top_k: int = 0,
) -> Texts:
    """Decodes prompts in batches, untimed; with the rule `observe`, alpha is measured over the target's whole text."""
    side = _bench(work, drafter, rule, temperature=temperature, top_p=top_p, top_k=top_k)
    text: list[str] = []
    num_tokens, overlap, judged = 0, 0.0, 0.0
    for batch in work.batches(batch_size, prompts.start, prompts.stop):
        decoded, real = side.decode(drafter, batch), len(batch.prompts)
        text += (decoded.generation.text or [])[:real]
        num_tokens += sum(map(len, decoded.generation.tokens[:real]))
        overlap += float(decoded.state.rows.stats.overlap[:real].sum())
        judged += float(decoded.state.rows.stats.proposed[:real].sum())
    return Texts(text, overlap / judged if judged else 0.0, num_tokens)
