"""The models, drafters and rules that flags name; those of a user's own files are read by `own`.

Everything that can be checked without a model is checked by `Models.check` and the other functions here.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from specjax import drafters, limits, sampling
from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.decoding.verify import Rule
from specjax.experiments import own
from specjax.experiments.settings import Check, at_least, between, given, one_of
from specjax.parallel import sharding
from specjax.types import AnyDrafter

DRAFTERS = ("model", "ngram", "suffix", "aggressive", "merged", "none", "table", "retrieval")

WITH_DRAFT = {"model": "SOURCE", "table": "PATH (of configs/count.py)", "retrieval": "PATH (of configs/count.py)"}
"""Drafters that need `config.draft`, and what that is."""

MAY_HAVE_DRAFT = ("merged",)
"""Drafters that take the SOURCE of a draft model in `config.draft`, but do not need one."""

DRAFT_TOKENS = between(0, limits.MAX_DRAFT_TOKENS, "; 4 to 10 are common")
"""A number of draft tokens that a machine has memory for."""

MAX_MATCH = 64
"""The longest match in tokens: each token is compared with the whole text."""


@dataclasses.dataclass(frozen=True)
class Models:
    """The keys that say what is loaded, and where it is placed."""

    target: Annotated[str, given("SOURCE")]
    drafter: str
    draft: str
    draft_int8: bool
    min_confidence: Annotated[float, Check(lambda p: 0 <= p <= 1, "a probability, from 0 (off) to 1")]
    min_match: Annotated[int, between(1, MAX_MATCH, " tokens")]
    dtype: Annotated[str, one_of("float32", "bfloat16")]
    mesh_data: Annotated[int, at_least(1)]
    mesh_model: Annotated[int, at_least(1)]
    mesh_whole: str
    draft_sharding: Annotated[str, one_of("split", "replicated")]

    known_drafters: ClassVar[tuple[str, ...]] = DRAFTERS
    """The drafters that may be chosen, besides a user's own."""

    def check(self) -> None:
        """Refuses a drafter that cannot be made, before anything is loaded.

        Raises:
          ValueError: naming the key, its value and the remedy.
          FileNotFoundError: where a file does not exist.
        """
        sharding.with_whole(self.mesh_whole)
        name, draft = self.drafter, self.draft
        if own.is_own(name):
            own.drafter_function(name)
        elif name not in self.known_drafters:
            known = ", ".join(self.known_drafters)
            raise ValueError(f"config.drafter={name!r}: choose one of {known}, or FILE.py:FUNCTION.")
        if name != "model" and (self.draft_int8 or self.min_confidence):
            raise ValueError(
                f"config.draft_int8={self.draft_int8}, config.min_confidence={self.min_confidence}: only a draft model "
                f"has either, but config.drafter={name!r}. Give --config.drafter=model, or leave them out."
            )
        if name in WITH_DRAFT and not draft:
            raise ValueError(
                f"config.drafter={name!r} needs a draft: give --config.draft={WITH_DRAFT[name]}, or choose "
                "drafter=ngram."
            )
        if name not in (*WITH_DRAFT, *MAY_HAVE_DRAFT) and draft and not own.is_own(name):
            raise ValueError(f"config.draft={draft!r} is not used by drafter={name}: leave it out.")
        if name in ("table", "retrieval") and not pathlib.Path(draft).expanduser().exists():
            raise FileNotFoundError(f"config.draft={draft!r} does not exist: configs/count.py makes such a draft.")


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


def drafter_of(chosen: Models, target: Pretrained, load_draft: Callable[[], Pretrained]) -> Callable[[int], AnyDrafter]:
    """The chosen drafter, as a function of K.

    Raises:
      ValueError: where what is loaded does not fit.
      OSError: for files that cannot be read.
    """
    shortest, longest = chosen.min_match, max(chosen.min_match, 8)
    if own.is_own(chosen.drafter):
        return own.drafter(chosen.drafter, chosen.draft, target)
    if chosen.drafter == "model":
        draft = load_draft()
        return lambda k: drafters.model(draft, num_draft_tokens=k, min_confidence=chosen.min_confidence)
    if chosen.drafter == "ngram":
        return lambda k: drafters.ngram(num_draft_tokens=k, min_match=shortest, max_match=longest)
    if chosen.drafter == "suffix":
        return lambda k: drafters.suffix(num_draft_tokens=k, min_match=shortest)
    if chosen.drafter == "aggressive":
        return lambda k: drafters.aggressive(num_draft_tokens=k)
    if chosen.drafter == "merged":
        return _merged(chosen, load_draft)
    if chosen.drafter == "table":
        table = drafters.load_table(chosen.draft)
        return lambda k: drafters.table(table, num_draft_tokens=k)
    if chosen.drafter == "retrieval":
        datastore = drafters.load_datastore(chosen.draft)
        longest = max(min(longest, datastore.depth), shortest)
        return lambda k: drafters.retrieval(datastore, num_draft_tokens=k, min_match=shortest, max_match=longest)
    return lambda k: drafters.none()


def _merged(chosen: Models, load_draft: Callable[[], Pretrained]) -> Callable[[int], AnyDrafter]:
    """Lookup and suffix lookup in one tree, or lookup and a draft model where there is one, of K tokens each."""
    shortest, longest = chosen.min_match, max(chosen.min_match, 8)

    def lookup(k: int) -> AnyDrafter:
        return drafters.ngram(num_draft_tokens=k, min_match=shortest, max_match=longest)

    if not chosen.draft:
        return lambda k: drafters.merged([lookup(k), drafters.suffix(num_draft_tokens=k, min_match=shortest)])
    draft = load_draft()
    return lambda k: drafters.merged([drafters.model(draft, num_draft_tokens=k), lookup(k)])
