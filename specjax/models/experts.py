"""A mixture of experts: a router, and feed-forwards of which each token is sent to a few.

**What is read.** Decoding waits for weights, and a block of a few tokens needs those of a few experts. So one expert's
matrices are sliced out of the stack and multiplied at a time, in a loop over the experts that some token chose. A
gather of all chosen ones would write a copy of them to memory first, and a product with all experts (to which
`jax.lax.ragged_dot` is lowered on CPUs) reads everything: 128 experts where one token needs 8.

**What is computed.** No expert has a capacity, and no token is dropped. Up to `FEW` tokens go through each of those
experts together, each weighted with its own probability or 0, so a row of the product is where it always is: what its
neighbours are changes nothing, to the last bit. More tokens are sorted by expert and multiplied in blocks of one expert
each, which is `chosen / number` of the operations; a token's neighbours then change at most the rounding.

**On a mesh**, every device multiplies its part of each expert, or its own experts (`sharding.EXPERT_PARALLEL`), and one
sum over devices follows the loop: hence the `shard_map`, without which XLA would add up in every round.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from specjax.models import bfloat16, modules
from specjax.models.config import DecoderConfig, Experts
from specjax.models.feed_forward import FeedForward
from specjax.models.modules import parameter
from specjax.parallel import sharding

FEW = {"cpu": 16, "default": 128}
"""The most tokens that all go through each chosen expert, by platform. Accelerators multiply as many in the time in
which they read the weights, or nearly; CPUs do not, and 16 is what `cpu_products` multiplies."""

SMALLEST_BLOCK = 8
"""The fewest rows of a sorted block."""

Run = Callable[[Int[Array, ""], Float[Array, "R D"]], Float[Array, "R D"]]
"""`(number of an expert, rows) -> its outputs`."""


def distinct_experts(experts: Experts, tokens: float) -> float:
    """How many experts of a layer at least one of these tokens is expected to choose.

    As if each token chose any experts with the same probability, whatever the others choose: tokens of one text have
    more in common, so this is more than what is read.
    """
    return experts.number * (1.0 - (1.0 - experts.chosen / experts.number) ** tokens)


def route(
    x: Float[Array, "R D"], router: Float[Array, "D E"], chosen: int, *, renormalise: bool
) -> tuple[Float[Array, "R C"], Int[Array, "R C"]]:
    """The weights of the experts that read each token, and their numbers, by falling probability.

    The probabilities are those of the softmax over all experts, of which the largest are taken (Mixtral, arXiv
    2401.04088, and Qwen3); renormalised, they are a softmax over the chosen ones.

    In float32 whatever the weights are: where two experts are nearly as probable, rounding would choose.
    """
    logits = jnp.dot(x.astype(jnp.float32), router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    weights, numbers = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), chosen)
    return weights / jnp.sum(weights, axis=-1, keepdims=True) if renormalise else weights, numbers


def _loop(rounds: int, used: Int[Array, ""], step: Callable[[Array, Array], Array], out: Array, skips: bool) -> Array:
    """`out = step(i, out)` for i below `used`, which is at most `rounds`; without `skips`, for all rounds.

    The number of rounds is static, so that there are gradients, and GPUs run the loop without asking the host.
    Gradients slice the weights again in place of keeping every slice.
    """

    def body(out: Array, i: Array) -> tuple[Array, None]:
        if not skips:
            return step(i, out), None
        return jax.lax.cond(i < used, step, lambda i, out: out, i, out), None

    return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), out, jnp.arange(rounds))[0]


def _together(run: Run, number: int, skips: bool, x: Array, weights: Array, numbers: Array) -> Array:
    """All rows through each expert that some row chose, in ascending order of the experts."""
    is_chosen = numbers[..., None] == jnp.arange(number)
    # A sum and no product, which TPUs would compute of weights rounded to bfloat16.
    own, is_used = jnp.sum(jnp.where(is_chosen, weights[..., None], 0.0), axis=1), jnp.any(is_chosen, axis=(0, 1))
    used, order = jnp.sum(is_used), jnp.argsort(~is_used, stable=True)

    def step(i: Array, out: Array) -> Array:
        # A round beyond the last expert reads it again, and adds nothing.
        expert = order[jnp.minimum(i, jnp.maximum(used - 1, 0))]
        weight = jnp.where(i < used, own[:, expert], 0.0)[:, None]
        return out + jnp.where(weight > 0, weight * run(expert, x), 0.0)

    return _loop(min(numbers.size, number), used, step, jnp.zeros(x.shape, jnp.float32), skips)


def _sorted(run: Run, number: int, skips: bool, x: Array, weights: Array, numbers: Array) -> Array:
    """Blocks of rows that chose the same expert, for the experts in ascending order.

    A block has as many rows as an expert has on average, so at most twice as many rows are computed as were chosen.
    """
    rows, chosen = numbers.shape
    size = max(SMALLEST_BLOCK, -(-rows * chosen // number))
    flat = numbers.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.sum(flat[:, None] == jnp.arange(number), axis=0, dtype=jnp.int32)
    blocks = -(-counts // size)
    end, last = jnp.cumsum(counts), jnp.cumsum(blocks)

    def step(i: Array, out: Array) -> Array:
        expert = jnp.minimum(jnp.searchsorted(last, i, side="right"), number - 1)
        place = end[expert] - counts[expert] + (i - last[expert] + blocks[expert]) * size + jnp.arange(size)
        is_own = (place < end[expert]) & (i < last[-1])
        choice = order[jnp.minimum(place, flat.size - 1)]
        read = weights.reshape(-1)[choice][:, None] * run(expert, x[choice // chosen])
        return out.at[jnp.where(is_own, choice // chosen, rows)].add(read, mode="drop")

    # An expert's last block may have one row only.
    rounds = (flat.size + number * (size - 1)) // size
    return _loop(rounds, last[-1], step, jnp.zeros(x.shape, jnp.float32), skips)


def mix(run: Run, number: int, x: Array, weights: Array, numbers: Array) -> Float[Array, "R D"]:
    """The sums of the chosen experts' outputs, times their weights.

    Args:
      run: computes one expert.
      number: how many experts there are; a choice of another number adds nothing.
      x: the rows.
      weights: `[R, C]` those of each row's choices.
      numbers: `[R, C]` the experts.
    """

    def form(platform: str, skips: bool) -> Callable[[Array, Array, Array], Array]:
        how = _together if len(x) <= FEW[platform] else _sorted
        return functools.partial(how, run, number, skips)

    # GPUs read the predicate of a branch on the host.
    return jax.lax.platform_dependent(
        x, weights, numbers, cpu=form("cpu", True), cuda=form("default", False), default=form("default", True)
    )


class MixtureOfExperts(nnx.Module):
    """A router over `experts`, one feed-forward whose parameters are those of all experts, stacked."""

    def __init__(self, config: DecoderConfig, rules: sharding.Rules, rngs: nnx.Rngs):
        """Declares the parameters."""
        c = config
        assert c.experts is not None
        self.config, self.rules = c, rules
        # Not split: every device chooses for itself.
        self.router = parameter(rngs, (c.hidden_size, c.experts.number), ("embed", None), c.dtype)
        definition = nnx.split(nnx.eval_shape(lambda: FeedForward(c, nnx.Rngs(0))))[0]
        keys = jax.random.split(rngs.params(), c.experts.number)
        stacked = jax.vmap(lambda key: nnx.state(FeedForward(c, nnx.Rngs(key)), nnx.Param))(keys)
        self.experts = nnx.merge(definition, modules.mark_stacked(stacked, "experts"))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The sum of the chosen experts' outputs for each token."""
        e = self.config.experts
        assert e is not None
        rows = x.reshape(-1, x.shape[-1])
        weights, numbers = route(rows, self.router[...], e.chosen, renormalise=e.renormalise)
        weights, numbers = (choice.reshape(*x.shape[:2], e.chosen) for choice in (weights, numbers))
        definition, params = nnx.split(self.experts)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return _of_all(definition, x, weights, numbers, params)
        return self._on_mesh(mesh, definition, x, weights, numbers, params)

    def _on_mesh(
        self, mesh: Any, definition: Any, x: Array, weights: Array, numbers: Array, params: Any
    ) -> Float[Array, "B T D"]:
        """Each device computes what it holds of the experts, for its own rows; then the devices' parts are added up."""
        table = {name: axis for name, axis in self.rules if axis in mesh.shape and mesh.shape[axis] > 1}
        rows, split = table.get("batch"), [table[name] for name in ("experts", "mlp") if name in table]
        if rows is not None and x.shape[0] % mesh.shape[rows]:
            rows = None
        leaves, treedef = jax.tree.flatten(params)
        names = [variable.get_metadata()["axes"] for _, variable in nnx.to_flat_state(params)]
        manual = {"batch": rows, **{name: table.get(name) for name in ("experts", "mlp")}}
        specs = [PartitionSpec(*(manual.get(name or "") for name in axes)) for axes in names]
        own = table.get("experts")

        def part(x: Array, weights: Array, numbers: Array, *leaves: Array) -> Array:
            if own is not None:
                numbers = numbers - jax.lax.axis_index(own) * leaves[0].shape[0]
                numbers = jnp.where(numbers >= 0, numbers, leaves[0].shape[0])
            found = _of_all(definition, x, weights, numbers, jax.tree.unflatten(treedef, leaves))
            return jax.lax.psum(found, tuple(split)) if split else found

        by_row = PartitionSpec(rows)
        alone = {axis for axis in mesh.shape if mesh.shape[axis] == 1}
        axes = {axis for axis in (rows, *split) if axis is not None} | alone
        return jax.shard_map(
            part, in_specs=(by_row, by_row, by_row, *specs), out_specs=by_row, axis_names=axes, check_vma=False
        )(x, weights, numbers, *leaves)


def _of_all(definition: Any, x: Array, weights: Array, numbers: Array, params: Any) -> Float[Array, "B T D"]:
    """The mixture of the experts of these parameters."""

    def run(expert: Array, rows: Array) -> Array:
        def take(stack: Array) -> Array:
            return bfloat16.moved(
                lambda x, i: jax.lax.dynamic_index_in_dim(x, i, axis=0, keepdims=False), (stack,), expert
            )

        return nnx.merge(definition, jax.tree.map(take, params))(rows[None])[0]

    number = jax.tree.leaves(params)[0].shape[0]
    flat = (array.reshape(-1, array.shape[-1]) for array in (x, weights, numbers))
    return mix(run, number, *flat).reshape(x.shape)
