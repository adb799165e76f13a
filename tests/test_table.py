"""N-gram tables: counted as a dictionary would count, proper distributions, files, and the drafter that uses them."""

import collections
import itertools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import context_of, greedy_text, random_corpus, random_prompts, tokenizer_of, usual
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import specjax
from specjax import decoding, drafters, testing
from specjax.drafters import store
from specjax.drafters.table import Table, Trie, distribution
from specjax.text.tokenizer import Tokenizer
from specjax.types import Params

Counts = dict[tuple[int, ...], dict[int, float]]
"""Contexts, the oldest token first, and the discounted probabilities of their successors."""

ADVANCE: Any = decoding.advance
SMALL = settings(max_examples=150, deadline=None, derandomize=True)
CORPORA = st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=6).filter(lambda texts: any(map(len, texts)))


def _discount(counts: Sequence[int]) -> float:
    once, twice = list(counts).count(1), list(counts).count(2)
    return min(max(once / max(once + 2 * twice, 1), 0.1), 0.9)


def counted(
    corpus: Sequence[Sequence[int]],
    order: int,
    vocab_size: int,
    min_count: int = 1,
    max_successors: int = 99,
    context_tokens: int = 0,
) -> tuple[Counts, list[float], dict[tuple[int, ...], int]]:
    """The table by dictionaries: its lists, its unigrams, and how often each n-gram of two tokens or more was seen."""
    seen: dict[int, dict[tuple[int, ...], collections.Counter[int]]] = {n: {} for n in range(order)}
    for text in corpus:
        for place in range(context_tokens, len(text)):
            for size in range(min(place, order - 1) + 1):
                context = tuple(text[place - size : place])
                seen[size].setdefault(context, collections.Counter())[text[place]] += 1
    first = seen[0][()]
    discount, total = _discount(list(first.values())), sum(first.values())
    known = [max(first[w] - discount, 0) / total for w in range(vocab_size)]
    unigram = [p + (1 - sum(known)) / vocab_size for p in known]
    lists: Counts = {}
    grams = {}
    for size in range(1, order):
        discount = _discount([n for successors in seen[size].values() for n in successors.values()])
        for context, successors in seen[size].items():
            total = sum(successors.values())
            best = sorted((-n, w) for w, n in successors.items() if n >= min_count)[:max_successors]
            if best:
                lists[context] = {w: (-n - discount) / total for n, w in best}
            grams |= {(*context, w): n for w, n in successors.items()}
    return lists, unigram, grams


def expected(lists: Counts, unigram: Sequence[float], context: tuple[int, ...]) -> np.ndarray:
    """The distribution after a context, by the definition."""
    if not context:
        return np.asarray(unigram)
    below = expected(lists, unigram, context[1:])
    listed = lists.get(context, {})
    probs = (1 - sum(listed.values())) * below
    for token, weight in listed.items():
        probs[token] += weight
    return probs


def unpacked(trie: Trie) -> Counts:
    """What a trie holds, by walking through all of it."""
    arrays = Trie(*(np.asarray(x) for x in trie))  # pyright: ignore[reportArgumentType]
    lists: Counts = {}
    reached = 0

    def visit(node: int, context: tuple[int, ...]) -> None:
        nonlocal reached
        reached += 1
        begin, end = arrays.successors[node : node + 2]
        if context:
            lists[context] = {
                int(w): float(p) for w, p in zip(arrays.successor[begin:end], arrays.weight[begin:end], strict=True)
            }
            left = 1 - sum(lists[context].values())
            np.testing.assert_allclose(arrays.backoff[node], left, atol=1e-6)
        children = range(arrays.children[node], arrays.children[node + 1])
        tokens = arrays.token[list(children)].tolist() if children else []
        assert tokens == sorted(set(tokens))
        for child, token in zip(children, tokens, strict=True):
            visit(child, (token, *context))

    visit(0, ())
    assert reached == len(arrays.token), "a context that no walk reaches"
    return lists


def assert_same_lists(found: Counts, wanted: Counts) -> None:
    assert found.keys() == wanted.keys()
    for context, listed in wanted.items():
        # In the same order: the most frequent first.
        assert list(found[context]) == list(listed)
        np.testing.assert_allclose(list(found[context].values()), list(listed.values()), rtol=1e-5)


