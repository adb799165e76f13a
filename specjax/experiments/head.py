"""Trains a head over a target's hidden states, and saves it as `drafters.load_feature_head` reads it."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import drafters, files
from specjax.api.pretrained import Pretrained, load
from specjax.drafters import store
from specjax.drafters.feature_head import Head
from specjax.experiments.instructions import instructions
from specjax.experiments.reports.display import View
from specjax.experiments.settings import Config, at_least, parse
from specjax.models import feature_head
from specjax.models.config import DecoderConfig
from specjax.models.feature_head import FeatureHeadConfig
from specjax.training import harvest, heads
from specjax.training.harvest import Texts


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `configs/head.py`."""

    name: str
    target: str
    texts: str
    taps: tuple[int, ...]
    vocab_size: Annotated[int, at_least(1)]
    num_batches: Annotated[int, at_least(2)]
    batch_size: Annotated[int, at_least(1)]
    prompt_width: Annotated[int, at_least(8)]
    max_new_tokens: Annotated[int, at_least(2)]
    own_prompts: Annotated[float, at_least(0)]
    steps: Annotated[int, at_least(1)]
    rows: Annotated[int, at_least(1)]
    depth: Annotated[int, at_least(1)]
    learning_rate: float
    eval_every: Annotated[int, at_least(1)]
    seed: Annotated[int, at_least(0)]

    def check(self) -> None:
        """Refuses a share that is none."""
        if self.own_prompts > 1:
            raise ValueError(f"config.own_prompts={self.own_prompts}: a share, from 0 to 1.")


def _passages(path: str) -> list[str]:
    """The passages of a file that are neither short nor long."""
    if not path:
        return []
    lines = (line for _, line in files.read_json_lines(pathlib.Path(path)))
    found = (line.get("text") or line.get("input") or "" for line in lines)
    return [text for text in found if 40 <= len(text) <= 500]


def _write(chosen: Settings, directory: pathlib.Path, view: View) -> list[Texts]:
    """The texts, written by the target in bfloat16 where they are not there yet."""
    prompts = [line["prompt"] for line in instructions(20_000, _passages(chosen.texts), seed=chosen.seed)]
    found = harvest.harvest(
        load(chosen.target, dtype="bfloat16"),
        prompts,
        directory / "texts",
        chosen.taps,
        num_batches=chosen.num_batches,
        batch_size=chosen.batch_size,
        prompt_width=chosen.prompt_width,
        max_new_tokens=chosen.max_new_tokens,
        own=chosen.own_prompts,
        seed=chosen.seed,
    )
    batches = []
    for path in found:
        batches.append(harvest.read_texts(path))
        view.line(f"{path.name}: {int(batches[-1].length.sum())} tokens.")
    return batches


def shape(target: DecoderConfig, taps: tuple[int, ...], vocab_size: int) -> FeatureHeadConfig:
    """A head whose layer is one of the target's."""
    layer = dataclasses.replace(target, num_layers=1, vocab_size=vocab_size, dtype="float32", tie_embeddings=False)
    return FeatureHeadConfig(layer, taps)


def _evaluate(config: FeatureHeadConfig, params: Any, frozen: heads.Frozen, texts: Texts, rows: int) -> heads.Quality:
    """The quality on held-out texts."""
    judge = _judge(config)
    parts = [Texts(*(x[i : i + rows] for x in texts)) for i in range(0, len(texts.length) - rows + 1, rows)]
    found = [jax.device_get(judge(params, frozen, part)) for part in parts[:4]]
    return jax.tree.map(lambda *x: np.mean(x, axis=0), *found)


def _judge(config: FeatureHeadConfig) -> Any:
    return jax.jit(lambda params, frozen, texts: heads.judge(config, params, frozen, texts, depth=3, whole=True))


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Writes texts and trains, as `EXPERIMENTS` says; the texts of an earlier run are kept unless `overwrite`."""
    view, directory = view or View(), pathlib.Path(workdir)
    chosen = parse(Settings, config)
    if overwrite:
        for path in (directory / "texts").glob("*"):
            path.unlink()
    batches = _write(chosen, directory, view)
    _train(chosen, load(chosen.target), batches, directory, view)


def _train(chosen: Settings, target: Pretrained, batches: Sequence[Texts], directory: pathlib.Path, view: View) -> None:
    held_out, batches = batches[0], batches[1:]
    tokens = heads.frequent_tokens(batches, chosen.vocab_size)
    assert isinstance(target.config, DecoderConfig)
    assert target.tokenizer is not None
    config = shape(target.config, chosen.taps, len(tokens))
    every = np.arange(target.config.vocab_size)
    output = feature_head.output_rows(target.config, target.params, every)
    embeddings = feature_head.embed(target.config, target.params, jnp.asarray(every)[None])[0]
    frozen = heads.Frozen(embeddings, output, output[tokens])
    params = heads.ridge(config, feature_head.initial(config, jax.random.key(chosen.seed)), embeddings, batches)
    vocabulary = store.fingerprint(target.tokenizer)

    def note(step: int, params: Any) -> None:
        quality = _evaluate(config, params, frozen, held_out, chosen.rows)
        greedy, sampled = (", ".join(f"{x:.3f}" for x in rates) for rates in quality[:2])
        view.line(f"step {step}: acceptance at temperature 0: {greedy}; at 1: {sampled}; loss {quality.loss:.3f}")
        drafters.save_feature_head(Head(config, params, tokens, vocabulary), directory)

    def report(state: heads.TrainState, loss: float) -> bool:
        del loss
        if state.step % chosen.eval_every == 0 or state.step == chosen.steps:
            note(state.step, state.params)
        return True

    note(0, params)
    recipe = heads.Recipe(
        learning_rate=chosen.learning_rate,
        num_steps=chosen.steps,
        batch_size=chosen.rows,
        depth=chosen.depth,
        seed=chosen.seed,
    )
    heads.train(config, params, frozen, batches, recipe, report)
    view.line(f"The head is in {directory}: --config.drafter=feature_head --config.draft={directory}.", "bold")
