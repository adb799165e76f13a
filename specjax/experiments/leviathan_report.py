"""The tables and plots of the experiment of Leviathan et al. 2022, the paper's figures beside the measured ones."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from specjax import files, theory
from specjax.experiments import noise, printable, results
from specjax.experiments.report import markdown, speedup
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

PAPER_LENIENCE: dict[str, dict[str, dict[float, float]]] = {
    "ende": {
        "unigram": {1.0: 0.07, 0.5: 0.10, 0.3: 0.11, 0.1: 0.16},
        "bigram": {1.0: 0.19, 0.5: 0.23, 0.3: 0.25, 0.1: 0.32},
        "small": {1.0: 0.62, 0.5: 0.71, 0.3: 0.76, 0.1: 0.84},
        "base": {1.0: 0.68, 0.5: 0.80, 0.3: 0.83, 0.1: 0.90},
    }
}
"""Table 5 (temperature 1): alpha by draft and lenience."""

_COLORS = ("#3b6ea5", "#c8553d", "#5b8c5a", "#8a6bb0", "#b08a3e", "#666666")


class Measured(NamedTuple):
    """Everything that the run measured.

    Attributes:
      name: of the experiment.
      paper: which of the paper's experiments stands beside it: "ende", "cnndm", "lm1b" or "".
      metric: the name of the quality metric.
      about: a sentence about models, data and machine.
      sizes: parameters of each model or entries of each table.
      alpha: by draft, then temperature: alpha on the target's own text, and the number of tokens it is a mean over.
      rows: the timed cells.
      quality: by temperature: the metric of plain decoding, and of each draft's speculative texts.
      lenience: by draft, then lenience: alpha.
      seconds: what the stages took.
    """

    name: str
    paper: str
    metric: str
    about: str
    sizes: dict[str, int]
    alpha: dict[str, dict[float, tuple[float, int]]]
    rows: list[Row]
    quality: dict[float, dict[str, float]]
    lenience: dict[str, dict[float, float]]
    seconds: dict[str, float]


def scored_prediction(row: Row, alpha: float) -> float:
    """Theorem 3.8 with the measured cost of scoring K + 1 tokens, where the paper takes it as that of one."""
    return theory.walltime_factor(min(alpha, 1.0), row["num_draft_tokens"], row["cost_ratio"], row["score_cost"])


def step_cost(row: Row) -> float:
    """A drafting step over a plain one, by the clock: tokens a step over the speedup."""
    return row["block_efficiency"] / row["measured_speedup"]


def _at(measured: Measured, draft: str, temperature: float) -> list[Row]:
    rows = [r for r in measured.rows if r["draft"] == draft and r["temperature"] == temperature]
    return sorted(rows, key=lambda row: row["num_draft_tokens"])


def _drafts(measured: Measured) -> list[str]:
    return list(dict.fromkeys(row["draft"] for row in measured.rows))


def _temperatures(measured: Measured) -> list[float]:
    return sorted({row["temperature"] for row in measured.rows})


def table_2(measured: Measured) -> list[list[str]]:
    """Each draft at each temperature: its best K, and the paper's row beside it."""
    header = "draft, T, c, alpha, K, Thm 3.8, with scoring, measured, best K predicted, paper: K / alpha / measured"
    table = [[*header.split(", "), measured.metric, f"{measured.metric} plain"]]
    for temperature in _temperatures(measured):
        for draft in _drafts(measured):
            swept = _at(measured, draft, temperature)
            best = max(swept, key=lambda row: row["measured_speedup"])
            alpha = measured.alpha[draft][temperature][0]
            predicted = max(swept, key=lambda row: scored_prediction(row, alpha))
            paper = PAPER_SPEEDUP.get(measured.paper, {}).get(temperature, {}).get(draft)
            quality = measured.quality.get(temperature, {})
            table.append(
                [
                    draft,
                    f"{temperature:g}",
                    f"{best['cost_ratio']:.2f}",
                    f"{alpha:.2f}",
                    str(best["num_draft_tokens"]),
                    f"{best['predicted_speedup']:.2f}x",
                    f"{scored_prediction(best, alpha):.2f}x",
                    speedup(best),
                    str(predicted["num_draft_tokens"]),
                    f"{paper[0]} / {paper[1]:.2f} / {paper[2]:.1f}x" if paper else "-",
                    f"{quality[draft]:.1f}" if draft in quality else "-",
                    f"{quality['plain']:.1f}" if "plain" in quality else "-",
                ]
            )
    return table


