"""What a plan says, in words and tables."""

from collections.abc import Iterable, Sequence
from typing import Any

from specjax.experiments import printable
from specjax.experiments.results import Row


def _gib(size: float | None) -> str:
    return "-" if size is None else f"{size / 2**30:.3f}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> list[str]:
    rule = "|".join(["---"] * len(header))
    return [
        f"| {' | '.join(header)} |",
        f"|{rule}|",
        *(f"| {' | '.join(printable.markdown(str(cell)) for cell in line)} |" for line in lines),
        "",
    ]


def _unit(row: Row) -> str:
    """What figures are of."""
    each = row["chip"]["devices"]
    return "chip" if each == 1 else f"device ({each} a chip)"


def fit(row: Row) -> str:
    """Whether it fits, in a sentence."""
    memory = row["memory"]
    sizes = f"{_gib(memory['needed'])} of {_gib(memory['available'])} GiB a {_unit(row)}"
    if not row["compiled"]:
        sizes += ", temporaries not counted"
    where = f"{row['target']} with {row['draft']} on {row['topology']}, batch {row['batch_size']}"
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
        f"Predicted (roofline, a lower bound): target call {_ms(by_k[0])} ms, draft call {_ms(row['draft_ms'])} ms, "
        f"c = {row['cost_ratio']:.3f}; at alpha = {row['alpha']:g}, K = {k}: {_ms(by_k[k])} ms/token, "
        f"{row['predicted_speedup']:.2f}x plain; best K = {best}: {_ms(by_k[best])} ms/token."
    )


def _references(row: Row) -> list[str]:
    """Predictions beside times that somebody has published."""
    lines = []
    for side, known in row["reference_ms"].items():
        call = next(call for call in row["calls"] if call["side"] == side)
        if not known:
            continue
        line = (
            f"Published for {row[side]}: {known:g} ms/token; predicted {_ms(call['ms'])} ms, {call['ms'] / known:.0%}."
        )
        if call["collectives"] and known > call["ms"]:
            each = 1e3 * (known - call["ms"]) / call["collectives"]
            line += f" What is missing is as much as {each:.0f} us for each of its {call['collectives']:g} collectives."
        lines.append(line)
    return lines


def headlines(rows: Sequence[Row]) -> list[str]:
    """The findings."""
    lines = []
    for row in rows:
        lines += [fit(row), _prediction(row), *_references(row)]
        if row["step"]:
            step = row["step"]
            lines.append(
                f"Compiled step: {step['cache_copies']:g} cache copies; "
                f"{step['alias_bytes'] / step['output_bytes']:.2%} of the state is written in place."
            )
    return lines


def _memory(row: Row) -> list[str]:
    memory = row["memory"]
    how = "extrapolated" if row["extrapolated"] else "compiled"
    lines = [(name.replace("_", " "), _gib(memory[name]), "computed") for name in list(memory)[:5]]
    if row["compiled"]:
        lines += [(name, _gib(memory[name]), how) for name in ("temporaries", "code")]
        lines.append(("arguments of the step, padding and all", _gib(memory["compiled_arguments"]), how))
    lines += [("needed", _gib(memory["needed"]), ""), ("available", _gib(memory["available"]), "data sheet")]
    return [f"### Memory, GiB a {_unit(row)}", "", *_table(("what", "GiB", "source"), lines)]


def _calls(row: Row) -> list[str]:
    header = (
        "call", "T", "GFLOP", "parameters MB", "cache MB", "collectives", "their kB",
        "arithmetic ms", "memory ms", "collectives ms", "sum ms", "XLA GFLOP", "XLA MB", "XLA ms",
    )  # fmt: skip
    lines = []
    for call in row["calls"]:
        xla = call["compiled_flops"], call["compiled_bytes_accessed"]
        lines.append((
            call["side"], call["tokens"], f"{call['flops'] / 1e9:.2f}", f"{call['parameter_bytes'] / 1e6:.1f}",
            f"{call['cache_bytes'] / 1e6:.1f}", f"{call['collectives']:.4g}", f"{call['collective_bytes'] / 1e3:.1f}",
            _ms(call["arithmetic_ms"]), _ms(call["memory_ms"]), _ms(call["collectives_ms"]), _ms(call["ms"]),
            *("-" if x is None else f"{x / unit:.2f}" for x, unit in zip(xla, (1e9, 1e6), strict=True)),
            _ms(call["compiled_optimal_ms"]),
        ))  # fmt: skip
    counted = (
        "Collectives are counted in the compiled calls, sampling's included (target calls of other T lie on the line "
        "between T = 1 and T = K + 1). XLA's columns are of the compiled calls: it counts every conversion and sum "
        "where a single row is multiplied, and bytes in on-chip memories too (which are not extrapolated), so they "
        "exceed the others, which are computed from the model's matrix products."
        if row["compiled"]
        else "Nothing was compiled: every column is computed from the model's matrix products and their shardings. "
        "Sampling's few small collectives are not counted."
    )
    return [f"### Calls, a {_unit(row)}", "", *_table(header, lines), counted, ""]


