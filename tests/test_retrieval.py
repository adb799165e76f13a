"""Retrieval: the suffix array and every lookup against brute force, files, and the drafter that uses them."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import context_of, greedy_text, random_corpus, random_prompts, tokenizer_of, usual
from hypothesis import given, settings
from hypothesis import strategies as st

import specjax
from specjax import decoding, drafters, testing
from specjax.drafters import store
from specjax.drafters.retrieval import Datastore, histogram, lookup, occurrences, spaced, suffix_array
from specjax.types import Params

ADVANCE: Any = decoding.advance
LETTERS = tokenizer_of("▁a ▁b ▁c ▁d [unk]")
SMALL = settings(max_examples=150, deadline=None, derandomize=True)


@SMALL
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=40), st.integers(1, 9))
def test_the_suffix_array_is_that_of_sorting(tokens, depth):
    reach = 1
    while reach < depth:
        reach *= 2
    # What lies beyond the end ranks below the -1 that parts texts.
    wanted = sorted(range(len(tokens)), key=lambda i: ((tokens[i:] + [-2] * reach)[:reach], i))
    assert suffix_array(np.asarray(tokens, np.int32), depth).tolist() == wanted


def test_texts_are_kept_apart():
    datastore = drafters.index_corpus([[0, 1], [], [1, 0, 1]], vocab_size=2, depth=4)
    assert np.asarray(datastore.params.tokens).tolist() == [0, 1, -1, -1, 1, 0, 1, -1]
    # "0 1", "0 1", then "1", "1", "1 0 1"; of equals that at the very end.
    assert np.asarray(datastore.params.suffixes).tolist() == [5, 0, 6, 1, 4]
    assert datastore.info["texts"] == 3
    assert datastore.info["tokens"] == 5


def matches_of(corpus: Sequence[Sequence[int]], text: Sequence[int], min_match: int, max_match: int) -> tuple[int, set]:
    """The longest match of a text's end, and the texts and places right behind where it stands."""
    for size in range(min(max_match, len(text)), min_match - 1, -1):
        end = list(text[len(text) - size :])
        found = {
            (i, at + size)
            for i, other in enumerate(corpus)
            for at in range(len(other) - size + 1)
            if list(other[at : at + size]) == end
        }
        if found:
            return size, found
    return 0, set()


def places(corpus: Sequence[Sequence[int]]) -> dict[int, tuple[int, int]]:
    """Which text, and where in it, each place of the datastore is; its end among them."""
    flat = [(i, j) for i, text in enumerate(corpus) for j in range(len(text) + 1)]
    return dict(enumerate(flat))


# Of one size, so that one program serves all examples.
def cut(tokens: Sequence[int], ends: Sequence[int]) -> list[list[int]]:
    bounds = [0, *sorted(ends), len(tokens)]
    return [list(tokens[a:b]) for a, b in itertools.pairwise(bounds)]


FIXED = st.tuples(
    st.lists(st.integers(0, 2), min_size=40, max_size=40),
    st.lists(st.integers(0, 40), min_size=3, max_size=3),
).map(lambda drawn: cut(*drawn))


@functools.partial(jax.jit, static_argnames=("min_match", "num_occurrences"))
def found(index: Any, last: Any, min_match: int, num_occurrences: int) -> Any:
    matches = lookup(index, last, min_match)
    return matches, occurrences(index, matches, num_occurrences)


@SMALL
@given(FIXED, st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(1, 3))
def test_the_longest_match_is_found_everywhere_it_stands(corpus, text, min_match):
    index = drafters.index_corpus(corpus, vocab_size=3, depth=4).params
    last = np.full(4, -1, np.int32)
    last[: min(len(text), 4)] = text[::-1][:4]
    matches, (at, there) = found(index, last, min_match, 64)
    size, wanted = matches_of(corpus, text, min_match, 4)
    assert int(matches.size) == size
    assert {places(corpus)[int(place)] for place in np.asarray(at)[np.asarray(there)]} == wanted
    assert int(np.asarray(there).sum()) == len(wanted)