def table_sweep(measured: Measured) -> list[list[str]]:
    """Every timed cell."""
    table = [
        [
            "draft",
            "T",
            "K",
            "alpha in the loop",
            "tok/call",
            "c",
            "scoring",
            "step",
            "Thm 3.8",
            "with scoring",
            "measured",
            "identical",
        ]
    ]
    for temperature in _temperatures(measured):
        for draft in _drafts(measured):
            for row in _at(measured, draft, temperature):
                alpha = measured.alpha[draft][temperature][0]
                identical = row["identical"]
                table.append(
                    [
                        draft,
                        f"{temperature:g}",
                        str(row["num_draft_tokens"]),
                        f"{row['acceptance_rate'] or 0:.2f}",
                        f"{row['block_efficiency']:.2f}",
                        f"{row['cost_ratio']:.3f}",
                        f"{row['score_cost']:.2f}",
                        f"{step_cost(row):.2f}",
                        f"{theory.walltime_factor(min(alpha, 1.0), row['num_draft_tokens'], row['cost_ratio']):.2f}x",
                        f"{scored_prediction(row, alpha):.2f}x",
                        speedup(row),
                        "-" if identical is None else f"{identical:.0%}",
                    ]
                )
    return table


def table_3(measured: Measured) -> list[list[str]]:
    """Alpha of every draft on the target's own text."""
    table = [["draft", "size", "T", "alpha", "paper", "tokens"]]
    for draft, by_temperature in measured.alpha.items():
        for temperature, (alpha, number) in sorted(by_temperature.items()):
            paper = PAPER_ALPHA.get(measured.paper, {}).get(temperature, {}).get(draft)
            shown = "-" if paper is None else f"{paper:.2f}"
            size = f"{measured.sizes.get(draft, 0):,}"
            table.append([draft, size, f"{temperature:g}", f"{alpha:.3f}", shown, f"{number:,}"])
    return table


def table_5(measured: Measured) -> list[list[str]]:
    """Alpha under lenience, the paper's in parentheses."""
    degrees = sorted({degree for row in measured.lenience.values() for degree in row}, reverse=True)
    table = [["draft", *(f"l = {degree:g}" for degree in degrees)]]
    for draft, row in measured.lenience.items():
        paper = PAPER_LENIENCE.get(measured.paper, {}).get(draft, {})
        shown = [f"{row[d]:.2f}" + (f" ({paper[d]:.2f})" if d in paper else "") for d in degrees]
        table.append([draft, *shown])
    return table


def speedup_plot(measured: Measured) -> Figure:
    """Speedup against K: measured points over the curves of Theorem 3.8, with and without the cost of scoring."""
    temperatures = _temperatures(measured)
    figure = Figure(figsize=(5.2 * len(temperatures), 4), layout="constrained")
    for axes, temperature in zip(np.atleast_1d(figure.subplots(1, len(temperatures))), temperatures, strict=True):
        for draft, color in zip(_drafts(measured), _COLORS * 9, strict=False):
            swept = _at(measured, draft, temperature)
            alpha = min(measured.alpha[draft][temperature][0], 1.0)
            k = [row["num_draft_tokens"] for row in swept]
            free = [theory.walltime_factor(alpha, row["num_draft_tokens"], row["cost_ratio"]) for row in swept]
            axes.plot(k, free, "-", color=color, linewidth=1, alpha=0.6)
            axes.plot(k, [scored_prediction(row, alpha) for row in swept], "--", color=color, linewidth=1)
            axes.plot(k, [row["measured_speedup"] for row in swept], "o", color=color, label=printable.plot(draft))
        axes.axhline(1, color="#666666", linewidth=0.8, linestyle=":")
        axes.set_title(f"temperature {temperature:g}", loc="left", fontsize=10)
        axes.set_xlabel("draft tokens a step, K")
        axes.set_ylabel("speedup over plain decoding")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle("Points: measured. Lines: Theorem 3.8; dashed: with the measured cost of scoring.", fontsize=9)
    return figure


