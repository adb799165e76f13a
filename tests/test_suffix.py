"""Suffix lookup against a suffix automaton in plain Python, and the votes against counting."""

import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import context_of, greedy_text

from specjax import drafters, testing
from specjax.drafters import contract
from specjax.types import Feedback, Inputs, ModelOutput, Params

LENGTH = 48
suffix_module: Any = importlib.import_module("specjax.drafters.suffix")


class _Node:
    """A state of a suffix automaton: the substrings of one set of end positions, the longest of them this long."""

    def __init__(self, length: int, link: "_Node | None", next_: dict[int, "_Node"]) -> None:
        self.length, self.link, self.next, self.ends = length, link, next_, set()


class Automaton:
    """The suffix automaton of a text, grown token by token (Blumer et al. 1985)."""

    def __init__(self) -> None:
        self.root = _Node(0, None, {})
        self.last = self.root
        self.size = 0

    def extend(self, token: int) -> None:
        new = _Node(self.last.length + 1, self.root, {})
        at: _Node | None = self.last
        while at is not None and token not in at.next:
            at.next[token] = new
            at = at.link
        if at is not None:
            target = at.next[token]
            if target.length != at.length + 1:
                clone = _Node(at.length + 1, target.link, dict(target.next))
                clone.ends = set(target.ends)
                target.link = clone
                while at is not None and at.next.get(token) is target:
                    at.next[token] = clone
                    at = at.link
                target = clone
            new.link = target
        self.last = new
        state: _Node | None = new
        while state is not None:
            state.ends.add(self.size)
            state = state.link
        self.size += 1

    def repeated(self) -> tuple[int, set[int]]:
        """The length of the longest suffix that occurred before, and the places at which it ended."""
        link = self.last.link
        assert link is not None
        return (link.length, link.ends - {self.size - 1}) if link.length else (0, set())


def read(drafter: Any, rows: list[list[int]], params: Any = None, chunk: int = LENGTH) -> Any:
    """The drafter's state after some texts, told in chunks."""
    update = _update(drafter)
    state = drafter.init(len(rows), LENGTH)
    for begin in range(0, max(map(len, rows)), chunk):
        tokens = np.zeros((len(rows), chunk), np.int32)
        count = np.zeros(len(rows), np.int32)
        for row, text in enumerate(rows):
            part = text[begin : begin + chunk]
            tokens[row, : len(part)], count[row] = part, len(part)
        length = np.minimum([len(text) for text in rows], begin + chunk).astype(np.int32)
        nothing = jnp.zeros((len(rows), 1, 0, 1))
        output = ModelOutput(jnp.zeros((len(rows), 1, 1)), nothing)
        fed = Feedback(jnp.asarray(tokens), jnp.asarray(count), jnp.asarray(length), nothing, output)
        state = update(Params((), params), state, fed)
    return state


@functools.cache
def _update(drafter: Any) -> Any:
    return jax.jit(drafter.update)


def proposed(drafter: Any, state: Any, context: Any, params: Any = ()) -> Any:
    return jax.jit(lambda params, state: drafter.propose(params, state, (), context)[0])(Params((), params), state)


