"""Run by test_training in a process with 8 virtual CPU devices: trains on one device and on a mesh, prints JSON."""

import dataclasses
import json
import re
import sys
import tempfile

import jax
from test_training import MODELS, SHORT, copies, make_dataset

from specjax.parallel import sharding
from specjax.training import train
from specjax.training.checkpoints import Checkpoints

CONFIG = dataclasses.replace(SHORT, batch_size=8, num_microbatches=2, dropout=0.1)
MODEL = dataclasses.replace(MODELS["t5"], vocab_size=128, num_heads=4)


def compiled(state, mesh):
    """The program of a step."""
    batch = make_dataset(copies(60)).batch(0, CONFIG.batch_size, mesh)
    with sharding.on_mesh(mesh):
        return train.train_step.lower(MODEL, CONFIG, state, batch).compile()


def steps(program, state, first: int, last: int, mesh) -> tuple:
    data, losses = make_dataset(copies(60)), []
    for step in range(first, last):
        state, metrics = program(state, data.batch(step, CONFIG.batch_size, mesh))
        losses.append(float(metrics.loss))
    return state, losses


def shapes(x: jax.Array) -> list:
    """Of an array and of what one device has of it."""
    return [x.shape, x.addressable_shards[0].data.shape]


def main() -> None:
    mesh = sharding.make_mesh(data=2, model=4)
    state = train.init(MODEL, CONFIG)
    _, one = steps(compiled(state, None), state, 0, 4, None)
    state = train.init(MODEL, CONFIG, mesh)
    program = compiled(state, mesh)
    state, first = steps(program, state, 0, 2, mesh)
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(directory, {})
        checkpoints.save(state)
        restored = checkpoints.restore(train.abstract_state(MODEL, CONFIG, mesh))
        checkpoints.close()
    state, second = steps(program, state, 2, 4, mesh)
    _, resumed = steps(program, restored, 2, 4, mesh)
    batch = make_dataset(copies(60)).batch(0, CONFIG.batch_size, mesh)
    text = program.as_text() or ""
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.shape == state.params["head"]["values"].shape]
    report = {
        "devices": jax.device_count(),
        "one": one,
        "mesh": first + second,
        "resumed": resumed,
        "head": shapes(state.params["head"]["values"]),
        "moment": shapes(moments[0]),
        "tokens": shapes(batch.tokens),
        "all_to_all": len(re.findall(r" all-to-all(?:-start)?\(", text)),
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