def position_plot(measured: Measured) -> Figure:
    """Acceptance by position in the draft, of the largest K of every draft."""
    temperatures = _temperatures(measured)
    figure = Figure(figsize=(5.2 * len(temperatures), 3.6), layout="constrained")
    for axes, temperature in zip(np.atleast_1d(figure.subplots(1, len(temperatures))), temperatures, strict=True):
        for draft, color in zip(_drafts(measured), _COLORS * 9, strict=False):
            rates = _at(measured, draft, temperature)[-1]["acceptance_by_position"]
            places = [i for i, rate in enumerate(rates) if rate is not None]
            axes.plot(
                [i + 1 for i in places], [rates[i] for i in places], "o-", color=color, label=printable.plot(draft)
            )
        axes.set_ylim(0, 1.05)
        axes.set_title(f"temperature {temperature:g}", loc="left", fontsize=10)
        axes.set_xlabel("position in the draft")
        axes.set_ylabel("accepted, of those judged there")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return figure


def findings(measured: Measured) -> list[str]:
    """What the run shows, in sentences."""
    found = []
    errors = []
    for row in measured.rows:
        alpha = measured.alpha[row["draft"]][row["temperature"]][0]
        errors.append(row["measured_speedup"] / scored_prediction(row, alpha) - 1)
    inside = sum(abs(error) <= 0.15 for error in errors)
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
  **step**: a drafting step over a plain one, by the clock, everything in it.
- **Thm 3.8**: (1 - alpha^(K+1)) / ((1 - alpha)(K c + 1)). **with scoring**: the same with the cost of scoring in the
  place of 1.
- **measured**: wall clock of decoding, speculative over plain in turn in one process, batch 1, every step drafting.
  **~**: within noise. **?**: not explained by the calls, or one timing without a spread (`experiments/noise.py`)."""


def summary(measured: Measured) -> str:
    """The text of `summary.md`."""
    seconds = ", ".join(f"{name} {value / 60:.1f} min" for name, value in measured.seconds.items())
    parts = [
        f"# {measured.name}",
        measured.about,
        "\n".join(f"- {text}" for text in findings(measured)),
        "## Speedup (the paper's Table 2)",
        markdown(table_2(measured)),
        "![speedup](speedup.png)",
        "## Alpha (Table 3)",
        markdown(table_3(measured)),
        "![acceptance by position](acceptance.png)",
        "## Lenience (Table 5, temperature 1)" if measured.lenience else "",
        markdown(table_5(measured)) if measured.lenience else "",
        "## Every cell",
        markdown(table_sweep(measured)),
        LEGEND,
        f"Time: {seconds}." if seconds else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_report(directory: pathlib.Path, measured: Measured) -> Sequence[str]:
    """Writes `results.json`, `summary.md` and the plots.

    Returns:
      the files' names.
    """
    files.write(directory / "results.json", results.to_json(measured.rows))
    speedup_plot(measured).savefig(directory / "speedup.png", dpi=130)
    position_plot(measured).savefig(directory / "acceptance.png", dpi=130)
    files.write(directory / "summary.md", summary(measured))
    return "results.json", "summary.md", "speedup.png", "acceptance.png"
