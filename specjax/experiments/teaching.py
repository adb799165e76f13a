"""What all runs that teach a draft by its target share: their settings, the target, and the texts."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
from jax.sharding import Mesh

from specjax.api import pretrained
from specjax.api.pretrained import Pretrained
from specjax.experiments import board, distill_data
from specjax.experiments.distill_data import Line
from specjax.experiments.reports.display import View
from specjax.experiments.settings import POSITIVE, Check, at_least, given, one_of
from specjax.models.weights import checkpoint
from specjax.parallel import sharding
from specjax.training import divergences, own_text
from specjax.training.config import TrainConfig
from specjax.training.data import Dataset
from specjax.training.own_text import Lengths, OwnTexts, Prompt, Shares, Writing

WRITTEN = "written"
"""The directory of the texts that models wrote."""


@dataclasses.dataclass(frozen=True)
class Teaching:
    """The keys that these runs share."""

    name: str
    target: Annotated[str, given("SOURCE")]
    target_dtype: Annotated[str, one_of("float32", "bfloat16")]
    data: Annotated[str, given("FILE")]
    num_prompts: Annotated[int, at_least(0)]
    valid: str
    num_valid: Annotated[int, at_least(1)]
    chat: Annotated[str, one_of("auto", "true", "false")]
    prompt_length: Annotated[int, at_least(1)]
    divergence: str
    temperature: Annotated[float, POSITIVE]
    mix: dict[str, float]
    max_new_tokens: Annotated[int, at_least(1)]
    write_batch_size: Annotated[int, at_least(1)]
    regenerate_every: Annotated[int, at_least(1)]
    texts_per_round: Annotated[int, at_least(1)]
    target_length: Annotated[int, at_least(2)]
    source_length: Annotated[int, at_least(1)]
    mesh_data: Annotated[int, at_least(1)]
    mesh_model: Annotated[int, at_least(1)]
    tensorboard: Annotated[bool, board.INSTALLED]
    seed: Annotated[int, Check(lambda value: 0 <= value < 2**32, "from 0 to 4294967295")]
    optimisation: TrainConfig

    @property
    def shares(self) -> Shares:
        """The shares of the kinds of text, which add up to one."""
        total = sum(self.mix.values())
        return Shares(**{name: value / total for name, value in self.mix.items()})

    def check_divergence(self) -> None:
        """Refuses a name that is not known."""
        divergences.named(self.divergence)

    def check(self) -> None:
        """Refuses values that do not fit each other, before anything is loaded."""
        try:
            self.check_divergence()
        except ValueError as error:
            raise ValueError(f"config.{error}") from error
        if not all(math.isfinite(value) and value >= 0 for value in self.mix.values()) or not sum(self.mix.values()):
            shown = ", ".join(f"mix.{name}={value}" for name, value in self.mix.items())
            raise ValueError(f"config.{shown}: shares of 0 or more, and one of them more than 0.")
        if self.write_batch_size % self.mesh_data:
            raise ValueError(
                f"config.write_batch_size={self.write_batch_size} is not a multiple of mesh_data={self.mesh_data}."
            )

    def identity(self, target: Pretrained, *names: str) -> dict[str, Any]:
        """What determines the objective and the texts, besides what `fit.identity` has; `names` of more keys."""
        shared = ("target", "divergence", "temperature", "mix", "max_new_tokens")
        shared += ("write_batch_size", "regenerate_every", "texts_per_round")
        values = {name: getattr(self, name) for name in (*shared, *names)}
        return {"distill": values, "target_model": checkpoint.config_to_json(target.config)}


class Taught(NamedTuple):
    """What a draft is taught with.

    Attributes:
      target: the target.
      mesh: where it is, or None.
      lines: the lines to train on.
      held_out: those that are held out.
    """

    target: Pretrained
    mesh: Mesh | None
    lines: list[Line]
    held_out: list[Line]


def load(chosen: Teaching, view: View) -> Taught:
    """Reads the data and loads the target.

    Raises:
      ValueError: for several processes, or a target without a tokenizer.
      OSError: for files that cannot be read.
    """
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes: a draft is distilled by one, on all devices of its host.")
    mesh = None
    if chosen.mesh_data * chosen.mesh_model > 1:
        mesh = sharding.make_mesh(data=chosen.mesh_data, model=chosen.mesh_model)
    with view.status(f"Reading {chosen.data}"):
        lines, held_out = _lines(chosen)
    with view.status(f"Loading {chosen.target}{pretrained.download_note(chosen.target)}"):
        target = pretrained.load(chosen.target, dtype=chosen.target_dtype, mesh=mesh)
    if target.tokenizer is None:
        raise ValueError(f"{chosen.target} has no tokenizer, which turns the prompts into tokens: give one that has.")
    return Taught(target, mesh, lines, held_out)


def _lines(chosen: Teaching) -> tuple[list[Line], list[Line]]:
    """The lines to train on, and those that are held out."""
    lines = distill_data.read(chosen.data)
    if chosen.valid:
        held_out = distill_data.choose(distill_data.read(chosen.valid), chosen.num_valid, chosen.seed)
        return distill_data.choose(lines, chosen.num_prompts, chosen.seed), held_out
    if len(lines) <= chosen.num_valid:
        raise ValueError(
            f"{chosen.data} has {len(lines)} lines, of which config.num_valid={chosen.num_valid} are held out: give "
            "more lines, or lower it."
        )
    wanted = chosen.num_prompts + chosen.num_valid if chosen.num_prompts else 0
    both = distill_data.choose(lines, wanted, chosen.seed)
    return both[chosen.num_valid :], both[: chosen.num_valid]


def _prompts(
    chosen: Teaching, target: Pretrained, lengths: Lengths, lines: Sequence[Line], view: View, what: str
) -> list[Prompt]:
    """Tokenised prompts that leave room for a text."""
    assert target.tokenizer is not None
    chat = target.tokenizer.has_chat_template if chosen.chat == "auto" else chosen.chat == "true"
    is_decoder = lengths.start_token is None
    longest = chosen.target_length - min(chosen.max_new_tokens, chosen.target_length // 2)
    found = distill_data.encode(
        lines,
        target,
        lengths,
        chat=chat and is_decoder,
        prompt_length=chosen.prompt_length,
        max_prompt=longest if is_decoder else chosen.source_length,
    )
    why = "as too long"
    if chosen.shares.fixed and what == "Training":
        found, why = [prompt for prompt in found if prompt.given is not None], f"{why}, or without text for mix.fixed"
    left_out = len(lines) - len(found)
    note = f", {left_out} left out {why}" if left_out else ""
    view.line(f"{what}: {len(found)} prompts{note}.")
    if not found:
        raise ValueError(f"{what}: none of {len(lines)} prompts fits: raise config.target_length, or shorten them.")
    return found


def texts(
    chosen: Teaching, taught: Taught, draft: Pretrained, directory: pathlib.Path, view: View
) -> tuple[OwnTexts, Dataset]:
    """The texts of a run, which models write where they are missing, and the held-out texts."""
    target = taught.target
    lengths = Lengths(chosen.target_length, chosen.source_length, target.model.start_token)
    prompts = _prompts(chosen, target, lengths, taught.lines, view, "Training")
    asked = _prompts(chosen, target, lengths, taught.held_out, view, "Held out")
    width = max(len(prompt.tokens) for prompt in [*prompts, *asked])
    writing = Writing(chosen.temperature, chosen.max_new_tokens, chosen.write_batch_size, width, chosen.seed)
    found = OwnTexts(
        prompts,
        chosen.shares,
        target,
        draft,
        writing,
        lengths,
        directory / WRITTEN,
        chosen.regenerate_every,
        chosen.texts_per_round,
        _Written(view),
    )
    valid = own_text.held_out(asked, target, writing, lengths, directory / WRITTEN / "held_out.jsonl", _Written(view))
    return found, valid


class _Written:
    """Says how many texts are written, at the first and then at every tenth."""

    def __init__(self, view: View):
        self.view, self.shown = view, -1

    def __call__(self, done: int, total: int) -> None:
        if self.shown != (tenth := 10 * done // max(total, 1)):
            self.shown = tenth
            self.view.line(f"Writing texts: {done} of {total}.")
