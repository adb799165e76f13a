"""The report of a pruning: a table of its rounds."""

from collections.abc import Sequence

from specjax.experiments.reports import tables
from specjax.experiments.results import Row


def line(row: Row) -> str:
    """A finished round."""
    return (
        f"Round {row['round']}: {_shape(row)}, {row['parameters'] / 1e6:.1f}M parameters; alpha "
        f"{row['alpha_pruned']:.3f} after pruning, {row['alpha']:.3f} after distillation; perplexity "
        f"{row['perplexity_pruned']:.2f}, then {row['perplexity']:.2f}"
    )


def _shape(row: Row) -> str:
    layers = " + ".join(f"{number}" for number in row["layers"].values())
    sparse = f", {row['sparsity']:.0%} of weights zero" if row["sparsity"] >= 0.005 else ""
    return f"{layers} layers, {row['heads']} key/value heads, width {row['width']}{sparse}"


def summary(name: str, target: str, rows: Sequence[Row]) -> str:
    """The text of `summary.md`."""
    columns: tables.Columns = (
        ("round", lambda row: row["round"]),
        ("what is left", _shape),
        ("parameters", lambda row: f"{row['parameters'] / 1e6:.1f}M"),
        ("alpha, pruned", lambda row: f"{row['alpha_pruned']:.3f}"),
        ("alpha, distilled", lambda row: f"{row['alpha']:.3f}"),
        ("greedy agreement", lambda row: f"{row['agreement']:.3f}"),
        ("perplexity, pruned", lambda row: f"{row['perplexity_pruned']:.2f}"),
        ("perplexity, distilled", lambda row: f"{row['perplexity']:.2f}"),
        ("steps", lambda row: row["steps"]),
    )
    return tables.page(
        f"# {name}",
        f"{target}, pruned in rounds. Alpha is the acceptance rate of rejection, greedy agreement that at temperature "
        "0, and perplexity e to the cross-entropy, all on the target's own continuations of held-out prompts.",
        tables.markdown(tables.table(columns, rows)),
    )
