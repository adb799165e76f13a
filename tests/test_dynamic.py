"""Trees whose shape follows the draft's probabilities: which nodes they have, and the text that they give."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import context_of

from specjax import drafters, testing
from specjax.drafters import model_dynamic
from specjax.types import Inputs, Params

DRAFT, TABLE = testing.tabular(1)
PROMPTS = [[0, 1, 2], [3, 1, 3, 1], [2]]
SIZE = drafters.Dynamic(width=3, depth=3, num_nodes=8)


def reference(text: list[int]) -> list[tuple[float, tuple[int, ...]]]:
    """The nodes of EAGLE-2's tree with their log-probabilities, in the order in which they are considered."""
    table = jax.nn.log_softmax(TABLE, axis=-1)

    def expand(score: float, path: tuple[int, ...]) -> list[tuple[float, tuple[int, ...]]]:
        last = ([0, 0, *text, *path])[-2:]
        row = np.asarray(table[last[0] * 4 + last[1]])
        return [(score + float(row[t]), (*path, int(t))) for t in np.argsort(-row, kind="stable")[: SIZE.width]]

    level = expand(0.0, ())
    considered = list(level)
    for _ in range(1, SIZE.depth):
        frontier = sorted(level, key=lambda node: -node[0])[: SIZE.width]
        level = [child for score, path in frontier for child in expand(score, path)]
        considered += level
    best = sorted(range(len(considered)), key=lambda i: -considered[i][0])[: SIZE.num_nodes]
    return [considered[i] for i in sorted(best)]


def test_a_dynamic_tree_has_the_nodes_that_are_most_probable():
    drafter = drafters.model(DRAFT, dynamic=SIZE)
    context = context_of(PROMPTS, SIZE.num_nodes, 4, max_draft=[3, 3, 0], temperature=[1.0, 0.0, 1.0])

    @jax.jit
    def propose(context_tokens: Any, length: Any) -> Any:
        inputs = Inputs(context_tokens, length)
        state = DRAFT.prefill(TABLE, inputs, drafter.init(3, 16))[1]
        return drafter.propose(Params(None, TABLE), state, None, context)[0]

    proposal = propose(context.history.tokens, context.history.length)
    assert proposal.length.tolist() == [8, 8, 0]
    assert proposal.probs is None
    for row in range(2):
        tokens, parent = (np.asarray(x)[row].tolist() for x in (proposal.tokens, proposal.parent))
        paths: list[tuple[int, ...]] = []
        for token, above in zip(tokens, parent, strict=True):
            paths.append((*(paths[above] if above >= 0 else ()), token))
        assert paths == [path for _, path in reference(PROMPTS[row])]


def test_a_parent_is_chosen_before_its_child_where_both_are_as_probable():
    # The draft is sure: every node of the path has log-probability 0, and all others -inf.
    level = [
        model_dynamic._Level(jnp.asarray([[1, -1]]), jnp.asarray([[0.0, -jnp.inf]]), jnp.asarray([[-1, -1]])),
        model_dynamic._Level(
            jnp.asarray([[2, -1, -1, -1]]), jnp.asarray([[0.0] + [-jnp.inf] * 3]), jnp.asarray([[0, 0, 1, 1]])
        ),
    ]
    tokens, parent = model_dynamic.best_nodes(level, 3)
    assert (tokens.tolist(), parent.tolist()) == ([[1, -1, 2]], [[-1, -1, 0]])


@pytest.mark.parametrize(
    ("dynamic", "words"),
    [
        (drafters.Dynamic(0, 2, 3), "width and depth are at least 1"),
        (drafters.Dynamic(2, 2, 2), r"num_nodes lies between depth \+ 1 = 3 and the 6 nodes"),
        (drafters.Dynamic(2, 2, 7), "num_nodes lies between"),
    ],
)
def test_a_dynamic_tree_that_cannot_be_is_refused(dynamic: drafters.Dynamic, words: str):
    with pytest.raises(ValueError, match=words):
        drafters.model(DRAFT, dynamic=dynamic)


def test_a_dynamic_tree_goes_with_no_other_size():
    with pytest.raises(ValueError, match="leave out topology and the sizes of chains"):
        drafters.model(DRAFT, dynamic=SIZE, topology=(2, 2))
