"""The report of a comparison: the table, the findings in words, and `summary.md`."""

from collections.abc import Sequence
from typing import Any

from specjax import theory
from specjax.experiments import noise, prompts, results
from specjax.experiments.reports import printable
from specjax.experiments.reports.tables import bullets, markdown, page, speedup
from specjax.experiments.results import Row

TERMINAL_LEGEND = (
    "alpha: expected share of draft tokens accepted. c: time of a draft token over that of a target call.",
    "predicted: by Theorem 3.8 from alpha, K and c. accounted: by the calls really made, at their measured costs.",
    "measured: by the clock, ~ within noise, ? not explained by the calls or without a spread to compare with.",
)

MANY = 12
"""With more prompts than this, tables and plots have a line per task instead of a line per prompt."""
RARE = 0.05
"""Below this share of drafting steps, drafting cannot have cost much."""


def label(row: Row) -> str:
    """The name of a row in tables."""
    if row["prompt"] is None:
        return printable.line(row["task"])
    return printable.line(prompts.name(row["task"], row["id"], row["prompt"]))


def lines(rows: Sequence[Row]) -> list[Row]:
    """The rows that a table or a plot shows: one per prompt, or one per task where there are many, and the total."""
    shown = results.judged(rows) if len(rows) <= MANY else results.by_task(rows)
    return [*shown, results.combine(rows, "all")]


def _share(row: Row) -> str:
    if row["identical"] is None:
        return "sampled"
    if row["num_prompts"] == 1:
        return "yes" if row["num_identical"] else "NO"
    return f"{row['num_identical']} of {row['num_prompts']}"


def between(row: Row) -> str:
    """The interval of the measured speedup."""
    return f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}"


COLUMNS = (
    ("prompt", label),
    ("tokens", lambda row: row["num_tokens"]),
    ("plain\ntok/s", lambda row: f"{row['baseline_tokens_per_second']:.1f}"),
    ("spec.\ntok/s", lambda row: f"{row['tokens_per_second']:.1f}"),
    ("alpha", lambda row: "none" if row["acceptance_rate"] is None else f"{row['acceptance_rate']:.2f}"),
    ("tok/\ncall", lambda row: f"{row['block_efficiency']:.2f}"),
    ("c", lambda row: f"{row['cost_ratio']:.2g}" if row["cost_ratio"] >= 0.001 else "<.001"),
    ("pre-\ndicted", lambda row: f"{row['predicted_speedup']:.2f}x"),
    ("ac-\ncounted", lambda row: f"{row['accounted_speedup']:.2f}x"),
    ("mea-\nsured", speedup),
    ("iden-\ntical", _share),
)
"""The columns of the table, with headings in two lines, so that it fits 80 columns of a terminal."""

TERMINAL_HEADER = tuple(heading for heading, _ in COLUMNS)
HEADER = tuple(heading.replace("-\n", "").replace("/\n", "/").replace("\n", " ") for heading in TERMINAL_HEADER)


def cells(row: Row) -> list[str]:
    """The line of the table for a row."""
    return [str(cell(row)) for _, cell in COLUMNS]


def _better_k(row: Row) -> int:
    """The number of draft tokens that alpha and the measured costs favour; 0 where none gains at least 5 %."""
    k, alpha, c = row["num_draft_tokens"], min(row["acceptance_rate"], 1.0), row["cost_ratio"]

    def score_cost(n: int) -> float:
        # Measured at 1 and K + 1 tokens; interpolated between them.
        return 1 + max(row["score_cost"] - 1, 0.0) * n / k

    best = theory.best_num_draft_tokens(alpha, c, score_cost, max(2 * k, 8))
    return best if best and theory.walltime_factor(alpha, best, c, score_cost(best)) >= 1.05 else 0


def remedy(row: Row) -> str:
    """A remedy where speculation was slower than plain decoding."""
    if row["num_draft_tokens"] == 0:
        return "this drafter proposes nothing, so both sides are plain decoding and the difference is noise"
    if row["acceptance_rate"] is None:
        return "the drafter found nothing to propose; try a draft model (--config.drafter=model --config.draft=SOURCE)"
    if row["draft_steps"] < RARE * row["target_calls"]:
        return (
            f"only {row['draft_steps']} of {row['target_calls']} steps drafted, so this is overhead and noise (more "
            "--config.repeats tell them apart); the drafter has nothing to offer here, --config.drafter=none is as good"
        )
    best = _better_k(row)
    step_cost = results.costs_of(row).step_cost
    costs = f"alpha is {row['acceptance_rate']:.2f}, a drafting step costs {step_cost:.2f} plain ones"
    if best == 0:
        return f"{costs}: no number of draft tokens pays here; use a cheaper or better draft, or --config.drafter=none"
    if best != row["num_draft_tokens"]:
        return f"{costs}: try --config.num_draft_tokens={best}"
    return f"{costs}, which should pay: measure longer texts and more --config.repeats, on a quiet machine"


def _identity(total: Row) -> str:
    if total["identical"] is None:
        kind = "the same distribution" if total["exact"] else "ANOTHER distribution (the rule is not exact)"
        return f"Text is sampled: both sides have {kind}, not the same text."
    same = f"Text identical to plain decoding on {total['num_identical']} of {total['num_prompts']} prompts."
    if total["identical"] == 1:
        return same
    if not total["exact"]:
        return f"{same} The rule {total['verify']} is not exact."
    return f"{same} Rounding decides between near-equal logits: --config.dtype=float32 rounds least."


