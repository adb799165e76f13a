"""How a decoder attends to its cache: by XLA's products, or by a kernel that reads what each row has.

XLA's products (`Einsum`) read the whole buffer; the kernel of `attention_kernel` reads the blocks of entries that the
queries of a row attend to. It pays where a call reads much of the cache beside the parameters: `choose` decides by
their bytes, which are known from shapes, so that a program holds one of the two. CPUs, and GPUs that are not CUDA's,
make XLA's products in both.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from specjax.models import attention
from specjax.models import cache as cache_lib
from specjax.parallel import sharding

LEAST_SHARE = 0.1
"""The cache's share of the bytes that a call reads from which on the kernel is chosen."""

MAX_TOKENS = 32
"""The most tokens of a block that the kernel takes: what each of them sees is one integer."""

EVERY = 2**31 - 1
"""The window of layers without one, where others have one."""


class Seen(NamedTuple):
    """Which entries of a cache the tokens of a block attend to, as a mask and as what the mask is made of.

    Attributes:
      mask: `[B, T, S]`, the window included.
      length: `[B]` the number of committed entries. None, as for all below: only `Einsum` attends.
      bits: `[B, T]` bit j of a token: it sees the entry `length + j`.
      positions: `[B, T]` the positions of the tokens.
      window: a token sees an entry only if it is fewer positions before it; None where no layer has a window.
    """

    mask: Bool[Array, "#B T S"]
    length: Int[Array, " B"] | None = None
    bits: UInt32[Array, "B T"] | None = None
    positions: Int[Array, "B T"] | None = None
    window: Int[Array, ""] | None = None


@runtime_checkable
class Attend(Protocol):
    """Attends to a cache: the sums of its values, `[B, T, H, G, E]` in float32. Static: equal ones share programs."""

    def __call__(
        self,
        query: Float[Array, "B T H G E"],
        keys: Float[Array, "B *L H S E"],
        values: Float[Array, "B *L H S E"],
        seen: Seen,
        layer: Int[Array, ""] | None,
        *,
        cap: float | None,
        in_cache: bool = True,
    ) -> Float[Array, "B T H G E"]:
        """The arguments are those of `attention_kernel.attend_ragged`.

        Args:
          query: the scaled queries, in the dtype of the cache.
          keys: the keys of a layer, or of all layers.
          values: the values of the same entries.
          seen: which entries each token attends to.
          layer: which layer to read, where the cache holds all of them.
          cap: the bound of the scores, see `attention.softcap`.
          in_cache: whether the entries are those of a cache, not of a training batch.
        """
        ...


def bits(sees: Bool[Array, "B T W"] | None, depth: Int[Array, "#B T"]) -> UInt32[Array, "#B T"]:
    """`Seen.bits` of a block of at most 32 tokens: from what each sees, or for a chain from its depth."""
    if sees is None:
        return (jnp.uint32(2) << depth.astype(jnp.uint32)) - 1
    return jnp.sum(sees.astype(jnp.uint32) << jnp.arange(sees.shape[-1], dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Einsum:
    """By XLA's products (`Attend`)."""

    def __call__(self, query, keys, values, seen: Seen, layer, *, cap, in_cache=True):
        """As `Attend` says."""
        keys, values = cache_lib.of_layer(keys, layer), cache_lib.of_layer(values, layer)
        return attention.attend(query, keys, values, seen.mask, cap=cap, in_cache=in_cache)


def _kernel(form: Any, query, keys, values, seen: Seen, layer, *, cap):
    # Here, so that only those who may need it wait for the import of Pallas.
    from specjax.models.attention_kernel import attend_ragged

    assert seen.length is not None
    assert seen.positions is not None
    places = seen.length, seen.bits, seen.positions
    return attend_ragged(query, keys, values, *places, layer, window=seen.window, cap=cap, form=form)


KERNELS: dict[str, Callable[..., Array]] = {
    "tpu": functools.partial(_kernel, "tpu"),
    "cuda": functools.partial(_kernel, "gpu"),
}
"""By the name that JAX has for the platform."""


def _platform() -> str:
    """The platform that a program is traced for: that of the mesh, or else of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "cuda" if name == "gpu" else name


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Kernel:
    """By the kernel on TPUs and CUDA GPUs, else by XLA's products (`Attend`).

    Attributes:
      rules: logical to mesh axes: XLA cannot split the kernel, so each device calls it for its own rows and heads.
    """

    rules: sharding.Rules

    def __call__(self, query, keys, values, seen: Seen, layer, *, cap, in_cache=True):
        """As `Attend` says; has no derivative."""
        assert in_cache
        arguments = query, keys, values, seen, layer

        def split(kernel: Callable[..., Array]) -> Callable[..., Array]:
            own = functools.partial(kernel, cap=cap)
            mesh = jax.sharding.get_abstract_mesh()
            if mesh.empty:
                return own
            axes = ("batch", None, "kv_heads", None, None)
            heads = sharding.dividing(query.shape, axes, mesh, self.rules)
            entries = sharding.dividing(keys.shape, cache_lib.axes_of(keys.ndim), mesh, self.rules)
            rows = PartitionSpec(heads[0])
            of_seen = Seen._make(rows if x is not None and x.ndim else PartitionSpec() for x in seen)
            specs = heads, entries, entries, of_seen, PartitionSpec()
            return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)

        # Others need not wait for the kernel of a chip that they are not compiled for to be traced.
        platform = _platform()
        kernels = {platform: split(KERNELS[platform])} if platform in KERNELS else {}
        return jax.lax.platform_dependent(*arguments, **kernels, default=functools.partial(Einsum(), cap=cap))


class Choice(NamedTuple):
    """Which of the two attends, and why.

    Attributes:
      name: "einsum" or "kernel".
      why: a reason in words.
    """

    name: str
    why: str


def choose(asked: str, tokens: int, window: int, parameter_bytes: float, cache_bytes: float) -> Choice:
    """Which of the two attends in a call.

    Below a tenth of the bytes, XLA's products cost little though they read the whole buffer, and need no kernel of
    their own in every layer.

    Args:
      asked: one of `config.ATTENTIONS`.
      tokens: the tokens of a row, with those before it that are in the cache but not committed.
      window: the least window of a layer; `MAX_TOKENS` where no layer has one.
      parameter_bytes: those that the call reads.
      cache_bytes: those of the buffers of the rows that share these parameters.
    """
    share = cache_bytes / (cache_bytes + parameter_bytes)
    if tokens > MAX_TOKENS:
        return Choice("einsum", f"a call reads {tokens} tokens of a row, and the kernel takes {MAX_TOKENS}")
    if window < MAX_TOKENS:
        # The kernel takes a block's tokens for a path, which they need not be: within a window this changes nothing.
        return Choice("einsum", f"a window of {window} tokens may be narrower than a block")
    if asked != "auto":
        return Choice(asked, f"attention={asked!r} says so")
    bytes_read = f"the cache is {share:.0%} of the bytes that a call reads"
    if share < LEAST_SHARE:
        return Choice("einsum", f"{bytes_read}, below {LEAST_SHARE:.0%}")
    return Choice("kernel", f"{bytes_read}, at least {LEAST_SHARE:.0%}")


def of(choice: Choice, rules: sharding.Rules) -> Attend:
    """What was chosen."""
    return Kernel(rules) if choice.name == "kernel" else Einsum()
