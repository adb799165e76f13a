"""Adapts a small model to masks (PARD), and saves it as `specjax.load` and `configs/compare.py` read it."""

import dataclasses
import functools
import pathlib
from typing import Annotated

from specjax.experiments import one_call
from specjax.experiments.one_call import OneCall
from specjax.experiments.reports.display import View
from specjax.experiments.settings import Check, Config, at_least, given, parse
from specjax.training import pard, slots
from specjax.training.fit import Run, Task

_SHARE = Check(lambda share: 0 < share <= 1, "a share above 0, and at most 1")


@dataclasses.dataclass(frozen=True)
class Settings(OneCall):
    """The keys of `configs/pard.py`."""

    draft: Annotated[str, given("SOURCE")]
    num_masks: Annotated[int, at_least(1)]
    keep_masks: Annotated[float, _SHARE]
    least_masks: Annotated[float, _SHARE]


def _prepare(chosen: Settings, view: View) -> Run:
    mesh = one_call.mesh_of(chosen)
    draft = one_call.model_of(chosen.draft, mesh, view)
    assert draft.tokenizer is not None
    shares = {"keep": chosen.keep_masks, "least": chosen.least_masks}
    try:
        config = slots.adapted(draft.config, chosen.mask_token)
        training, held_out = (
            pard.with_masks(texts, chosen.mask_token, chosen.num_masks, **shares)
            for texts in one_call.texts(chosen, draft)
        )
    except ValueError as error:
        raise ValueError(f"config.{error}") from error
    view.line(f"Rows of {chosen.target_length} tokens and {sum(training.counts)} masks.")
    names = ("draft", "mask_token", "num_masks", "keep_masks", "least_masks")
    task = Task(training.objective, identity={"pard": {name: getattr(chosen, name) for name in names}})
    return Run(config, chosen.optimisation, training, held_out, draft.tokenizer, mesh, task, draft.params)


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Adapts a model, as `EXPERIMENTS` says; FloatingPointError where the loss is not finite."""
    chosen = parse(Settings, config)
    one_call.train(
        config,
        chosen,
        functools.partial(_prepare, chosen),
        workdir,
        overwrite=overwrite,
        view=view or View(),
        begins_with=chosen.draft,
        drafter="pard",
        num_draft_tokens=chosen.num_masks + 1,
    )
