"""Several drafters in one tree: paths kept once, parts told of their own drafts, text that is plain decoding's."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Pair, greedy_text, random_corpus, random_prompts, right_pad, run, texts, tokenizer_of

from specjax import decoding, drafters, sampling, testing
from specjax.decoding import verify
from specjax.drafters.merged import join, share_nodes, split
from specjax.types import Draft, Drafter, Feedback, ModelOutput, Proposal, Topology

module: Any = importlib.import_module("specjax.drafters.merged")
TARGET = testing.tabular(0)
DRAFT, DRAFT_TABLE = testing.tabular(1)


def random_tree(rng: np.random.Generator, size: int, vocab_size: int, depth: int) -> tuple[list[int], list[int]]:
    """Nodes of at most that depth, parents first; some of them -1, with nothing below."""
    tokens: list[int] = []
    parent: list[int] = []
    level: list[int] = []
    for node in range(size):
        above = [-1, *(i for i in range(node) if level[i] < depth)]
        parent.append(int(rng.choice(above)))
        level.append(1 if parent[-1] < 0 else level[parent[-1]] + 1)
        gone = rng.random() < 0.15 or (parent[-1] >= 0 and tokens[parent[-1]] < 0)
        tokens.append(-1 if gone else int(rng.integers(vocab_size)))
    return tokens, parent


def paths(tokens: Any, parent: Any) -> list[tuple[int, ...] | None]:
    """The text of each node; None where there is no node."""
    found: list[tuple[int, ...] | None] = []
    for token, above in zip(np.asarray(tokens).tolist(), np.asarray(parent).tolist(), strict=True):
        before = found[above] if above >= 0 else ()
        found.append(None if token < 0 or before is None else (*before, token))
    return found


def test_each_path_stays_once_with_all_that_follows_it():
    rng = np.random.default_rng(0)
    merge = jax.jit(lambda t, p: jax.vmap(lambda a, b: share_nodes(a, b, np.zeros(14, bool), 4))(t, p))
    trees = [random_tree(rng, 14, 2, 4) for _ in range(80)]
    tokens, parent, owner = merge(*(jnp.asarray(x, jnp.int32) for x in zip(*trees, strict=True)))
    fewer = 0
    for given, token, above, stands_for in zip(trees, tokens, parent, owner, strict=True):
        kept = paths(token, above)
        assert all(path is None or kept[stands_for[i]] == path for i, path in enumerate(paths(*given)))
        before, after = ([path for path in found if path is not None] for found in (paths(*given), paths(token, above)))
        assert len(after) == len(set(after)), "a path that is two nodes"
        assert set(after) == set(before)
        fewer += len(after) < len(before)
    assert fewer > 40


def two_parts() -> list[Proposal]:
    """A chain and a tree of two rows, which have the beginning of a path in common."""
    chain = Proposal(jnp.asarray([[1, 2, 3], [1, 1, 1]]), jnp.asarray([3, 1]), None)
    tree = Proposal(
        jnp.asarray([[1, 0, 2, 4], [2, 1, 3, -1]]),
        jnp.asarray([4, 4]),
        None,
        jnp.asarray([[-1, -1, 0, 2], [-1, -1, 0, 1]]),
    )
    return [chain, tree]


def assert_joined() -> None:
    proposal = jax.jit(lambda parts: join(parts, 3, 5)[0])(two_parts())
    found = [[path for path in paths(*row) if path] for row in zip(proposal.tokens, proposal.parent, strict=True)]
    assert found[0] == [(1,), (1, 2), (1, 2, 3), (0,), (1, 2, 4)], f"paths {found[0]}"
    assert found[1] == [(1,), (2,), (2, 3)], f"paths {found[1]}"
    assert proposal.length.tolist() == [7, 7]


def test_the_paths_of_all_parts_are_in_one_tree():
    assert_joined()
    nothing = [part._replace(length=jnp.zeros(2, jnp.int32)) for part in two_parts()]
    assert join(nothing, 3, 5)[0].length.tolist() == [0, 0]


def test_parents_that_are_not_shifted_are_noticed(monkeypatch: pytest.MonkeyPatch, catches: Any):
    monkeypatch.setattr(module, "_behind", lambda parent, begin: parent)
    with catches("parents of a merged tree's second part are not shifted", "paths of both parts", "paths"):
        assert_joined()


def test_where_a_part_has_sampled_each_node_has_its_own_distribution():
    chain, tree = two_parts()
    probs = jnp.full((2, 3, 5), 0.2)
    sampled = chain._replace(probs=probs)
    # The sampled part comes first, whatever the order of the parts, and a second one is not merged into it.
    for parts in ([sampled, tree], [tree, sampled], [sampled, tree, sampled]):
        joined = jax.jit(lambda parts: join(parts, 3, 5)[0])(parts)
        assert joined.probs is not None
        count = len(parts) - 1
        np.testing.assert_array_equal(joined.probs[:, : 3 * count], jnp.tile(probs, (1, count, 1)))
        np.testing.assert_array_equal(joined.probs[:, 3 * count :], jax.nn.one_hot(tree.tokens, 5))
        found = paths(joined.tokens[0], joined.parent[0])
        assert found == [(1,), (1, 2), (1, 2, 3)] * count + [None, (0,), None, (1, 2, 4)]


def test_merging_a_deterministic_sibling_into_a_sampled_one_is_exact_and_the_reverse_is_not():
    """By enumeration: siblings that are judged in turn (SpecInfer, Algorithm 2), one sampled, one deterministic."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(4), 2)
    fixed = 1

    def judge(p: np.ndarray, siblings: list[tuple[int, np.ndarray]]) -> np.ndarray:
        """The distribution of the next token."""
        if not siblings:
            return p
        (token, own), *rest = siblings
        accepted = min(1.0, p[token] / own[token])
        left = np.maximum(p - own, 0.0)
        after = judge(left / left.sum() if left.sum() else p, rest)
        return accepted * np.eye(4)[token] + (1 - accepted) * after

    one_hot = np.eye(4)[fixed]

    def mean(siblings: Any) -> np.ndarray:
        return np.sum([q[token] * judge(p, siblings(token)) for token in range(4)], axis=0)

    np.testing.assert_allclose(mean(lambda x: [(x, q), (fixed, one_hot)]), p)
    np.testing.assert_allclose(mean(lambda x: [(x, q)] if x == fixed else [(x, q), (fixed, one_hot)]), p)
    reverse = mean(lambda x: [(fixed, one_hot)] if x == fixed else [(fixed, one_hot), (x, q)])
    assert np.abs(reverse - p).max() > 1e-3


