"""Attention to a cache of which a part is in use: the einsum that reads it whole, and what reads only that part.

    python benchmarks/attention.py --buffer=8192 --used=200 --used=8000

On TPUs and GPUs, the Pallas kernel of `specjax.models.attention_kernel`; on CPUs, the blocks of
`specjax.models.attention`. Prints the median of each call in microseconds, in turn, and the bandwidth at which the part
in use is read. The models take the kernel once it has been measured to pay: until then, only this program calls it.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from specjax.models import attention, attention_kernel, layers

_BUFFER = flags.DEFINE_integer("buffer", 8192, "Entries of the cache.", lower_bound=16)
_USED = flags.DEFINE_multi_integer("used", [200, 2000, 8000], "Committed entries of each row.", lower_bound=0)
_ROWS = flags.DEFINE_integer("batch_size", 1, "Rows.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 5, "Tokens of a row that are scored at once.", lower_bound=1, upper_bound=32)
_HEADS = flags.DEFINE_integer("kv_heads", 8, "Key/value heads.", lower_bound=1)
_GROUP = flags.DEFINE_integer("group", 4, "Query heads of each.", lower_bound=1)
_SIZE = flags.DEFINE_integer("head_dim", 128, "Dimensions of a head.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Precision of the cache.")
_REPEATS = flags.DEFINE_integer("repeats", 30, "Timed calls of each.", lower_bound=1)

Attend = Callable[[Any, Any, Any, Any], Any]


def by_mask(query: Any, keys: Any, values: Any, length: Any, *, in_cache: bool) -> Any:
    """`attention.attend` with the mask of a chain."""
    positions = length[:, None] + jnp.arange(query.shape[1])
    mask, _ = layers.visible(keys.shape[2], positions, length, None)
    return attention.attend(query, keys, values, mask, in_cache=in_cache)


def by_kernel(query: Any, keys: Any, values: Any, length: Any, *, form: Any) -> Any:
    """The Pallas kernel, for a chain."""
    positions = length[:, None] + jnp.arange(query.shape[1])
    return attention_kernel.attend_ragged(query, keys, values, length, None, positions, form=form)


def contenders() -> dict[str, Attend]:
    """What is compared on this machine, the einsum first."""
    backend = jax.default_backend()
    on_cpu = functools.partial(by_mask, in_cache=True)
    ours = on_cpu if backend == "cpu" else functools.partial(by_kernel, form=backend)
    return {"whole": functools.partial(by_mask, in_cache=False), "part": ours}


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    rng, rows, size = np.random.default_rng(0), _ROWS.value, _SIZE.value
    shape = (rows, _HEADS.value, _BUFFER.value, size)
    keys, values = (jnp.asarray(rng.normal(size=shape), _DTYPE.value) for _ in range(2))
    query = jnp.asarray(rng.normal(size=(rows, _TOKENS.value, _HEADS.value, _GROUP.value, size)), _DTYPE.value)
    programs = {name: jax.jit(function) for name, function in contenders().items()}
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {keys.shape} {keys.dtype}, {_TOKENS.value} tokens")
    for used in _USED.value:
        if used + _TOKENS.value > _BUFFER.value:
            raise app.UsageError(f"--used={used} and {_TOKENS.value} tokens do not fit --buffer={_BUFFER.value}.")
        length = jnp.full(rows, used, jnp.int32)
        results = {
            name: jax.block_until_ready(program(query, keys, values, length)) for name, program in programs.items()
        }
        error = float(jnp.max(jnp.abs(results["whole"] - results["part"])))
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(_REPEATS.value):
            for name, program in programs.items():
                begin = time.perf_counter()
                jax.block_until_ready(program(query, keys, values, length))
                seconds[name].append(time.perf_counter() - begin)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        read = 2 * rows * _HEADS.value * (used + _TOKENS.value) * size * keys.dtype.itemsize
        print(
            f"{used:6d} of {_BUFFER.value}: whole {1e6 * median['whole']:8.0f} us, part {1e6 * median['part']:8.0f} us "
            f"({median['whole'] / median['part']:.2f}x, {read / median['part'] / 1e9:.1f} GB/s), "
            f"largest difference {error:.1e}"
        )


if __name__ == "__main__":
    app.run(main)
