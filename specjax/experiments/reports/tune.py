"""The page, the lines and the plot of what `configs/tune.py` found."""

import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from specjax.experiments.reports import plots, tables
from specjax.experiments.results import Row
from specjax.experiments.tuned import Tuned

_CALLS = {
    "model": "model(specjax.load(DRAFT), {shape})",
    "feature_head": "feature_head(specjax.drafters.load_feature_head(HEAD), target, {shape})",
    "medusa": "medusa(specjax.drafters.load_medusa(HEADS), target, {shape})",
    "blockwise": "blockwise(specjax.drafters.load_blockwise(HEADS), target, {shape})",
    "eagle": "eagle(HEAD, target, {shape})",
    "pard": "pard(specjax.load(DRAFT), {shape})",
    "nonautoregressive": "nonautoregressive(specjax.load(DRAFT), {shape})",
    "skip": "skip(target, attention=ATTENTION, mlp=MLP, {shape})",
    "early_exit": "early_exit(target, LAYER, {shape})",
    "first_of": "first_of([specjax.drafters.ngram({shape}), OTHER])",
}
"""How functions of `specjax.drafters` are called that take more than a shape."""

_BOUND = ", or rather a bound: of the rows of a batch the one that needs most time, if the others asked for no more"
"""What the oracle is for a batch (`policies.oracle`)."""


def _call(chosen: Any, tuned: Tuned) -> str:
    """The choice as a line of Python."""
    if tuned.topology:
        shape = f"topology={[*tuned.topology]}"
    else:
        shape = f"num_draft_tokens={tuned.num_draft_tokens}"
        shape += f", lengths={tuned.lengths}" if tuned.lengths else ""
    return "specjax.drafters." + _CALLS.get(chosen.drafter, f"{chosen.drafter}({{shape}})").format(shape=shape)


def line(chosen: Any, row: Row) -> str:
    """What was chosen, in a sentence."""
    tuned, batch = Tuned(**row["tuned"]), row["batch_size"]
    if not tuned.num_draft_tokens and not tuned.topology:
        return f"Batch {batch}: {chosen.drafter} does not pay on this machine for these texts; decode plainly."
    return (
        f"Batch {batch}: {tuned.shape}; {tuned.predicted_speedup:.2f}x is expected. Now --config.tuned=True takes it."
    )


def _policies(rows: Sequence[Row]) -> str:
    columns: tables.Columns = (
        ("policy", lambda row: row["policy"]),
        ("speedup", lambda row: f"{row['speedup']:.3f}x"),
        ("drafted in a step", lambda row: tables.number(row["drafted"], ".1f")),
        ("regret", lambda row: f"{row['regret']:.1%}"),
    )
    return tables.markdown(tables.table(columns, rows))


def _categories(rows: Sequence[Row]) -> str:
    columns: tables.Columns = (
        ("texts", lambda row: row["task"] or "all"),
        ("number", lambda row: str(row["texts"])),
        ("right ahead", lambda row: f"{row['matched']:.2f}"),
        ("drafted in a step", lambda row: f"{row['drafted']:.1f}"),
        ("speedup", lambda row: f"{row['speedup']:.2f}x"),
    )
    return tables.markdown(tables.table(columns, sorted(rows, key=lambda row: -row["drafted"])))


def _costs(row: Row) -> str:
    columns: tables.Columns = (
        ("draft tokens", lambda k: str(k)),
        ("drafting", lambda k: f"{row['draft_costs'][k]:.2f}"),
        ("scoring", lambda k: f"{row['score_costs'][k]:.2f}"),
    )
    return tables.markdown(tables.table(columns, range(len(row["score_costs"]))))


def _ranks(chances: Sequence[Sequence[float]]) -> str:
    columns: tables.Columns = (
        ("depth", lambda at: str(at[0] + 1)),
        *((f"rank {rank + 1}", lambda at, rank=rank: f"{at[1][rank]:.2f}") for rank in range(len(chances[0]))),
    )
    return tables.markdown(tables.table(columns, list(enumerate(chances))))


def _section(chosen: Any, row: Row) -> list[str]:
    """What was found at a batch size."""
    tuned = Tuned(**row["tuned"])
    step = ", ".join(f"{cost:.2f}" for cost in tuned.step_costs)
    parts = [f"## Batch {row['batch_size']}", f"**{line(chosen, row)}**"]
    if tuned.num_draft_tokens:
        parts.append(f"```python\ndrafter = {_call(chosen, tuned)}\nstep_cost = [{step}]\n```")
    parts += [
        "Every way to choose the number of draft tokens, on the same texts and drafts, at the costs below. Regret is "
        f"the time above that of an oracle which knows what will be accepted{_BOUND if row['batch_size'] > 1 else ''}. "
        "`expected value` is what the loop does.",
        _policies(row["policies"]),
        "By category: how many of the drafted tokens are right, from any position of a text on, and how many tokens "
        "the loop chooses to draft.",
        _categories(row["categories"]),
        "Costs in plain steps, measured where 2, 4, 8 ... tokens are scored and interpolated between:",
        _costs(row),
    ]
    if row["acceptance_by_rank"]:
        parts += [
            "How often the text's token has a rank among the draft's, given that those before it had one of these. The "
            f"best tree is expected to give {row['tree_speedup']:.2f}x (`theory.best_tree`):",
            _ranks(row["acceptance_by_rank"]),
        ]
    return parts


def summary(chosen: Any, device: str, rows: Sequence[Row], images: Sequence[str]) -> str:
    """The text of `summary.md`."""
    draft = f" with {chosen.draft_name}" if chosen.draft else ""
    texts = sum(row["texts"] for row in rows[0]["categories"])
    return tables.page(
        "# Tuned drafts",
        f"{chosen.target_name}, {chosen.dtype}, drafter {chosen.drafter}{draft}, {texts} texts of at most "
        f"{chosen.max_new_tokens} new tokens, temperature {chosen.temperature:g}, {device}. Each text was decoded "
        "once, and the drafter asked at each of its positions; all else follows from that and from measured costs.",
        *(f"![{image}]({image})" for image in images),
        *(part for row in rows for part in _section(chosen, row)),
    )


def figure(rows: Sequence[Row]) -> Figure:
    """The speedup of every policy, a panel for each batch size."""
    drawn, panels = plots.panels(len(rows), 6.4, 1.4 + 0.3 * max(len(row["policies"]) for row in rows))
    for axes, row in zip(panels, rows, strict=True):
        some = row["policies"][::-1]
        color = [plots.BLUE if x["policy"].startswith("expected") else plots.GREY for x in some]
        axes.barh(range(len(some)), [x["speedup"] for x in some], color=color, height=0.6)
        axes.axvline(1, color=plots.ORANGE, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(some)), [x["policy"] for x in some], fontsize=8)
        plots.finish(axes, f"Batch {row['batch_size']}", "times plain decoding", "")
    return drawn


def plot(directory: pathlib.Path, rows: Sequence[Row]) -> list[str]:
    """Writes the plot, and returns the name of its file."""
    return plots.save(directory, {"tune.png": figure(rows)})
