"""The tables and plots of the experiment of Chen et al. 2023, with the paper's figures beside the measured ones."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from specjax.experiments import noise
from specjax.experiments.reports import plots
from specjax.experiments.reports.tables import bullets, markdown, number, page, speedup, table
from specjax.experiments.results import Row

TOKENS = 128
"""The paper's Figure 1 has the time for this number of tokens."""


class Sampling(NamedTuple):
    """Temperature and nucleus of sampling."""

    temperature: float
    top_p: float

    @property
    def name(self) -> str:
        """Its name in tables."""
        return "greedy" if self.temperature == 0 else f"nucleus {self.top_p:g}, T={self.temperature:g}"


class Published(NamedTuple):
    """A line of the paper's Table 1: K = 4, batch 1.

    Attributes:
      plain: the metric without speculation.
      speculative: the metric with speculation.
      plain_ms: milliseconds per token without speculation.
      speculative_ms: milliseconds per token with speculation.
      speedup: the ratio of these two.
    """

    plain: str
    speculative: str
    plain_ms: float
    speculative_ms: float
    speedup: float


PAPER: dict[str, dict[Sampling, Published]] = {
    "xsum": {
        Sampling(1.0, 0.8): Published("ROUGE-2 11.2", "11.4", 14.1, 7.52, 1.92),
        Sampling(0.0, 1.0): Published("ROUGE-2 15.7", "15.6", 14.1, 7.00, 2.01),
    },
    "humaneval": {Sampling(0.8, 0.95): Published("pass 45.1 %", "47.0 %", 14.1, 5.73, 2.46)},
}
"""Table 1, by task and sampling. A target of 70B parameters and a draft of 4B on 16 TPU v4."""

DIFFERENT = (
    "The paper: Chinchilla, 70B parameters, with a draft of 4B and 8 layers, trained for it (1.8 ms per token against "
    "14.1), on 16 TPU v4, batch 1, K = 4; XSum: 11,305 texts of at most 128 tokens after one example; HumanEval: 100 "
    "texts of at most 512 tokens for each of 164 problems. Ours are the models, device and numbers of texts above: "
    "milliseconds and quality cannot be compared across, and a speedup only as far as the ratios of costs are alike. "
    "Ours are of decoding alone, without reading the prompt."
)
"""The differences between the paper's setting and ours."""


class Measured(NamedTuple):
    """Everything that the run measured.

    Attributes:
      name: the name of the experiment.
      paper: which of the paper's tasks is shown next to it: "xsum", "humaneval" or "".
      about: a sentence about models, data and machine.
      rows: the timed cells, with their `clock`.
      scores: by side and sampling ("plain, greedy"), then metric: one score per problem, 0 to 100.
      quality_draft_tokens: K of the texts that were judged.
      seconds: how long measuring took.
    """

    name: str
    paper: str
    about: str
    rows: list[Row]
    scores: dict[str, dict[str, list[float]]]
    quality_draft_tokens: int
    seconds: float


class Line(NamedTuple):
    """The cells of one sampling and batch size, K ascending: a line of the plots."""

    sampling: Sampling
    batch_size: int
    rows: list[Row]

    @property
    def label(self) -> str:
        """Its name in legends."""
        return f"{self.sampling.name}, batch {self.batch_size}"


def lines(rows: Sequence[Row]) -> list[Line]:
    """The cells by sampling and batch size."""
    keys = dict.fromkeys((Sampling(r["temperature"], r["top_p"]), r["batch_size"]) for r in rows)
    found = []
    for sampling, batch_size in keys:
        swept = [r for r in rows if (r["temperature"], r["top_p"], r["batch_size"]) == (*sampling, batch_size)]
        found.append(Line(sampling, batch_size, sorted(swept, key=lambda row: row["num_draft_tokens"])))
    return found


