"""What comes of a user or a model is shown as it is: no markup, control characters or formulas; tables are whole."""

import io

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_experiments import row

from specjax.experiments import results
from specjax.experiments.reports import compare as report
from specjax.experiments.reports import plots, printable
from specjax.experiments.reports.display import View

MARKUP = [
    "[/red]",
    "[code]",
    "[bold]x[/bold]",
    "[link=http://x]",
    "[/]",
    "a|b",
    "$x^2$",
    "$\\frac$",
    "\x1b[2J",
    "[[",
    "\\[",
]
texts = st.sampled_from(MARKUP) | st.text(max_size=12)
few = settings(max_examples=30, deadline=None)


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), record=True, force_terminal=True, width=width, highlight=False)


def shown(console: Console) -> str:
    return console.export_text()


@given(texts, texts)
@example("[/red]", "[code]")
@few
def test_everything_of_a_user_is_shown_as_it_is(category, text):
    console = terminal(200)
    view = View(console)
    rows = results.judged([row(0, task=category), row(1, task=text)])
    with view.status(category), view.progress(2, what=category) as bar:
        bar.advance(bar.task_ids[0])
    view.prompt(category, text)
    view.text([(text, True), (text, False)])
    view.row(rows[0])
    view.line(text)
    view.end(rows)
    output = shown(console)
    for word in map(printable.line, (category, text)):
        assert "".join(word.split()) in "".join(output.split())
    assert "\x1b[2J" not in output
    output.encode()


@given(st.lists(texts, min_size=1, max_size=3))
@few
def test_a_markdown_table_is_not_broken(categories):
    shown = [row(i, task=category) for i, category in enumerate(categories)]
    text = report.summary({"name": "\n".join(categories)}, shown, [])
    table = [line for line in text.split("\n") if line.startswith("|")]
    assert len(table) == len(categories) + 3
    assert len({line.replace("\\\\", "").replace("\\|", "").count("|") for line in table}) == 1


@pytest.mark.parametrize("category", [*MARKUP, "$\\unknown$", "_hidden"])
def test_plots_take_any_name(category, tmp_path):
    plots.speedup(report.lines([row(0, task=category)])).savefig(tmp_path / "x.png")


@pytest.mark.parametrize("width", [80, 100, 130])
@pytest.mark.parametrize("category", ["qa", "mathematical reasoning with many words", "one" * 20])
@pytest.mark.parametrize("many", [False, True])
def test_a_table_fits_the_terminal_and_no_heading_is_cut(width, category, many):
    console = terminal(width)
    number = report.MANY + 1 if many else 3
    tokens = {"num_tokens": 4321, "batch_tokens": 4321, "baseline_batch_tokens": 4321}
    tokens |= {"target_calls": 2470, "draft_steps": 1235}
    rows = [row(i, seconds=50.0, baseline_seconds=60.0, task=category, **tokens) for i in range(number)]
    View(console).end(rows)
    lines = shown(console).split("\n")
    assert max(map(len, lines)) <= width
    head = "".join(" ".join(lines[:4]).split())
    for part in "\n".join(report.TERMINAL_HEADER).split("\n"):
        assert part in head
    assert "\u2026" not in "".join(lines), "something was cut"
    assert str(number * 4321) in "".join(lines)
    body = "".join("".join(line.split()) for line in lines)
    for word in ("alpha:expected", "c:time", "predicted:byTheorem3.8", "accounted:bythecalls", "~withinnoise"):
        assert word in body
