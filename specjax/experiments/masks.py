"""Trains embeddings for mask tokens, and says how often what they draft would be accepted."""

import dataclasses
import os
import pathlib
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from specjax import drafters
from specjax.api.pretrained import Pretrained, load
from specjax.drafters import store as draft_store
from specjax.experiments import results
from specjax.experiments.reports import masks as report
from specjax.experiments.reports.display import View
from specjax.experiments.settings import POSITIVE, Config, at_least, between, given, one_of, parse
from specjax.experiments.store import Store
from specjax.parallel import sharding
from specjax.training import data as data_lib
from specjax.training import divergences, masks
from specjax.training.data import Dataset
from specjax.training.masks import FitState, Masks, Quality

STATE, PLOT = "state", "masks.png"
"""The directory of what a run resumes from, and the file of its plot."""

_KIND = "masks_state"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `configs/masks.py`."""

    name: str
    target: Annotated[str, given("SOURCE")]
    dtype: Annotated[str, one_of("float32", "bfloat16")]
    num_masks: Annotated[int, at_least(1)]
    mask_token: Annotated[int, at_least(0)]
    data: Annotated[str, given("FILE")]
    valid: Annotated[str, given("FILE")]
    num_valid: Annotated[int, at_least(1)]
    target_length: Annotated[int, at_least(3)]
    source_length: Annotated[int, at_least(1)]
    batch_size: Annotated[int, at_least(1)]
    num_points: Annotated[int, at_least(1)]
    num_steps: Annotated[int, at_least(1)]
    learning_rate: Annotated[float, POSITIVE]
    decay: Annotated[float, between(0, 1)]
    divergence: str
    save_every: Annotated[int, at_least(1)]
    mesh_data: Annotated[int, at_least(1)]
    mesh_model: Annotated[int, at_least(1)]
    seed: Annotated[int, at_least(0)]

    def check(self) -> None:
        """Refuses a divergence that does not exist, and rows that do not divide over the devices."""
        try:
            divergences.named(self.divergence)
        except ValueError as error:
            raise ValueError(f"config.{error}") from error
        if self.batch_size % self.mesh_data:
            raise ValueError(f"config.batch_size={self.batch_size}: a multiple of config.mesh_data={self.mesh_data}.")


class Progress(NamedTuple):
    """What a run has come to.

    Attributes:
      state: after the steps that are made.
      losses: `[n, K]` the loss of each place before each of them.
      steps: after how many steps held-out texts were judged.
      qualities: what was found there.
    """

    state: FitState
    losses: Float[np.ndarray, "n K"]
    steps: tuple[int, ...] = ()
    qualities: tuple[Quality, ...] = ()


def write_state(directory: pathlib.Path, progress: Progress) -> None:
    """Writes what `read_state` reads, in one file, in place of the one before."""
    arrays = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(progress.state))}
    arrays |= {"losses": progress.losses, "qualities": np.asarray(progress.qualities, np.float32)}
    draft_store.write(directory / STATE, _KIND, arrays, {"steps": list(progress.steps)}, None)


def read_state(directory: pathlib.Path, begin: FitState) -> Progress | None:
    """What an interrupted run has come to, or None where there was none.

    Args:
      directory: the workdir.
      begin: a state of the same structure.

    Raises:
      ValueError: for a file that is damaged.
    """
    if not (directory / STATE / draft_store.FILE).exists():
        return None
    arrays, info, _ = draft_store.read(directory / STATE, _KIND, None)
    leaves, definition = jax.tree.flatten(begin)
    kept = [jnp.asarray(arrays[f"leaf{i}"], leaf.dtype) for i, leaf in enumerate(leaves)]
    qualities = tuple(Quality(*values) for values in arrays["qualities"])
    return Progress(jax.tree.unflatten(definition, kept), arrays["losses"], tuple(info["steps"]), qualities)


def _dataset(path: str, chosen: Settings, target: Pretrained) -> Dataset:
    lengths = {"target_length": chosen.target_length, "source_length": chosen.source_length}
    start = target.model.start_token
    assert target.tokenizer is not None
    encoded = data_lib.encode(data_lib.read(path), target.tokenizer, start_token=start, **lengths)
    return data_lib.dataset(encoded, start_token=start, seed=chosen.seed, **lengths)


def _train(
    what: Masks, target: Pretrained, chosen: Settings, mesh: Any, directory: pathlib.Path, view: View
) -> Progress:
    """Trains from where an earlier run stopped; what is finished is kept every `save_every` steps."""
    training, held_out = _dataset(chosen.data, chosen, target), _dataset(chosen.valid, chosen, target)
    held_out = dataclasses.replace(held_out, rows=held_out.rows[: chosen.num_valid])

    def judged(progress: Progress) -> Progress:
        batches = held_out.in_order(chosen.batch_size, mesh)
        quality = masks.judge(what, target.params, progress.state.embeddings, batches)
        step = len(progress.losses)
        view.line(report.line(step, quality))
        progress = progress._replace(steps=(*progress.steps, step), qualities=(*progress.qualities, quality))
        write_state(directory, progress)
        return progress

    begin = masks.init(what, target, chosen.mask_token)
    progress = read_state(directory, begin)
    if progress is None:
        progress = judged(Progress(begin, np.zeros((0, what.number), np.float32)))
    else:
        view.line(f"Going on after step {len(progress.losses)} of {chosen.num_steps}.")
    with view.progress(chosen.num_steps, what="step", remaining=True) as bar:
        while (first := len(progress.losses)) < chosen.num_steps:
            bar.update(bar.task_ids[0], completed=first)
            steps = range(first, min(first + chosen.save_every, chosen.num_steps))
            state, losses = masks.fit(
                what,
                target.params,
                training,
                progress.state,
                batch_size=chosen.batch_size,
                steps=steps,
                mesh=mesh,
            )
            if not np.isfinite(losses).all():
                raise FloatingPointError(
                    f"The loss is not finite in steps {first} to {steps.stop}: lower config.learning_rate="
                    f"{chosen.learning_rate}, and begin again with --overwrite."
                )
            progress = judged(progress._replace(state=state, losses=np.concatenate([progress.losses, losses])))
        bar.update(bar.task_ids[0], completed=chosen.num_steps)
    return progress


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Trains the embeddings, as `EXPERIMENTS` says; FloatingPointError where the loss is not finite."""
    view, chosen = view or View(), parse(Settings, config)
    made = (STATE, draft_store.FILE, "results.json", "summary.md", PLOT)
    store = Store(workdir, config.to_dict(), overwrite=overwrite, names=made)
    store.holds(STATE)
    store.write_config()
    mesh = None
    if chosen.mesh_data * chosen.mesh_model > 1:
        mesh = sharding.make_mesh(data=chosen.mesh_data, model=chosen.mesh_model)
    with view.status(f"Loading {chosen.target}"):
        target = load(chosen.target, dtype=chosen.dtype, mesh=mesh)
    if target.tokenizer is None:
        raise ValueError(f"The target {chosen.target} has no tokenizer: save one beside it (tokenizer.json).")
    what = masks.of(
        target,
        chosen.num_masks,
        divergence=divergences.named(chosen.divergence),
        num_points=chosen.num_points,
        decay=chosen.decay,
        learning_rate=chosen.learning_rate,
        num_steps=chosen.num_steps,
        seed=chosen.seed,
    )
    with sharding.on_mesh(mesh):
        progress = _train(what, target, chosen, mesh, store.directory, view)
    drafters.save_masks(progress.state.embeddings, store.directory, target=target)
    rows = [
        {"step": step} | {name: [float(x) for x in values] for name, values in quality._asdict().items()}
        for step, quality in zip(progress.steps, progress.qualities, strict=True)
    ]
    store.write("results.json", results.to_json(rows))
    images = report.plot(store.directory, PLOT, progress.losses, rows)
    store.write("summary.md", report.summary(chosen, rows, images))
    view.line(report.finding(rows), "bold")
    view.line(
        f"Results: {store.directory}{os.sep}; configs/compare.py drafts so with --config.draft={store.directory} and "
        f"--config.drafter=parallel_masks --config.num_draft_tokens={chosen.num_masks + 1}, or mask_tokens and "
        f"{chosen.num_masks}."
    )
