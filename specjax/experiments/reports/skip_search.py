"""The page, the line of a trial and the plot of a search for sublayers to skip."""

import pathlib
from collections.abc import Mapping, Sequence

from specjax.experiments.reports import plots, tables
from specjax.experiments.results import Row
from specjax.types import Skips


def _layers(numbers: Sequence[int]) -> str:
    """Numbers of layers, with runs shortened: 3-5, 8."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts) or "none"


def _skipped(row: Row) -> int:
    return sum(len(row[kind]) for kind in Skips._fields)


def line(row: Row, num_sublayers: int) -> str:
    """A finished trial."""
    return (
        f"Trial {row['trial']}: {_skipped(row)} of {num_sublayers} sublayers skipped, {row['acceptance_rate']:.2f} "
        f"accepted, {row['block_efficiency']:.2f} tokens per call, {row['measured_speedup']:.2f}x"
    )


def finding(best: Row, num_sublayers: int) -> str:
    """What the search found, in a sentence."""
    skipped = f"{_skipped(best)} of {num_sublayers} sublayers"
    if best["measured_speedup"] <= 1:
        return (
            f"Nothing pays: the best drafts, without {skipped}, are {best['measured_speedup']:.2f}x as fast as plain "
            "decoding. Choose another drafter for this target, such as ngram."
        )
    return (
        f"The best drafts leave out {skipped}: {best['measured_speedup']:.2f}x as fast as plain decoding on these "
        "prompts. The best of several noisy measurements flatters: compare on others."
    )


def summary(
    name: str, rows: Sequence[Row], best: Row, importance: Mapping[tuple[str, int], float], images: Sequence[str]
) -> str:
    """The text of `summary.md`."""
    columns: tables.Columns = (
        ("trial", lambda row: row["trial"]),
        ("attention skipped", lambda row: _layers(row["attention"])),
        ("feed-forward skipped", lambda row: _layers(row["mlp"])),
        ("accepted", lambda row: f"{row['acceptance_rate']:.2f}"),
        ("tokens per call", lambda row: f"{row['block_efficiency']:.2f}"),
        ("ms per token", lambda row: f"{1e3 * row['seconds_per_token']:.1f}"),
        ("plain, ms", lambda row: f"{1e3 * row['baseline_seconds_per_token']:.1f}"),
        ("speedup", lambda row: f"{row['measured_speedup']:.2f}x"),
    )
    ordered = sorted(rows, key=lambda row: -row["measured_speedup"])
    return tables.page(
        f"# {name}",
        finding(best, len(importance)),
        *(f"![{image}]({image})" for image in images),
        tables.markdown(tables.table(columns, ordered)),
    )


def plot(directory: pathlib.Path, rows: Sequence[Row], importance: Mapping[tuple[str, int], float]) -> list[str]:
    """Draws how much each sublayer matters, and what the trials brought."""
    figure, (left, right) = plots.panels(2, 4.8, 3.4)
    for kind, color, label in (("attention", plots.BLUE, "attention"), ("mlp", plots.ORANGE, "feed-forward")):
        layers = [number for name, number in importance if name == kind]
        left.plot(layers, [importance[kind, number] for number in layers], "o-", color=color, label=label, markersize=3)
    left.set_ylim(0, None)
    plots.finish(left, "Tokens that change without a sublayer", "layer", "share", legend=True)
    right.scatter([_skipped(row) for row in rows], [row["measured_speedup"] for row in rows], color=plots.BLUE, s=14)
    right.axhline(1, color=plots.GREY, linewidth=1, linestyle="--")
    plots.finish(right, "Trials", "sublayers skipped", "speedup over plain decoding")
    return plots.save(directory, {"skip_search.png": figure})
