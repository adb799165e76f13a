"""The models, drafters and rules that flags name; those of a user's own files are read by `own`.

Everything that can be checked without a model is checked by `Models.check` and the other functions here.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from specjax import limits, sampling
from specjax.decoding import verify
from specjax.decoding.verify import Rule
from specjax.experiments import drafting, own
from specjax.experiments.settings import Check, at_least, between, given, one_of
from specjax.models import quantisation
from specjax.parallel import sharding

DRAFT_TOKENS = between(0, limits.MAX_DRAFT_TOKENS, "; 4 to 10 are common")
"""A number of draft tokens that a machine has memory for."""

QUANTISE = Check(lambda text: not text or quantisation.is_known(text), f"choose one of {quantisation.EXAMPLES}")
"""How a model is loaded, or an empty text."""

SPELLING = Check(
    lambda text: not text or (text != quantisation.KEEP and quantisation.is_known(text)),
    f"choose one of {quantisation.EXAMPLES}",
)
"""How a model is quantised, or an empty text."""

MAX_MATCH = 64
"""The longest match in tokens: each token is compared with the whole text."""


@dataclasses.dataclass(frozen=True)
class Models:
    """The keys that say what is loaded, and where it is placed."""

    target: Annotated[str, given("SOURCE")]
    drafter: str
    draft: str
    target_quantise: Annotated[str, QUANTISE]
    draft_quantise: Annotated[str, QUANTISE]
    min_confidence: Annotated[float, Check(lambda p: 0 <= p <= 1, "a probability, from 0 (off) to 1")]
    min_match: Annotated[int, between(1, MAX_MATCH, " tokens")]
    dtype: Annotated[str, one_of("float32", "bfloat16")]
    mesh_data: Annotated[int, at_least(1)]
    mesh_model: Annotated[int, at_least(1)]
    mesh_whole: str
    draft_sharding: Annotated[str, one_of("split", "replicated")]

    known_drafters: ClassVar[tuple[str, ...]] = ("model", "ngram")
    """The drafters of `drafting.DRAFTERS` that may be chosen, besides a user's own."""

    @property
    def target_name(self) -> str:
        """The target in results: a quantised one is another model than the one that it was made of."""
        return f"{self.target} ({self.target_quantise})" if self.target_quantise else self.target

    @property
    def draft_name(self) -> str:
        """The draft in results."""
        return f"{self.draft} ({self.draft_quantise})" if self.draft_quantise else self.draft

    def check(self) -> None:
        """Refuses a drafter that cannot be made, before anything is loaded.

        Raises:
          ValueError: naming the key, its value and the remedy.
          FileNotFoundError: where a file does not exist.
        """
        sharding.with_whole(self.mesh_whole)
        name = self.drafter
        if own.is_own(name):
            own.drafter_function(name)
        elif name not in self.known_drafters:
            known = ", ".join(self.known_drafters)
            raise ValueError(f"config.drafter={name!r}: choose one of {known}, or FILE.py:FUNCTION.")
        else:
            drafting.DRAFTERS[name].check(self)


@dataclasses.dataclass(frozen=True)
class AllModels(Models):
    """The keys of `Models`, and those of all drafters."""

    num_draft_tokens: Annotated[int, DRAFT_TOKENS]
    lengths: Annotated[tuple[int, ...], Check(lambda lengths: all(n > 0 for n in lengths), "numbers above 0")]
    topology: tuple[Any, ...]
    dynamic: tuple[int, ...]
    depth: Annotated[int, between(0, limits.MAX_DRAFT_TOKENS)]
    num_fallback_tokens: Annotated[int, DRAFT_TOKENS]
    window: Annotated[int, between(1, 256, " trajectories")]
    guesses: Annotated[int, between(1, 256)]
    mask_token: Annotated[int, at_least(0)]
    skip_attention: tuple[int, ...]
    skip_mlp: tuple[int, ...]
    exit_layer: Annotated[int, at_least(1)]

    known_drafters: ClassVar[tuple[str, ...]] = tuple(drafting.DRAFTERS)


def name_of(text: str) -> str:
    """The name of a drafter in tables: for one in a file, without the directories."""
    if not own.is_own(text):
        return text
    file, _, name = text.partition(":")
    return f"{pathlib.PurePath(file).name}:{name}"


def rule(text: str) -> Rule:
    """The acceptance rule that config.verify names.

    Raises:
      ValueError: for an unknown name, invalid numbers, or a file without a rule.
      FileNotFoundError: where the file does not exist.
    """
    return own.rule(text) if own.is_own(text) else verify.parse(text)


def compiler_options(pairs: Sequence[str]) -> dict[str, str]:
    """Options of XLA, each written NAME=VALUE.

    Raises:
      ValueError: for one that is written in another way.
    """
    for pair in pairs:
        if not pair.partition("=")[0].startswith("xla_") or "=" not in pair:
            raise ValueError(
                f"config.compiler_options has {pair!r}: write NAME=VALUE, such as xla_gpu_graph_min_graph_size=1."
            )
    return dict(pair.split("=", maxsplit=1) for pair in pairs)


def check_seed(seed: int, texts: int = 0) -> None:
    """Refuses a seed that is out of range, or from which the seeds of the texts would run out of range.

    Raises:
      ValueError: naming the key, its value and the bound.
    """
    if not 0 <= seed < 2**32 - texts:
        raise ValueError(f"config.seed={seed}: from 0 to {2**32 - 1 - texts}, since text i uses seed + i.")


def check_sampling(options: dict[str, Any]) -> None:
    """Refuses invalid sampling options.

    Raises:
      ValueError: naming the option, its value and the bounds.
    """
    for key, value in options.items():
        if not math.isfinite(value):
            raise ValueError(f"config.{key}={value} is not a finite number.")
    try:
        sampling.options(1, **options)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"config.{error}") from error


def check_rule(text: str, temperature: float) -> None:
    """Refuses a rule that does not exist or does not fit the temperature.

    Raises:
      ValueError: naming the key, its value and the remedy.
      FileNotFoundError: where its file does not exist.
    """
    chosen = rule(text)
    if chosen is verify.greedy and temperature > 0:
        raise ValueError(f"config.verify='greedy' is for temperature 0, not {temperature}: choose rejection.")
