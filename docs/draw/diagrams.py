"""Draws the diagrams of the pages, docs/images/*.svg: `python docs/draw/diagrams.py`.

The colors are those of the plots and notebooks: blue is accepted, orange is rejected (and crossed out), a black frame
is the target's own token, a dashed one is a draft. A dark page gets a dark picture, where the browser says so.
"""

import html
import pathlib
import sys
from collections.abc import Callable, Sequence

IMAGES = pathlib.Path(__file__).parents[1] / "images"

STYLE = """\
svg { --paper: #ffffff; --edge: #d0d7de; --ink: #1f2328; --quiet: #656d76; --text: #f6f8fa; --blue: #0072b2;
  --orange: #d55e00; --accepted: #dbe8f5; --rejected: #f7ddd6; --shared: #b9c8d8; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #15181e; --edge: #3d444d; --ink: #e6edf3; --quiet: #9198a1; --text: #212830; --blue: #4aa8e0;
    --orange: #ff8f3f; --accepted: #15344b; --rejected: #4a2a16; --shared: #3b5a75; } }
text { font-family: Helvetica, Arial, sans-serif; font-size: 14px; fill: var(--ink); }
.bold { font-weight: bold } .small { font-size: 12px } .tiny { font-size: 11px }
.quiet { fill: var(--quiet) } .middle { text-anchor: middle }
.blue { fill: var(--blue) } .orange { fill: var(--orange) } .shared { fill: var(--shared) } .end { text-anchor: end }
.box { fill: var(--text); stroke: var(--quiet) } .draft { fill: none; stroke: var(--ink); stroke-dasharray: 4 3 }
.accepted { fill: var(--accepted); stroke: var(--blue) } .rejected { fill: var(--rejected); stroke: var(--orange) }
.target { fill: var(--paper); stroke: var(--ink); stroke-width: 2 } .line { stroke: var(--quiet) }
.strike { stroke: var(--orange); stroke-width: 2 } .call { fill: var(--accepted); stroke: var(--blue) }
.dropped { fill: none; stroke: var(--edge) }
"""


class Picture:
    """An SVG picture that grows by its parts."""

    def __init__(self, width: int, height: int, title: str, about: str):
        """Begins with a frame and a background."""
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}">',
            f"<title>{html.escape(title)}</title>",
            f"<desc>{html.escape(about)}</desc>",
            f"<style>\n{STYLE}</style>",
            f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8" fill="var(--paper)" '
            'stroke="var(--edge)"/>',
        ]

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        """Words that begin at a point, or surround it if their kind has `middle`."""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{html.escape(words)}</text>')

    def rect(self, x: float, y: float, width: float, height: float, kind: str, corner: float = 0) -> None:
        """A rectangle."""
        size = f'width="{width:g}" height="{height:g}" rx="{corner:g}"'
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" {size} class="{kind}"/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "line") -> None:
        """A line."""
        self.parts.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>')

    def token(self, x: float, y: float, word: str, kind: str, width: float = 52) -> None:
        """A token in its box; one that is rejected is crossed out."""
        self.rect(x, y, width, 28, kind, 5)
        self.text(x + width / 2, y + 19, word, "middle" + (" quiet" if kind == "dropped" else ""))
        if kind == "rejected":
            self.line(x + 6, y + 14, x + width - 6, y + 14, "strike")

    def __str__(self) -> str:
        """The file."""
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def loop() -> Picture:
    """One step of the loop."""
    about = (
        "The drafter proposes four tokens, the target scores them in one call, three are accepted, the fourth is "
        "replaced by a token of the target, and the loop goes on with four tokens more."
    )
    picture = Picture(880, 352, "One step of the decoding loop", about)
    text = ((104, "shells", 56), (166, "by", 52), (224, "the", 52))
    drafts = ((296, "sea", 52), (354, "shore", 60), (420, ".", 38), (464, "The", 52))
    rows = ((28, "draft"), (88, "score"), (172, "verify"), (236, "commit"), (300, "next"))
    for y, name in rows:
        picture.text(24, y + 19, name, "bold")
    for y in (28, 236):
        for x, word, width in text:
            picture.token(x, y, word, "box", width)
    for x, word, width in drafts:
        picture.token(x, 28, word, "draft", width)
        picture.token(x, 172, word, "rejected" if word == "The" else "accepted", width)
        picture.token(x, 236, "She" if word == "The" else word, "target" if word == "The" else "accepted", width)
    picture.rect(220, 88, 300, 36, "call", 6)
    picture.text(370, 111, "one call of the target", "bold blue middle")
    for x in (250, 322, 384, 439, 490):
        picture.line(x, 124, x, 134)
        for i, height in enumerate((5, 14, 8, 3)):
            picture.rect(x - 11 + 6 * i, 150 - height, 4, height, "blue")
    said = (
        ("K draft tokens: a lookup in the text, a head,", "or K calls of a small model"),
        ("the last token and the drafts in one pass:", "K + 1 distributions of the target"),
        ("accept drafts by an exact rule, then take", "one more token from the target"),
        ("1 to K + 1 tokens per row; a stop token or", "the row's budget ends it"),
        ("the same jitted while_loop:", "no return to the host"),
    )
    for (y, _), lines in zip(rows, said, strict=True):
        for i, words in enumerate(lines):
            picture.text(560, y + 12 + 18 * i, words)
    picture.text(104, 319, "rejected entries lie beyond cache.length and are overwritten")
    return picture


