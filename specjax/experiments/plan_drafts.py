"""The drafts that `configs/plan.py` plans, by `config.drafter`: how each is written, and its `planning.kinds.Kind`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from specjax import drafters, files
from specjax.drafters import model_dynamic
from specjax.models import eagle
from specjax.models.config import DecoderConfig, ModelConfig
from specjax.models.eagle import EagleConfig
from specjax.models.parallel_heads import ParallelHeadsConfig
from specjax.models.weights import shapes
from specjax.planning import kinds
from specjax.planning.kinds import Kind

Tree = tuple[int, ...]
"""The width, depth and nodes of a dynamic tree (`drafters.Dynamic`)."""


class Planned(NamedTuple):
    """One way to draft.

    Attributes:
      shape: `(config.draft, target, dtype) -> ` the draft's shape.
      kind: `(dynamic tree or None) -> Kind`.
      spelling: how `config.draft` is written.
      needs_draft: whether it has to be given.
      trees: whether it drafts dynamic trees.
    """

    shape: Callable[[str, ModelConfig, str], Any]
    kind: Callable[[drafters.Dynamic | None], Kind]
    spelling: str
    needs_draft: bool = True
    trees: bool = False


def _model(name: str, target: ModelConfig, dtype: str) -> ModelConfig:
    del target
    return shapes.read(name, dtype)


def _number(name: str, text: str, spelling: str) -> int:
    if not text.isdigit():
        raise ValueError(f"config.draft={name!r}: write {spelling}.")
    return int(text)


_EAGLE = "eagle3:TOKENS (0: all), eagle1, a directory with the config.json of a head, or a hub id"


def _eagle(name: str, target: ModelConfig, dtype: str) -> EagleConfig:
    """A head whose layer is like one of the target's, or of the sizes that its own `config.json` says."""
    if not isinstance(target, DecoderConfig):
        raise ValueError("config.drafter='eagle': EAGLE heads read decoders, and config.target is an encoder-decoder.")
    like, _, size = name.partition(":")
    if like == "eagle1":
        return eagle.like(target, (target.num_layers,), version=1)
    taps = eagle.default_taps(target.num_layers)
    if like == "eagle3":
        return eagle.like(target, taps, _number(name, size, _EAGLE))
    layer = shapes.read(name, dtype)
    if not isinstance(layer, DecoderConfig) or layer.num_layers != 1:
        raise ValueError(f"config.draft={name!r} is no head of one layer: write {_EAGLE}.")
    known = files.read_json(shapes.directory(name) / "config.json").get("draft_vocab_size") or target.vocab_size
    head = eagle.like(layer, taps, int(known))
    return EagleConfig(head.layer, taps, target.hidden_size)


def _heads(kind: str, inner: Callable[[int, ModelConfig], int]) -> Callable[[str, ModelConfig, str], Any]:
    spelling = f"{kind}:HEADS, or {kind}:HEADS:own with output matrices of their own"

    def shape(name: str, target: ModelConfig, dtype: str) -> ParallelHeadsConfig:
        parts = name.split(":")
        if parts[0] != kind or len(parts) not in (2, 3) or parts[2:] not in ([], ["own"]):
            raise ValueError(f"config.draft={name!r}: write {spelling}.")
        number = _number(name, parts[1], spelling)
        size = target.head_size if len(parts) == 3 else 0
        return ParallelHeadsConfig(
            kind, number, target.hidden_size, inner_size=inner(number, target), output_size=size, dtype=dtype
        )

    return shape


def _nothing(name: str, target: ModelConfig, dtype: str) -> None:
    del target, dtype
    if name:
        raise ValueError(f"config.draft={name!r}: the target reads the masks itself; leave it out.")


_SHAPE = "SHAPE, a preset, a directory or a hub id"

DRAFTERS = {
    "model": Planned(_model, kinds.model, _SHAPE, trees=True),
    "eagle": Planned(_eagle, kinds.eagle, _EAGLE, trees=True),
    "medusa": Planned(_heads("medusa", lambda k, target: 0), lambda _: kinds.PARALLEL_HEADS, "medusa:HEADS"),
    "blockwise": Planned(
        # As wide for each head as the target's own feed-forward (`configs/heads.py`).
        _heads("blockwise", lambda k, target: k * target.intermediate_size),
        lambda _: kinds.PARALLEL_HEADS,
        "blockwise:HEADS",
    ),
    "pard": Planned(_model, lambda _: kinds.PARD, _SHAPE),
    "parallel_masks": Planned(_nothing, lambda _: kinds.MASKS, "nothing", needs_draft=False),
    "mask_tokens": Planned(_nothing, lambda _: kinds.FUSED_MASKS, "nothing", needs_draft=False),
}
"""By `config.drafter`. Another way to draft is added here."""


def check(drafter: str, draft: str, trees: tuple[Tree, ...], quantise: str) -> None:
    """Refuses what does not go together, before any shape is read.

    Raises:
      ValueError: naming the key, its value and the remedy.
    """
    planned = DRAFTERS[drafter]
    if planned.needs_draft and not draft:
        raise ValueError(f"config.draft is empty: give --config.draft={planned.spelling}.")
    if quantise and planned.shape is not _model:
        raise ValueError(f"config.draft_quantise={quantise!r}: only a draft that is a model has it; leave it out.")
    if trees and not planned.trees:
        having = ", ".join(name for name, entry in DRAFTERS.items() if entry.trees)
        raise ValueError(f"config.trees={trees}: drafter={drafter} drafts none; leave it out, or choose {having}.")
    for tree in trees:
        if len(tree) != 3:
            raise ValueError(f"config.trees has {tree}: give (width, depth, nodes), such as (10, 7, 59).")
        model_dynamic.check(drafters.Dynamic(*tree))
