"""Trains a head over a target's hidden states, and saves it as `specjax.load_draft` reads it."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax import drafters, files
from specjax.api.pretrained import Pretrained, load
from specjax.drafters import store
from specjax.drafters.feature_head import Head
from specjax.experiments import board, results
from specjax.experiments.instructions import instructions
from specjax.experiments.reports.display import View
from specjax.experiments.settings import POSITIVE, Check, Config, at_least, between, given, one_of, parse
from specjax.experiments.store import clear
from specjax.models import eagle, feature_head
from specjax.models.config import DecoderConfig
from specjax.models.eagle import EagleConfig
from specjax.models.feature_head import FeatureHeadConfig
from specjax.training import fit, harvest, heads
from specjax.training.harvest import Texts

TEXTS, QUALITY = "texts", "results.json"
"""The directory of the texts, and the file of the evaluations."""

_OF_TEXTS = ("target", "texts", "taps", "batch_size", "prompt_width", "max_new_tokens", "own_prompts", "seed")
"""The keys that determine the texts."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `configs/head.py`."""

    name: str
    kind: Annotated[str, one_of("feature_head", "eagle")]
    version: Annotated[int, Check(lambda version: version in (1, 3), "1 for EAGLE and EAGLE-2, or 3 for EAGLE-3")]
    target: Annotated[str, given("SOURCE")]
    texts: str
    taps: tuple[int, ...]
    vocab_size: Annotated[int, at_least(1)]
    num_batches: Annotated[int, at_least(2)]
    batch_size: Annotated[int, at_least(1)]
    prompt_width: Annotated[int, at_least(8)]
    max_new_tokens: Annotated[int, at_least(2)]
    own_prompts: Annotated[float, between(0, 1, ", a share")]
    steps: Annotated[int, at_least(1)]
    rows: Annotated[int, at_least(1)]
    depth: Annotated[int, at_least(1)]
    learning_rate: Annotated[float, POSITIVE]
    prompt_weight: Annotated[float, between(0, 1)]
    clip: Annotated[float, POSITIVE]
    only_known: bool
    eval_every: Annotated[int, at_least(1)]
    tensorboard: Annotated[bool, board.INSTALLED]
    seed: Annotated[int, at_least(0)]

    def check(self) -> None:
        """Refuses rows that the held-out batch does not have, and a file that does not exist."""
        if self.rows > self.batch_size:
            raise ValueError(
                f"config.rows={self.rows}: at most config.batch_size={self.batch_size}, the held-out batch is read so."
            )
        if self.kind == "eagle" and self.version == 3 and len(self.taps) < 2:
            raise ValueError(
                f"config.taps={self.taps}: config.kind='eagle' reads all of them but the last, which is learnt; give "
                "those before it too, such as (2, 15, 27, 30) for 30 layers."
            )
        if self.texts:
            files.check_file(pathlib.Path(self.texts).expanduser(), "config.texts: the file", "give JSONL with `text`")


def _passages(path: str) -> list[str]:
    """The passages of a file that are neither short nor long."""
    if not path:
        return []
    lines = (line for _, line in files.read_json_lines(pathlib.Path(path)))
    found = (line.get("text") or line.get("input") or "" for line in lines)
    return [text for text in found if 40 <= len(text) <= 500]


def _load(chosen: Settings, dtype: str) -> tuple[Pretrained, DecoderConfig]:
    """The target, and its shape.

    Raises:
      ValueError: for a target that a head cannot read.
    """
    target = load(chosen.target, dtype=dtype)
    config = target.config
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"config.target={chosen.target!r}: a head reads a decoder-only target.")
    if target.tokenizer is None or not target.tokenizer.has_chat_template:
        raise ValueError(f"config.target={chosen.target!r} has no chat template, in which it is asked for texts.")
    if not chosen.taps or chosen.taps[-1] != config.num_layers:
        raise ValueError(
            f"config.taps={chosen.taps}: the last hidden state is learnt too; end with {config.num_layers}, the "
            "number of the target's layers."
        )
    return target, config


def check_texts(chosen: Settings, directory: pathlib.Path) -> None:
    """Refuses texts that were written with other settings, and notes those of these.

    Raises:
      ValueError: naming the keys that differ.
    """
    path = directory / "config.json"
    ours = json.loads(json.dumps({key: getattr(chosen, key) for key in _OF_TEXTS}))
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps(ours, indent=1) + "\n")
        return
    before = files.read_json(path)
    differ = [
        f"config.{key}={before.get(key)!r} before, {ours[key]!r} now" for key in ours if before.get(key) != ours[key]
    ]
    if differ:
        raise ValueError(
            f"{directory} has texts of other settings ({'; '.join(differ)}): give another --workdir, or --overwrite."
        )