def spread(rows: Sequence[Row], side: str = "") -> list[float]:
    """P50, P90 and P99 of the milliseconds for `TOKENS` tokens of a text; `side` "baseline_": without speculation.

    A text that ends early is counted as if it went on as fast, and so is a batch with such texts. Each is weighted by
    its tokens, so that one that ended at once counts little.
    """
    clock = [batch for row in rows for batch in row["clock"]]
    tokens = [batch[f"{side}tokens"] for batch in clock]
    taken = [1e3 * TOKENS * b[f"{side}seconds"] * b["rows"] / n for b, n in zip(clock, tokens, strict=True)]
    return np.percentile(taken, (50, 90, 99), weights=tokens, method="inverted_cdf").tolist()


def ms_per_token(row: Row, side: str = "") -> float:
    """Milliseconds per token of a row, all batches together."""
    seconds = sum(batch[f"{side}seconds"] * batch["rows"] for batch in row["clock"])
    return 1e3 * seconds / sum(batch[f"{side}tokens"] for batch in row["clock"])


def loop_ms(row: Row) -> float:
    """Milliseconds per step of the loop."""
    return 1e3 * sum(batch["seconds"] for batch in row["clock"]) / sum(batch["steps"] for batch in row["clock"])


def efficiency(row: Row) -> float:
    """The paper's measure of acceptance: tokens of a loop over K + 1, the token that the target adds included.

    It falls with K for any draft, and is not an estimate of alpha.
    """
    return row["block_efficiency"] / (row["num_draft_tokens"] + 1)


def loop_fit(line: Line) -> tuple[float, float]:
    """Milliseconds that a draft token adds to a loop by a straight line through K >= 1, and the share explained (R^2).

    K = 0 is left out: a plain step is another program. Both are NaN with fewer than three K.
    """
    drafting = [row for row in line.rows if row["num_draft_tokens"]]
    if len(drafting) < 3:
        return float("nan"), float("nan")
    k = np.asarray([row["num_draft_tokens"] for row in drafting], float)
    ms = np.asarray([loop_ms(row) for row in drafting])
    slope, start = np.polyfit(k, ms, 1)
    return float(slope), float(1 - np.var(ms - start - slope * k) / np.var(ms))


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over problems."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _best(line: Line) -> Row:
    """The fastest cell that drafts, or the fastest one where none drafts."""
    return max([row for row in line.rows if row["num_draft_tokens"]] or line.rows, key=lambda r: r["measured_speedup"])


def _scored(measured: Measured, side: str, sampling: Sampling) -> str:
    found = measured.scores.get(f"{side}, {sampling.name}", {})
    return ", ".join("{} {:.1f} ± {:.1f}".format(name, *_mean(values)) for name, values in found.items()) or "-"


def table_1(measured: Measured) -> list[list[str]]:
    """Every sampling and batch size at the K of the judged texts and at the best K, the paper's line beside it."""

    def paper(line: Line, shown: Callable[[Published], str]) -> str:
        found = PAPER.get(measured.paper, {}).get(line.sampling) if line.batch_size == 1 else None
        return shown(found) if found else "-"

    def cells(line: Line) -> list[tuple[Line, Row]]:
        judged = [row for row in line.rows if row["num_draft_tokens"] == measured.quality_draft_tokens]
        best = _best(line)
        return [(line, row) for row in ([*judged, best] if best not in judged else judged)]

    columns = (
        ("sampling", lambda cell: cell[0].sampling.name),
        ("batch", lambda cell: cell[0].batch_size),
        ("K", lambda cell: f"{cell[1]['num_draft_tokens']}{' (best)' if cell[1] is _best(cell[0]) else ''}"),
        ("quality plain", lambda cell: _scored(measured, "plain", cell[0].sampling)),
        ("speculative", lambda cell: _scored(measured, "speculative", cell[0].sampling)),
        ("ms/token plain", lambda cell: f"{ms_per_token(cell[1], 'baseline_'):.2f}"),
        ("speculative", lambda cell: f"{ms_per_token(cell[1]):.2f}"),
        ("speedup", lambda cell: speedup(cell[1])),
        ("paper: quality", lambda cell: paper(cell[0], lambda p: f"{p.plain} -> {p.speculative}")),
        ("paper: ms/token", lambda cell: paper(cell[0], lambda p: f"{p.plain_ms:g} -> {p.speculative_ms:.2f}")),
        ("paper: speedup", lambda cell: paper(cell[0], lambda p: f"{p.speedup:.2f}x")),
    )
    return table(columns, itertools.chain.from_iterable(map(cells, lines(measured.rows))))


