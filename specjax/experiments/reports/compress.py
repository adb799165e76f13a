"""The report of smaller models of a target: one table."""

from collections.abc import Mapping, Sequence
from typing import Any

from specjax.experiments.reports import tables
from specjax.experiments.results import Row


def _speedup(row: Row) -> float:
    return row["target_ms_per_token"] / row["ms_per_token"]


def line(row: Row) -> str:
    """A finished row."""
    metric = "" if row["metric"] is None else f", metric {row['metric']:.2f}"
    return (
        f"{row['ms_per_token']:.1f} ms per token ({_speedup(row):.2f}x), {row['bytes'] / 2**20:.0f} MiB, perplexity "
        f"{row['perplexity']:.2f}{metric}, {row['num_identical']} of {row['num_prompts']} texts are the target's"
    )


def _named(row: Row) -> str:
    return row["name"] if row["role"] == "alone" else f"the target, drafted for by: {row['name']}"


def summary(about: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The text of `summary.md`."""
    columns: tables.Columns = (
        ("what writes", _named),
        ("ms per token", lambda row: f"{row['ms_per_token']:.1f}"),
        ("speedup", lambda row: f"{_speedup(row):.2f}x"),
        ("parameters", lambda row: f"{row['bytes'] / 2**20:.0f} MiB"),
        ("perplexity", lambda row: f"{row['perplexity']:.2f}"),
        *(((about["metric"], lambda row: f"{row['metric']:.2f}"),) if about["metric"] else ()),
        ("drafts accepted", lambda row: tables.number(row["acceptance_rate"], ".2f")),
        ("texts that are the target's", lambda row: f"{row['num_identical']}/{row['num_prompts']}"),
    )
    return tables.page(
        f"# {about['name']}",
        f"{about['target']}, {about['dtype']}, temperature 0, batch 1, {rows[0]['num_prompts']} prompts of at most "
        f"{about['max_new_tokens']} new tokens, K = {about['num_draft_tokens']}, {about['device']}, jax "
        f"{about['jax_version']}. Times are of whole calls, compilation excluded: of each prompt the median of "
        f"{about['repeats']}, plain decoding of the target in turn. Parameters are what is held in memory. Perplexity "
        "is that of the model that writes.",
        tables.markdown(tables.table(columns, rows)),
    )
