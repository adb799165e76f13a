"""Trees of draft tokens over enumerable models: drawn in every way, judged, and completed to texts of one length."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax import sampling, testing
from specjax.decoding.verify import Rule
from specjax.types import Proposal, StepKeys

V, DEPTH = 4, 2
PARENTS = (-1, -1, 0, 0, 1, 1)
"""Two nodes, and two below each of them."""
N = len(PARENTS)
LEVELS = ((-1, (0, 1)), (0, (2, 3)), (1, (4, 5)))
"""Each parent with its children, in the order in which they are drawn."""
TEXTS = 40_000
SIGNIFICANCE = 1e-5

Probs = jax.Array
Draw = Callable[[Any, Any, int], tuple[Any, Any]]
"""`(key, q [draft, V], number) -> (tokens, probs)`: children of one node, and what each was drawn from."""


class Models(NamedTuple):
    """The next-token distributions of a target and two drafts, by the tokens before: `[V + 1, V + 1, V]`.

    The tokens of a text of fewer than two are V, at the front.
    """

    target: Probs
    drafts: Probs


@functools.cache
def models(seed: int = 0, by_depth: bool = False) -> Models:
    """Random ones; `by_depth`: the drafts' second token does not depend on the first, as with heads."""
    rng = np.random.default_rng(seed)
    target = rng.dirichlet(np.full(V, 0.7), (V + 1, V + 1))
    drafts = rng.dirichlet(np.full(V, 0.7), (2, V + 1, V + 1))
    if by_depth:
        drafts[:, V, :V] = drafts[:, V, :1]
    return Models(jnp.asarray(target, jnp.float32), jnp.asarray(drafts, jnp.float32))


def exact(target: Probs) -> np.ndarray:
    """`[V, V, V]` the joint distribution of three tokens."""
    table = np.asarray(target, np.float64)
    joint = np.zeros((V,) * 3)
    for a, b, c in itertools.product(range(V), repeat=3):
        joint[a, b, c] = table[V, V, a] * table[V, a, b] * table[a, b, c]
    return joint / joint.sum()


# Kinds of children.


def without_replacement(key: Any, q: Any, number: int) -> tuple[Any, Any]:
    noisy = jnp.log(q[0]) + jax.random.gumbel(key, (V,))
    tokens = jnp.argsort(-noisy)[:number]
    probs = []
    left = q[0]
    for i in range(number):
        probs.append(left / jnp.sum(left))
        left = left.at[tokens[i]].set(0.0)
    return tokens, jnp.stack(probs)


def with_replacement(key: Any, q: Any, number: int) -> tuple[Any, Any]:
    tokens = jax.vmap(lambda key: sampling.categorical(key, q[0]))(jax.random.split(key, number))
    return tokens, jnp.broadcast_to(q[0], (number, V))


def deterministic(key: Any, q: Any, number: int) -> tuple[Any, Any]:
    del key
    tokens = jnp.argsort(-q[0])[:number]
    return tokens, jnp.eye(V)[tokens]


def merged(key: Any, q: Any, number: int) -> tuple[Any, Any]:
    """One child of each draft; they may be equal."""
    return jax.vmap(sampling.categorical)(jax.random.split(key, number), q[:number]), q[:number]


KINDS: dict[str, Draw] = {
    "without replacement": without_replacement,
    "with replacement": with_replacement,
    "deterministic": deterministic,
    "merged": merged,
}


def propose(draw: Draw, given: Models, key: Any, shared: bool = False) -> Proposal:
    """A tree for one row. `shared`: all nodes of a depth are drawn with the same noise."""
    tokens, probs = jnp.zeros(N, jnp.int32), jnp.zeros((N, V))
    for parent, children in LEVELS:
        before = (V, V) if parent < 0 else (V, tokens[parent])
        own = jax.random.fold_in(key, min(parent + 1, 1) if shared else parent + 1)
        drawn, stated = draw(own, given.drafts[:, *before], len(children))
        at = np.asarray(children)
        tokens, probs = tokens.at[at].set(drawn.astype(jnp.int32)), probs.at[at].set(stated)
    return Proposal(tokens, jnp.int32(N), probs, jnp.asarray(PARENTS, jnp.int32))


def target_probs(given: Models, tokens: Any) -> Any:
    """`[N + 1, V]` the target's distributions, after the root and each node."""
    above = [V if parent < 0 else tokens[parent] for parent in PARENTS]
    return jnp.stack([given.target[V, V], *(given.target[a, t] for a, t in zip(above, tokens, strict=True))])


@functools.cache
def _proposals(draw: Draw, shared: bool) -> Any:
    def run(given: Models, keys: Any) -> Proposal:
        return jax.vmap(lambda key: propose(draw, given, key, shared))(keys)

    return jax.jit(run)


@functools.cache
def _texts(rule: Rule) -> Any:
    def one(given: Models, key: Any, proposal: Proposal) -> tuple[Any, Any]:
        """The counts of whole texts, and of accepted tokens."""
        accept, *own = jax.random.split(key, 2 * DEPTH + 3)
        keys = StepKeys(accept, jnp.stack(own[: DEPTH + 1]))
        found = rule(keys, target_probs(given, proposal.tokens), proposal)
        a, b, c = found.tokens
        # What the step does not emit is drawn from the target, as later steps would.
        b = jnp.where(found.num_accepted >= 1, b, sampling.categorical(own[-1], given.target[V, a]))
        c = jnp.where(found.num_accepted >= 2, c, sampling.categorical(own[-2], given.target[a, b]))
        return jnp.stack([a, b, c]), found.num_accepted

    def run(given: Models, keys: Any, proposals: Proposal) -> tuple[Any, Any]:
        texts, accepted = jax.vmap(functools.partial(one, given))(keys, proposals)
        index = texts @ jnp.asarray([V * V, V, 1])
        return jnp.zeros(V**3, jnp.int32).at[index].add(1), jnp.mean(accepted.astype(jnp.float32))

    return jax.jit(run)


def p_value(
    rule: Rule,
    draw: Draw,
    change: Callable[[Proposal], Proposal] = lambda proposal: proposal,
    *,
    shared: bool = False,
    texts: int = TEXTS,
) -> tuple[float, float]:
    """Of the texts that a rule makes of drawn trees, against their exact distribution; and the accepted tokens a step.

    Args:
      rule: the rule.
      draw: how children are drawn.
      change: what a bug makes of the proposals, batched.
      shared: whether all nodes of a depth share one draw, of a draft whose distribution depends on the depth alone.
      texts: how many.
    """
    given, keys = models(0, shared), jax.random.split(jax.random.key(0), (2, texts))
    counts, accepted = _texts(rule)(given, keys[1], change(_proposals(draw, shared)(given, keys[0])))
    return testing.g_test(np.asarray(counts).reshape((V,) * 3), exact(given.target)), float(accepted)


def assert_exact(rule: Rule, draw: Draw, change: Any = lambda proposal: proposal, **options: Any) -> None:
    """The texts have the target's distribution, jointly over all their tokens."""
    p, _ = p_value(rule, draw, change, **options)
    assert p > SIGNIFICANCE, f"{rule.name} on these trees is not distributed as the target: p = {p:.1e}"