def test_a_part_is_told_of_its_own_draft_and_then_of_the_rest():
    tokens, features = jnp.asarray([[5, 6, 7, 8], [5, 6, 7, 8]]), jnp.arange(8.0).reshape(2, 4, 1, 1)
    output = ModelOutput(jnp.zeros((2, 4, 1)), features)
    whole = Feedback(tokens, jnp.asarray([4, 2]), jnp.asarray([14, 12]), features, output)
    own, rest = split(whole, jnp.asarray([1, 3]))
    assert own.num_tokens.tolist() == [2, 2]
    assert own.length.tolist() == [12, 12]
    assert rest.num_tokens.tolist() == [2, 0]
    assert rest.length.tolist() == [14, 12]
    assert rest.tokens[0, :2].tolist() == [7, 8]
    # Features belong to the token before each committed one.
    assert rest.features[0, :2, 0, 0].tolist() == [2.0, 3.0]


def decode(draft: Draft, rule: Any, temperature: float, stop_tokens: tuple[int, ...] = (3,)) -> Any:
    """16 ragged rows, which may end in a stop token."""
    pair = Pair(*TARGET, draft.drafter, draft.params)
    state = decoding.prefill(
        pair.target,
        pair.drafter,
        pair.params,
        right_pad(random_prompts(16, 4), 16),
        max_new_tokens=[24] * 15 + [1],
        options=sampling.options(16, temperature=temperature),
        stop_tokens=stop_tokens,
        step_cost=0.0,
        max_len=64,
    )
    return run(pair, rule, state)


def assert_cache_is_text() -> None:
    """What a draft model among other parts has in its cache is the text, whatever was accepted of whose draft."""
    lookup = drafters.suffix(num_draft_tokens=6, min_match=1, tokens_per_match=9.0)
    made = drafters.merged([lookup, drafters.model(DRAFT, num_draft_tokens=4)])
    rows = decode(made._replace(params=((), DRAFT_TABLE)), verify.coupled, 1.0).rows
    assert np.asarray(rows.stats.histogram)[:, 2:].sum() > 0, "no draft of two tokens was accepted"
    cache = rows.drafter.parts[1]
    known = np.arange(rows.tokens.shape[1]) < np.asarray(cache.length)[:, None]
    wrong = np.flatnonzero((known & (np.asarray(cache.tokens) != np.asarray(rows.tokens))).any(axis=1))
    assert not len(wrong), f"the cache of row {wrong[0]} is not its text"


@pytest.mark.slow
def test_a_draft_model_keeps_up_with_what_other_parts_had_accepted():
    assert_cache_is_text()


@pytest.mark.slow
def test_a_draft_model_that_takes_all_accepted_tokens_for_its_own_is_noticed(
    monkeypatch: pytest.MonkeyPatch, catches: Any
):
    module._drafter.cache_clear()
    monkeypatch.setattr(module, "_agreed", lambda tokens, parent, committed, depth: jnp.full(tokens.shape[0], 99))
    with catches("a merged model's cache has drafts that were not accepted", "cache is the text", "is not its text"):
        assert_cache_is_text()
    module._drafter.cache_clear()


