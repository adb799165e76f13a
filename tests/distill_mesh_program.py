"""Run by test_distill in a process with 8 virtual CPU devices: distils on one device and on a mesh, prints JSON."""

import json
import pathlib
import sys
import tempfile
from typing import Any

import jax
from jax.sharding import Mesh
from test_distill import make_run, make_target

from specjax.models import families
from specjax.parallel import sharding
from specjax.training import fit


def distilled(mesh: Mesh | None) -> tuple[list[dict[str, Any]], list[Any]]:
    """The curve of a short run, and the shapes of the target's head and of what one device has of it."""
    target = make_target(vocab_size=128, num_heads=4, num_kv_heads=4)
    if mesh is not None:
        target = target._replace(params=sharding.shard(target.params, families.param_axes(target.config), mesh))
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        run = make_run(directory, target=target, mesh=mesh, batch_size=8, num_microbatches=2, num_steps=6)
        lines = fit.fit(run, directory).lines
    head = run.task.frozen["head"]["values"]
    return lines, [head.shape, head.addressable_shards[0].data.shape]


def main() -> None:
    one, _ = distilled(None)
    split, head = distilled(sharding.make_mesh(data=2, model=4))
    json.dump({"devices": jax.device_count(), "one": one, "mesh": split, "head": head}, sys.stdout)


if __name__ == "__main__":
    main()
