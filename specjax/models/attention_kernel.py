"""Attention of a few tokens to a cache, whose cost follows each row's own length: Pallas kernels for TPUs and GPUs.

XLA's products read the whole buffer of a cache, with a mask. Here a row reads the blocks of entries that its queries
attend to, and no others. Softmax is computed block by block (arXiv 1805.02867, algorithm 3), as in FlashAttention
(arXiv 2205.14135, algorithm 1), with the queries of a group as rows of one matrix per key/value head.

**TPU.** One step of the grid reads a block of several heads. The blocks of a row are counted from its own first one; a
step beyond its last one names that one again, so that nothing is fetched, and computes nothing. The grid has as many
steps as the row that needs most.

**GPU.** Each row's blocks are split over several programs, which fill the chip where there are few rows and heads
(Flash-Decoding, https://pytorch.org/blog/flash-decoding). Their sums are combined by what each found as its largest
score.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int, UInt32

from specjax.models.attention_choice import MAX_TOKENS

TPU_BLOCK, TPU_BLOCK_BYTES = 512, 1 << 20
"""The most entries of a step, and bytes of its keys: much smaller steps would take longer to start than to read."""

TPU_LANES = 128
"""The size of a tile's last axis."""

GPU_BLOCK, GPU_BLOCK_BYTES = 128, 1 << 15
"""The most entries of an iteration, and bytes of its keys: two of keys and of values fit the shared memory."""

GPU_ROWS = 64
"""The most queries of a program, whose sums are held in registers."""

GPU_PROGRAMS = 128
"""How many programs fill a chip: one for each multiprocessor of an A100 or H100, which has two blocks on the way."""

_LEAST = jnp.finfo(jnp.float32).min

Carry = tuple[Float[Array, "*H R 1"], Float[Array, "*H R 1"], Float[Array, "*H R E"]]
"""Of each query: its largest score, the sum of its weights, and that of the values by them."""


@functools.partial(jax.jit, static_argnames=("cap", "form", "block", "interpret"))
def attend_ragged(
    query: Float[Array, "B T H G E"],
    keys: Float[Array, "B *L H S E"],
    values: Float[Array, "B *L H S E"],
    length: Int[Array, " B"],
    sees: UInt32[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    layer: Int[Array, ""] | None = None,
    *,
    window: Int[Array, ""] | int | None = None,
    cap: float | None = None,
    form: Literal["tpu", "gpu"],
    block: int | None = None,
    interpret: Any = False,
) -> Float[Array, "B T H G E"]:
    """Softmax attention of a block of tokens to the committed entries of a cache and to those of the block.

    The same as `attend` with the mask of `layers.visible`. Entries that no query sees may hold anything finite. Has no
    derivative. Under a mesh, call it within `jax.shard_map` over rows and heads, with
    `check_vma=False`: XLA cannot split it.

    Args:
      query: the scaled queries of T <= 32 tokens, in the dtype of the cache.
      keys: the keys of a layer, or of all layers, bfloat16 or float32.
      values: the values of the same entries.
      length: the number of committed entries, which every query sees.
      sees: bit j of a token: it sees the entry `length + j`. A token sees itself. None: a chain, whose tokens see those
        up to their own.
      positions: the positions of the tokens, which only a window needs.
      layer: which layer to read, where the cache holds all of them.
      window: a query sees an entry only if it is fewer positions before it; within the block, positions are counted
        along the entries that it sees.
      cap: the bound of the scores, see `softcap`.
      form: the chip that it is compiled for.
      block: the number of entries read at a time; a power of two. None: what suits the chip and the shape.
      interpret: runs the kernel as XLA operations, on any chip: True, or for a TPU's kernel `InterpretParams`.

    Returns:
      float32; zeros for a query that sees nothing.

    Raises:
      ValueError: for more than 32 tokens.
    """
    tokens = query.shape[1]
    if tokens > MAX_TOKENS:
        raise ValueError(f"{tokens} tokens of a row: at most {MAX_TOKENS}, since what each sees is 32 bits.")
    if sees is None:
        sees = jnp.broadcast_to((jnp.uint32(2) << jnp.arange(tokens, dtype=jnp.uint32)) - 1, positions.shape)
    # The heads of all layers, one after the other, and which of them is the first.
    keys, values = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (keys, values))
    head = jnp.int32(0) if layer is None else layer * query.shape[2]
    return _FORMS[form](query, keys, values, length, sees, positions, head, window, cap, block, interpret)


def _scalars(head: Int[Array, ""], window: Int[Array, ""] | int | None) -> Int[Array, " 2"]:
    """What all programs read: the first head of the layer, and the window, or anything where there is none."""
    return jnp.stack([jnp.asarray(x, jnp.int32) for x in (head, 0 if window is None else window)])


