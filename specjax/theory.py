"""Closed forms of Leviathan et al. 2022 (arXiv 2211.17192): what speculation should bring before it is measured.

For trees, `best_tree` finds the shape with the least time per token (Sequoia, arXiv 2402.12374).

`alpha` is the expected acceptance probability of a draft token, taken as independent of the others; `c` the time of one
draft call over that of one target call; K the number of draft tokens per step. `score_cost` extends the paper, whose
target scores K + 1 tokens in the time of one: it is the time of a call that scores K + 1 over that of a call that
scores one.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


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


def tokens_per_step(acceptances: Sequence[float]) -> float:
    """Tokens per target call of a chain whose draft positions are accepted with these chances.

    Args:
      acceptances: of each position, given that all before it were accepted, as trained heads report them; where all are
        alpha, it is `expected_tokens`.

    Raises:
      ValueError: for a chance that is none.

    >>> round(tokens_per_step([0.8, 0.5, 0.5]), 3)
    2.4
    """
    for chance in acceptances:
        _check(chance, 0)
    return 1.0 + sum(math.prod(acceptances[: k + 1]) for k in range(len(acceptances)))


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


class BestTree(NamedTuple):
    """The tree that `best_tree` found.

    Attributes:
      paths: its nodes as paths of ranks, for `drafters.model(topology=...)`; empty where drafting does not pay.
      expected_tokens: tokens per target call.
      time_per_token: in units of a target call that scores one token.
    """

    paths: tuple[tuple[int, ...], ...]
    expected_tokens: float
    time_per_token: float


def _best_children(chance: Sequence[float], below: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the children of a node add to its expected tokens, and how many nodes each child gets.

    Args:
      chance: of each child, that it is the first to be accepted.
      below: `[M + 1]` the expected tokens from a child on, with at most m nodes, the child included; 0 for m = 0.

    Returns:
      `[B + 1, M + 1]` what the children from rank b on add with at most m nodes, and the nodes of child b (0: there is
      none, and none after it).
    """
    limit = len(below) - 1
    value, share = np.zeros((len(chance) + 1, limit + 1)), np.zeros((len(chance) + 1, limit + 1), int)
    for b in reversed(range(len(chance))):
        for m in range(1, limit + 1):
            # F(m, b) = max over y of P_b E(y, depth - 1) + F(m - y, b + 1).
            given = chance[b] * below[1 : m + 1] + value[b + 1, m - 1 :: -1]
            y = int(np.argmax(given))
            if given[y] > 0:
                value[b, m], share[b, m] = given[y], y + 1
    return value, share


def best_tree(
    acceptance: Sequence[Sequence[float]],
    draft_cost: float,
    score_cost: Callable[[int], float] = lambda tokens: 1.0,
    max_nodes: int = 64,
) -> BestTree:
    """The tree of draft tokens with the least time per token, by Sequoia's dynamic program (arXiv 2402.12374).

    Where the chances fall with the rank, adding the most probable node again and again gives as many tokens for every
    number of nodes (Medusa, arXiv 2401.10774, section 2.3.3); the program does not need that.

    Args:
      acceptance: for each depth from 1 on, by rank, the chance that this child is the first of its siblings to be
        accepted, given that its parent was.
      draft_cost: the time of a draft call, of which there is one for each depth, over that of a target call that scores
        one token.
      score_cost: T -> the time of scoring T tokens, the last committed one included, over that of scoring one.
      max_nodes: the most draft tokens of a tree.

    Raises:
      ValueError: for chances that are none, or a negative number of nodes.

    >>> best_tree([(0.5, 0.2, 0.1)] * 2, draft_cost=0.05, max_nodes=3).paths
    ((0,), (1,), (0, 0))
    """
    for depth, chances in enumerate(acceptance, 1):
        if min(chances, default=0.0) < 0 or sum(chances) > 1 + 1e-6:
            raise ValueError(f"acceptance at depth {depth} is {list(chances)}: chances, which sum to at most 1.")
    if max_nodes < 0:
        raise ValueError(f"max_nodes={max_nodes} is negative.")
    best = BestTree((), 1.0, score_cost(1))
    for deepest in range(1, len(acceptance) + 1):
        below, shares, value = np.minimum(np.arange(max_nodes + 1), 1.0), [], np.zeros((1, max_nodes + 1))
        for chances in reversed(acceptance[:deepest]):
            value, share = _best_children(chances, below)
            shares.append(share)
            below = np.concatenate([[0.0], 1.0 + value[0, :-1]])
        tokens = 1.0 + value[0]
        times = [(deepest * draft_cost + score_cost(m + 1)) / tokens[m] for m in range(1, max_nodes + 1)]
        m = int(np.argmin(times)) + 1 if times else 0
        if m and times[m - 1] < best.time_per_token - 1e-12:
            best = BestTree(_paths_of(shares[::-1], m), float(tokens[m]), float(times[m - 1]))
    return best


def _paths_of(shares: list[np.ndarray], num_nodes: int) -> tuple[tuple[int, ...], ...]:
    """The paths of a tree, from how many nodes each child gets (`_best_children`), by depth."""
    if not shares:
        return ()
    paths, left = [], num_nodes
    for rank in range(len(shares[0])):
        share = int(shares[0][rank, left])
        if not share:
            break
        paths.append((rank,))
        paths += [(rank, *path) for path in _paths_of(shares[1:], share - 1)]
        left -= share
    return tuple(sorted(paths, key=lambda path: (len(path), path)))