def texts(count: int = 24) -> list[list[int]]:
    rng = np.random.default_rng(0)
    found = [rng.integers(0, size, length).tolist() for size in (2, 3, 4) for length in rng.integers(1, 41, count // 3)]
    return [*found, [0, 1, 2, 3, 1] * 6, [2] * 30, [*range(4), 0, *range(4), *range(4), 1, *range(4)]]


def assert_longest_suffixes(drafter: Any) -> None:
    """What a drafter has matched is what a suffix automaton of each text finds."""
    rows = texts()
    matched = np.asarray(read(drafter, rows).matched)
    lengths = []
    for text, found in zip(rows, matched, strict=True):
        automaton = Automaton()
        for token in text:
            automaton.extend(token)
        size, ends = automaton.repeated()
        assert found.max() == size, f"a match of {found.max()} tokens in place of {size} in {text}"
        if size:
            assert set(np.flatnonzero(found == size).tolist()) == ends
        lengths.append(size)
    assert max(lengths) > 8
    assert 0 in lengths


def test_the_longest_repeated_suffix_and_its_places_are_those_of_a_suffix_automaton():
    assert_longest_suffixes(drafters.suffix())


def test_what_was_read_in_pieces_is_what_was_read_at_once():
    rows = texts()
    at_once, in_pieces = read(drafters.suffix(), rows), read(drafters.suffix(), rows, chunk=3)
    jax.tree.map(np.testing.assert_array_equal, at_once, in_pieces)


def test_the_last_token_counted_as_its_own_occurrence_is_noticed(monkeypatch: pytest.MonkeyPatch, catches: Any):
    def advance(past: Any, matched: Any, token: Any, at: Any) -> Any:
        is_read = jnp.arange(past.shape[0]) <= at
        return jnp.where((past == token) & is_read, jnp.roll(matched, 1) + 1, 0)

    monkeypatch.setattr(suffix_module, "advance", advance)
    drafter = drafters.suffix(min_match=3, num_draft_tokens=2)
    with catches("the end of a text votes for what lies behind it", "suffix automaton", "in place of"):
        assert_longest_suffixes(drafter)


class Wanted(NamedTuple):
    """A draft by counting; the share of each token among the occurrences that agree with those before it and go on."""

    tokens: list[int]
    shares: list[float]
    match: int


def counted(text: list[int], k: int, corpus: list[list[int]], max_match: int = 99) -> Wanted:
    """The majority's continuation: plain Python over all occurrences."""
    found: list[tuple[int, list[int]]] = []
    for past in [*corpus, text]:
        own = past is text
        for end in range(len(past) - own):
            size = 0
            while size <= min(end, len(text) - 1) and past[end - size] == text[-1 - size]:
                size += 1
            after = list(past[end + 1 :])
            while own and len(after) < k:  # A copy that reaches the text's end goes on periodically.
                after = after + after[: k - len(after)]
            found.append((size, after[:k]))
    best = max((size for size, _ in found), default=0)
    alive = [after for size, after in found if size >= min(best, max_match)] if best else []
    tokens, shares = [], []
    for i in range(k):
        votes: dict[int, list[int]] = {}
        for place, after in enumerate(alive):
            if len(after) > i:
                votes.setdefault(after[i], []).append(place)
        if not votes:
            break
        # The most votes; of equal ones the most recent occurrence's.
        token = max(votes, key=lambda token: (len(votes[token]), votes[token][-1]))
        tokens.append(token)
        shares.append(len(votes[token]) / sum(map(len, votes.values())))
        alive = [alive[place] for place in votes[token]]
    return Wanted(tokens, shares, best)


CORPUS = [[0, 1, 2, 0, 1, 0], [2, 1, 1, 0, 2], [1]]


@pytest.mark.parametrize(("with_corpus", "max_match", "floor"), [(False, None, 0.0), (True, 2, 0.41)])
def test_drafts_are_the_continuation_of_the_majority(with_corpus: bool, max_match: int | None, floor: float):
    rows = texts()
    made = drafters.suffix(
        num_draft_tokens=5,
        min_match=2,
        max_match=max_match,
        tokens_per_match=1.5,
        min_probability=floor,
        num_occurrences=99,
        corpus=CORPUS if with_corpus else None,
    )
    drafter, params, *_ = contract.check(made)
    state = read(drafter, rows, params)
    proposal = proposed(drafter, state, context_of(rows, 5, 4), params)
    lengths = set()
    for text, tokens, length in zip(rows, np.asarray(proposal.tokens), np.asarray(proposal.length), strict=True):
        wanted = counted(text, 5, CORPUS if with_corpus else [], max_match or 99)
        sure = int((np.cumprod(wanted.shares) >= floor).sum()) if wanted.match >= min(2, len(text)) else 0
        assert length == min(sure, int(np.ceil(1.5 * wanted.match)))
        assert tokens[:length].tolist() == wanted.tokens[:length]
        lengths.add(int(length))
    assert {0, 5} <= lengths
    assert len(lengths) > 2


def test_an_encoder_decoder_drafts_a_copy_of_its_source_from_the_first_token_on():
    drafter = contract.check(drafters.suffix(num_draft_tokens=4, tokens_per_match=9.0)).drafter

    source = jnp.asarray([[5, 6, 7, 8, 9, 5], [3, 1, 0, 0, 0, 0]])
    start = jnp.zeros((2, 1), jnp.int32)
    one = jnp.ones(2, jnp.int32)
    inputs = Inputs(start, one, source, jnp.asarray([6, 2]))
    output = ModelOutput(jnp.zeros((2, 1, 1)), jnp.zeros((2, 1, 0, 1)))
    state = drafter.init(2, 16, 6)
    state = _update(drafter)(Params((), ()), state, Feedback(start, one, one, output.features, output, inputs))
    context = context_of([[0], [0]], 4, 10)
    proposal = proposed(drafter, state, context)
    assert proposal.tokens[0].tolist() == [5, 6, 7, 8]
    assert proposal.length.tolist() == [4, 2]
    assert proposal.tokens[1, :2].tolist() == [3, 1]
    # After 5, 6 the source goes on; what lies behind the source is no token.
    step = Feedback(jnp.asarray([[5, 6], [1, 0]]), jnp.asarray([2, 1]), jnp.asarray([3, 2]), output.features, output)
    proposal = proposed(drafter, _update(drafter)(Params((), ()), state, step), context)
    assert proposal.tokens[0].tolist() == [7, 8, 9, 5]
    assert proposal.length.tolist() == [4, 0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_draft_tokens": -1}, "num_draft_tokens=-1"),
        ({"num_draft_tokens": 4, "depth": 4}, "depth=4"),
        ({"min_match": 3, "max_match": 2}, "min_match=3 and max_match=2"),
        ({"tokens_per_match": 0.0}, "tokens_per_match=0.0"),
        ({"min_probability": 1.5}, "min_probability=1.5"),
        ({"num_occurrences": 0}, "num_occurrences=0"),
        ({"corpus": []}, "0 texts hold no tokens"),
    ],
)
def test_what_makes_no_sense_is_said(options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        drafters.suffix(**options)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [None, 3])
def test_greedy_text_is_plain_decodings(depth: int | None):
    plain, _ = greedy_text(drafters.none(), ())
    drafted, accepted = greedy_text(drafters.suffix(num_draft_tokens=6, min_match=1, depth=depth), ())
    assert drafted == plain
    assert accepted > 5


@pytest.mark.slow
def test_a_corpus_of_the_texts_is_followed():
    plain, _ = greedy_text(drafters.none(), ())
    draft = contract.check(drafters.suffix(corpus=plain))
    drafted, accepted = greedy_text(draft, draft.params)
    assert drafted == plain
    assert accepted > 40


@pytest.mark.slow
@pytest.mark.parametrize("depth", [None, 3])
def test_it_keeps_a_drafters_contract(depth: int | None):
    testing.check_drafter(drafters.suffix(num_draft_tokens=6, min_match=1, depth=depth))
