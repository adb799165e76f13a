"""Parallel heads over a tabular target: the hidden state of a token is the token, one-hot, and heads are a table."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import drafters, testing
from specjax.drafters import model_tree, parallel_heads
from specjax.types import Block, Drafter, Model

TARGET, TABLE = testing.tabular(0)


def _tapped(tokens: Any, output: Any) -> Any:
    return output._replace(features=jax.nn.one_hot(tokens, 4)[:, :, None])


def _prefill(params: Any, inputs: Any, cache: Any) -> Any:
    output, cache = TARGET.prefill(params, inputs, cache)
    return _tapped(inputs.tokens, output), cache


def _apply(params: Any, block: Block, cache: Any) -> Any:
    output, cache = TARGET.apply(params, block, cache)
    return _tapped(block.tokens, output), cache


TAPPED: Model = TARGET._replace(prefill=_prefill, apply=_apply, num_layers=1)
"""`TARGET`, with features."""


def _read(params: Any, hidden: Any) -> Any:
    return jnp.einsum("bv,kvw->bkw", hidden, params.draft)


HEADS = parallel_heads.Plan(_read, 3, 4, 1)
"""Three heads, whose logits are those of `HEAD_TABLE` for the token before the last one."""

HEAD_TABLE = jnp.asarray(np.random.default_rng(3).standard_normal((3, 4, 4)), jnp.float32)


def tree(children: Any, topology: Any = (2, 2, 1)) -> Drafter:
    """Heads that draft a tree."""
    shares = children is not drafters.children.most_probable
    return parallel_heads.of_tree(HEADS, model_tree.plan(TAPPED, topology, children, shares_draws=shares))
