"""The tables and plots of the experiment of Leviathan et al. 2022, the paper's figures beside the measured ones."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specjax import theory
from specjax.experiments import noise
from specjax.experiments.reports import plots, printable
from specjax.experiments.reports.tables import bullets, markdown, number, page, speedup, table
from specjax.experiments.results import Row

PAPER_SPEEDUP: dict[str, dict[float, dict[str, tuple[int, float, float]]]] = {
    "ende": {
        0.0: {"small": (7, 0.75, 3.4), "base": (7, 0.80, 2.8), "large": (7, 0.82, 1.7)},
        1.0: {"small": (7, 0.62, 2.6), "base": (5, 0.68, 2.4), "large": (3, 0.71, 1.4)},
    },
    "cnndm": {
        0.0: {"small": (5, 0.65, 3.1), "base": (5, 0.73, 3.0), "large": (3, 0.74, 2.2)},
        1.0: {"small": (5, 0.53, 2.3), "base": (3, 0.55, 2.2), "large": (3, 0.56, 1.7)},
    },
}
"""Table 2 (T5 v1.1 XXL on one TPU v4, batch 1): gamma, alpha and measured speedup by temperature and draft."""

PAPER_ALPHA: dict[str, dict[float, dict[str, float]]] = {
    "ende": {
        0.0: {"unigram": 0.08, "bigram": 0.20, "small": 0.75, "base": 0.80, "large": 0.82},
        1.0: {"unigram": 0.07, "bigram": 0.19, "small": 0.62, "base": 0.68, "large": 0.71},
    },
    "cnndm": {
        0.0: {"unigram": 0.13, "bigram": 0.23, "small": 0.65, "base": 0.73, "large": 0.74},
        1.0: {"unigram": 0.08, "bigram": 0.16, "small": 0.53, "base": 0.55, "large": 0.56},
    },
    "lm1b": {
        0.0: {"unigram": 0.03, "bigram": 0.05, "small": 0.88},
        1.0: {"unigram": 0.03, "bigram": 0.05, "small": 0.89},
    },
}
"""Table 3: alpha by temperature and draft."""

PAPER_TOP_K: dict[str, dict[int, dict[str, float]]] = {"lm1b": {40: {"small": 0.74}}}
"""Table 3, LaMDA 137B with the draft of 8B, whose ratio of sizes is that of the pair on lm1b, temperature 1."""

PAPER_LENIENCE: dict[str, dict[str, dict[float, float]]] = {
    "ende": {
        "unigram": {1.0: 0.07, 0.5: 0.10, 0.3: 0.11, 0.1: 0.16},
        "bigram": {1.0: 0.19, 0.5: 0.23, 0.3: 0.25, 0.1: 0.32},
        "small": {1.0: 0.62, 0.5: 0.71, 0.3: 0.76, 0.1: 0.84},
        "base": {1.0: 0.68, 0.5: 0.80, 0.3: 0.83, 0.1: 0.90},
    }
}
"""Table 5 (temperature 1): alpha by draft and lenience."""


class Measured(NamedTuple):
    """Everything that the run measured.

    Attributes:
      name: the name of the experiment.
      paper: which of the paper's experiments is shown next to it: "ende", "cnndm", "lm1b" or "".
      metric: the name of the quality metric.
      label: what the target is, where times are those of a larger model than the one that writes the text; else empty.
      about: a sentence about models, data and machine.
      sizes: parameters of each model or entries of each table.
      alpha: by draft, then temperature: alpha on the target's own text, and the number of tokens it is a mean over.
      alpha_top_k: by draft, then k: the same at temperature 1 with the k likeliest tokens alone, on both sides.
      rows: the timed cells.
      quality: by temperature: the metric of plain decoding, and of each draft's speculative texts.
      lenience: by draft, then lenience: alpha.
      distilled: by draft that was distilled: the validations before its training and of the greatest acceptance rate.
      seconds: how long each stage took.
    """

    name: str
    paper: str
    metric: str
    label: str
    about: str
    sizes: dict[str, int]
    alpha: dict[str, dict[float, tuple[float, int]]]
    alpha_top_k: dict[str, dict[int, tuple[float, int]]]
    rows: list[Row]
    quality: dict[float, dict[str, float]]
    lenience: dict[str, dict[float, float]]
    distilled: dict[str, list[Row]]
    seconds: dict[str, float]


class Sweep(NamedTuple):
    """The timed cells of one draft at one temperature, K ascending, and alpha on the target's own text."""

    draft: str
    temperature: float
    alpha: float
    rows: list[Row]

    @property
    def best(self) -> Row:
        """The fastest cell."""
        return max(self.rows, key=lambda row: row["measured_speedup"])


