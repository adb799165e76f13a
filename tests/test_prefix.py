"""The prefix cache: what is found, what is kept, and what is dropped."""

import sys

from specjax.serving.prefix import PrefixCache

CHUNK = 4


def prompt(*chunks: int, rest: int = 1) -> list[int]:
    """Chunks of equal tokens, and some more tokens."""
    return [token for chunk in chunks for token in [chunk] * CHUNK] + [99] * rest


def cache(max_bytes: int = 100, **options) -> PrefixCache:
    return PrefixCache(CHUNK, max_bytes, **options)


def keep(found: PrefixCache, *chunks: int, salt: str = "", num_bytes: int = 10) -> None:
    """Keeps a text named after its chunks, as an engine does that has read a prompt so far."""
    found.find(prompt(*chunks), salt)
    found.keep(prompt(*chunks, rest=0), salt, f"text {chunks}", num_bytes)


def test_the_longest_kept_beginning_is_found():
    kept = cache()
    keep(kept, 1, 2)
    assert kept.find(prompt(1, 2, 3), "") == ("text (1, 2)", 8, 0)
    keep(kept, 1, 2, 3, 4)
    assert kept.find(prompt(1, 2, 3, 4, 5), "")[:2] == ("text (1, 2, 3, 4)", 16)
    assert kept.find(prompt(1, 2, 9), "")[:2] == ("text (1, 2)", 8)
    assert kept.find(prompt(7, 2, 3), "")[:2] == (None, 0)
    assert kept.has(prompt(1, 2, rest=0), "")
    assert not kept.has(prompt(1, rest=0), "")


def test_the_last_token_is_always_read():
    kept = cache()
    keep(kept, 1, 2)
    assert kept.find(prompt(1, 2, rest=0), "").length == 0
    keep(kept, 1)
    assert kept.find(prompt(1, 2, rest=0), "").length == 4
    assert kept.find([1], "").length == 0


def test_chunks_are_compared_whole():
    kept = cache()
    kept.find([1, 2, 3, 4, 9], "")
    kept.keep([1, 2, 3, 4], "", "text", 10)
    assert kept.find([1, 2, 3, 4, 8], "").text == "text"
    for other in ([1, 2, 3, 5], [1, 1, 3, 4], [2, 1, 3, 4], [1, 2, 3, 4 + 2**32]):
        assert kept.find([*other, 9], "") == (None, 0, 0)


def test_where_prompts_part_is_told():
    kept = cache()
    assert kept.find(prompt(1, 2, 3), "") == (None, 0, 0)
    assert kept.find(prompt(1, 2, 4), "") == (None, 0, 8)
    keep(kept, 1, 2)
    assert kept.find(prompt(1, 2, 5), "") == ("text (1, 2)", 8, 0)


def test_salts_share_nothing():
    kept = cache()
    keep(kept, 1, 2, salt="a")
    assert kept.find(prompt(1, 2, 3), "b") == (None, 0, 0)
    assert kept.find(prompt(1, 2, 3), "a").length == 8


def test_the_least_recently_used_is_dropped():
    kept = cache(max_bytes=30)
    for chunk in (1, 2, 3):
        keep(kept, chunk)
    kept.find(prompt(1, 9), "")  # Used again: 2 is now the oldest.
    keep(kept, 4)
    assert [kept.has(prompt(chunk, rest=0), "") for chunk in (1, 2, 3, 4)] == [True, False, True, True]
    assert kept.num_bytes == 30
    keep(kept, 5, num_bytes=25)
    assert kept.has(prompt(5, rest=0), "")
    assert kept.num_bytes <= 30
    keep(kept, 6, num_bytes=31)  # Never fits.
    assert not kept.has(prompt(6, rest=0), "")
    assert kept.has(prompt(5, rest=0), "")


def test_without_memory_nothing_is_kept():
    kept = cache(max_bytes=0)
    keep(kept, 1)
    assert kept.find(prompt(1, 2), "") == (None, 0, 0)
    assert kept.num_bytes == kept.num_nodes == 0


def test_chunks_are_forgotten_with_their_texts():
    kept = cache(max_nodes=8)
    for chunk in range(40):
        keep(kept, chunk)
    assert kept.num_nodes <= 8
    assert kept.num_nodes == sum(1 for _ in kept._nodes())
    assert kept.num_bytes == 10 * sum(node.text is not None for node in kept._nodes())
    assert kept.has(prompt(39, rest=0), "")


def test_salts_are_forgotten_too():
    """A client may choose a new one for each request."""
    kept = cache(max_nodes=8)
    for i in range(40):
        kept.find([1], f"short {i}")
        keep(kept, 1, salt=f"long {i}")
    assert kept.num_nodes == sum(1 for _ in kept._nodes()) <= 8
    assert kept.num_bytes == 10 * sum(node.text is not None for node in kept._nodes())
    assert kept.has(prompt(1, rest=0), "long 39")
    assert not kept.has(prompt(1, rest=0), "long 0")


def test_a_node_is_small():
    """Thousands of chunks that nobody asks for again are remembered, for a while."""
    kept = PrefixCache(256, 1)
    kept.find(list(range(1000, 2000)), "salt" * 1000)
    names = [node.key for node in kept._nodes()]
    assert len(names) == 4
    assert max(map(sys.getsizeof, names)) < 100
