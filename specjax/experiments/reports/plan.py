"""The report of a plan: words, tables and a plot."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from specjax.experiments.reports import plots, printable
from specjax.experiments.reports.tables import bullets, markdown, number, page, table
from specjax.experiments.results import Row


def _gib(size: float | None) -> str:
    return number(None if size is None else size / 2**30, ".3f")


def _ms(value: float | None) -> str:
    return number(value, ".3f")


def _unit(row: Row) -> str:
    """The unit that figures are for."""
    each = row["chip"]["devices"]
    return "chip" if each == 1 else f"device ({each} a chip)"


def _pair(row: Row) -> str:
    """Target and draft in words."""
    target, draft = (
        f"{row[side]} in {row['quantised'][side]}" if row["quantised"][side] else row[side]
        for side in ("target", "draft")
    )
    return f"{target} with {draft}"


def fit(row: Row) -> str:
    """A sentence that says whether the models fit."""
    memory = row["memory"]
    sizes = f"{_gib(memory['needed'])} of {_gib(memory['available'])} GiB a {_unit(row)}"
    if not row["compiled"]:
        sizes += ", temporaries not counted"
    where = f"{_pair(row)} on {row['topology']}, batch {row['batch_size']}"
    if row["exhausted"]:
        sizes += ", and XLA finds no room for its temporaries with them, even for few layers"
    if row["fits"]:
        return f"Fits: {where}: {sizes}."
    if not row["remedies"]:
        return f"DOES NOT FIT: {where}: {sizes}. No larger slice, smaller batch or shorter buffer alone would do."
    return f"DOES NOT FIT: {where}: {sizes}. What would: {'; '.join(row['remedies'])}."


def _prediction(row: Row) -> str:
    k, best = row["num_draft_tokens"], row["best_num_draft_tokens"]
    by_k = row["ms_per_token_by_draft_tokens"]
    return (
        f"Predicted (roofline, a lower bound): target call {_ms(by_k[0])} ms, a draft token {_ms(row['draft_ms'])} ms, "
        f"c = {row['cost_ratio']:.3f}; at alpha = {row['alpha']:g}, K = {k}: {_ms(by_k[k])} ms/token, "
        f"{row['predicted_speedup']:.2f}x plain; best K = {best}: {_ms(by_k[best])} ms/token."
    )


def _references(row: Row) -> list[str]:
    """Predictions beside published times."""
    lines = []
    for side, known in row["reference_ms"].items():
        call = next((call for call in row["calls"] if call["side"] == side), None)
        if not known or call is None:
            continue
        line = (
            f"Published for {row[side]}: {known:g} ms/token; predicted {_ms(call['ms'])} ms, {call['ms'] / known:.0%}."
        )
        if call["collectives"] and known > call["ms"]:
            each = 1e3 * (known - call["ms"]) / call["collectives"]
            line += f" What is missing is as much as {each:.0f} us for each of its {call['collectives']:g} collectives."
        lines.append(line)
    return lines


def _attention(row: Row) -> str:
    """How both sides attend to their caches, and why."""
    how = {"einsum": "XLA's products over the whole buffer", "kernel": "the kernel that reads what each row has"}
    return " ".join(
        f"{side.capitalize()}: attention by {how[choice['name']]} ({choice['why']})."
        for side, choice in row["attention"].items()
    )


def headlines(rows: Sequence[Row]) -> list[str]:
    """The findings."""
    lines = []
    for row in rows:
        lines += [fit(row), _prediction(row), *_references(row), _attention(row)]
        if row["step"]:
            step, gathered = row["step"], row["step"]["gathered_bytes"] / 1e6
            lines.append(
                f"Compiled step: {step['cache_copies']:g} cache copies; {gathered:.3g} MB gathered; "
                f"{step['alias_bytes'] / step['output_bytes']:.2%} of the state is written in place."
            )
            if not row["chip"]["tpu"]:
                lines.append(
                    f"Kernels in the program of the loop: {step['kernels_per_step']:g}, each once; "
                    f"{step['host_predicates']:g} loops and conditions wait for a predicate that the host reads."
                )
    return lines


def _memory(row: Row) -> str:
    memory = row["memory"]
    how = "extrapolated" if row["extrapolated"] else "compiled"
    lines = [(name.replace("_", " "), memory[name], "computed") for name in list(memory)[:5]]
    if row["compiled"]:
        lines += [(name, memory[name], how) for name in ("temporaries", "code")]
        lines.append(("arguments of the step, padding and all", memory["compiled_arguments"], how))
    lines += [("needed", memory["needed"], ""), ("available", memory["available"], "data sheet")]
    columns = (("what", lambda line: line[0]), ("GiB", lambda line: _gib(line[1])), ("source", lambda line: line[2]))
    return page(f"### Memory, GiB a {_unit(row)}", markdown(table(columns, lines)))


_CALLS = (
    ("call", lambda call: call["side"]),
    ("T", lambda call: call["tokens"]),
    ("GFLOP", lambda call: f"{call['flops'] / 1e9:.2f}"),
    ("parameters MB", lambda call: f"{call['parameter_bytes'] / 1e6:.1f}"),
    ("cache MB", lambda call: f"{call['cache_bytes'] / 1e6:.1f}"),
    ("collectives", lambda call: f"{call['collectives']:.4g}"),
    ("their kB", lambda call: f"{call['collective_bytes'] / 1e3:.1f}"),
    ("arithmetic ms", lambda call: _ms(call["arithmetic_ms"])),
    ("memory ms", lambda call: _ms(call["memory_ms"])),
    ("collectives ms", lambda call: _ms(call["collectives_ms"])),
    ("sum ms", lambda call: _ms(call["ms"])),
    ("XLA GFLOP", lambda call: _scaled(call["compiled_flops"], 1e9)),
    ("XLA MB", lambda call: _scaled(call["compiled_bytes_accessed"], 1e6)),
    ("XLA ms", lambda call: _ms(call["compiled_optimal_ms"])),
)


def _scaled(value: float | None, unit: float) -> str:
    return number(None if value is None else value / unit, ".2f")


def _calls(row: Row) -> str:
    counted = (
        "Collectives are counted in the compiled calls, sampling's included (target calls of other T lie on the line "
        "between T = 1 and T = K + 1). XLA's columns are of the compiled calls: it counts every conversion and sum "
        "where a single row is multiplied, and bytes in on-chip memories too (which are not extrapolated), so they "
        "exceed the others, which are computed from the model's matrix products."
        if row["compiled"]
        else "Nothing was compiled: every column is computed from the model's matrix products and their shardings. "
        "Sampling's few small collectives are not counted."
    )
    return page(f"### Calls, a {_unit(row)}", markdown(table(_CALLS, row["calls"])), counted)


_COLLECTIVES = (
    ("part of the step", lambda c: c["part"].replace("_", " ")),
    ("kind", lambda c: c["kind"]),
    ("in the program", lambda c: f"{c['count']:g}"),
    ("kB together", lambda c: f"{c['bytes'] / 1e3:.2f}"),
    ("kB the largest", lambda c: f"{c['largest'] / 1e3:.2f}"),
)


def _collectives(row: Row) -> str:
    if not row["step"]:
        return ""
    words = (
        "As they stand in the program of the whole loop, each once: a target call stands there for T = 1 and for "
        "T = K + 1; a draft call for the first token of a draft, for the others, and for catching up after plain "
        "steps; sampling for every option."
    )
    counted = markdown(table(_COLLECTIVES, row["step"]["collectives"]))
    return page("### Collectives of the compiled step", counted, words)


def _shown(drafts: Sequence[int]) -> str:
    """A chain or a tree in words."""
    return f"K = {drafts[0]}" if len(drafts) == 1 else f"tree, width {drafts[0]}, depth {drafts[1]}, {drafts[2]} nodes"


_STEPS = (
    ("drafts", lambda step: _shown(step["drafts"])),
    ("drafting ms", lambda step: _ms(step["drafting_ms"])),
    ("scoring ms", lambda step: _ms(step["scoring_ms"])),
    ("step ms", lambda step: _ms(step["ms"])),
    ("pays above, tokens a step", lambda step: f"{step['pays_above']:.2f}"),
)

_LENGTHS = (
    ("published by", lambda cell: cell["source"]),
    ("drafts", lambda cell: _shown(cell["drafts"])),
    ("tokens a step", lambda cell: f"{cell['tokens_per_step']:.2f}"),
    ("planned ms/token", lambda cell: _ms(cell["predicted_ms_per_token"])),
    ("planned speedup", lambda cell: f"{cell['predicted_speedup']:.2f}x"),
    ("their ms/token", lambda cell: _ms(cell["measured_ms_per_token"])),
    ("their speedup", lambda cell: f"{found:.2f}x" if (found := cell["measured_speedup"]) else ""),
)


def _steps(row: Row) -> str:
    words = (
        "A step drafts, then the target scores: it is faster than plain decoding where it writes more tokens than the "
        "last column says."
    )
    parts = [page("### Steps (predictions)", markdown(table(_STEPS, row["steps"])), words)]
    if row["lengths"]:
        words = "With the tokens per step that others have published, beside the times that they measured."
        parts.append(page("### At published lengths", markdown(table(_LENGTHS, row["lengths"])), words))
    return page(*(part.strip() for part in parts))


def _compilation(row: Row) -> str:
    if not row["compiled"]:
        return ""
    layers = row["compiled_layers"]
    words = " and ".join(f"{side} {' and '.join(map(str, layers[side]))}" for side in ("target", "draft"))
    end = "the rest is extrapolated, linearly in the layers" if row["extrapolated"] else "these are all layers"
    return f"Compiled with layers: {words}; {end}. It took {row['compile_seconds']:.0f} s."


def _draft_call(row: Row) -> Row | None:
    """The last of a step's draft calls; None where the target drafts for itself."""
    return next((call for call in reversed(row["calls"]) if call["side"] != "target"), None)


