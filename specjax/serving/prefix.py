"""The prefix cache: prompts that begin alike are read once.

A trie over chunks of prompts. Its nodes lie at multiples of the chunk length, where every prompt is cut in any case: a
prompt that continues a cached prefix reads the same chunks, in the same shapes, as one that reads all of them, so its
text is the same. A node may hold a text that has been read up to it: the target's cache and the drafter's state
together, so that both always continue at the same length.

Texts are kept at the last edge of each prompt, for conversations that go on, and where prompts part, for those that
share their beginning. The least recently used are dropped beyond a limit of memory.
"""

import array
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


class Match(NamedTuple):
    """What a prompt has in common with earlier ones.

    Attributes:
      text: a text that has been read, or None.
      length: its tokens.
      fork: the length up to which a prompt before had the same tokens, where nothing is kept so far.
    """

    text: Any
    length: int
    fork: int


def _digest(named: bytes) -> bytes:
    """A short name: a chunk takes some kilobytes, a salt what a client likes, and there are many thousand of them."""
    return hashlib.blake2b(named, digest_size=32).digest()


class _Node:
    def __init__(self, parent: "_Node | None", key: bytes):
        self.parent, self.key = parent, key
        self.children: dict[bytes, _Node] = {}
        self.text: Any = None
        self.num_bytes = 0
        self.used = 0


class PrefixCache:
    """Texts that have been read, by their tokens. Not thread-safe: the engine's thread owns it."""

    def __init__(self, chunk: int, max_bytes: int, max_nodes: int = 1 << 16):
        """An empty cache.

        Args:
          chunk: the length of the chunks of prompts.
          max_bytes: the most memory of kept texts; 0 keeps none.
          max_nodes: the most chunks, and salts, that are remembered.
        """
        self._chunk, self.max_bytes, self._max_nodes = chunk, max_bytes, max_nodes
        self._roots: dict[bytes, _Node] = {}
        self._clock = itertools.count(1)
        self.num_bytes = self.num_nodes = 0

    def _chunks(self, tokens: Sequence[int]) -> Iterator[bytes]:
        for begin in range(0, len(tokens), self._chunk):
            yield _digest(array.array("q", tokens[begin : begin + self._chunk]).tobytes())

    def _child(self, siblings: dict[bytes, _Node], parent: _Node | None, key: bytes) -> _Node:
        if key not in siblings:
            siblings[key] = _Node(parent, key)
            self.num_nodes += 1
        return siblings[key]

    def find(self, tokens: Sequence[int], salt: str) -> Match:
        """The longest kept text that a prompt begins with, and remembers the prompt.

        Args:
          tokens: the prompt.
          salt: only prompts of the same salt share anything.
        """
        if not self.max_bytes:
            return Match(None, 0, 0)
        now, node = next(self._clock), self._child(self._roots, None, _digest(salt.encode("utf-8", "surrogatepass")))
        node.used = now
        best, length, fork, depth, is_known = None, 0, 0, 0, True
        # The last token is read in any case.
        for chunk in self._chunks(tokens[: (len(tokens) - 1) // self._chunk * self._chunk]):
            is_known &= chunk in node.children
            node, depth = self._child(node.children, node, chunk), depth + self._chunk
            node.used = now
            if is_known:
                fork = depth
                if node.text is not None:
                    best, length = node.text, depth
        self._drop_nodes()
        return Match(best, length, fork if fork > length else 0)

    def keep(self, tokens: Sequence[int], salt: str, text: Any, num_bytes: int) -> None:
        """Keeps a text that has been read; its length is a multiple of the chunk's.

        Args:
          tokens: its tokens.
          salt: as for `find`.
          text: the text.
          num_bytes: its memory.
        """
        node = self._at(tokens, salt)
        if node is None or node.text is not None or num_bytes > self.max_bytes:
            return
        node.text, node.num_bytes = text, num_bytes
        self.num_bytes += num_bytes
        for old in sorted((n for n in self._nodes() if n.text is not None and n is not node), key=lambda n: n.used):
            if self.num_bytes <= self.max_bytes:
                break
            self._drop_text(old)

    def _at(self, tokens: Sequence[int], salt: str) -> _Node | None:
        node = self._roots.get(_digest(salt.encode("utf-8", "surrogatepass")))
        for chunk in self._chunks(tokens):
            node = None if node is None else node.children.get(chunk)
        return node

    def has(self, tokens: Sequence[int], salt: str) -> bool:
        """Whether a text of these tokens is kept."""
        node = self._at(tokens, salt)
        return node is not None and node.text is not None

    def _nodes(self) -> Iterator[_Node]:
        waiting = list(self._roots.values())
        while waiting:
            node = waiting.pop()
            waiting += node.children.values()
            yield node

    def _drop_text(self, node: _Node) -> None:
        self.num_bytes -= node.num_bytes
        node.text, node.num_bytes = None, 0

    def _drop_nodes(self) -> None:
        """Forgets the leaves that have not been used for longest, a quarter of all at a time."""
        while self.num_nodes > self._max_nodes:
            leaves = sorted((n for n in self._nodes() if not n.children), key=lambda n: n.used)
            for leaf in leaves[: max(self.num_nodes // 4, 1)]:
                self._drop_text(leaf)
                siblings = self._roots if leaf.parent is None else leaf.parent.children
                del siblings[leaf.key]
                self.num_nodes -= 1
