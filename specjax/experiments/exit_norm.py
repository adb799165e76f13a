"""Fits the norm of an early exit on texts, and says what it changes on others."""

import dataclasses
import json
import os
import pathlib
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.experiments import bench, results
from specjax.experiments.reports import exit_norm as report
from specjax.experiments.reports.display import View
from specjax.experiments.settings import Check, Config, at_least, given, one_of, parse
from specjax.experiments.store import Store
from specjax.models import families
from specjax.training import data as data_lib
from specjax.training import exit_norm
from specjax.training.data import Dataset

FILE = "exit_norm.json"
"""What a run found: the number of layers that the exit runs, and the scale of its norm."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `configs/exit_norm.py`."""

    target: Annotated[str, given("SOURCE")]
    dtype: Annotated[str, one_of("float32", "bfloat16")]
    exit_layer: Annotated[int, at_least(1)]
    data: Annotated[str, given("FILE")]
    valid: Annotated[str, given("FILE")]
    num_valid: Annotated[int, at_least(1)]
    target_length: Annotated[int, at_least(2)]
    source_length: Annotated[int, at_least(1)]
    batch_size: Annotated[int, at_least(1)]
    num_steps: Annotated[int, at_least(1)]
    learning_rate: Annotated[float, Check(lambda rate: rate > 0, "above 0")]
    save_every: Annotated[int, at_least(1)]
    seed: Annotated[int, at_least(0)]


def load(directory: str | pathlib.Path) -> tuple[int, np.ndarray]:
    """The layers that the exit runs, and the scale of its norm, as a run found them.

    Raises:
      FileNotFoundError: where there is no finished run.
      ValueError: where its file is broken.
    """
    path = pathlib.Path(directory).expanduser() / FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: configs/exit_norm.py makes it, with --workdir={directory}.")
    try:
        content = json.loads(path.read_text())
        scale = np.asarray(content["scale"], np.float32)
        if scale.ndim != 1:
            raise ValueError(f"a scale of shape {scale.shape}")
        return int(content["layer"]), scale
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is broken ({error!r}): run configs/exit_norm.py anew.") from error


def _dataset(path: str, chosen: Settings, target: Any) -> Dataset:
    lengths = {"target_length": chosen.target_length, "source_length": chosen.source_length}
    start = target.model.start_token
    encoded = data_lib.encode(data_lib.read(path), target.tokenizer, start_token=start, **lengths)
    return data_lib.dataset(encoded, start_token=start, seed=chosen.seed, **lengths)


def _fit(exits: exit_norm.Exit, target: Any, chosen: Settings, store: Store, view: View) -> tuple[Any, list[float]]:
    """The trained scale, and the losses; what is finished is kept, with the optimiser's state."""
    training, state, losses = _dataset(chosen.data, chosen, target), exit_norm.init(exits, target.params), []
    definition = jax.tree.structure(state)
    with view.progress(chosen.num_steps, what="steps") as bar:
        for begin in range(0, chosen.num_steps, chosen.save_every):
            steps = range(begin, min(begin + chosen.save_every, chosen.num_steps))

            def compute(state: Any = state, steps: range = steps) -> dict[str, Any]:
                after, found = exit_norm.fit(
                    exits, target.params, training, batch_size=chosen.batch_size, steps=steps, state=state
                )
                return {"losses": found, "state": [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(after)]}

            cell = store.get(f"steps {begin} to {steps.stop}", compute)
            leaves = [
                jnp.asarray(kept, leaf.dtype) for kept, leaf in zip(cell["state"], jax.tree.leaves(state), strict=True)
            ]
            state = jax.tree.unflatten(definition, leaves)
            losses += cell["losses"]
            bar.update(bar.task_ids[0], completed=steps.stop)
            view.line(f"Step {steps.stop} of {chosen.num_steps}: KL {np.mean(cell['losses']):.4f} nats.")
    return state.scale, losses


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Fits the norm, as `EXPERIMENTS` says."""
    view, chosen = view or View(), parse(Settings, config)
    store = Store(workdir, config.to_dict(), overwrite=overwrite, names=(FILE, "results.json", "summary.md"))
    store.write_config()
    target = bench.load(chosen.target, view, dtype=chosen.dtype)
    if target.tokenizer is None:
        raise ValueError(f"The target {chosen.target} has no tokenizer: save one beside it (tokenizer.json).")
    exits = exit_norm.of(target, chosen.exit_layer, learning_rate=chosen.learning_rate, num_steps=chosen.num_steps)
    scale, losses = _fit(exits, target, chosen, store, view)
    held_out = _dataset(chosen.valid, chosen, target)
    held_out = dataclasses.replace(held_out, rows=held_out.rows[: chosen.num_valid])
    row: results.Row = {"target": chosen.target, "layer": chosen.exit_layer, "num_steps": chosen.num_steps}
    for name, own in (("before", target.params["norm"]), ("after", scale)):
        found = store.get(
            f"agreement {name}",
            lambda own=own: exit_norm.agreement(
                exits, target.params, own, held_out.in_order(chosen.batch_size)
            )._asdict(),
        )
        row |= {f"{key}_{name}": value for key, value in found.items()}
    row |= {"num_valid_tokens": sum(held_out.examples[i].size for texts in held_out.rows for i in texts)}
    row |= {"dtype": chosen.dtype, "device": bench.device_name(), "parameters": families.num_params(target.config)}
    store.write("results.json", results.to_json([row]))
    store.write(FILE, results.to_json({"layer": chosen.exit_layer, "scale": np.asarray(scale).tolist()}))
    images = report.plot(store.directory, losses)
    store.write("summary.md", report.summary(config.name, row, images))
    view.line(report.finding(row), "bold")
    view.line(
        f"Results: {store.directory}{os.sep}; configs/compare.py drafts so with --config.drafter=early_exit "
        f"--config.draft={store.directory}."
    )