def sweeps(measured: Measured) -> list[Sweep]:
    """The timed cells by temperature and draft."""
    found: dict[tuple[float, str], list[Row]] = {}
    order = list(dict.fromkeys(row["draft"] for row in measured.rows))
    for row in sorted(measured.rows, key=lambda row: row["num_draft_tokens"]):
        found.setdefault((row["temperature"], row["draft"]), []).append(row)
    keys = sorted(found, key=lambda key: (key[0], order.index(key[1])))
    return [Sweep(draft, t, measured.alpha[draft][t][0], found[t, draft]) for t, draft in keys]


def scored_prediction(row: Row, alpha: float) -> float:
    """Theorem 3.8 with the measured cost of scoring K + 1 tokens, which the paper takes as that of one."""
    return theory.walltime_factor(min(alpha, 1.0), row["num_draft_tokens"], row["cost_ratio"], row["score_cost"])


def free_prediction(row: Row, alpha: float) -> float:
    """Theorem 3.8 as published, for alpha on the target's own text."""
    return theory.walltime_factor(min(alpha, 1.0), row["num_draft_tokens"], row["cost_ratio"])


def step_cost(row: Row) -> float:
    """The measured cost of a drafting step over that of a plain one: tokens per step over the speedup."""
    return row["block_efficiency"] / row["measured_speedup"]


def table_2(measured: Measured) -> list[list[str]]:
    """Each draft at each temperature: its best K, and the paper's row beside it."""

    def paper(sweep: Sweep) -> str:
        found = PAPER_SPEEDUP.get(measured.paper, {}).get(sweep.temperature, {}).get(sweep.draft)
        return "{} / {:.2f} / {:.1f}x".format(*found) if found else "-"

    def quality(sweep: Sweep, side: str) -> str:
        return number(measured.quality.get(sweep.temperature, {}).get(side), ".1f")

    columns = (
        ("draft", lambda s: s.draft),
        ("T", lambda s: f"{s.temperature:g}"),
        ("c", lambda s: f"{s.best['cost_ratio']:.2f}"),
        ("alpha", lambda s: f"{s.alpha:.2f}"),
        ("K", lambda s: s.best["num_draft_tokens"]),
        ("Thm 3.8", lambda s: f"{s.best['predicted_speedup']:.2f}x"),
        ("with scoring", lambda s: f"{scored_prediction(s.best, s.alpha):.2f}x"),
        ("measured", lambda s: speedup(s.best)),
        ("best K predicted", lambda s: max(s.rows, key=lambda r: scored_prediction(r, s.alpha))["num_draft_tokens"]),
        ("paper: K / alpha / measured", paper),
        (measured.metric, lambda s: quality(s, s.draft)),
        (f"{measured.metric} plain", lambda s: quality(s, "plain")),
    )
    return table(columns, sweeps(measured))


def table_sweep(measured: Measured) -> list[list[str]]:
    """Every timed cell."""
    columns = (
        ("draft", lambda cell: cell[0].draft),
        ("T", lambda cell: f"{cell[0].temperature:g}"),
        ("K", lambda cell: cell[1]["num_draft_tokens"]),
        ("alpha in the loop", lambda cell: f"{cell[1]['acceptance_rate'] or 0:.2f}"),
        ("tok/call", lambda cell: f"{cell[1]['block_efficiency']:.2f}"),
        ("c", lambda cell: f"{cell[1]['cost_ratio']:.3f}"),
        ("scoring", lambda cell: f"{cell[1]['score_cost']:.2f}"),
        ("step", lambda cell: f"{step_cost(cell[1]):.2f}"),
        ("Thm 3.8", lambda cell: f"{free_prediction(cell[1], cell[0].alpha):.2f}x"),
        ("with scoring", lambda cell: f"{scored_prediction(cell[1], cell[0].alpha):.2f}x"),
        ("measured", lambda cell: speedup(cell[1])),
        ("identical", lambda cell: number(cell[1]["identical"], ".0%")),
    )
    return table(columns, [(sweep, row) for sweep in sweeps(measured) for row in sweep.rows])