def table_sweep(measured: Measured) -> list[list[str]]:
    """Every timed cell: what Figure 1 shows."""
    spreads = [
        (f"{name}P{percent}", lambda cell, side=side, i=i: f"{spread([cell[1]], side)[i]:.0f}")
        for side, first in (("", f"{TOKENS} tokens: "), ("baseline_", "plain: "))
        for i, (name, percent) in enumerate(((first, 50), ("", 90), ("", 99)))
    ]
    columns = (
        ("sampling", lambda cell: cell[0].sampling.name),
        ("batch", lambda cell: cell[0].batch_size),
        ("K", lambda cell: cell[1]["num_draft_tokens"]),
        ("alpha", lambda cell: number(cell[1]["acceptance_rate"], ".2f")),
        ("tokens/loop", lambda cell: f"{cell[1]['block_efficiency']:.2f}"),
        ("tokens/(K+1)", lambda cell: f"{efficiency(cell[1]):.2f}"),
        ("loop ms", lambda cell: f"{loop_ms(cell[1]):.1f}"),
        *spreads,
        ("speedup", lambda cell: speedup(cell[1])),
        ("same", lambda cell: number(cell[1]["identical"], ".0%")),
    )
    return table(columns, [(line, row) for line in lines(measured.rows) for row in line.rows])


class Swept(NamedTuple):
    """A line of the plots, as numbers; each list has an entry for each K.

    Attributes:
      label: its name in legends.
      num_draft_tokens: K, ascending.
      loop_ms: milliseconds per step of the loop.
      tokens: tokens per step.
      spread_ms: P50, P90 and P99 of the milliseconds for `TOKENS` tokens of a text, for each K.
      plain_ms: the same of plain decoding, measured in turn with that K.
    """

    label: str
    num_draft_tokens: list[int]
    loop_ms: list[float]
    tokens: list[float]
    spread_ms: list[list[float]]
    plain_ms: list[list[float]]


def sweep(measured: Measured) -> list[Swept]:
    """The numbers of the plots."""
    return [
        Swept(
            line.label,
            [row["num_draft_tokens"] for row in line.rows],
            [loop_ms(row) for row in line.rows],
            [loop_ms(row) / ms_per_token(row) for row in line.rows],
            [spread([row]) for row in line.rows],
            [spread([row], "baseline_") for row in line.rows],
        )
        for line in lines(measured.rows)
    ]


def draw_figure_1(swept: Sequence[Swept]) -> Figure:
    """The paper's Figure 1: time for 128 tokens, acceptance and loop time against K."""
    figure, panels = plots.panels(3, 3.2, 3.4)
    shown = (
        (f"ms for {TOKENS} tokens", lambda ms, tokens, k: TOKENS * ms / tokens),
        ("tokens of a step / (K + 1)", lambda ms, tokens, k: tokens / (k + 1)),
        ("ms for a step", lambda ms, tokens, k: ms),
    )
    for axes, (title, value) in zip(panels, shown, strict=True):
        for line, (color, marker) in zip(swept, itertools.cycle(plots.STYLES), strict=False):
            k = line.num_draft_tokens
            values = [value(*cell) for cell in zip(line.loop_ms, line.tokens, k, strict=True)]
            axes.plot(k, values, f"{marker}-", color=color, label=line.label)
        axes.set_xticks(sorted({k for line in swept for k in line.num_draft_tokens}))
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
        plots.finish(axes, title, "draft tokens per step, K", "", legend=axes is panels[0])
    return figure


