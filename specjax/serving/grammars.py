"""The grammars of all running requests in one table of a fixed size, so that a new one compiles nothing."""

from typing import Any

import numpy as np

from specjax.sampling import automaton
from specjax.types import Automaton


class GrammarTable:
    """Grammars by where their states begin in one table. Each keeps its place until no request uses it any more."""

    def __init__(self, vocab_size: int, num_states: int, num_classes: int):
        """An empty table.

        Args:
          vocab_size: V of the target.
          num_states: the states of all grammars together.
          num_classes: the classes of tokens that all grammars together distinguish.
        """
        self._shape, self._vocab_size = (num_states, num_classes), vocab_size
        self._places: dict[int, tuple[int, Automaton, int]] = {}  # By id: where it begins, itself, its users.

    def check(self, grammar: Automaton) -> None:
        """Checks that a grammar fits, at least alone.

        Raises:
          ValueError: for one that does not, or that was made for another vocabulary.
        """
        if grammar.token_class.shape[0] != self._vocab_size:
            raise ValueError(
                f"The grammar knows {grammar.token_class.shape[0]} tokens, but the target's vocabulary has "
                f"{self._vocab_size}: build it with vocab_size={self._vocab_size}."
            )
        states, classes = grammar.next_state.shape
        if states > self._shape[0] or classes > self._shape[1]:
            raise ValueError(
                f"The grammar has {states} states and {classes} classes of tokens; this engine has room for "
                f"{self._shape[0]} and {self._shape[1]}: simplify it, or give the engine a larger grammar_states or "
                "grammar_classes."
            )

    def has(self, grammar: Automaton) -> bool:
        """Whether some request uses it already."""
        return id(grammar) in self._places

    def add(self, grammar: Automaton) -> int | None:
        """Takes a grammar in: the state in which it begins, or None while there is no room for it."""
        if self.has(grammar):
            begin, same, users = self._places[id(grammar)]
            self._places[id(grammar)] = begin, same, users + 1
            return begin
        states, end = grammar.next_state.shape[0], 0
        for begin, other, _ in sorted(self._places.values(), key=lambda place: place[0]):
            if begin - end >= states:
                break
            end = begin + other.next_state.shape[0]
        if end + states > self._shape[0]:
            return None
        self._places[id(grammar)] = end, grammar, 1
        if self._classes().max() >= self._shape[1]:
            del self._places[id(grammar)]
            return None
        return end

    def remove(self, grammar: Automaton) -> None:
        """A request that used it has ended."""
        begin, same, users = self._places.pop(id(grammar))
        if users > 1:
            self._places[id(grammar)] = begin, same, users - 1

    def _classes(self) -> Any:
        """`[V]` the class of each token, such that each grammar treats the tokens of a class alike."""
        joint = np.zeros(self._vocab_size, np.int64)
        for _, grammar, _ in self._places.values():
            # Renumbered each time, so that the product of the class counts does not overflow.
            joint = joint * grammar.next_state.shape[1] + np.asarray(grammar.token_class)
            joint = np.unique(joint, return_inverse=True)[1]
        return joint

    def table(self) -> Automaton:
        """All grammars in one table, in host memory."""
        classes = self._classes()
        _, example = np.unique(classes, return_index=True)
        next_state: Any = np.full(self._shape, automaton.DEAD, np.int32)
        for begin, grammar, _ in self._places.values():
            own = np.asarray(grammar.next_state)
            own = np.where(own < 0, automaton.DEAD, own + begin)[:, np.asarray(grammar.token_class)[example]]
            next_state[begin : begin + len(own), : len(example)] = own
        return Automaton(classes.astype(np.int32), next_state)
