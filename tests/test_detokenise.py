"""Text that grows by tokens: the same however the tokens come, whole characters, and nothing of a stop string."""

import itertools

import pytest
from serving_fakes import byte_tokenizer

from specjax.serving.detokenise import Detokeniser

BYTES = byte_tokenizer(None)
TEXT = "naïve — 東京 🗼 end. END here"


def grown(tokens: list[int], size: int, stops: tuple[str, ...] = (), **options) -> list:
    """The gains of a text whose tokens come `size` at a time, until it ends."""
    text, gains = Detokeniser(BYTES, stops, **options), []
    for at in range(0, len(tokens), size):
        part = tokens[at : at + size]
        gains.append(text.add(part, is_last=at + size >= len(tokens)))
        if gains[-1].stop is not None:
            break
    return gains


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_the_text_is_whole_and_its_characters_too(size):
    tokens = BYTES.encode(TEXT)
    assert len(tokens) > len(TEXT)
    gains = grown(tokens, size)
    assert "".join(gain.text for gain in gains) == TEXT
    assert sum(gain.num_tokens for gain in gains) == len(tokens)
    assert not any("\ufffd" in gain.text for gain in gains)
    # What has been counted is what has been shown.
    for count in range(1, len(gains)):
        shown = sum(gain.num_tokens for gain in gains[:count])
        assert BYTES.decode(tokens[:shown]) == "".join(gain.text for gain in gains[:count])


def test_a_text_that_ends_within_a_character_shows_that():
    gains = grown(BYTES.encode("a東")[:-1], 1)
    assert [gain.text for gain in gains] == ["a", "", "\ufffd"]
    assert sum(gain.num_tokens for gain in gains) == 3


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(("stops", "before"), [(("END",), "naïve — 東京 🗼 end. "), (("京 🗼", "xyz"), "naïve — 東")])
def test_nothing_of_a_stop_string_is_shown(size, stops, before):
    gains = grown(BYTES.encode(TEXT), size, stops)
    texts = ["".join(gain.text for gain in gains[:count]) for count in range(1, len(gains) + 1)]
    assert texts[-1] == before
    assert all(before.startswith(text) for text in texts)
    assert gains[-1].stop == stops[0]
    assert sum(gain.num_tokens for gain in gains) == len(BYTES.encode(before))
    included = grown(BYTES.encode(TEXT), size, stops, include_stop=True)
    assert "".join(gain.text for gain in included) == before + stops[0]
    assert sum(gain.num_tokens for gain in included) == len(BYTES.encode(before + stops[0]))


def test_what_may_begin_a_stop_string_is_held_back_only_as_long():
    text = Detokeniser(BYTES, ("###",))
    gains = [text.add(BYTES.encode(part), is_last=False) for part in ("a#", "#b", "##", "c")]
    assert [gain.text for gain in gains] == ["a", "##b", "", "##c"]
    last = text.add(BYTES.encode("##"), is_last=True)
    assert (last.text, last.stop, last.num_tokens) == ("##", None, 2)


def test_the_first_stop_string_counts_and_of_two_there_the_longer():
    for stops in itertools.permutations(("bc", "bcd", "d")):
        (gain,) = grown(BYTES.encode("abcde"), 9, stops, include_stop=True)
        assert (gain.text, gain.stop) == ("abc", "bc") or (gain.text, gain.stop) == ("abcd", "bcd")
        single = grown(BYTES.encode("abcde"), 9, stops)
        assert single[0].text == "a"


def test_without_a_tokenizer_tokens_are_counted():
    text = Detokeniser(None)
    assert text.add([1, 2, 3], is_last=False) == ("", 3, None)
    assert text.add([4], is_last=True) == ("", 1, None)
