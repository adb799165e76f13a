"""What a notebook shows: figures, tables, and texts in which the accepted draft tokens are marked."""

import html
import io
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from specjax.experiments.reports import display, plots, printable, tables
from specjax.experiments.reports.accepted_text import segments
from specjax.text.tokenizer import Tokenizer

_DPI = 150
"""Pixels per inch of pictures, about twice the resolution of the page."""

_ACCEPTED = "background:#dbe8f5;color:#12324f;text-decoration:underline"


class Shown:
    """Something that notebooks show as HTML, Markdown or a picture, and a terminal as text."""

    def __init__(self, text: str, **forms: Any):
        """Keeps the plain text, and richer forms by the name of IPython's method, such as `html`."""
        self.text, self.forms = text, forms

    def __repr__(self) -> str:
        """The plain text."""
        return self.text

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        del include, exclude
        return {"text/plain": self.text} | self.forms


def figure(drawn: Figure, description: str) -> Shown:
    """A figure as a picture of twice the resolution of the page.

    Args:
      drawn: the figure.
      description: what it shows, in words, where no picture can be shown.
    """
    file = io.BytesIO()
    drawn.savefig(file, format="png", dpi=_DPI, facecolor="white")
    return Shown(description, **{"image/png": file.getvalue()})


def marked(tokenizer: Tokenizer, tokens: Sequence[int], from_draft: Sequence[bool]) -> Shown:
    """A text, in which the stretches of accepted draft tokens are underlined, and in colour where that is possible."""
    parts = segments(tokenizer, tokens, from_draft)
    begin, end = display.MARKS
    plain = "".join(f"{begin}{text}{end}" if accepted else text for text, accepted in parts)
    rich = "".join(
        f'<u style="{_ACCEPTED}">{_escape(text)}</u>' if accepted else _escape(text) for text, accepted in parts
    )
    return Shown(printable.text(plain), **{"text/html": f'<p style="line-height:1.7">{rich}</p>'})


def _escape(text: str) -> str:
    return html.escape(printable.text(text)).replace("\n", "<br>").replace("$", "&#36;")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Shown:
    """A table; numbers are written as they are, so round them before."""
    text = tables.markdown([list(header), *([str(cell) for cell in row] for row in rows)])
    return Shown(text, **{"text/markdown": text})


def results(directory: pathlib.Path, *names: str) -> list[Shown]:
    """The plots of a run and its page, `summary.md`.

    Args:
      directory: of the run.
      *names: the files of the plots to show; none: those of the page, in its order, or all where it shows none.
    """
    page = (directory / "summary.md").read_text(encoding="utf-8")
    images = names or tuple(re.findall(r"^!\[.*?\]\((.*?)\)$", page, flags=re.MULTILINE))
    images = images or tuple(sorted(path.name for path in directory.glob("*.png")))
    shown = [Shown(image, **{"image/png": (directory / image).read_bytes()}) for image in images]
    text = re.sub(r"^!\[.*?\]\(.*?\)\n+", "", page, flags=re.MULTILINE)
    # A page's headings go below those of the notebook.
    text = re.sub(r"^(#+) ", r"##\1 ", text, flags=re.MULTILINE)
    return [*shown, Shown(text, **{"text/markdown": text})]


class Step(NamedTuple):
    """A step, as `steps` draws it.

    Attributes:
      drafted: the draft tokens.
      num_accepted: how many of them were accepted.
      token: the target's own token behind them.
    """

    drafted: Sequence[int]
    num_accepted: int
    token: int


_BOXES = {
    "accepted": ("#dbe8f5", plots.BLUE, "black"),
    "rejected": ("#f7ddd6", plots.ORANGE, "black"),
    "dropped": ("#f4f4f4", "#cccccc", "#888888"),
    "of the target": ("white", "black", "black"),
}
"""Face, edge and ink of the boxes around tokens."""


