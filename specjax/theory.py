"""Closed forms of Leviathan et al. 2022 (arXiv 2211.17192): what speculation should bring before it is measured.

`alpha` is the expected acceptance probability of a draft token, taken as independent of the others; `c` the time of one
draft call over that of one target call; K the number of draft tokens per step. `score_cost` extends the paper, whose
target scores K + 1 tokens in the time of one: it is the time of a call that scores K + 1 over that of a call that
scores one.
"""

import math
from collections.abc import Callable


def _check(alpha: float, num_draft_tokens: int) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha} is not a probability.")
    if num_draft_tokens < 0:
        raise ValueError(f"num_draft_tokens={num_draft_tokens} is negative.")


def expected_tokens(alpha: float, num_draft_tokens: int) -> float:
    """Tokens per target call, eq. 1: `(1 - alpha^(K+1)) / (1 - alpha)`.

    >>> round(expected_tokens(0.8, 5), 3)
    3.689
    """
    _check(alpha, num_draft_tokens)
    return sum(alpha**i for i in range(num_draft_tokens + 1))


def walltime_factor(alpha: float, num_draft_tokens: int, c: float, score_cost: float = 1.0) -> float:
    """Speedup over plain decoding, Theorem 3.8: `expected_tokens / (K c + score_cost)`.

    >>> round(walltime_factor(0.75, 7, 0.02), 2)
    3.16
    """
    return expected_tokens(alpha, num_draft_tokens) / (num_draft_tokens * c + score_cost)


def operations_factor(alpha: float, num_draft_tokens: int, c_hat: float) -> float:
    """Growth of arithmetic operations, Theorem 3.11; `c_hat` is c counted in operations.

    >>> round(operations_factor(0.9, 10, 0.0), 2)
    1.6
    """
    return (num_draft_tokens * c_hat + num_draft_tokens + 1) / expected_tokens(alpha, num_draft_tokens)


def pays(alpha: float, c: float) -> bool:
    """Whether some K is faster than plain decoding: alpha > c (Corollary 3.9)."""
    _check(alpha, 0)
    return alpha > c


def guaranteed_factor(alpha: float, c: float) -> float:
    """The speedup that K = 1 gives: `(1 + alpha) / (1 + c)` (Corollary 3.9)."""
    return walltime_factor(alpha, 1, c)


def oracle_tokens(alpha: float) -> float:
    """Tokens per target call with a drafter that knows how many will be accepted: `1 / (1 - alpha)` (§3.5)."""
    _check(alpha, 0)
    return math.inf if alpha == 1.0 else 1.0 / (1.0 - alpha)


def pipelined_factor(p_correct: float, layer: int, num_layers: int) -> float:
    """Speedup of Predictive Pipelined Decoding over plain decoding (arXiv 2307.05908), on chips that are to spare.

    The calls for the next token begin at an intermediate layer of the call before, one for each of its k most probable
    tokens there. Where the token is among them, which happens with probability `p_correct`, the next call is `layer` of
    `num_layers` layers behind, otherwise a whole call; all layers take the same time, and the head none:
    `1 / (1 - p_correct (1 - layer / num_layers))`.

    Args:
      p_correct: how often the token is among the k most probable ones at the layer.
      layer: after how many layers the next calls begin.
      num_layers: of the target.

    >>> round(pipelined_factor(0.5, 20, 40), 3)
    1.333
    """
    _check(p_correct, 0)
    if not 1 <= layer <= num_layers:
        raise ValueError(f"layer={layer}: from 1 to the {num_layers} layers of the target.")
    return 1.0 / (1.0 - p_correct * (1.0 - layer / num_layers))


def best_num_draft_tokens(
    alpha: float, c: float, score_cost: Callable[[int], float] = lambda k: 1.0, max_draft_tokens: int = 64
) -> int:
    """The K in `0 .. max_draft_tokens` with the largest walltime factor, the smallest one in a tie.

    Args:
      alpha: acceptance probability.
      c: time of a draft call over that of a target call.
      score_cost: K -> time of scoring K + 1 tokens over that of scoring one.
      max_draft_tokens: the largest K to try.

    >>> best_num_draft_tokens(0.75, 0.02)
    9
    >>> best_num_draft_tokens(0.1, 0.2)
    0
    """

    def factor(k: int) -> float:
        return walltime_factor(alpha, k, c, 1.0 if k == 0 else score_cost(k))

    return max(range(max_draft_tokens + 1), key=factor)