def _bounds(
    length: Int[Array, " B"],
    sees: UInt32[Array, "B T"],
    positions: Int[Array, "B T"],
    window: Int[Array, ""] | int | None,
    size: int,
    block: int,
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """The numbers of the first and the last block of each row that hold entries which a query attends to."""
    behind = jnp.max(MAX_TOKENS - jax.lax.clz(sees).astype(jnp.int32), axis=1)
    last = (jnp.clip(length + behind, 1, size) - 1) // block
    if window is None:
        return jnp.zeros_like(last), last
    begin = jnp.clip(jnp.min(positions, axis=1) - window + 1, 0, length)
    return jnp.minimum(begin // block, last), last


def _by_rows(x: Array, group: int, rows: int) -> Array:
    """`[B, T]`, for each token, as `[B, R, 1]`, for each query of a group and for padding."""
    each = jnp.repeat(x, group, axis=1)
    return jnp.pad(each, ((0, 0), (0, rows - each.shape[1])))[:, :, None].astype(jnp.int32)


def _matrix(query: Array, rows: int, size: int) -> Array:
    """`[B, T, H, G, E]` as `[B, H, R, E]`, padded to so many rows and dimensions."""
    batch, tokens, heads, group, dims = query.shape
    matrix = jnp.swapaxes(query, 1, 2).reshape(batch, heads, tokens * group, dims)
    return jnp.pad(matrix, ((0, 0), (0, 0), (0, rows - tokens * group), (0, size - dims)))


def _unmatrix(mixed: Array, query: Array) -> Array:
    """What `_matrix` made, without padding, in the shape of the query."""
    batch, tokens, heads, group, dims = query.shape
    mixed = mixed[:, :, : tokens * group, :dims].reshape(batch, heads, tokens, group, dims)
    return jnp.swapaxes(mixed, 1, 2)


def _visible(
    slots: Int[Array, "R N"],
    length: Int[Array, ""],
    sees: Int[Array, "R 1"],
    positions: Int[Array, "R 1"],
    window: Int[Array, ""] | None,
) -> Bool[Array, "R N"]:
    """Which entries each query attends to, see `layers.visible`."""
    behind = slots - length
    committed = behind < 0
    later = jax.lax.shift_right_logical(jnp.broadcast_to(sees, slots.shape), jnp.clip(behind, 0, MAX_TOKENS - 1))
    seen = committed | ((behind < MAX_TOKENS) & ((later & 1) == 1))
    if window is None:
        return seen
    # The entries of a block that a token attends to are a path that ends with itself.
    distance = jnp.where(committed, positions - slots, jax.lax.population_count(later) - 1)
    return seen & (distance < window)


def _dot(a: Array, b: Array, axis: int) -> Array:
    """The sums over the last axis of a and an axis of b, for each of the axes before the last two."""
    batch = tuple(range(a.ndim - 2))
    sums = (a.ndim - 1,), (axis % b.ndim,)
    return jax.lax.dot_general(a, b, (sums, (batch, batch)), preferred_element_type=jnp.float32)


def _read(
    query: Float[Array, "*H R E"],
    keys: Array,
    values: Array,
    seen: Bool[Array, "*#H R N"],
    carry: Carry,
    cap: float | None,
    *,
    turned: bool = False,
) -> Carry:
    """The sums with another block of entries (arXiv 1805.02867, algorithm 3, lines 3 to 6, for N entries at once).

    Args:
      query: the queries.
      keys: `[*H, N, E]`, or turned `[*H, E, N]`.
      values: as the keys.
      seen: which query attends to which entry.
      carry: the sums before.
      cap: see `attend_ragged`.
      turned: whether the entries are the last axis.
    """
    size, entries = (-2, -1) if turned else (-1, -2)
    largest, total, mixed = carry
    scores = _dot(query, keys, size)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(seen, scores, _LEAST)
    above = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - above), 0.0)
    scale = jnp.exp(largest - above)
    total = total * scale + jnp.sum(weights, axis=-1, keepdims=True)
    return above, total, mixed * scale + _dot(weights.astype(values.dtype), values, entries)


def _mean(total: Array, mixed: Array) -> Array:
    """The weighted mean of the values. The largest weight is 1: only a query that sees nothing has a sum below."""
    return mixed / jnp.maximum(total, 1.0)


# --- TPU


