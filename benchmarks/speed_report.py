"""The Markdown of `speed.py`: a line per category, means over all prompts with their intervals, and notes."""

import datetime
from collections.abc import Sequence
from typing import Any

from specjax.experiments.statistics import bootstrap_interval, geometric_mean
from specjax.metrics import Costs

PLAIN, NGRAM = "specjax plain", "specjax ngram"

Measured = dict[str, Any]
"""The measurements of one prompt: `category`, `milliseconds` by mode, `new_tokens`, `identical` and more."""


def by_category(rows: Sequence[Measured]) -> dict[str, list[Measured]]:
    """The prompts of each category, in order of appearance."""
    return {name: [r for r in rows if r["category"] == name] for name in dict.fromkeys(r["category"] for r in rows)}


def ratios(rows: Sequence[Measured], slower: str, faster: str) -> list[float]:
    """How many times as fast one mode is as another, by prompt."""
    return [row["milliseconds"][slower] / row["milliseconds"][faster] for row in rows]


def mean_ratio(rows: Sequence[Measured], slower: str, faster: str) -> str:
    """The geometric mean of a ratio over prompts, and its bootstrap interval over the prompts of each category."""
    mean = geometric_mean(ratios(rows, slower, faster))
    interval = bootstrap_interval([ratios(some, slower, faster) for some in by_category(rows).values()])
    return f"{mean:.2f}x" + (f" (95 %: {interval[0]:.2f} to {interval[1]:.2f})" if interval else "")


def table(rows: Sequence[Measured], modes: Sequence[str]) -> str:
    """Milliseconds per token by category, geometric means, and the gain of lookup with its extremes."""
    lines = ["| category | prompts | " + " | ".join(modes) + " | gain | lowest to highest |"]
    lines.append("|---|" + "---:|" * (len(modes) + 3))
    for name, some in [*by_category(rows).items(), ("all", list(rows))]:
        means = [geometric_mean([row["milliseconds"][mode] for row in some]) for mode in modes]
        gains = ratios(some, PLAIN, NGRAM)
        gain = f"{geometric_mean(gains):.2f}x"
        if name == "all":
            gain = mean_ratio(some, PLAIN, NGRAM)
        cells = [
            name,
            str(len(some)),
            *(f"{mean:.1f}" for mean in means),
            gain,
            f"{min(gains):.2f} to {max(gains):.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _share(rows: Sequence[Measured], key: str) -> str:
    return f"{sum(row[key] for row in rows)} of {len(rows)} prompts"


def against(rows: Sequence[Measured], modes: Sequence[str], other: str) -> str:
    """The comparison with another engine, of which `other` is the plain mode."""
    name = other.removesuffix(" plain")
    means = {
        mode: geometric_mean([row["milliseconds"][mode] for row in rows])
        for mode in modes
        if mode.startswith(f"{name} ")
    }
    best = min(means, key=lambda mode: means[mode])
    same = sum(row["agrees"][other] for row in rows)
    return (
        f"Plain specjax over plain {name}: {mean_ratio(rows, other, PLAIN)}; n-gram lookup over its best mode "
        f"({best}): {mean_ratio(rows, best, NGRAM)}. Plain texts are identical on {same} of {len(rows)} prompts."
    )


def notes(rows: Sequence[Measured], modes: Sequence[str], costs: Costs, overhead: dict[str, float]) -> list[str]:
    """The notes below the table."""
    gains = ratios(rows, PLAIN, NGRAM)
    worst = min(range(len(rows)), key=lambda i: gains[i])
    later = [row for some in by_category(rows).values() for row in some[1:]]
    found = [f"N-gram lookup over plain decoding: {mean_ratio(rows, PLAIN, NGRAM)}."]
    if later:
        found.append(
            "Without the first prompt of each category, on which defaults have been tried: "
            f"{mean_ratio(later, PLAIN, NGRAM)}, {len(later)} prompts."
        )
    found.append(
        f"Slower than plain decoding on {sum(gain < 1 for gain in gains)} of {len(rows)} prompts; the worst has "
        f"{gains[worst]:.2f}x ({rows[worst]['category']} {rows[worst]['id']}). Text identical to plain decoding's on "
        f"{_share(rows, 'identical')}."
    )
    found += [against(rows, modes, other) for other in modes if other.endswith(" plain") and other != PLAIN]
    k = costs.num_draft_tokens
    found.append(
        f"A call that scores {k + 1} tokens costs {costs.score_cost:.2f} plain ones, a drafting step "
        f"{costs.step_cost:.2f}. The loop's own overhead: {overhead[PLAIN]:.1%} of plain decoding, "
        f"{overhead[NGRAM]:.1%} with lookup."
    )
    return found


def markdown(
    rows: Sequence[Measured],
    modes: Sequence[str],
    settings: dict[str, Any],
    costs: Costs,
    overhead: dict[str, float],
    command: str,
) -> str:
    """The whole report.

    Args:
      rows: one per prompt, those of a category in the order of their `question_id`.
      modes: the keys of their `milliseconds`.
      settings: of the record.
      costs: of a step.
      overhead: by mode, the share of a run that is neither target nor draft.
      command: what was run.
    """
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    sizes = [len(some) for some in by_category(rows).values()]
    each = f"the first {sizes[0]}" if len(set(sizes)) == 1 else f"the first {min(sizes)} to {max(sizes)}"
    calls = "one call" if settings["repeats"] == 1 else f"the median of {settings['repeats']} calls"
    how = (
        f"{settings['target']} in {settings['dtype']}, greedy, batch 1, at most {settings['max_new_tokens']} new "
        f"tokens, K = {settings['num_draft_tokens']}; whole calls with the prefill, all modes in turn in one process; "
        f"milliseconds per token, {calls} a prompt. Prompts: {each} of each category by question id, "
        f"{len(rows)} in all. Means are geometric; the interval is a bootstrap over the prompts of each category."
    )
    parts = [
        f"`{command}`",
        f"{settings['machine']}, {versions}, {datetime.date.today()}. {how}",
        table(rows, modes),
        "\n".join(f"- {note}" for note in notes(rows, modes, costs, overhead)),
    ]
    return "\n\n".join(parts) + "\n"