def _write(chosen: Settings, directory: pathlib.Path, view: View) -> list[Texts]:
    """The texts, written by the target in bfloat16 where they are not there yet."""
    check_texts(chosen, directory)
    prompts = [line["prompt"] for line in instructions(20_000, _passages(chosen.texts), seed=chosen.seed)]
    found = harvest.harvest(
        _load(chosen, "bfloat16")[0],
        prompts,
        directory,
        chosen.taps,
        num_batches=chosen.num_batches,
        batch_size=chosen.batch_size,
        prompt_width=chosen.prompt_width,
        max_new_tokens=chosen.max_new_tokens,
        own=chosen.own_prompts,
        seed=chosen.seed,
    )
    batches = []
    with view.progress(chosen.num_batches, what="batch", remaining=True) as bar:
        for path in found:
            batches.append(harvest.read_texts(path))
            view.line(f"{path.name}: {int(batches[-1].length.sum())} tokens.")
            bar.advance(bar.task_ids[0])
    return batches


def shape(target: DecoderConfig, taps: tuple[int, ...], vocab_size: int) -> FeatureHeadConfig:
    """A head whose layer is one of the target's, without a window; of experts, it has the feed-forward of one."""
    changes = {"num_layers": 1, "vocab_size": vocab_size, "dtype": "float32", "tie_embeddings": False, "experts": None}
    changes |= {"sliding_window": None, "global_layers": (), "local_rope_theta": None, "mask_token": None}
    layer = dataclasses.replace(target, **changes)
    return FeatureHeadConfig(layer, taps)


class Kind(NamedTuple):
    """A kind of head.

    Attributes:
      shape: `(target, taps, vocab_size) -> ` the shape, in float32, given the hidden states of the texts.
      initial: `(shape, frozen, texts, seed) -> ` its first parameters.
      save: `(target, shape, params, tokens, directory)` writes it in bfloat16.
      files: what it writes.
      taps: which of the hidden states of the texts it is trained on; the last is learnt.
      draws_all: whether it drafts all of the target's tokens, whatever `config.vocab_size` is.
      recipe: entries of `heads.Recipe` that it has in the place of the config's.
    """

    shape: Callable[[DecoderConfig, tuple[int, ...], int], heads.AnyHead]
    initial: Callable[[Any, heads.Frozen, Sequence[Texts], int], Any]
    save: Callable[[Pretrained, Any, Any, np.ndarray, pathlib.Path], None]
    files: tuple[str, ...]
    taps: slice = slice(None)
    draws_all: bool = False
    recipe: Mapping[str, Any] = MappingProxyType({})


def _ridge(head: FeatureHeadConfig, frozen: heads.Frozen, batches: Sequence[Texts], seed: int) -> Any:
    return heads.ridge(head, feature_head.initial(head, jax.random.key(seed)), frozen.embeddings, batches)


def _save(
    target: Pretrained, head: FeatureHeadConfig, params: Any, tokens: np.ndarray, directory: pathlib.Path
) -> None:
    assert target.tokenizer is not None  # As `_load` has checked.
    drafters.save_feature_head(Head(head, params, tokens, store.fingerprint(target.tokenizer)), directory)


def _save_eagle(
    target: Pretrained, head: EagleConfig, params: Any, tokens: np.ndarray, directory: pathlib.Path
) -> None:
    known = tokens if head.own_head else None
    drafters.save_eagle(drafters.EagleHead(*eagle.cast(head, params, "bfloat16"), known), target, directory)


def _initial_eagle(head: EagleConfig, frozen: heads.Frozen, batches: Sequence[Texts], seed: int) -> Any:
    return heads.initial(head, frozen.rows, jax.random.key(seed))


_EAGLE_FILES = ("model.safetensors", "config.json")

EAGLES = {
    1: Kind(
        lambda target, taps, size: eagle.like(target, taps[-1:], version=1),
        _initial_eagle,
        _save_eagle,
        _EAGLE_FILES,
        taps=slice(-1, None),
        draws_all=True,
        # Section 4.2 of arXiv 2401.15077 and the authors' code: one draft token, smooth L1, a tenth of cross-entropy.
        recipe=MappingProxyType({"depth": 1, "feature_weight": 1.0, "token_weight": 0.1, "noise": 0.2}),
    ),
    3: Kind(lambda target, taps, size: eagle.like(target, taps[:-1], size), _initial_eagle, _save_eagle, _EAGLE_FILES),
}
"""By `config.version`, for `config.kind` of "eagle"."""