def draw_spread(swept: Sequence[Swept]) -> Figure:
    """P50, P90 and P99 of the texts' times against K, those of plain decoding beside each K dotted."""
    figure, panels = plots.panels(len(swept), 4.6, 3.8)
    for axes, line in zip(panels, swept, strict=True):
        k = line.num_draft_tokens
        both = zip((50, 90, 99), zip(*line.spread_ms, strict=True), zip(*line.plain_ms, strict=True), strict=True)
        for (percent, values, plain), (color, marker) in zip(both, plots.STYLES, strict=False):
            axes.plot(k, values, f"{marker}-", color=color, label=f"P{percent}")
            axes.plot(k, plain, ":", color=color, linewidth=1, label=f"P{percent}, plain")
        axes.set_xticks(k)
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
        plots.finish(axes, line.label, "draft tokens per step, K", f"ms for {TOKENS} tokens", legend=True)
    return figure


def findings(measured: Measured) -> list[str]:
    """The findings of the run, in sentences."""
    found = []
    for line in lines(measured.rows):
        best = _best(line)
        found.append(
            f"{line.label}: fastest with K = {best['num_draft_tokens']}, {speedup(best)} plain decoding "
            f"({ms_per_token(best, 'baseline_'):.2f} to {ms_per_token(best):.2f} ms per token)."
        )
        drafting = [row for row in line.rows if row["num_draft_tokens"]]
        slower = [row for row in drafting if row["measured_speedup"] < 1 and row["verdict"] != noise.NOISE]
        if slower:
            names = ", ".join(f"{row['num_draft_tokens']} ({row['measured_speedup']:.2f}x)" for row in slower)
            found.append(f"**{line.label}: SLOWER than plain decoding with K = {names}.**")
        slope, explained = loop_fit(line)
        if np.isfinite(slope):
            fit = f"straight line, R2 {explained:.2f}"
            found.append(f"{line.label}: a draft token adds {slope:.2f} ms to a loop ({fit}).")
    for sampling in dict.fromkeys(line.sampling for line in lines(measured.rows)):
        plain, ours = (measured.scores.get(f"{side}, {sampling.name}", {}) for side in ("plain", "speculative"))
        for metric in plain:
            difference, error = _mean(np.subtract(ours[metric], plain[metric]).tolist())
            found.append(
                f"{metric}, {sampling.name}: {np.mean(plain[metric]):.2f} plainly, {np.mean(ours[metric]):.2f} with "
                f"speculation; the difference is {difference:+.2f} ± {error:.2f} (standard error over problems)."
            )
    return found


LEGEND = f"""\
- **quality**: mean and standard error over problems, 0 to 100; the texts of both sides are of the same prompts.
- **ms/token**, **{TOKENS} tokens**: of decoding a row; a text that ends early is counted as if it went on as fast.
  P50, P90, P99: over texts (over batches, where several texts are decoded together), each of the weight of its tokens.
- **tokens/(K+1)**: the paper's acceptance, the token that the target adds among the tokens. **alpha**: mean of
  sum min(target, draft) over the judged draft tokens.
- **K = 0**: plain against plain decoding: how much the clock is to be trusted.
- **speedup ~**: within noise. **?**: not explained by the calls, or one timing without a spread
  (`experiments/noise.py`).
- **same**: texts that equal plain decoding's, token by token (greedy only)."""


def summary(measured: Measured) -> str:
    """The text of `summary.md`."""
    return page(
        f"# {measured.name}",
        measured.about,
        bullets(findings(measured)),
        "## Speed and quality (the paper's Table 1)",
        markdown(table_1(measured)),
        DIFFERENT if measured.paper else "",
        "## Every K (Figure 1)",
        "![figure 1](figure1.png)",
        "![spread](spread.png)",
        markdown(table_sweep(measured)),
        LEGEND,
        f"Measuring took {measured.seconds / 60:.1f} min.",
    )


def figures(measured: Measured) -> dict[str, Figure]:
    """The plots by the names of their files."""
    swept = sweep(measured)
    return {"figure1.png": draw_figure_1(swept), "spread.png": draw_spread(swept)}
