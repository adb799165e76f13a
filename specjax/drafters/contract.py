"""A drafter's contract with the loop, checked while the loop is traced: shapes and types, at no cost at run time.

Values (ids within the vocabulary, probabilities that sum to 1, ...) are checked by `specjax.testing.check_drafter`.
"""

import functools
import inspect
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from specjax.types import Context, Draft, Drafter, Feedback, Params, Probes, Proposal, Topology, Tree

REMEDY = "`specjax.types` documents a drafter, and specjax.testing.check_drafter(drafter, target) tests one"


def describe(function: Callable[..., Any]) -> str:
    """Where a function is defined, such as `propose of my_drafter (my_drafter.py, line 12)`."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    parts = getattr(function, "__qualname__", type(function).__name__).split(".<locals>.")
    name = parts[-1] if len(parts) == 1 else f"{parts[-1]} of {parts[-2].split('.')[-1]}"
    code = getattr(function, "__code__", None)
    return name if code is None else f"{name} ({pathlib.Path(code.co_filename).name}, line {code.co_firstlineno})"


def _blame(function: Callable[..., Any], what: str) -> str:
    return f"The drafter is wrong: {describe(function)} {what}; {REMEDY}."


def check_proposal(proposal: Any, drafter: Drafter, batch_size: int, vocab_size: int) -> None:
    """Checks the shapes and types of a proposal; works on traced arrays.

    Args:
      proposal: what `drafter.propose` returned first.
      drafter: the drafter, which errors name.
      batch_size: B.
      vocab_size: V of the target.

    Raises:
      TypeError: for an object that is not a `Proposal`, or arrays of another type.
      ValueError: for arrays of another shape.
    """
    nodes, topology = drafter.num_draft_tokens, drafter.topology
    if not isinstance(proposal, Proposal):
        raise TypeError(_blame(drafter.propose, f"returns {_kind(proposal)} instead of a Proposal"))
    wanted = {
        "tokens": ((batch_size, nodes), "int32", "[B, K]"),
        "length": ((batch_size,), "int32", "[B]"),
        "probs": ((batch_size, nodes, vocab_size), "float32", "[B, K, V]"),
        "parent": ((batch_size, nodes), "int32", "[B, K]"),
        "confidence": ((batch_size, nodes), "float32", "[B, K]"),
    }
    for field, (shape, dtype, axes) in wanted.items():
        value = getattr(proposal, field)
        if field in ("probs", "parent", "confidence") and value is None:
            continue
        if not (hasattr(value, "shape") and hasattr(value, "dtype")):
            raise TypeError(_blame(drafter.propose, f"proposes {field} of {_kind(value)}, which is not an array"))
        if tuple(value.shape) != shape:
            raise ValueError(
                _blame(drafter.propose, f"proposes {field} of shape {list(value.shape)}, not {axes} = {list(shape)}")
            )
        if value.dtype != jnp.dtype(dtype):
            raise TypeError(_blame(drafter.propose, f"proposes {field} of type {value.dtype}, not {dtype}"))

    check_probes(proposal.probes, drafter, batch_size)
    if (proposal.parent is None) != topology.is_chain:
        wrong = "a chain with parents" if topology.is_chain else "a tree without parents"
        raise ValueError(_blame(drafter.propose, f"proposes {wrong}, but its topology is {topology}"))


def check_probes(probes: Any, drafter: Drafter, batch_size: int) -> None:
    """Checks the shapes and types of the probes of a proposal.

    Raises:
      TypeError, ValueError: as `check_proposal` does.
    """
    number, nodes = drafter.topology.num_probes, drafter.num_draft_tokens
    if probes is None and not number:
        return
    if not isinstance(probes, Probes) or not number:
        raise TypeError(
            _blame(drafter.propose, f"proposes {_kind(probes)} as probes, but its topology has num_probes={number}")
        )
    wanted = {
        "tokens": ((batch_size, number), "int32", "[B, M]"),
        "depth": ((batch_size, number), "int32", "[B, M]"),
        "sees": ((batch_size, number, nodes + 1 + number), "bool", "[B, M, N + 1 + M]"),
    }
    for field, (shape, dtype, axes) in wanted.items():
        value = getattr(probes, field)
        if tuple(value.shape) != shape or value.dtype != jnp.dtype(dtype):
            found = f"{value.dtype}{list(value.shape)}"
            raise ValueError(
                _blame(drafter.propose, f"proposes probes whose {field} are {found}, not {axes} = {dtype}{list(shape)}")
            )
    if probes.embeddings is not None and probes.embeddings.ndim != 2:
        wrong = f"proposes probes whose embeddings are {list(probes.embeddings.shape)}, not [X, E]"
        raise ValueError(_blame(drafter.propose, wrong))


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _check_carried(function: Callable[..., Any], before: Tree, after: Tree, name: str) -> None:
    """Checks that what the loop carries keeps its structure, shapes and types."""
    old, new = jax.tree.structure(before), jax.tree.structure(after)
    if old != new:
        raise TypeError(_blame(function, f"changes the structure of the {name} from {old} to {new}"))
    named = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, a), b in named:
        was, became = (f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in (a, b))
        if was != became:
            where = jax.tree_util.keystr(path) or name
            raise TypeError(_blame(function, f"changes {where} of the {name} from {was} to {became}"))


def propose(drafter: Drafter, params: Params, state: Tree, cache: Any, context: Context) -> tuple[Proposal, Tree, Any]:
    """Calls `drafter.propose`, and checks what it returns.

    Raises:
      TypeError, ValueError: naming the drafter, as `check_proposal` does, and for a state that changes its structure.
    """
    found = drafter.propose(params, state, cache, context)
    if not isinstance(found, tuple) or isinstance(found, Proposal) or len(found) != 3:
        raise TypeError(_blame(drafter.propose, f"returns {_kind(found)} instead of (Proposal, state, cache)"))
    proposal, after, cache_after = found
    check_proposal(proposal, drafter, context.max_draft.shape[0], context.vocab_size)
    _check_carried(drafter.propose, state, after, "state")
    _check_carried(drafter.propose, cache, cache_after, "target's cache")
    return proposal, after, cache_after


def update(drafter: Drafter, params: Params, state: Tree, feedback: Feedback) -> Tree:
    """Calls `drafter.update`, and checks the state that it returns.

    Raises:
      TypeError: naming the drafter, where the state changes its structure.
    """
    after = drafter.update(params, state, feedback)
    _check_carried(drafter.update, state, after, "state")
    return after


def check(drafter: Any) -> Draft:
    """What a user gave as a drafter, as a `Draft`.

    Raises:
      TypeError: for an object that is not a drafter, such as `drafters.ngram` without its brackets.
      ValueError: for a topology that is not one.
    """
    given = drafter.drafter if isinstance(drafter, Draft) else drafter
    if not isinstance(given, Drafter):
        from specjax import drafters

        inside = {
            "model": "specjax.load(...)",
            "table": "drafters.load_table(...)",
            "retrieval": "drafters.load_datastore(...)",
            "merged": "[drafters.ngram(), ...]",
            "mask_tokens": "mask_token=...",
            "feature_head": "drafters.load_feature_head(...), target",
            "medusa": "drafters.load_medusa(...), target",
            "blockwise": "drafters.load_blockwise(...), target",
            "eagle": "drafters.load_eagle(...), target",
            "parallel_masks": "specjax.load(...), mask_token=...",
            "pard": "specjax.load(...)",
            "nonautoregressive": "specjax.load(...)",
            "skip": "specjax.load(...), attention=(...)",
            "early_exit": "specjax.load(...), layer",
        }
        for name in ("ngram", "none", "suffix", "aggressive", "jacobi", "lookahead", *inside):
            if drafter is getattr(drafters, name):
                raise TypeError(
                    f"drafter=drafters.{name} is not called: write drafters.{name}({inside.get(name, '')})."
                )
        if callable(drafter):
            raise TypeError(
                f"drafter={describe(drafter)} is a function: call it, and give the Drafter that it returns."
            )
        raise TypeError(
            f"drafter is {_kind(drafter)}: give a Drafter, such as specjax.drafters.ngram(), or None to decode plainly."
        )
    topology = given.topology
    numbers = (topology.num_nodes, topology.depth) if isinstance(topology, Topology) else (topology,)
    if not all(isinstance(k, int) and not isinstance(k, bool) and k >= 0 for k in numbers) or len(numbers) != 2:
        raise ValueError(
            _blame(
                given.propose,
                f"has the topology {topology!r}; give specjax.types.Topology.chain(K), with K of at least 0",
            )
        )
    rising = all(a < b for a, b in itertools.pairwise((0, *topology.lengths, topology.num_nodes)))
    if topology.lengths and not (rising and topology.is_chain and not topology.num_probes):
        raise ValueError(
            f"The drafter has lengths={topology.lengths}: rising numbers of draft tokens below K={topology.num_nodes}, "
            "for chains without probes."
        )
    return drafter if isinstance(drafter, Draft) else Draft(drafter, ())
