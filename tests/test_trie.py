"""Candidates merged into a tree, against dictionaries of prefixes."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import context_of, greedy_text, random_corpus, random_prompts

from specjax import drafters, testing
from specjax.drafters import contract, trie
from specjax.drafters.table import distribution
from specjax.types import Params, Proposal

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
    "prefixes that candidates share are not merged": (_not_shared, "a prefix that is two nodes|nodes of"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_noticed(bug: str, monkeypatch: pytest.MonkeyPatch, catches: Any):
    plant, match = BUGS[bug]
    merge = plant(monkeypatch)
    with catches(bug, "dictionary of prefixes", match):
        assert_merged(merge)


# The drafters that draft trees of text.

CORPUS = random_corpus(count=60)
STORE = drafters.index_corpus(CORPUS, vocab_size=5)
COUNTS = drafters.count_ngrams(CORPUS, vocab_size=5)


def paths_of(proposal: Proposal, row: int) -> list[tuple[int, ...]]:
    """The texts of the nodes of one row, in their order."""
    assert proposal.parent is not None
    paths: list[tuple[int, ...]] = []
    for node in range(int(proposal.length[row])):
        above = int(proposal.parent[row, node])
        assert -1 <= above < node
        paths.append((*(paths[above] if above >= 0 else ()), int(proposal.tokens[row, node])))
    return paths


def proposed(draft: Any, rows: list[list[int]], k: int) -> Proposal:
    drafter, params, *_ = contract.check(draft)
    state = drafter.init(len(rows), 64)
    context = context_of(rows, k, 8)
    return jax.jit(lambda params: drafter.propose(Params((), params), state, (), context)[0])(params)


def test_a_tree_of_lookups_has_the_copies_behind_several_matches():
    text = [7, 1, 2, 3, 4, 7, 1, 2, 3, 0, 7, 1, 2, 0, 0, 7, 1, 2]
    proposal = proposed(drafters.ngram(num_draft_tokens=7, depth=3), [text, [1, 2, 3, 4]], 7)
    # Behind the most recent "7 1 2" is 0 0 7, behind the others 3 0 7 and 3 4 7, which share their 3.
    assert set(paths_of(proposal, 0)) == {(0,), (0, 0), (0, 0, 7), (3,), (3, 0), (3, 0, 7), (3, 4)}
    assert paths_of(proposal, 1) == []


def test_a_tree_of_retrieved_texts_has_the_most_frequent_continuations():
    rows = random_prompts(40, 5)
    draft = drafters.retrieval(STORE, num_draft_tokens=6, depth=3, min_match=1, max_match=3, num_occurrences=128)
    proposal = proposed(draft, rows, 6)
    full = 0
    for row, text in enumerate(rows):
        found: dict[tuple[int, ...], int] = {}
        for size in range(min(3, len(text)), 0, -1):
            for other in CORPUS:
                for at in range(size, len(other) + 1):
                    if other[at - size : at] == text[len(text) - size :]:
                        for end in range(at + 1, min(at + 3, len(other)) + 1):
                            prefix = tuple(other[at:end])
                            found[prefix] = found.get(prefix, 0) + 1
            if found:
                break
        paths = paths_of(proposal, row)
        assert len(paths) == min(6, len(found))
        counts = [found[path] for path in paths]
        assert counts == sorted(found.values(), reverse=True)[: len(paths)]
        full += len(paths) == 6
    assert full > 20


def test_a_tree_of_a_table_has_its_most_probable_tokens():
    rows = [[1, 2, 0], [4], [3, 3]]
    proposal = proposed(drafters.table(COUNTS, topology=(2, 1)), rows, 4)
    of = jax.jit(distribution, static_argnums=2)
    for row, text in enumerate(rows):

        def best(text: list[int], k: int) -> list[int]:
            last = [-1, -1, *text][-1:-3:-1]
            probs = np.asarray(of(COUNTS.params, jnp.asarray(last), COUNTS.max_successors))
            return np.argsort(-probs, kind="stable")[:k].tolist()

        first = best(text, 2)
        wanted = [(token,) for token in first] + [(token, *best([*text, token], 1)) for token in first]
        assert paths_of(proposal, row) == wanted


TREES = {
    "ngram": lambda: drafters.ngram(num_draft_tokens=6, min_match=1, depth=3),
    "retrieval": lambda: drafters.retrieval(
        drafters.index_corpus(random_corpus(vocab_size=61), vocab_size=61), num_draft_tokens=6, depth=3, min_match=1
    ),
    "table": lambda: drafters.table(
        drafters.count_ngrams(random_corpus(vocab_size=61), vocab_size=61), topology=(3, 2)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TREES)
def test_greedy_text_of_trees_is_plain_decodings(name: str):
    plain, _ = greedy_text(drafters.none(), ())
    draft = contract.check(TREES[name]())
    drafted, accepted = greedy_text(draft, draft.params)
    assert drafted == plain
    assert accepted > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ngram", "retrieval", "table"])
def test_trees_keep_a_drafters_contract(name: str):
    made = {
        "ngram": lambda: drafters.ngram(num_draft_tokens=5, min_match=1, depth=3),
        "retrieval": lambda: drafters.retrieval(STORE, num_draft_tokens=5, depth=3, min_match=1),
        "table": lambda: drafters.table(COUNTS, topology=(2, 1)),
    }[name]()
    testing.check_drafter(made, testing.tabular(0, vocab_size=5))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: drafters.ngram(num_draft_tokens=4, depth=4), "depth=4"),
        (lambda: drafters.ngram(num_draft_tokens=4, depth=2, num_candidates=0), "num_candidates=0"),
        (lambda: drafters.retrieval(STORE, num_draft_tokens=4, depth=0), "depth=0"),
        (lambda: drafters.table(COUNTS, num_draft_tokens=4, topology=(2, 1)), "leave out num_draft_tokens"),
        (lambda: drafters.table(COUNTS, topology=(1, 1)), "is a chain"),
    ],
)
def test_what_makes_no_tree_is_said(make: Callable[[], Any], words: str):
    with pytest.raises(ValueError, match=words):
        make()