@pytest.mark.parametrize("num_occurrences", [1, 3, 7, 12])
def test_of_many_occurrences_some_at_even_distances_are_taken(num_occurrences):
    datastore = drafters.index_corpus([[0, 1 + n % 4] for n in range(12)], vocab_size=5)
    matches, (at, there) = found(datastore.params, np.asarray([0, -1], np.int32), 1, num_occurrences)
    assert int(matches.number) == 12
    assert np.asarray(there).all()
    ranks = [np.asarray(datastore.params.suffixes).tolist().index(place - 1) for place in np.asarray(at)]
    assert ranks == [n * 12 // num_occurrences for n in range(num_occurrences)]
    # They are ordered by what follows, so that its proportions are kept.
    tokens = np.asarray(datastore.params.tokens)[np.asarray(at)].tolist()
    assert tokens == sorted(tokens)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000, 2**31 - 2])
def test_distances_are_even_for_any_count(count):
    assert spaced(jnp.asarray(count, jnp.int32), 64).tolist() == [n * count // 64 for n in range(64)]


def stated(corpus, text, drafted, *, min_match, max_match, vocab_size) -> list[np.ndarray]:
    """The distribution of every place of a draft, by counting; up to the first place where nothing goes on."""
    _, alive = matches_of(corpus, text, min_match, max_match)
    probs = []
    for token in drafted:
        goes_on = [corpus[i][j] for i, j in alive if j < len(corpus[i])]
        if not goes_on:
            break
        probs.append(np.bincount(goes_on, minlength=vocab_size) / len(goes_on))
        alive = {(i, j + 1) for i, j in alive if j < len(corpus[i]) and corpus[i][j] == token}
    return probs


@pytest.mark.parametrize("temperature", usual([0.0, 1.0], 1.0))
@pytest.mark.parametrize("min_match", usual([1, 2, 3], 2))
def test_stated_probabilities_follow_the_drafted_tokens(min_match, temperature):
    corpus = random_corpus(count=60)
    datastore = drafters.index_corpus(corpus, vocab_size=5)
    rows = random_prompts(200, 5)
    drafter = drafters.retrieval(datastore, num_draft_tokens=4, min_match=min_match, max_match=4, num_occurrences=512)
    proposal = drafter.drafter.propose(
        Params((), datastore.params), (), (), context_of(rows, 4, 5, temperature=temperature)
    )[0]
    lengths = []
    for row, tokens, probs, length in zip(
        rows, *(np.asarray(x) for x in (proposal.tokens, proposal.probs)), np.asarray(proposal.length), strict=True
    ):
        wanted = stated(corpus, row, tokens.tolist(), min_match=min_match, max_match=4, vocab_size=5)
        assert length == len(wanted)
        lengths.append(length)
        for i, own in enumerate(wanted):
            own = own if temperature else np.eye(5)[own.argmax()]
            np.testing.assert_allclose(probs[i], own, atol=1e-6)
            assert probs[i, tokens[i]] > 0
        assert not np.isnan(probs).any()
    # Some found nothing, some came to the end of a text, some drafted as much as they could.
    assert set(lengths) >= ({1, 4} if min_match == 1 else {0, 1, 4})


@pytest.mark.slow
def test_a_row_drafts_only_as_much_as_it_may():
    datastore = drafters.index_corpus([[0, 1, 2, 3, 4]] * 3, vocab_size=5)
    drafter = drafters.retrieval(datastore, num_draft_tokens=3, min_match=1)
    rows = [[0], [0], [0], [3], [4], [4, 4, 2, 2], [1, 3]]
    proposal = drafter.drafter.propose(
        Params((), datastore.params), (), (), context_of(rows, 3, 5, max_draft=[0, 2, 3, 3, 3, 3, 3])
    )[0]
    assert np.asarray(proposal.length).tolist() == [0, 2, 3, 1, 0, 2, 1]
    assert np.asarray(proposal.tokens)[2].tolist() == [1, 2, 3]
    strict = drafters.retrieval(datastore, num_draft_tokens=3, min_match=2)
    proposal = strict.drafter.propose(Params((), datastore.params), (), (), context_of(rows, 3, 5))[0]
    assert np.asarray(proposal.length).tolist() == [0] * 7


def test_tokens_beyond_the_targets_vocabulary_are_not_drafted():
    datastore = drafters.index_corpus([[0, 1, 4], [0, 1, 2, 4]], vocab_size=5)
    drafter = drafters.retrieval(datastore, num_draft_tokens=2, min_match=2)
    proposal = drafter.drafter.propose(Params((), datastore.params), (), (), context_of([[0, 1]], 2, 4))[0]
    assert np.asarray(proposal.tokens)[0, 0] == 2
    assert np.asarray(proposal.length).tolist() == [1]


def test_a_histogram_counts_those_alive_that_go_on():
    index = drafters.index_corpus([[0, 1], [0, 2]], vocab_size=3).params
    count = histogram(index, jnp.asarray([1, 2, 4, 5, 99]), jnp.asarray([True, True, True, True, True]), 3)
    assert np.asarray(count).tolist() == [0, 1, 1]
    count = histogram(index, jnp.asarray([1, 4]), jnp.asarray([False, True]), 3)
    assert np.asarray(count).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: drafters.index_corpus([[1]], vocab_size=2, depth=0), "depth=0"),
        (lambda: drafters.index_corpus([], vocab_size=2), "0 texts hold no tokens"),
        (lambda: drafters.index_corpus([[1], [2]], vocab_size=2), "Text 1 has token 2"),
        (lambda: drafters.index_corpus([[1, 1, 1]], vocab_size=2, max_tokens=3), "less than the first text's 3 tokens"),
        (lambda: drafters.retrieval(small(), num_draft_tokens=-1), "num_draft_tokens=-1"),
        (lambda: drafters.retrieval(small(), min_match=3, max_match=2), "min_match=3 and max_match=2"),
        (lambda: drafters.retrieval(small(), max_match=17), "max_match=17 is more than the datastore's depth of 16"),
        (lambda: drafters.retrieval(small(), num_occurrences=0), "num_occurrences=0"),
    ],
)
def test_what_makes_no_sense_is_said(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_texts_beyond_the_bound_are_left_out():
    datastore = drafters.index_corpus([[0, 1], [1, 1, 1], [0]], vocab_size=2, max_tokens=8)
    assert datastore.info["texts"] == 2
    assert datastore.info["dropped"] == {"max_tokens": 1}
    assert datastore.info["bytes"] == 4 * (7 + 5)


def small(tokenizer=LETTERS) -> Datastore:
    return drafters.index_corpus(random_corpus(), vocab_size=5, tokenizer=tokenizer)


def test_a_datastore_is_read_as_it_was_saved(tmp_path):
    datastore = small()
    drafters.save_datastore(datastore, tmp_path)
    loaded = drafters.load_datastore(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, datastore.params)
    assert loaded[2:] == datastore[2:]
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.vocab() == LETTERS.vocab()
    with pytest.raises(ValueError, match="of kind 'retrieval', not 'ngram'"):
        drafters.load_table(tmp_path)
    with pytest.raises(ValueError, match="vocabularies do not match"):
        drafters.load_datastore(tmp_path, tokenizer=tokenizer_of("▁b ▁a ▁c ▁d [unk]"))
    path = tmp_path / store.FILE
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is truncated"):
        drafters.load_datastore(path)
    drafters.save_table(drafters.count_ngrams([[1, 2]], vocab_size=5), tmp_path)
    with pytest.raises(ValueError, match="of kind 'ngram', not 'retrieval'"):
        drafters.load_datastore(tmp_path)


@pytest.mark.slow
def test_greedy_text_is_plain_decodings():
    plain, _ = greedy_text(drafters.none(), ())
    noise = random_corpus(vocab_size=61)
    datastore = drafters.index_corpus([*noise, *plain], vocab_size=61)
    drafted, accepted = greedy_text(drafters.retrieval(datastore), datastore.params)
    assert drafted == plain
    assert accepted > 40


@pytest.mark.slow
def test_another_datastore_of_the_same_shapes_compiles_nothing():
    plain, _ = greedy_text(drafters.none(), ())
    datastore = drafters.index_corpus(plain, vocab_size=61)
    other = drafters.index_corpus([[60 - t for t in text] for text in plain], vocab_size=61)
    first, accepted = greedy_text(drafters.retrieval(datastore), datastore.params)
    compiled = ADVANCE._cache_size()
    second, of_other = greedy_text(drafters.retrieval(other), other.params)
    assert ADVANCE._cache_size() == compiled
    assert first == second == plain
    assert accepted > of_other, "the datastore is closed over"


@pytest.mark.slow
def test_through_the_front_door():
    model, params = testing.tiny_decoder(0, vocab_size=5)
    target = specjax.Pretrained(model, params, LETTERS, None)  # pyright: ignore[reportArgumentType]
    prompts = ["a b c", [3, 1]]
    plain = specjax.generate(target, prompts, max_new_tokens=20)
    drafter = specjax.drafters.retrieval(small(), num_draft_tokens=3)
    out = specjax.generate(target, prompts, drafter=drafter, max_new_tokens=20, step_cost=0.0)
    assert out.tokens == plain.tokens
    assert sum(map(sum, out.from_draft)) > 0