def _tpu_kernel(
    first: Any,
    last: Any,
    length: Any,
    scalars: Any,
    query: Any,
    keys: Any,
    values: Any,
    sees: Any,
    positions: Any,
    out: Any,
    *carry: Any,
    windowed: bool,
    cap: float | None,
    size: int,
    turned: bool,
) -> None:
    """A step of the grid `[B, groups of heads, blocks]`; the blocks of a row are read one after the other."""
    row, step = pl.program_id(0), pl.program_id(2)
    number = first[row] + step

    @pl.when(step == 0)
    def _begin() -> None:
        for ref, value in zip(carry, (_LEAST, 0.0, 0.0), strict=True):
            ref[...] = jnp.full(ref.shape, value, jnp.float32)

    @pl.when(number <= last[row])
    def _next() -> None:
        axis = 2 if turned else 1
        rows, block = query.shape[1], keys.shape[axis]
        slots = number * block + jax.lax.broadcasted_iota(jnp.int32, (rows, block), 1)
        seen = _visible(slots, length[row], sees[...], positions[...], scalars[1] if windowed else None)
        own = values[...]
        if size % block:
            # Behind the end of the buffer is anything, also NaN, and 0 * NaN is NaN.
            inside = number * block + jax.lax.broadcasted_iota(jnp.int32, own.shape, axis) < size
            own = jnp.where(inside, own, jnp.zeros_like(own))
        sums = tuple(ref[...] for ref in carry)
        found = _read(query[...], keys[...], own, seen[None], sums, cap, turned=turned)
        for ref, value in zip(carry, found, strict=True):
            ref[...] = value

    @pl.when(number == last[row])
    def _end() -> None:
        out[...] = _mean(carry[1][...], carry[2][...])


def _tpu_heads(heads: int, bytes_of_one: int) -> int:
    """How many heads a step reads: a divisor of all."""
    return max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * bytes_of_one <= TPU_BLOCK_BYTES))


