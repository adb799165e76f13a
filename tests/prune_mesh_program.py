"""Run by test_prune in a process with 8 virtual CPU devices: prunes on one device and on a mesh, prints JSON."""

import json
import sys
import tempfile
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from test_distill import make_target
from test_training import copies, make_dataset

import specjax
from specjax.api.pretrained import Pretrained
from specjax.models import families
from specjax.parallel import sharding
from specjax.training import importance


def pruned(mesh: Mesh | None, kind: str) -> dict[str, Any]:
    """A model of fewer layers, heads, channels and weights, saved, and loaded onto the mesh again."""
    wide: Any = {"vocab_size": 128, "num_heads": 8, "intermediate_size": 128}
    target = make_target(kind, 3, **wide, **({"num_kv_heads": 8} if kind == "decoder" else {}))
    params = target.params
    if mesh is not None:
        params = sharding.shard(params, families.param_axes(target.config), mesh)
    batches = list(make_dataset(copies(12), kind).in_order(2, mesh))[:2]
    layers = {"layers": 2} if kind == "decoder" else {"encoder": 1, "decoder": 2}
    with sharding.on_mesh(mesh):
        config, params = importance.shrink(
            target.config, params, importance.Sizes(layers, 4, 64, 0.25), batches, report=lambda done, total: None
        )
    with tempfile.TemporaryDirectory() as directory:
        specjax.save(Pretrained(families.model(config), params, target.tokenizer, config), directory)
        model = specjax.load(directory, mesh=mesh)
    part = jax.tree.leaves(model.params)[0].addressable_shards[0]
    down = model.params["layers" if kind == "decoder" else "decoder"][1]["mlp"]["down"]["values"]
    return {
        "sums": [float(np.abs(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(model.params)],
        "down": [down.shape, down.addressable_shards[0].data.shape],
        "device": str(part.device),
    }


def main() -> None:
    mesh = sharding.make_mesh(data=2, model=4)
    found = {kind: [pruned(None, kind), pruned(mesh, kind)] for kind in ("decoder", "t5")}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