def sampled_parts() -> Draft:
    corpus = random_corpus(vocab_size=4)
    counts = drafters.count_ngrams(corpus, vocab_size=4)
    parts = [
        drafters.model(DRAFT, num_draft_tokens=2),
        drafters.ngram(num_draft_tokens=3, min_match=1),
        drafters.table(counts, num_draft_tokens=2),
    ]
    made = drafters.merged(parts)
    return made._replace(params=(DRAFT_TABLE, (), counts.params))


@pytest.mark.slow
def test_coupled_text_of_lookups_and_a_tree_is_plain_decodings():
    parts = [drafters.ngram(num_draft_tokens=3, min_match=1), drafters.ngram(num_draft_tokens=5, min_match=1, depth=3)]
    plain = Draft(drafters.none(), ())
    wanted, got = (texts(decode(draft, verify.coupled, 1.0)) for draft in (plain, drafters.merged(parts)))
    assert got == wanted


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_of_sampled_parts_is_plain_decodings(temperature: float):
    rule = verify.coupled if temperature else verify.greedy
    plain = Draft(drafters.none(), ())
    wanted, got = (texts(decode(draft, rule, temperature)) for draft in (plain, sampled_parts()))
    assert got == wanted


@pytest.mark.slow
def test_greedy_text_is_plain_decodings():
    model, params = testing.tiny_decoder(1)
    plain, _ = greedy_text(drafters.none(), ())
    parts = [drafters.suffix(num_draft_tokens=5, min_match=1), drafters.model(model, topology=(2, 1)), drafters.ngram()]
    drafted, accepted = greedy_text(drafters.merged(parts), ((), params, ()))
    assert drafted == plain
    assert accepted > 5


@pytest.mark.slow
def test_it_keeps_a_drafters_contract():
    lookups = [drafters.ngram(num_draft_tokens=3, min_match=1), drafters.suffix(num_draft_tokens=4, depth=2)]
    testing.check_drafter(drafters.merged(lookups))
    made = sampled_parts()
    testing.check_drafter(made, TARGET)


def always_wrong() -> Drafter:
    """A chain of tokens outside the vocabulary, which no rule accepts."""

    def propose(params: Any, state: Any, cache: Any, context: Any) -> Any:
        rows = context.max_draft.shape[0]
        return Proposal(jnp.full((rows, 3), 99, jnp.int32), jnp.minimum(context.max_draft, 3), None), state, cache

    nothing: Any = lambda *_: ()  # noqa: E731
    return Drafter(nothing, propose, lambda params, state, feedback: state, Topology.chain(3))


SELF_DRAFTERS = {
    "jacobi": lambda: drafters.jacobi(num_draft_tokens=3),
    "lookahead": lambda: drafters.lookahead(window=3, ngram=3, guesses=3, num_buckets=4),
    "mask_tokens": lambda: drafters.mask_tokens(mask_token=1, num_draft_tokens=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", SELF_DRAFTERS)
def test_a_part_that_reads_the_output_drafts_as_it_would_alone(name: str, temperature: float):
    """It is given the outputs of its own nodes and probes: beside a part that is always wrong, and beside itself.

    Nothing stops here: what a guess says after a stop token is read by a chain, and left out of a tree.
    """
    rule, drafter = verify.coupled if temperature else verify.greedy, SELF_DRAFTERS[name]()
    alone = decode(Draft(drafter, ()), rule, temperature, ())
    assert np.asarray(alone.rows.stats.accepted).sum() > 0
    for parts in ([always_wrong(), drafter], [drafter, drafter]):
        merged = decode(drafters.merged(parts), rule, temperature, ())
        assert texts(merged) == texts(alone)
        np.testing.assert_array_equal(merged.rows.stats.target_calls, alone.rows.stats.target_calls)


def other_vocabulary() -> list[Any]:
    corpora = [drafters.count_ngrams([[0, 1]], vocab_size=3, tokenizer=tokenizer_of(w)) for w in ("a b c", "b a c")]
    return [drafters.table(table) for table in corpora]


@pytest.mark.parametrize(
    ("parts", "error", "words"),
    [
        (list, ValueError, "none of them drafts"),
        (lambda: [drafters.none()], ValueError, "none of them drafts"),
        (lambda: [drafters.none(), drafters.ngram()], ValueError, "only one of them"),
        (lambda: [drafters.ngram, drafters.ngram()], TypeError, "drafters.ngram is not called"),
        (lambda: [drafters.ngram(num_draft_tokens=600)] * 2, ValueError, "num_draft_tokens=1200"),
        (other_vocabulary, ValueError, "vocabularies do not match"),
    ],
)
def test_parts_that_make_no_sense_are_said(parts: Any, error: Any, words: str):
    with pytest.raises(error, match=words):
        drafters.merged(parts())
