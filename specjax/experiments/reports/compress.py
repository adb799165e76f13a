"""The report of smaller models of a target: one table."""

from collections.abc import Mapping, Sequence
from typing import Any

from specjax.experiments.reports import tables
from specjax.experiments.results import Row


def _speedup(row: Row) -> float:
    return row["target_ms_per_token"] / row["ms_per_token"]


def line(row: Row) -> str:
    """A finished row."""
    parts = [f"{row['bytes'] / 2**20:.0f} MiB", f"perplexity {row['perplexity']:.2f}"]
    if row["metric"] is not None:
        parts.append(f"metric {row['metric']:.2f}")
    if row["alpha"] is not None:
        parts.append(f"alpha {row['alpha']:.3f}")
    if row["ms_per_token"] is not None:
        parts.insert(0, f"{row['ms_per_token']:.1f} ms per token ({_speedup(row):.2f}x)")
        parts.append(f"{row['num_identical']} of {row['num_prompts']} texts are the target's")
    return ", ".join(parts)


def _named(row: Row) -> str:
    return row["name"] if row["role"] == "alone" else f"the target, drafted for by: {row['name']}"


def summary(about: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The text of `summary.md`."""
    times: tables.Columns = (
        ("ms per token", lambda row: f"{row['ms_per_token']:.1f}"),
        ("speedup", lambda row: f"{_speedup(row):.2f}x"),
    )
    same: tables.Columns = (
        ("drafts accepted", lambda row: tables.number(row["acceptance_rate"], ".2f")),
        ("texts that are the target's", lambda row: f"{row['num_identical']}/{row['num_prompts']}"),
    )
    is_timed = about["repeats"] > 0
    columns: tables.Columns = (
        ("what writes", _named),
        *(times if is_timed else ()),
        ("parameters", lambda row: f"{row['bytes'] / 2**20:.0f} MiB"),
        ("perplexity", lambda row: f"{row['perplexity']:.2f}"),
        *(((about["metric"], lambda row: f"{row['metric']:.2f}"),) if about["metric"] else ()),
        ("alpha", lambda row: tables.number(row["alpha"], ".3f")),
        *(same if is_timed else ()),
    )
    timed = (
        f"Temperature 0, batch 1, {rows[0]['num_prompts']} prompts of at most {about['max_new_tokens']} new tokens, "
        f"K = {about['num_draft_tokens']}. Times are of whole calls, compilation excluded: of each prompt the median "
        f"of {about['repeats']}, plain decoding of the target in turn."
    )
    return tables.page(
        f"# {about['name']}",
        f"{about['target']}, {about['dtype']}, {about['device']}, jax {about['jax_version']}. Parameters are what is "
        "held in memory. Perplexity is that of the model that writes. Alpha is the acceptance rate of the draft at "
        "temperature 1, over the same texts.",
        timed if is_timed else "",
        tables.markdown(tables.table(columns, rows)),
    )