P = (("the", 0.42, 0.20), ("a", 0.25, 0.45), ("his", 0.18, 0.10), ("my", 0.10, 0.20), ("this", 0.05, 0.05))
"""A place in a text: token, probability under the target, probability under the draft."""


def rule() -> Picture:
    """What is accepted, and what is drawn after a rejection."""
    shared = sum(min(p, q) for _, p, q in P)
    about = (
        "Bars of the target's distribution p and the draft's q over five tokens. Accepting a drafted token with "
        "probability min(1, p / q) gives min(p, q); the residual max(0, p - q) fills up what is missing to p."
    )
    picture = Picture(880, 300, "The rule of acceptance", about)
    high, floor = 360, 232

    def bar(x: float, value: float, kind: str, below: float = 0, width: float = 26) -> None:
        picture.rect(x, floor - high * (below + value), width, high * value, kind)

    picture.text(24, 36, "before: p, the target, and q, the draft", "bold")
    picture.text(470, 36, "after: accepted, and drawn again", "bold")
    for i, (word, p, q) in enumerate(P):
        x = 40 + 76 * i
        bar(x, p, "blue")
        bar(x + 28, q, "orange")
        picture.text(x + 27, floor + 20, word, "middle")
        x = 490 + 76 * i
        bar(x, min(p, q), "shared", width=44)
        bar(x, max(p - q, 0), "blue", min(p, q), 44)
        picture.text(x + 22, floor + 20, word, "middle")
    for x in (30, 480):
        picture.line(x, floor, x + 374, floor)
    for x, kind, words in (
        (40, "blue", "p"),
        (90, "orange", "q"),
        (490, "shared", f"min(p, q): accepted, {shared:.2f} in all"),
        (716, "blue", "max(0, p - q)"),
    ):
        picture.rect(x, floor + 38, 12, 12, kind)
        picture.text(x + 18, floor + 49, words, "small")
    picture.text(170, floor + 49, "a is drafted too often, the too seldom", "small quiet")
    return picture


TREE = (("sea", -1), ("the", -1), ("shore", 0), ("shells", 0), ("beach", 1), (".", 2))
"""The nodes of a draft: token, and its parent's number, or -1 for the last token of the text."""


def ancestors(node: int) -> list[int]:
    """A node and all that lie between it and the text."""
    return [] if node < 0 else [node, *ancestors(TREE[node][1])]