def name(tokenizer: Tokenizer, token: int) -> str:
    """A token as a label of a plot: blanks are shown as open boxes, and line ends as in Python."""
    word = repr(tokenizer.decode([int(token)], skip_special_tokens=False))[1:-1]
    return printable.plot(word.replace(" ", "\u2423"))


def _boxes(step: Step) -> list[tuple[int, str]]:
    """The tokens of a step with their kinds, in the order of their places; the rejected one before the target's."""
    n, drafted = int(step.num_accepted), [int(token) for token in step.drafted]
    rejected = [(token, "rejected") for token in drafted[n : n + 1]]
    accepted = [(token, "accepted") for token in drafted[:n]]
    return [
        *accepted,
        *rejected,
        (int(step.token), "of the target"),
        *((token, "dropped") for token in drafted[n + 1 :]),
    ]


def steps(tokenizer: Tokenizer, history: Sequence[Step], most: int = 12) -> Figure:
    """Draws the tokens of each step: accepted, rejected (crossed out), of the target, and dropped unjudged."""
    shown = history[:most]
    drawn, (axes,) = plots.panels(1, 7, 0.6 + 0.36 * len(shown))
    drawn.set_layout_engine("none")
    drawn.set_dpi(_DPI)  # Texts are as wide as they will be in the picture.
    axes.set_position((0.075, 0.02, 0.92, 0.96))
    axes.set_xlim(0, 1)
    axes.set_ylim(len(shown) + 0.6, -0.6)
    renderer = FigureCanvasAgg(drawn).get_renderer()
    pixels = axes.get_window_extent(renderer).width
    for row, step in enumerate(shown):
        x = 0.01
        for token, kind in _boxes(step):
            face, edge, ink = _BOXES[kind]
            word = ("\u2717 " if kind == "rejected" else "") + name(tokenizer, token)
            box = {"boxstyle": "round,pad=0.25", "facecolor": face, "edgecolor": edge}
            style = {"family": "monospace", "fontsize": 9, "va": "center", "color": ink}
            label = axes.text(x, row, word, bbox=box, **style)
            x += label.get_window_extent(renderer).width / pixels + 0.027
    for i, (kind, (face, edge, ink)) in enumerate(_BOXES.items()):
        box = {"boxstyle": "round,pad=0.25", "facecolor": face, "edgecolor": edge}
        word = ("\u2717 " if kind == "rejected" else "") + kind
        axes.text(0.01 + 0.2 * i, len(shown) + 0.1, word, bbox=box, fontsize=8, va="center", color=ink)
    axes.set_yticks(range(len(shown)), [f"step {i}" for i in range(1, 1 + len(shown))], fontsize=8)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False)
    return drawn


def shards(axes: Axes, title: str, array: jax.Array) -> None:
    """Draws an array that is split along at most one axis: a box for each part, with the devices that hold it."""
    parts: dict[tuple[int, float, float], list[int]] = {}
    for shard in array.addressable_shards:
        cuts = [cut.indices(size)[:2] for cut, size in zip(shard.index, array.shape, strict=True)]
        split = next((i for i, cut in enumerate(cuts) if cut != (0, array.shape[i])), 0)
        begin, end = cuts[split]
        parts.setdefault((split, begin / array.shape[split], end / array.shape[split]), []).append(shard.device.id)
    for i, ((split, begin, end), devices) in enumerate(sorted(parts.items())):
        # The first axis runs downward, all others to the right.
        x, y, width, height = (0.0, begin, 1.0, end - begin) if split == 0 else (begin, 0.0, end - begin, 1.0)
        color = ("#dbe8f5", "#f7ddd6", "#ececec")[i % 3]
        axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=plots.GREY))
        label = ", ".join(map(str, sorted(devices)))
        axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=8, rotation=90 * (split > 0))
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    axes.set_title(f"{title}\n{' x '.join(map(str, array.shape))}", fontsize=7)