def _collectives(row: Row) -> list[str]:
    if not row["step"]:
        return []
    lines = [
        (
            c["part"].replace("_", " "),
            c["kind"],
            f"{c['count']:g}",
            f"{c['bytes'] / 1e3:.2f}",
            f"{c['largest'] / 1e3:.2f}",
        )
        for c in row["step"]["collectives"]
    ]
    header = ("part of the step", "kind", "in the program", "kB together", "kB the largest")
    words = (
        "As they stand in the program of the whole loop, each once: a target call stands there for T = 1 and for "
        "T = K + 1; a draft call for the first token of a draft, for the others, and for catching up after plain "
        "steps; sampling for every option."
    )
    return ["### Collectives of the compiled step", "", *_table(header, lines), words, ""]


def _compilation(row: Row) -> list[str]:
    if not row["compiled"]:
        return []
    layers = row["compiled_layers"]
    words = " and ".join(f"{side} {' and '.join(map(str, layers[side]))}" for side in ("target", "draft"))
    end = "the rest is extrapolated, linearly in the layers" if row["extrapolated"] else "which are all"
    return [f"Compiled with layers: {words}; {end}. It took {row['compile_seconds']:.0f} s.", ""]


def _compare(rows: Sequence[Row]) -> list[str]:
    if len(rows) < 2:
        return []
    lines = []
    for row in rows:
        draft = next(call for call in row["calls"] if call["side"] == "draft")
        best = row["best_num_draft_tokens"]
        lines.append((
            row["draft"], f"{row['num_parameters']['draft'] / 1e9:.2f}", _ms(draft["ms"]), _ms(draft["memory_ms"]),
            f"{draft['collectives']:g}", _ms(draft["collectives_ms"]), f"{row['cost_ratio']:.3f}", best,
            _ms(row["ms_per_token_by_draft_tokens"][best]),
        ))  # fmt: skip
    header = (
        "draft", "10^9 parameters", "call ms", "of memory", "collectives", "of collectives", "c", "best K", "ms/token",
    )  # fmt: skip
    words = f"All at alpha = {rows[0]['alpha']:g}. Collectives wait for each other: a deep draft pays for every layer."
    return ["## The drafts beside each other (predictions)", "", *_table(header, lines), words, ""]


def _sources(row: Row) -> list[str]:
    chip = row["chip"]
    latency = f"{1e6 * chip['hop_latency']:g} us a hop"
    if chip["base_latency"]:
        latency += f" and {1e6 * chip['base_latency']:g} us before the first"
    return [
        "## Where the figures come from",
        "",
        f"- {chip['name']}: {chip['flops'] / 1e12:g} TFLOP/s (bfloat16, dense), {chip['memory'] / 2**30:.1f} GiB at "
        f"{chip['bandwidth'] / 1e9:g} GB/s, {chip['interconnect'] / 1e9:g} GB/s to other chips, both ways "
        f"({chip['source']}).",
        f"- Assumed latency of collectives: {latency} ({chip['latency_source']}).",
        "- A call takes the larger of its arithmetic and its memory traffic at peak rates, then its collectives. "
        "Sampling's arithmetic, kernels' overheads and what stays below the peaks are not in it.",
        "",
    ]


def markdown(title: str, rows: Sequence[Row]) -> str:
    """`summary.md`."""
    lines = [f"# Plan: {title}", "", "All times are predictions: nothing was run.", ""]
    for row in rows:
        lines += [f"## {row['target']} with {row['draft']} on {row['topology']}", ""]
        lines += [f"- {line}" for line in headlines([row])]
        mesh = row["mesh"]
        lines.append(
            f"- {row['chips']} chips as data {mesh['data']} x model {mesh['model']}; {row['dtype']}; "
            f"buffer of {row['buffer']} tokens; draft {row['draft_sharding']}."
        )
        for side, names in row["replicated"].items():
            if names:
                lines.append(f"- Every device has the {side}'s {', '.join(names)} whole: the size does not divide.")
        lines += ["", *_compilation(row), *_memory(row), *_collectives(row), *_calls(row)]
    return "\n".join([*lines, *_compare(rows), *_sources(rows[0])])
