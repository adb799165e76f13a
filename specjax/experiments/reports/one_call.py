"""The page and the plot of a model that learns to predict several tokens in one call."""

import itertools
from collections.abc import Sequence

from matplotlib.figure import Figure

from specjax.experiments.reports import plots, tables
from specjax.training.curve import Line


def shares(line: Line) -> list[float]:
    """How often the most probable token was the text's, by draft position."""
    return [line[f"same_{i}"] for i in itertools.takewhile(lambda i: f"same_{i}" in line, itertools.count(1))]


def described(line: Line) -> str:
    """What a validation says."""
    shown = ", ".join(f"{share:.3f}" for share in shares(line))
    return f"validation loss {line['valid_loss']:.4f}; the text's own token by draft position {shown}"


def best(valid: Sequence[Line]) -> Line:
    """The validation of least loss, whose model is kept."""
    return min(valid, key=lambda line: line["valid_loss"])


def finding(valid: Sequence[Line]) -> str:
    """What came of it, in a sentence."""
    first, kept = valid[0], best(valid)
    before, after = (", ".join(f"{share:.3f}" for share in shares(line)) for line in (first, kept))
    return (
        f"The most probable token of each draft position was the text's own, on held-out text: {before} at first, "
        f"{after} after {kept['step']} steps."
    )


def summary(name: str, image: str, valid: Sequence[Line]) -> str:
    """The text of `summary.md`."""
    first, kept = valid[0], best(valid)
    columns: tables.Columns = (
        ("draft position", lambda place: place + 1),
        (f"the text's own token, after {first['step']} steps", lambda place: f"{shares(first)[place]:.3f}"),
        (f"after {kept['step']} steps", lambda place: f"{shares(kept)[place]:.3f}"),
    )
    return tables.page(
        f"# {name}",
        finding(valid),
        tables.markdown(tables.table(columns, range(len(shares(kept))))),
        f"![{image}]({image})",
    )


def figure(valid: Sequence[Line]) -> Figure:
    """How often the most probable token was the text's, by draft position."""
    figure, (axes,) = plots.panels(1, 5.6, 3.6)
    steps = [line["step"] for line in valid]
    for place, (color, marker) in zip(range(len(shares(valid[0]))), itertools.cycle(plots.STYLES), strict=False):
        same = [shares(line)[place] for line in valid]
        axes.plot(steps, same, marker=marker, color=color, label=f"position {place + 1}")
    plots.finish(axes, "The text's own token, held-out text", "step", "share", legend=True)
    return figure
