"""Acceptance rules: `(keys, target_probs, proposal) -> Verdict`, for one row; the loop `vmap`s them.

`target_probs` is `[T, V]` with T = N + 1: for a chain, row i is the target's distribution of the token at draft
position i, given the text and the draft tokens before it; for a tree, row i + 1 is that of the token after node i, and
row 0 that of the first token. Target and draft distributions are those that `sampling.probabilities` returns. Where a
paper counts draft tokens from 1, x_i is `proposal.tokens[i - 1]`.

`greedy`, `rejection`, `block`, `traversal` and `coupled` are exact (`exact.py`, and for trees `trees.py`), and so is
`observe`, which only measures. The others (`lossy.py`) give up exactness to accept more; they have `exact=False`, and
are called with a number: `lenient(0.3)`.
"""

from specjax.decoding.verify.exact import block, block_acceptance, coupled, greedy, observe, rejection, traversal
from specjax.decoding.verify.lossy import distance, lenient, top_k, typical
from specjax.decoding.verify.names import RULES, check, parse, replaced_at_zero
from specjax.decoding.verify.rule import Accepts, Judge, Rule, draft_probs, overlap

__all__ = [
    "RULES",
    "Accepts",
    "Judge",
    "Rule",
    "block",
    "block_acceptance",
    "check",
    "coupled",
    "distance",
    "draft_probs",
    "greedy",
    "lenient",
    "observe",
    "overlap",
    "parse",
    "rejection",
    "replaced_at_zero",
    "top_k",
    "traversal",
    "typical",
]