def tree() -> Picture:
    """A tree of draft tokens, and which of them each one sees."""
    about = (
        "A tree of six draft tokens behind the text 'by the', and a matrix: each token sees the text and its own "
        "ancestors, never its siblings. One path of the tree is accepted."
    )
    picture = Picture(880, 300, "A tree of draft tokens", about)
    picture.text(24, 36, "one call scores all continuations", "bold")
    picture.text(550, 36, "what each token sees", "bold")
    at = {-1: (84, 130), 0: (180, 86), 1: (180, 190), 2: (282, 60), 3: (282, 112), 4: (282, 190), 5: (384, 60)}
    picture.token(24, 130, "by", "box")
    picture.token(84, 130, "the", "box")
    for node, (_, parent) in enumerate(TREE):
        (x0, y0), (x1, y1) = at[parent], at[node]
        picture.line(x0 + 62 if parent >= 0 else x0 + 52, y0 + 14, x1, y1 + 14)
    for node, (word, _) in enumerate(TREE):
        kind = "accepted" if node in ancestors(2) else "rejected" if node == 5 else "dropped"
        picture.token(*at[node], word, kind, 62)
    picture.token(384, 104, "and", "target", 62)
    picture.line(344, 74, 384, 118)
    picture.text(24, 254, "blue: the path that is accepted; framed: the target's own token behind it.", "small quiet")
    picture.text(24, 272, "Positions are those of the text: siblings share one.", "small quiet")
    size, left, top = 34, 600, 66
    for i, (word, _) in enumerate(TREE):
        picture.text(left - 8, top + size * i + 21, word, "small end")
        picture.text(left + size * (i + 1.5), top - 8, word, "tiny middle")
        for j in range(-1, len(TREE)):
            kind = "accepted" if j < 0 or j in ancestors(i) else "dropped"
            picture.rect(left + size * (j + 1), top + size * i, size - 4, size - 4, kind, 3)
    picture.text(left + size / 2, top - 8, "text", "tiny middle")
    return picture


ROWS = (
    ("copies its prompt", (4, 4, 4, 4)),
    ("a question", (1, 2, 1, 1)),
    ("ends early", (3, 4, 0, 0)),
    ("drafts do not pay", (2, 1, 1, 1)),
)
"""The rows of a batch, and the tokens that each commits in four steps."""


def batch() -> Picture:
    """Rows of a batch that accept different numbers of tokens."""
    about = (
        "Four rows of a batch over four steps: each row commits the tokens that it has had accepted and one of the "
        "target, between one and four; one row has ended, and one drafts nothing any more."
    )
    picture = Picture(880, 268, "A ragged batch", about)
    picture.text(24, 36, "every row advances by what it has had accepted", "bold")
    for i in range(4):
        picture.text(232 + 160 * i + 66, 66, f"step {i + 1}", "small quiet middle")
    for row, (name, counts) in enumerate(ROWS):
        y = 78 + 42 * row
        picture.text(24, y + 19, name)
        for step, count in enumerate(counts):
            x = 232 + 160 * step
            paused = row == 3 and step > 1
            drafts = 0 if paused or not count else 3
            for place in range(max(count, drafts)):
                kind = "accepted" if place < count - 1 else "target" if place == count - 1 else "dropped"
                picture.rect(x + 34 * place, y, 28, 26, kind, 4)
    caption = (
        "Three tokens are drafted. Blue: accepted; framed: the target's own token, in the place of a rejected draft or "
        "behind the last; grey: dropped."
    )
    picture.text(24, 254, caption, "small quiet")
    return picture


DIAGRAMS: dict[str, Callable[[], Picture]] = {"loop": loop, "rule": rule, "tree": tree, "batch": batch}


def main(names: Sequence[str] = ()) -> None:
    """Writes the diagrams that are named, or all."""
    for name in names or DIAGRAMS:
        (IMAGES / f"{name}.svg").write_text(str(DIAGRAMS[name]()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