def _attend_tpu(
    query: Array,
    keys: Array,
    values: Array,
    length: Array,
    sees: Array,
    positions: Array,
    head: Array,
    window: Array | int | None,
    cap: float | None,
    block: int | None,
    interpret: Any,
) -> Array:
    """`attend_ragged` by `_tpu_kernel`."""
    batch, tokens, heads, group, dims = query.shape
    size, item = keys.shape[2], keys.dtype.itemsize
    block = min(block or TPU_BLOCK, size)
    # Tiles have 8 rows of 4 bytes.
    rows = -(-tokens * group * item // 32) * (32 // item)
    own = _tpu_heads(heads, block * dims * item)
    # Other sizes would fill tiles in part, and XLA makes the entries of the cache the last axis: this moves nothing.
    turned = dims % TPU_LANES != 0
    if turned:
        keys, values = jnp.swapaxes(keys, 2, 3), jnp.swapaxes(values, 2, 3)
    first, last = _bounds(length, sees, positions, window, size, block)

    def at(row: Any, part: Any, step: Any, *_: Any) -> tuple[Any, ...]:
        return row, part, 0, 0

    def entries(row: Any, part: Any, step: Any, first: Any, last: Any, _: Any, scalars: Any) -> tuple[Any, ...]:
        part, number = scalars[0] + part, jnp.minimum(first[row] + step, last[row])
        return (row, part, 0, number) if turned else (row, part, number, 0)

    by_row = pl.BlockSpec((None, rows, 1), lambda row, *_: (row, 0, 0))
    of_queries = pl.BlockSpec((None, own, rows, dims), at)
    of_entries = pl.BlockSpec((None, own, dims, block) if turned else (None, own, block, dims), entries)
    mixed = pl.pallas_call(
        functools.partial(_tpu_kernel, windowed=window is not None, cap=cap, size=size, turned=turned),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, heads // own, jnp.max(last - first) + 1),
            in_specs=[of_queries, of_entries, of_entries, by_row, by_row],
            out_specs=of_queries,
            scratch_shapes=[pltpu.VMEM((own, rows, width), jnp.float32) for width in (1, 1, dims)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, heads, rows, dims), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="attend_ragged",
    )(
        first,
        last,
        length,
        _scalars(head // own, window),
        _matrix(query, rows, dims),
        keys,
        values,
        _by_rows(sees, group, rows),
        _by_rows(positions, group, rows),
    )
    return _unmatrix(mixed, query)


# --- GPU


def _gpu_kernel(
    first: Any,
    last: Any,
    length: Any,
    scalars: Any,
    query: Any,
    keys: Any,
    values: Any,
    sees: Any,
    positions: Any,
    largest: Any,
    total: Any,
    mixed: Any,
    *,
    windowed: bool,
    cap: float | None,
    block: int,
    splits: int,
    used: int,
) -> None:
    """A program of the grid `[B, H, tiles of queries, splits]`, which reads its part of the blocks of its row."""
    begin, end = first[0], last[0] + 1
    each = (end - begin + splits - 1) // splits
    begin = begin + pl.program_id(3) * each
    rows, dims = query.shape
    own, bits, places, of_head = query[...], sees[...], positions[...], scalars[0] + pl.program_id(1)
    window = scalars[1] if windowed else None

    def load(ref: Any, number: Any) -> Array:
        at = ref.at[of_head, pl.ds(number * block, block), pl.ds(0, dims)]
        _, size, width = ref.shape
        if size % block == 0 and width == dims:
            return plgpu.load(at)
        slots, columns = number * block + jnp.arange(block), jnp.arange(dims)
        return plgpu.load(at, mask=(slots[:, None] < size) & (columns[None, :] < width), other=0.0)

    def read(number: Any, carry: Carry) -> Carry:
        slots = jnp.broadcast_to((number * block + jnp.arange(block))[None, :], (rows, block))
        seen = _visible(slots, length[0], bits, places, window)
        return _read(own, load(keys, number), load(values, number), seen, carry, cap)

    nothing = tuple(
        jnp.full((rows, width), value, jnp.float32) for width, value in ((1, _LEAST), (1, 0.0), (dims, 0.0))
    )
    found = jax.lax.fori_loop(begin, jnp.minimum(begin + each, end), read, nothing)
    inside = pl.program_id(2) * rows + jnp.arange(rows) < used
    for ref, value in zip((largest, total, mixed), found, strict=True):
        plgpu.store(ref, value, mask=inside[:, None] if used % rows else None)


def _attend_gpu(
    query: Array,
    keys: Array,
    values: Array,
    length: Array,
    sees: Array,
    positions: Array,
    head: Array,
    window: Array | int | None,
    cap: float | None,
    block: int | None,
    interpret: Any,
) -> Array:
    """`attend_ragged` by `_gpu_kernel`, and the sum of its splits."""
    batch, tokens, heads, group, dims = query.shape
    size, item = keys.shape[2], keys.dtype.itemsize
    # Triton's arrays have powers of two as sizes, its products at least 16.
    width = max(pl.next_power_of_2(dims), 16)
    block = block or max(min(GPU_BLOCK, GPU_BLOCK_BYTES // (width * item)), 16)
    tile = min(max(pl.next_power_of_2(tokens * group), 16), GPU_ROWS)
    tiles = -(-tokens * group // tile)
    rows = tiles * tile
    splits = min(max(GPU_PROGRAMS // (batch * heads * tiles), 1), -(-size // block))

    def at(row: Any, head: Any, tile: Any, split: Any) -> tuple[Any, ...]:
        return row, head, split, tile, 0

    each, both = pl.BlockSpec((1,), lambda row, *_: (row,)), pl.BlockSpec((2,), lambda *_: (0,))
    by_row = pl.BlockSpec((None, tile, 1), lambda row, head, tile, split: (row, tile, 0))
    of_queries = pl.BlockSpec((None, None, tile, width), lambda row, head, tile, split: (row, head, tile, 0))
    of_entries = pl.BlockSpec((None, *keys.shape[1:]), lambda row, *_: (row, 0, 0, 0))
    widths = (1, 1, width)
    found = pl.pallas_call(
        functools.partial(
            _gpu_kernel, windowed=window is not None, cap=cap, block=block, splits=splits, used=tokens * group
        ),
        grid=(batch, heads, tiles, splits),
        in_specs=[each, each, each, both, of_queries, of_entries, of_entries, by_row, by_row],
        out_specs=[pl.BlockSpec((None, None, None, tile, width), at) for width in widths],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, splits, tokens * group, width), jnp.float32) for width in widths
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attend_ragged",
    )(
        *_bounds(length, sees, positions, window, size, block),
        length,
        _scalars(head, window),
        _matrix(query, rows, width),
        keys,
        values,
        _by_rows(sees, group, rows),
        _by_rows(positions, group, rows),
    )
    return _unmatrix(_combine(*found), query)


def _combine(
    largest: Float[Array, "B H P R 1"], total: Float[Array, "B H P R 1"], mixed: Float[Array, "B H P R E"]
) -> Float[Array, "B H R E"]:
    """The mean of all P splits of a row."""
    scale = jnp.exp(largest - jnp.max(largest, axis=2, keepdims=True))
    return _mean(jnp.sum(total * scale, axis=2), jnp.sum(mixed * scale, axis=2))


_FORMS: dict[str, Callable[..., Array]] = {"tpu": _attend_tpu, "gpu": _attend_gpu}
