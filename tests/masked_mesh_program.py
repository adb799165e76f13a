"""Run by test_masks in a process with 4 virtual CPU devices: trains masks on one device and on a mesh, prints JSON."""

import json
import sys
from typing import Any

import jax
import numpy as np

from specjax.api.pretrained import Pretrained
from specjax.models import families
from specjax.models.config import DecoderConfig, ModelConfig, T5Config
from specjax.parallel import sharding
from specjax.training import data as data_lib
from specjax.training import masks, pard, specdec, train
from specjax.training.config import TrainConfig
from specjax.training.data import Dataset, Encoded, Example

V, MASK, STEPS, ROWS = 32, 31, 3, 4
DECODER = DecoderConfig(V, 32, 64, 1, 4, 2, 8, max_position=64)
T5 = T5Config(V, 32, 8, 64, 1, 1, 4)
CONFIG = TrainConfig(num_steps=STEPS, batch_size=ROWS, num_microbatches=2, learning_rate=1e-2)


def texts(start: int | None) -> Dataset:
    rng, examples = np.random.default_rng(0), []
    for _ in range(24):
        text = rng.integers(0, MASK, 8).astype(np.int32)
        examples.append(Example(text, 0, text if start is not None else np.zeros(0, np.int32)))
    return data_lib.dataset(Encoded(examples, 0, 0), start_token=start, target_length=16, source_length=16, seed=0)


def embeddings(mesh: Any) -> list[float]:
    """The losses of the training of embeddings."""
    params = families.init_params(DECODER, jax.random.key(0))
    if mesh is not None:
        params = sharding.shard(params, families.param_axes(DECODER), mesh, sharding.RULES)
    side = Pretrained(families.model(DECODER), params, None, DECODER)
    what = masks.of(side, 2, num_points=8, num_steps=STEPS)
    with sharding.on_mesh(mesh):
        begin = masks.init(what, side, 3)
        _, losses = masks.fit(what, side.params, texts(None), begin, batch_size=ROWS, mesh=mesh)
    return losses.ravel().tolist()


def models(config: ModelConfig, source: Any, mesh: Any) -> list[float]:
    """The losses of the training of a model."""
    with sharding.on_mesh(mesh):
        state, losses = train.init(config, CONFIG, mesh), []
        for step in range(STEPS):
            batch = source.at(step, state.params).batch(step, ROWS, mesh)
            state, metrics = train.train_step(config, CONFIG, state, batch, objective=source.objective)
            losses += [float(metrics.loss), *(float(value) for value in metrics.measures.values())]
    return losses


def main() -> None:
    mesh, report = sharding.make_mesh(data=2, model=2), {}
    looks_ahead = pard.with_masks(texts(None), MASK, 3)
    slots = specdec.with_slots(texts(T5.start_token), MASK, 3, 4)
    glanced = specdec.glanced(slots, T5, STEPS)
    for name, losses in {
        "masks": embeddings,
        "pard": lambda mesh: models(DECODER, looks_ahead, mesh),
        "specdec": lambda mesh: models(T5, glanced, mesh),
    }.items():
        report[name] = [losses(None), losses(mesh)]
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