@SMALL
@given(CORPORA, st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_counts_are_those_of_a_dictionary(corpus, order, min_count, max_successors):
    table = drafters.count_ngrams(corpus, vocab_size=6, order=order, min_count=min_count, max_successors=max_successors)
    lists, unigram, grams = counted(corpus, order, 6, min_count, max_successors)
    assert_same_lists(unpacked(table.params), lists)
    np.testing.assert_allclose(table.params.unigram, unigram, rtol=1e-5)
    assert np.asarray(table.params.unigram).min() > 0, "a token that can never be drafted"
    sizes = collections.Counter(map(len, grams))
    assert table.info["seen"] == [sizes[n] for n in range(2, order + 1)]
    assert sum(table.info["entries"]) + sum(table.info["dropped"].values()) == len(grams)


@SMALL
@given(CORPORA, st.integers(2, 4), st.integers(0, 20), st.integers(1, 5))
def test_pruning_keeps_the_most_frequent_and_of_equals_the_shortest(corpus, order, max_entries, max_successors):
    options = {"vocab_size": 6, "order": order, "max_successors": max_successors}
    table = drafters.count_ngrams(corpus, **options, max_entries=max_entries)
    whole, _, grams = counted(corpus, order, 6, 1, max_successors)
    lists = unpacked(table.params)
    kept = {(*context, w) for context, listed in lists.items() for w in listed}
    candidates = {(*context, w) for context, listed in whole.items() for w in listed}
    assert len(kept) == min(max_entries, len(candidates)) == sum(table.info["entries"])
    assert table.info["dropped"]["max_entries"] == len(candidates) - len(kept)
    assert kept <= candidates

    def worth(gram: tuple[int, ...]) -> tuple[int, int]:
        return grams[gram], -len(gram)

    if kept and kept < candidates:
        assert min(map(worth, kept)) >= max(map(worth, candidates - kept))
    assert_same_lists(lists, {c: {w: whole[c][w] for w in whole[c] if w in lists[c]} for c in lists})


@pytest.mark.parametrize("order", usual([1, 2, 3, 4], 1, 3))
@pytest.mark.parametrize(("min_count", "max_successors"), [(1, 99), (2, 2)])
def test_distributions_back_off_from_the_longest_context(order, min_count, max_successors):
    corpus = random_corpus(count=12)
    table = drafters.count_ngrams(corpus, vocab_size=7, order=order, min_count=min_count, max_successors=max_successors)
    lists, unigram, _ = counted(corpus, order, 7, min_count, max_successors)
    # Tokens 5 and 6 are never seen, 8 is beyond the vocabulary; short texts have fewer tokens.
    contexts = [c for n in range(order) for c in itertools.product((0, 1, 2, 3, 4, 6, 8), repeat=n)]
    last = np.full((len(contexts), order - 1), -1, np.int32)
    for row, context in zip(last, contexts, strict=True):
        row[: len(context)] = context[::-1]
    found = jax.vmap(lambda row: distribution(table.params, row, max_successors))(jnp.asarray(last))
    np.testing.assert_allclose(np.asarray(found).sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found, [expected(lists, unigram, c) for c in contexts], atol=1e-6)
    if order > 2:
        assert any(len(c) == order - 1 for c in lists), "no long context was counted"


def test_texts_are_not_counted_across_their_ends_and_begin_with_what_is_context_alone():
    lists, unigram, _ = counted([[0, 1, 2], [0, 3]], 3, 4, context_tokens=1)
    table = drafters.count_ngrams([[0, 1, 2], [], [0, 3]], vocab_size=4, order=3, context_tokens=1)
    found = unpacked(table.params)
    assert_same_lists(found, lists)
    assert set(found) == {(0,), (1,), (0, 1)}
    np.testing.assert_allclose(table.params.unigram, unigram, rtol=1e-6)
    assert np.argmin(table.params.unigram) == 0


def test_sizes_are_bounded_and_told():
    corpus = random_corpus(vocab_size=50, count=400, longest=40)
    table = drafters.count_ngrams(corpus, vocab_size=50, order=4, max_entries=300, max_successors=8)
    assert table.info["bytes"] == sum(np.asarray(x).nbytes for x in table.params)
    assert table.info["bytes"] <= 24 * 300 + 4 * 50 + 8 * 8 + 64
    assert sum(table.info["entries"]) == 300
    assert table.info["dropped"]["max_entries"] > 0
    assert table.info["contexts"] <= 300


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": 0}, "order=0: at least 1"),
        ({"min_count": 0}, "min_count=0"),
        ({"max_successors": 0}, "max_successors=0"),
        ({"max_entries": -1}, "max_entries=-1"),
        ({"vocab_size": 3}, "Text 1 has token 4, but the vocabulary has 3"),
        ({"texts": [[], []]}, "2 texts hold no tokens"),
        ({"texts": [[1], [2]], "context_tokens": 1}, "context_tokens=1 leaves no token"),
    ],
)
def test_what_cannot_be_counted_is_said(options, words):
    corpus = options.pop("texts", [[1, 2], [2, 1, 4]])
    with pytest.raises(ValueError, match=words):
        drafters.count_ngrams(corpus, **{"vocab_size": 5} | options)


# Files.


LETTERS = tokenizer_of("▁a ▁b ▁c ▁d [unk]")


