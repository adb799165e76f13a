"""Candidates merged into a tree, against dictionaries of prefixes."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.drafters import trie

COUNT, DEPTH, NODES, CASES = 6, 4, 8, 120
Merge = Callable[..., trie.Nodes]


def cases() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidates of few tokens, so that many share prefixes; their lengths; weights that do not rise along them."""
    rng = np.random.default_rng(0)
    chains = rng.integers(0, 3, (CASES, COUNT, DEPTH))
    length = rng.integers(0, DEPTH + 1, (CASES, COUNT))
    weight = rng.choice([1.0, 1.0, 2.0, 0.5], (CASES, COUNT, 1)) * rng.choice([1.0, 0.5], (CASES, 1, 1)) ** range(DEPTH)
    return chains.astype(np.int32), length.astype(np.int32), weight.astype(np.float32)


def prefixes(chains: np.ndarray, length: np.ndarray, weight: np.ndarray) -> dict[tuple[int, ...], float]:
    """The weight of each prefix, in the order in which candidates bring them."""
    found: dict[tuple[int, ...], float] = {}
    for chain, size, own in zip(chains.tolist(), length, weight, strict=True):
        for end in range(1, size + 1):
            found[tuple(chain[:end])] = found.get(tuple(chain[:end]), 0.0) + float(own[end - 1])
    return found


def assert_merged(merge: Merge) -> None:
    """The nodes are the heaviest prefixes, each once, parents first."""
    given = cases()
    nodes = jax.jit(jax.vmap(lambda c, n, w: merge(c, n, w, NODES)))(*map(jnp.asarray, given))
    tokens, parent, weight, number = map(np.asarray, nodes)
    full = 0
    for case in range(CASES):
        wanted = prefixes(*(x[case] for x in given))
        size = int(number[case])
        assert size == min(len(wanted), NODES), f"{size} nodes of {len(wanted)} prefixes"
        assert (parent[case] < np.arange(NODES)).all(), f"a child before its parent: {parent[case]}"
        paths: list[tuple[int, ...]] = []
        for token, above in zip(tokens[case, :size].tolist(), parent[case, :size], strict=True):
            paths.append((*paths[above], token) if above >= 0 else (token,))
        assert len(set(paths)) == size, "a prefix that is two nodes"
        np.testing.assert_allclose(weight[case, :size], [wanted[path] for path in paths])
        # The first of the prefixes ordered by weight, then by depth, then by candidate.
        best = sorted(wanted, key=lambda path: (-wanted[path], len(path)))[:size]
        assert paths == best, "nodes in the wrong order"
        assert (tokens[case, size:] == -1).all()
        assert (parent[case, size:] == -1).all()
        full += size == NODES
    assert full > 20


def test_the_heaviest_prefixes_are_the_nodes_parents_first():
    assert_merged(trie.merge)


def test_fewer_candidates_than_nodes_leave_some_out():
    merge = jax.jit(trie.merge, static_argnums=3)
    nodes = merge(jnp.asarray([[4, 5]]), jnp.asarray([2]), jnp.ones((1, 2)), 5)
    assert nodes.tokens.tolist() == [4, 5, -1, -1, -1]
    assert nodes.parent.tolist() == [-1, 0, -1, -1, -1]
    light = trie.cut(nodes._replace(weight=jnp.asarray([2.0, 1.0, 0.0, 0.0, 0.0])), jnp.asarray(1.5))
    assert light.tokens.tolist() == [4, -1, -1, -1, -1]
    assert int(light.number) == 1


def _deepest_first(chains: Any, length: Any, weight: Any, num_nodes: int) -> trie.Nodes:
    # Without regard to depth, equal weights are ordered by the candidate's end first.
    nodes = trie.merge(chains, length, weight, num_nodes)
    order = jnp.argsort(-jnp.arange(num_nodes) * (jnp.arange(num_nodes) < nodes.number))
    return nodes._replace(
        tokens=nodes.tokens[order], weight=nodes.weight[order], parent=jnp.argsort(order)[nodes.parent]
    )


def _not_shared(patch: pytest.MonkeyPatch) -> Merge:
    module = importlib.import_module("specjax.drafters.trie")
    own = jnp.eye(COUNT, dtype=bool)[..., None]
    sound = trie._shared
    patch.setattr(module, "_shared", lambda chains, proposed: sound(chains, proposed) & own)
    return trie.merge


BUGS: dict[str, tuple[Callable[[pytest.MonkeyPatch], Merge], str]] = {
    "a child of the trie comes before its parent": (lambda _: _deepest_first, "a child before its parent"),
    "prefixes that candidates share are not merged": (_not_shared, "nodes of"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_noticed(bug: str, monkeypatch: pytest.MonkeyPatch, catches: Any):
    plant, match = BUGS[bug]
    merge = plant(monkeypatch)
    with catches(bug, "dictionary of prefixes", match):
        assert_merged(merge)