FEATURE_HEAD = Kind(shape, _ridge, _save, (store.FILE,))


def kind_of(chosen: Settings) -> Kind:
    """The kind of head that is trained."""
    return EAGLES[chosen.version] if chosen.kind == "eagle" else FEATURE_HEAD


@functools.cache
def _judge(config: heads.AnyHead) -> Any:
    return jax.jit(lambda params, frozen, texts: heads.judge(config, params, frozen, texts, depth=3, whole=True))


def _evaluate(config: heads.AnyHead, params: Any, frozen: heads.Frozen, texts: Texts, rows: int) -> heads.Quality:
    """The quality on held-out texts, by groups of rows."""
    parts = [Texts(*(x[i : i + rows] for x in texts)) for i in range(0, len(texts.length) - rows + 1, rows)]
    found = [jax.device_get(_judge(config)(params, frozen, part)) for part in parts]
    return jax.tree.map(lambda *x: np.mean(x, axis=0), *found)


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Writes texts and trains, as `EXPERIMENTS` says; the texts of an earlier run are kept unless `overwrite`."""
    view, directory, chosen = view or View(), pathlib.Path(workdir), parse(Settings, config)
    if overwrite:
        clear(directory, (TEXTS, QUALITY, *kind_of(chosen).files, board.DIRECTORY))
    try:
        batches = _write(chosen, directory / TEXTS, view)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the batches of texts that are finished are kept") from None
    with board.beside(lambda lines: None, directory, chosen.tensorboard) as told:
        _train(chosen, batches, directory, view, told)


def _train(chosen: Settings, batches: Sequence[Texts], directory: pathlib.Path, view: View, told: fit.Report) -> None:
    kind, (target, config) = kind_of(chosen), _load(chosen, "float32")
    held_out, *batches = (texts._replace(features=texts.features[:, :, kind.taps]) for texts in batches)
    every = np.arange(config.vocab_size)
    tokens = every if kind.draws_all else heads.frequent_tokens(batches, chosen.vocab_size)
    head = kind.shape(config, chosen.taps, len(tokens))
    output = feature_head.output_rows(config, target.params, every)
    embeddings = feature_head.embed(config, target.params, jnp.asarray(every)[None])[0]
    frozen = heads.Frozen(embeddings, output, output[tokens])
    params, rows = kind.initial(head, frozen, batches, chosen.seed), []

    def note(step: int, params: Any) -> None:
        quality = _evaluate(head, params, frozen, held_out, chosen.rows)
        greedy, sampled = (", ".join(f"{x:.3f}" for x in rates) for rates in quality[:2])
        view.line(f"step {step}: acceptance at temperature 0: {greedy}; at 1: {sampled}; loss {quality.loss:.3f}")
        rates = {name: [float(x) for x in getattr(quality, name)] for name in ("greedy", "overlap")}
        rows.append({"step": step, "loss": float(quality.loss), **rates})
        told([{"step": step, "valid_loss": float(quality.loss), **rates}])
        files.write(directory / QUALITY, json.dumps(rows, indent=1) + "\n")
        if _first(rows[-1]) >= max(map(_first, rows)):
            kind.save(target, head, params, tokens, directory)

    def report(state: heads.TrainState, loss: float) -> bool:
        told([{"step": state.step, "loss": loss}])
        if state.step % chosen.eval_every == 0 or state.step == chosen.steps:
            note(state.step, state.params)
        return True

    note(0, params)
    recipe = heads.Recipe(
        learning_rate=chosen.learning_rate,
        num_steps=chosen.steps,
        batch_size=chosen.rows,
        depth=chosen.depth,
        prompt_weight=chosen.prompt_weight,
        clip=chosen.clip,
        only_known=chosen.only_known,
        seed=chosen.seed,
    )._replace(**kind.recipe)
    heads.train(head, params, frozen, batches, recipe, report)
    view.line(f"The head is in {directory}: --config.drafter={chosen.kind} --config.draft={directory}.", "bold")


def _first(row: results.Row) -> float:
    """The acceptance rate of the first draft token, at both temperatures together."""
    return row["greedy"][0] + row["overlap"][0]