def counted_table(seed: int = 0, tokenizer: Tokenizer | None = LETTERS) -> Table:
    return drafters.count_ngrams(random_corpus(seed), vocab_size=5, order=3, max_successors=4, tokenizer=tokenizer)


def test_a_table_is_read_as_it_was_saved(tmp_path):
    table = counted_table()
    drafters.save_table(counted_table(1), tmp_path)
    drafters.save_table(table, tmp_path)
    for path in (tmp_path, tmp_path / store.FILE, str(tmp_path)):
        loaded = drafters.load_table(path)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, table.params)
        assert jax.tree.map(lambda x: x.dtype, loaded.params) == jax.tree.map(lambda x: x.dtype, table.params)
        assert loaded[2:] == table[2:]
        assert loaded.tokenizer is not None
        assert loaded.tokenizer.vocab() == LETTERS.vocab()
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_a_table_without_a_tokenizer_takes_one_that_fits(tmp_path):
    drafters.save_table(counted_table(tokenizer=None), tmp_path / "bare")
    assert drafters.load_table(tmp_path / "bare").tokenizer is None
    drafters.save_table(counted_table(), tmp_path / "named")
    (tmp_path / "named" / "tokenizer.json").unlink()
    assert drafters.load_table(tmp_path / "named").tokenizer is None
    assert drafters.load_table(tmp_path / "named", tokenizer=LETTERS).tokenizer is LETTERS
    with pytest.raises(ValueError, match=r"vocabularies do not match.*the tokenizer given"):
        drafters.load_table(tmp_path / "named", tokenizer=tokenizer_of("▁b ▁a ▁c ▁d [unk]"))


def _change(path, change) -> None:
    with store_metadata(path) as content:
        change(content)