def _of_call(name: str) -> Callable[[Row], str]:
    def shown(row: Row) -> str:
        call = _draft_call(row)
        return number(None if call is None else call[name], ".3f")

    return shown


_DRAFTS = (
    ("topology", lambda row: row["topology"]),
    ("draft", lambda row: row["draft"]),
    ("10^9 parameters", lambda row: f"{row['num_parameters']['draft'] / 1e9:.2f}"),
    ("call ms", _of_call("ms")),
    ("of memory", _of_call("memory_ms")),
    ("collectives", lambda row: f"{call['collectives']:g}" if (call := _draft_call(row)) else ""),
    ("of collectives", _of_call("collectives_ms")),
    ("c", lambda row: f"{row['cost_ratio']:.3f}"),
    ("best K", lambda row: row["best_num_draft_tokens"]),
    ("ms/token", lambda row: _ms(row["ms_per_token_by_draft_tokens"][row["best_num_draft_tokens"]])),
)


def _compare(rows: Sequence[Row]) -> str:
    if len(rows) < 2:
        return ""
    words = f"All at alpha = {rows[0]['alpha']:g}. Collectives wait for each other: a deep draft pays for every layer."
    return page("## The drafts beside each other (predictions)", markdown(table(_DRAFTS, rows)), words)


def _published(rows: Sequence[Row]) -> str:
    cells: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        for cell in row["published"]:
            known = (row["draft"], cell["task"], cell["num_draft_tokens"], cell["alpha"], cell["measured_speedup"])
            cells.setdefault(known, {"known": known})[row["topology"]] = cell["predicted_speedup"]
    if not cells:
        return ""
    formats = ("draft", "{}"), ("task", "{}"), ("K", "{}"), ("alpha", "{:.2f}"), ("published, measured", "{:.1f}x")
    columns = [
        (name, lambda cell, i=i, shown=shown: shown.format(cell["known"][i])) for i, (name, shown) in enumerate(formats)
    ]
    columns += [
        (f"planned, {topology}", lambda cell, topology=topology: f"{cell[topology]:.2f}x")
        for topology in dict.fromkeys(row["topology"] for row in rows)
    ]
    words = (
        "Theorem 3.8 of Leviathan et al. at published acceptance rates alpha and draft lengths K, with the planned c "
        "and the planned time of a call that scores K + 1 tokens, beside the speedup that was published."
    )
    return page("## Published speedups beside the plan", markdown(table(columns, list(cells.values()))), words)