def _overall(total: Row) -> tuple[str, bool]:
    """The verdict on the speedup over all prompts, and whether it deserves a warning."""
    speed, verdict = total["measured_speedup"], total["verdict"]
    if verdict == noise.NOISE:
        return (
            f"Over all prompts, speculation cannot be told from plain decoding: {speed:.2f}x is within noise "
            f"({between(total)}).",
            False,
        )
    if verdict == noise.UNKNOWN:
        return (
            f"Over all prompts, {speed:.2f}x was measured in one timing, which has no spread to compare with: give "
            "--config.repeats=3.",
            True,
        )
    why = ""
    if verdict == noise.UNEXPLAINED:
        why = f", though its calls explain {total['accounted_speedup']:.2f}x"
    if speed < 1:
        slower = f"Speculation is SLOWER than plain decoding over all prompts: {speed:.2f}x ({between(total)}){why}"
        return f"{slower}. Remedy: {remedy(total)}.", True
    if why:
        return (
            f"Over all prompts, {speed:.2f}x was measured ({between(total)}){why}: that is no gain of speculation; "
            "measure longer texts and more --config.repeats, on a quiet machine.",
            True,
        )
    return f"Speculation is {speed:.2f} times as fast as plain decoding over all prompts ({between(total)}).", False


def _names(rows: Sequence[Row]) -> str:
    return ", ".join(f"{label(row)} ({row['measured_speedup']:.2f}x)" for row in rows)


def _of_prompts(shown: Sequence[Row], total: Row) -> list[tuple[str, bool]]:
    """Which prompts are slower, and which speedups are not to be believed."""
    found = []
    ordered = sorted(shown, key=lambda row: row["measured_speedup"])
    losses = [row for row in ordered if row["verdict"] == noise.LOSS]
    if losses and total["measured_speedup"] >= 1:
        found.append((f"It is SLOWER on {_names(losses)}. Remedy for {label(losses[0])}: {remedy(losses[0])}.", True))
    if within := [row for row in ordered if row["verdict"] == noise.NOISE]:
        found.append((f"Within noise, so neither gain nor loss: {_names(within)}.", False))
    if unexplained := [row for row in ordered if row["verdict"] == noise.UNEXPLAINED]:
        calls = ", ".join(f"{row['accounted_speedup']:.2f}x" for row in unexplained)
        found.append((f"Not explained by the calls (which give {calls}): {_names(unexplained)}.", True))
    return found


def findings(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """The findings of a run, in sentences, and whether each deserves a warning."""
    shown = lines(rows)
    total = shown[-1]
    differs = total["identical"] is not None and total["identical"] < 1
    found = [(_identity(total), differs or not total["exact"]), _overall(total)]
    if total["fixed_shape"] and total["num_draft_tokens"]:
        cost = results.costs_of(total).score_cost
        text = f"fixed_shape: plain decoding scored K + 1 tokens too, {cost:.2f} times what it costs alone"
        found.append((f"{text}. The speedups are over that.", False))
    return found + _of_prompts(shown[:-1], total)


LEGEND = """\
- **tok/s**: new tokens a second while decoding, prefill and compilation excluded; median of the repeats.
- **alpha**: mean of sum min(target, draft) over the judged draft tokens. **tok/call**: tokens per target call.
- **c**: time of one draft token over that of one target call, measured.
- **predicted**: Theorem 3.8 of Leviathan et al. (2022) from alpha, K and c; it takes scoring K + 1 tokens as free and
  assumes that every step drafts.
- **accounted**: plain steps over the steps really taken, drafting ones at their measured cost.
- **measured**: wall clock, speculative over plain decoding in the same run. **~**: within noise, the interval at 95 %
  from the spread of the timings has 1 in it. **?**: not to be believed, since the calls do not explain it, or one
  timing has no spread. `specjax/experiments/noise.py` has the definition.
- **identical**: prompts whose text equals plain decoding's, token by token (greedy text, and the rule `coupled`)."""


def _told(row: Row) -> str:
    """What the loop was told that a drafting step costs."""
    told = row["step_cost"] if isinstance(row["step_cost"], list) else [row["step_cost"]]
    return ", ".join(f"{cost:.2f}" for cost in dict.fromkeys(told))


def summary(config: dict[str, Any], rows: Sequence[Row], images: Sequence[str]) -> str:
    """The text of `summary.md`."""
    shown = lines(rows)
    total = shown[-1]
    sides = f"target `{total['target']}`, drafter `{total['drafter']}`"
    if total["draft"]:
        sides += f" with `{total['draft']}`"
    rule = f"rule `{total['verify']}` ({'exact' if total['exact'] else 'NOT exact'})"
    device = f"{total['dtype']} on {total['device']} with jax {total['jax_version']}"
    k, costs = total["num_draft_tokens"], results.costs_of(total)
    return page(
        f"# {printable.line(config['name'])}",
        f"{sides}, K = {k}, {rule}, temperature {total['temperature']:g}, batch {total['batch_size']}, {device}.",
        markdown([HEADER, *map(cells, shown)]),
        bullets(f"**{text}**" if bad else text for text, bad in findings(rows)),
        f"Scoring {k + 1} tokens costs {costs.score_cost:.2f} plain steps, a whole drafting step {costs.step_cost:.2f} "
        f"(the run was told {_told(total)}). Compiling took {total['compile_seconds']:.1f} s for speculation "
        f"and {total['baseline_compile_seconds']:.1f} s for plain decoding; reading the prompts took "
        f"{total['prefill_seconds']:.2f} s and {total['baseline_prefill_seconds']:.2f} s.",
        "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in images),
        LEGEND,
    )