class store_metadata:
    """`with store_metadata(file) as content: ...` rewrites the file with what was changed in its metadata."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        header = self.path.read_bytes()
        size = int.from_bytes(header[:8], "little")
        self.content = json.loads(json.loads(header[8 : 8 + size])["__metadata__"]["specjax"])
        return self.content

    def __exit__(self, *_):
        save_file(load_file(self.path), self.path, metadata={"specjax": json.dumps(self.content)})


def _truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 64
    path.write_bytes(bytes(data))


def _other_tokenizer(path) -> None:
    tokenizer_of("▁b ▁a ▁c ▁d [unk]").save(path.parent)


BROKEN = {
    "missing": (lambda path: path.unlink(), "does not exist: make a draft with configs/count.py"),
    "truncated": (_truncate, "is truncated, or no safetensors file"),
    "no header": (lambda path: path.write_bytes(b"12"), "is truncated, or no safetensors file"),
    "damaged": (_flip, "is damaged: array"),
    "other file": (lambda path: save_file({"x": np.zeros(3)}, path), "is not a draft of specjax"),
    "other format": (lambda path: _change(path, lambda c: c.update(format=2)), "is of format 2, this specjax reads 1"),
    "other kind": (
        lambda path: _change(path, lambda c: c.update(kind="retrieval")),
        "of kind 'retrieval', not 'ngram'",
    ),
    "other vocabulary": (_other_tokenizer, "vocabularies do not match"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_named_in_one_line(how, tmp_path):
    drafters.save_table(counted_table(), tmp_path)
    damage, words = BROKEN[how]
    damage(tmp_path / store.FILE)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        drafters.load_table(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


# The drafter.


@pytest.mark.parametrize("order", usual([1, 2, 3], 2))
def test_stated_probabilities_follow_the_drafted_tokens(order):
    corpus = random_corpus()
    table = drafters.count_ngrams(corpus, vocab_size=5, order=order)
    lists, unigram, _ = counted(corpus, order, 5)
    rows = random_prompts(50, 5)
    context = context_of(rows, 3, 5, temperature=1.0)
    proposal = drafters.table(table, num_draft_tokens=3).drafter.propose(Params((), table.params), (), (), context)[0]
    assert np.asarray(proposal.length).tolist() == [3] * 50
    for row, tokens, probs in zip(rows, np.asarray(proposal.tokens), np.asarray(proposal.probs), strict=True):
        for i in range(3):
            text = [*row, *tokens[:i].tolist()]
            wanted = expected(lists, unigram, tuple(text[len(text) - min(order - 1, len(text)) :]))
            np.testing.assert_allclose(probs[i], wanted, atol=1e-5)
    greedy = drafters.table(table, num_draft_tokens=3).drafter.propose(
        Params((), table.params), (), (), context_of(rows, 3, 5)
    )[0]
    assert set(np.asarray(greedy.probs).ravel().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_options_that_read_the_text_see_the_drafts_before_a_place(temperature):
    table = counted_table()
    options = {"temperature": temperature, "no_repeat_ngram_size": 1}
    rows = [[0], [1], [4, 2]] * 10
    drafter = drafters.table(table, num_draft_tokens=3)
    proposal = drafter.drafter.propose(Params((), table.params), (), (), context_of(rows, 3, 5, **options))[0]
    assert np.asarray(proposal.length).tolist() == [3] * 30
    for row, tokens in zip(rows, np.asarray(proposal.tokens).tolist(), strict=True):
        assert len({*row, *tokens}) == len(row) + 3, "a token that the options forbid was drafted"


def test_rows_draft_as_much_as_they_may_and_nothing_is_done_for_none():
    table = counted_table()
    drafter = drafters.table(table, num_draft_tokens=3)
    proposal = drafter.drafter.propose(
        Params((), table.params), (), (), context_of([[1], [2], [3]], 3, 5, max_draft=[0, 2, 3])
    )[0]
    assert np.asarray(proposal.length).tolist() == [0, 2, 3]
    idle = drafter.drafter.propose(Params((), table.params), (), (), context_of([[1], [2]], 3, 5, max_draft=0))[0]
    assert np.asarray(idle.length).tolist() == [0, 0]


@pytest.mark.parametrize("vocab_size", [3, 8])
def test_a_vocabulary_of_another_width_is_cut_or_padded(vocab_size):
    table = counted_table()
    drafter = drafters.table(table, num_draft_tokens=3)
    proposal = drafter.drafter.propose(
        Params((), table.params), (), (), context_of([[1, 2], [4]] * 20, 3, vocab_size, temperature=1.0)
    )[0]
    assert proposal.probs is not None
    assert proposal.probs.shape == (40, 3, vocab_size)
    np.testing.assert_allclose(np.asarray(proposal.probs).sum(axis=-1), 1, atol=1e-5)
    assert not np.asarray(proposal.probs)[..., 5:].any()
    assert np.asarray(proposal.tokens).max() < min(vocab_size, 5)


def test_a_proposal_ends_where_the_options_forbid_every_token():
    table = counted_table()
    drafter = drafters.table(table, num_draft_tokens=3)
    options = {"suppress_tokens": [0, 1, 2, 3, 4], "temperature": [0.0, 1.0]}
    proposal = drafter.drafter.propose(Params((), table.params), (), (), context_of([[1, 2], [4]], 3, 6, **options))[0]
    assert np.asarray(proposal.length).tolist() == [0, 0]
    assert not np.isnan(np.asarray(proposal.probs)).any()


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 4])
def test_greedy_text_is_plain_decodings(order):
    plain, _ = greedy_text(drafters.none(), ())
    table = drafters.count_ngrams(plain, vocab_size=61, order=order)
    drafted, accepted = greedy_text(drafters.table(table), table.params)
    assert drafted == plain
    assert accepted > (0 if order == 1 else 20)


@pytest.mark.slow
def test_another_table_of_the_same_shapes_compiles_nothing():
    plain, _ = greedy_text(drafters.none(), ())
    table = drafters.count_ngrams(plain, vocab_size=61, order=2, max_successors=4)
    other = drafters.count_ngrams([[60 - t for t in text] for text in plain], vocab_size=61, order=2, max_successors=4)
    assert jax.tree.map(jnp.shape, other.params) == jax.tree.map(jnp.shape, table.params)
    first, accepted = greedy_text(drafters.table(table), table.params)
    compiled = ADVANCE._cache_size()
    second, of_other = greedy_text(drafters.table(other), other.params)
    assert ADVANCE._cache_size() == compiled
    assert first == second == plain
    assert accepted != of_other, "the table is closed over"


def test_negative_k_is_refused():
    with pytest.raises(ValueError, match="num_draft_tokens=-1 is negative"):
        drafters.table(counted_table(), num_draft_tokens=-1)


@pytest.mark.slow
def test_through_the_front_door(tmp_path):
    model, params = testing.tiny_decoder(0, vocab_size=5)
    target = specjax.Pretrained(model, params, LETTERS, None)  # pyright: ignore[reportArgumentType]
    drafters.save_table(counted_table(), tmp_path)
    loaded = drafters.load_table(tmp_path)
    prompts = ["a b c", [3, 1]]
    plain = specjax.generate(target, prompts, max_new_tokens=20)
    out = specjax.generate(
        target, prompts, drafter=specjax.drafters.table(loaded, num_draft_tokens=3), max_new_tokens=20, step_cost=0.0
    )
    assert out.tokens == plain.tokens
    assert sum(map(sum, out.from_draft)) > 0
    other = loaded._replace(tokenizer=tokenizer_of("▁b ▁a ▁c ▁d [unk]"))
    with pytest.raises(ValueError, match="The vocabularies do not match"):
        specjax.generate(target, prompts, drafter=specjax.drafters.table(other))