def table_3(measured: Measured) -> list[list[str]]:
    """Alpha of every draft on the target's own text."""
    paper, paper_top_k = PAPER_ALPHA.get(measured.paper, {}), PAPER_TOP_K.get(measured.paper, {})
    cells = [
        (draft, f"{t:g}", found, paper.get(t, {}).get(draft))
        for draft, by_t in measured.alpha.items()
        for t, found in sorted(by_t.items())
    ]
    cells += [
        (draft, f"1, top {k}", found, paper_top_k.get(k, {}).get(draft))
        for draft, by_k in measured.alpha_top_k.items()
        for k, found in by_k.items()
    ]
    columns = (
        ("draft", lambda cell: cell[0]),
        ("size", lambda cell: f"{measured.sizes.get(cell[0], 0):,}"),
        ("T", lambda cell: cell[1]),
        ("alpha", lambda cell: f"{cell[2][0]:.3f}"),
        ("paper", lambda cell: number(cell[3], ".2f")),
        ("tokens", lambda cell: f"{cell[2][1]:,}"),
    )
    return table(columns, cells)


def table_5(measured: Measured) -> list[list[str]]:
    """Alpha under lenience, the paper's in parentheses."""
    degrees = sorted({degree for row in measured.lenience.values() for degree in row}, reverse=True)

    def shown(draft: str, degree: float) -> str:
        paper = PAPER_LENIENCE.get(measured.paper, {}).get(draft, {}).get(degree)
        return f"{measured.lenience[draft][degree]:.2f}" + ("" if paper is None else f" ({paper:.2f})")

    columns = [(f"l = {degree:g}", lambda draft, degree=degree: shown(draft, degree)) for degree in degrees]
    return table([("draft", str), *columns], measured.lenience)


def table_distilled(measured: Measured) -> list[list[str]]:
    """Alpha of the distilled drafts on held-out text of the target, before their training and after it."""
    columns = (
        ("distilled draft", lambda cell: cell[0]),
        ("steps", lambda cell: f"{cell[1][1]['step']:,}"),
        ("alpha before", lambda cell: f"{cell[1][0]['alpha']:.3f}"),
        ("after", lambda cell: f"{cell[1][1]['alpha']:.3f}"),
        ("greedy agreement before", lambda cell: f"{cell[1][0]['agreement']:.3f}"),
        ("after", lambda cell: f"{cell[1][1]['agreement']:.3f}"),
    )
    return table(columns, measured.distilled.items())


def _by_temperature(
    measured: Measured, height: float, x: str, y: str, draw: Callable[[Axes, Sweep, str, str], object]
) -> Figure:
    """A panel for each temperature, in which every draft is drawn with a color and a marker of its own."""
    by_temperature = {t: list(some) for t, some in itertools.groupby(sweeps(measured), lambda s: s.temperature)}
    figure, panels = plots.panels(len(by_temperature), 5.2, height)
    for axes, (temperature, some) in zip(panels, by_temperature.items(), strict=True):
        for sweep, (color, marker) in zip(some, itertools.cycle(plots.STYLES), strict=False):
            draw(axes, sweep, color, marker)
        plots.finish(axes, f"temperature {temperature:g}", x, y, legend=True)
    return figure


def speedup_plot(measured: Measured) -> Figure:
    """Speedup against K: measured points over the curves of Theorem 3.8, with and without the cost of scoring."""

    def draw(axes: Axes, sweep: Sweep, color: str, marker: str) -> None:
        k = [row["num_draft_tokens"] for row in sweep.rows]
        axes.plot(
            k, [free_prediction(row, sweep.alpha) for row in sweep.rows], "-", color=color, linewidth=1, alpha=0.6
        )
        axes.plot(k, [scored_prediction(row, sweep.alpha) for row in sweep.rows], "--", color=color, linewidth=1)
        clock = [row["measured_speedup"] for row in sweep.rows]
        axes.plot(k, clock, marker, color=color, label=printable.plot(sweep.draft))

    figure = _by_temperature(measured, 4, "draft tokens per step, K", "speedup over plain decoding", draw)
    for axes in figure.axes:
        axes.axhline(1, color=plots.GREY, linewidth=0.8, linestyle=":")
        axes.set_xticks(sorted({row["num_draft_tokens"] for row in measured.rows}))
    figure.suptitle("Points: measured. Lines: Theorem 3.8; dashed: with the measured cost of scoring.", fontsize=9)
    return figure