def _sources(row: Row) -> str:
    chip = row["chip"]
    latency = f"{1e6 * chip['hop_latency']:g} us a hop"
    if chip["base_latency"]:
        latency += f" and {1e6 * chip['base_latency']:g} us before the first"
    figures = (
        f"{chip['name']}: {chip['flops'] / 1e12:g} TFLOP/s (bfloat16, dense), {chip['memory'] / 2**30:.1f} GiB at "
        f"{chip['bandwidth'] / 1e9:g} GB/s, {chip['interconnect'] / 1e9:g} GB/s to other chips, both ways "
        f"({chip['source']}).",
        f"Assumed latency of collectives: {latency} ({chip['latency_source']}).",
        "A call takes the larger of its arithmetic and its memory traffic at peak rates, then its collectives. "
        "Sampling's arithmetic, kernels' overheads and what stays below the peaks are not in it.",
    )
    return page(f"## Where the figures of {chip['name']} come from", bullets(figures))


def _of_draft(row: Row) -> str:
    """The section of one draft."""
    mesh = row["mesh"]
    layout = (
        f"{row['chips']} chips as data {mesh['data']} x model {mesh['model']}; {row['dtype']}; "
        f"buffer of {row['buffer']} tokens; draft {row['draft_sharding']}."
    )
    whole = [
        f"Every device has the {side}'s {', '.join(names)} whole: the size does not divide."
        for side, names in row["replicated"].items()
        if names
    ]
    parts = (_compilation(row), _memory(row), _collectives(row), _calls(row), _steps(row))
    title = f"## {_pair(row)} on {row['topology']}"
    return page(title, bullets([*headlines([row]), layout, *whole]), *(part.strip() for part in parts))


