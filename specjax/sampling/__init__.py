"""From logits to distributions to tokens: processors, warpers, grammars."""

from specjax.sampling import warp
from specjax.sampling.warp import (
    argmax,
    categorical,
    greedy,
    match_vocab,
    options,
    probabilities,
    sample,
    threshold,
    uniform,
)

__all__ = [
    "argmax",
    "categorical",
    "greedy",
    "match_vocab",
    "options",
    "probabilities",
    "sample",
    "threshold",
    "uniform",
    "warp",
]