def position_plot(measured: Measured) -> Figure:
    """Acceptance by position in the draft, for the largest K of every draft."""

    def draw(axes: Axes, sweep: Sweep, color: str, marker: str) -> None:
        rates = sweep.rows[-1]["acceptance_by_position"]
        plots.by_position(axes, rates, color, printable.plot(sweep.draft), marker)
        axes.set_ylim(0, 1.05)

    return _by_temperature(measured, 3.6, "position in the draft", "accepted, of those judged there", draw)


def findings(measured: Measured) -> list[str]:
    """The findings of the run, in sentences."""
    cells = [(row, sweep.alpha) for sweep in sweeps(measured) for row in sweep.rows]
    errors = [row["measured_speedup"] / scored_prediction(row, alpha) - 1 for row, alpha in cells]
    inside = sum(abs(error) <= 0.15 for error in errors)
    found = [f"**{measured.label}**"] if measured.label else []
    found.append(
        f"{inside} of {len(errors)} cells lie within 15 % of Theorem 3.8 with the measured cost of scoring K + 1 "
        f"tokens (median {np.median(errors):+.0%}, from {min(errors):+.0%} to {max(errors):+.0%})."
    )
    calls = [row["num_draft_tokens"] * row["cost_ratio"] + row["score_cost"] for row in measured.rows]
    steps = [step_cost(row) for row in measured.rows]
    found.append(
        f"By the clock, a drafting step takes {np.median(steps):.2f} plain ones (median); its model calls account for "
        f"{np.median(calls):.2f}, and the rest is choosing, checking and writing tokens."
    )
    best = max(measured.rows, key=lambda row: row["measured_speedup"])
    found.append(
        f"The best cell is the draft {best['draft']} at temperature {best['temperature']:g} with K = "
        f"{best['num_draft_tokens']}: {speedup(best)} plain decoding."
    )
    slower = [r for r in measured.rows if r["measured_speedup"] < 1 and r["verdict"] != noise.NOISE]
    if slower:
        found.append(
            f"**{len(slower)} of {len(measured.rows)} cells are SLOWER than plain decoding**, as the table says."
        )
    if within := sum(row["verdict"] == noise.NOISE for row in measured.rows):
        found.append(
            f"{within} of {len(measured.rows)} cells cannot be told from plain decoding: they are within noise."
        )
    for temperature, quality in sorted(measured.quality.items()):
        others = {name: value for name, value in quality.items() if name != "plain"}
        if others:
            low, high = min(others.values()), max(others.values())
            found.append(
                f"{measured.metric} at temperature {temperature:g}: {quality['plain']:.2f} plainly, {low:.2f} to "
                f"{high:.2f} with speculation."
            )
    return found


LEGEND = """\
- **alpha**: E[sum_x min(target, draft)] over all tokens of texts that the target generated (rule `observe`).
- **c**: time of one draft token over that of one target call, measured. **scoring**: time of a target call that scores
  K + 1 tokens over that of a plain one; the paper takes it as 1.
  **step**: the whole of a drafting step over a plain one, as it was measured.
- **Thm 3.8**: (1 - alpha^(K+1)) / ((1 - alpha)(K c + 1)). **with scoring**: the same with the cost of scoring in the
  place of 1.
- **measured**: wall clock of decoding, speculative over plain in turn in one process, batch 1, every step drafting.
  **~**: within noise. **?**: not explained by the calls, or one timing without a spread (`experiments/noise.py`)."""


def summary(measured: Measured) -> str:
    """The text of `summary.md`."""
    seconds = ", ".join(f"{name} {value / 60:.1f} min" for name, value in measured.seconds.items())
    return page(
        f"# {measured.name}",
        measured.about,
        bullets(findings(measured)),
        "## Speedup (the paper's Table 2)",
        markdown(table_2(measured)),
        "![speedup](speedup.png)",
        "## Alpha (Table 3)",
        markdown(table_3(measured)),
        "![acceptance by position](acceptance.png)",
        "## Distilled drafts" if measured.distilled else "",
        markdown(table_distilled(measured)) if measured.distilled else "",
        "## Lenience (Table 5, temperature 1)" if measured.lenience else "",
        markdown(table_5(measured)) if measured.lenience else "",
        "## Every cell",
        markdown(table_sweep(measured)),
        LEGEND,
        f"Time: {seconds}." if seconds else "",
    )


def figures(measured: Measured) -> dict[str, Figure]:
    """The plots by the names of their files."""
    return {"speedup.png": speedup_plot(measured), "acceptance.png": position_plot(measured)}