def summary(title: str, rows: Sequence[Row]) -> str:
    """The text of `summary.md`."""
    chips = {row["chip"]["name"]: row for row in rows}
    parts = [*map(_of_draft, rows), _compare(rows), _published(rows), *map(_sources, chips.values())]
    return page(f"# Plan: {title}", "All times are predictions: nothing was run.", *(part.strip() for part in parts))


def figure(rows: Sequence[Row]) -> Figure:
    """Predicted time of a target call against the tokens that it scores, and of a token against K, for each draft.

    Args:
      rows: of one topology.
    """
    figure, (left, right) = plots.panels(2, 4.5, 3.6)
    first = rows[0]
    times = first["target_ms_by_tokens"]
    label = printable.plot(f"target: {first['target']}")
    left.plot(range(1, len(times) + 1), times, "o-", color=plots.BLUE, label=label, markersize=3)
    for row, color in zip(rows, itertools.cycle((plots.ORANGE, plots.GREY, plots.BLUE)), strict=False):
        label = printable.plot(f"drafting, a token: {row['draft']}")
        left.axhline(row["draft_ms"], color=color, linestyle="--", linewidth=1.2, label=label)
        by_k, best = row["ms_per_token_by_draft_tokens"], row["best_num_draft_tokens"]
        label = printable.plot(f"{row['draft']}, best K = {best}")
        right.plot(range(len(by_k)), by_k, "o-", color=color, label=label, markersize=3)
        right.plot(best, by_k[best], "D", color=color, markersize=7, fillstyle="none")
    left.set_ylim(bottom=0)
    right.set_ylim(bottom=0)
    title = f"A call at the roofline of {first['topology']} (prediction)"
    plots.finish(left, title, "tokens T that it reads", "ms", legend=True)
    title = f"A token at alpha = {first['alpha']:g} (prediction)"
    plots.finish(right, title, "draft tokens K per step", "ms", legend=True)
    return figure
