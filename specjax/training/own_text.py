"""Texts that target and draft write themselves, for distillation (DistillSpec, arXiv 2310.08461, section 4).

What follows a prompt is the given text, the target's continuation, or the draft's, which is written anew by the current
draft every few steps (on-policy). All of it is decoded by `specjax.generate`, and kept in files, so that a run that
resumes does not write it again.
"""

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from specjax import files
from specjax.api.generate import generate
from specjax.api.pretrained import Pretrained
from specjax.training import data
from specjax.training.data import Dataset, Example
from specjax.types import Tree

Report = Callable[[int, int], None]
"""Takes how many texts of how many are written."""


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
      tokens: what is read: by the encoder, or by a language model.
      given: the text that it came with, or None.
    """

    tokens: tuple[int, ...]
    given: Example | None


@dataclasses.dataclass(frozen=True)
class Writing:
    """How texts are written.

    Attributes:
      temperature: that of both models.
      max_new_tokens: the most tokens of a text.
      batch_size: texts that are written together.
      prompt_width: the length that prompts are padded to, at least that of the longest.
      seed: determines the texts.
    """

    temperature: float
    max_new_tokens: int
    batch_size: int
    prompt_width: int
    seed: int


class Shares(NamedTuple):
    """The shares of the three kinds of text, which add up to one.

    Attributes:
      fixed: of the given texts.
      target: of continuations by the target.
      draft: of continuations by the draft.
    """

    fixed: float
    target: float
    draft: float


def write(
    model: Pretrained, prompts: Sequence[Sequence[int]], seeds: Sequence[int], writing: Writing
) -> list[list[int]]:
    """The model's continuations of one batch of prompts, stop tokens included. A text depends on its own seed alone."""
    missing = writing.batch_size - len(prompts)
    # One shape for all batches, so that nothing is compiled twice.
    out = generate(
        model,
        [*prompts, *[prompts[-1]] * missing],
        max_new_tokens=writing.max_new_tokens,
        temperature=writing.temperature,
        seed=[*seeds, *[0] * missing],
        prompt_width=writing.prompt_width,
        step_cost=0.0,
    )
    return out.tokens[: len(prompts)]


class Texts:
    """Written texts in a file, a line each, by the number of their prompt."""

    def __init__(self, path: str | pathlib.Path, settings: Mapping[str, Any]):
        """Opens or makes the file.

        Raises:
          ValueError: where it holds texts that were written with other settings, or is broken before its last line.
        """
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.settings = json.loads(json.dumps(dict(settings)))
        self.by_number: dict[int, list[int]] = {}
        if self.path.is_file():
            self._read()
        else:
            files.write(self.path, json.dumps(self.settings) + "\n")

    def _read(self) -> None:
        *whole, _ = self.path.read_bytes().split(b"\n")
        try:
            found, *lines = [json.loads(line) for line in whole]
            self.by_number = {int(line["number"]): [int(token) for token in line["tokens"]] for line in lines}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self.path} is broken ({error!r}): delete it to have its texts written again, or give --overwrite."
            ) from error
        if found != self.settings:
            differ = [name for name in self.settings if found.get(name) != self.settings[name]]
            raise ValueError(
                f"{self.path} holds texts that were written with other settings ({', '.join(differ)}): choose another "
                "--workdir, or give --overwrite."
            )
        # A line that was being written when the run was killed is written again.
        files.write(self.path, "".join(line.decode() + "\n" for line in whole))

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """The prompts whose text is not written yet."""
        return [number for number in numbers if number not in self.by_number]

    def fill(
        self, numbers: Sequence[int], prompts: Sequence[Prompt], model: Pretrained, writing: Writing, report: Report
    ) -> None:
        """Writes the texts that are missing, a batch at a time."""
        left = self.missing(numbers)
        seeds = np.random.default_rng([writing.seed, zlib.crc32(self.path.name.encode())])
        seed_of = seeds.integers(2**32, size=len(prompts))
        for begin in range(0, len(left), writing.batch_size):
            report(len(numbers) - len(left) + begin, len(numbers))
            some = left[begin : begin + writing.batch_size]
            found = write(model, [prompts[n].tokens for n in some], [int(seed_of[n]) for n in some], writing)
            self._add(dict(zip(some, found, strict=True)), model)

    def _add(self, found: Mapping[int, list[int]], model: Pretrained) -> None:
        lines = []
        for number, tokens in found.items():
            text = {} if model.tokenizer is None else {"text": model.tokenizer.decode(tokens)}
            lines.append(json.dumps({"number": number, "tokens": tokens} | text, ensure_ascii=False) + "\n")
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            raise files.cannot_write(self.path, error) from error
        self.by_number |= found


class Lengths(NamedTuple):
    """The shape of a row: T tokens, after a source of S tokens, or 0; and the start token of an encoder-decoder."""

    target_length: int
    source_length: int
    start_token: int | None


def example(prompt: Prompt, tokens: Sequence[int], lengths: Lengths) -> Example | None:
    """A written text as it is learnt: its own tokens, given the prompt; None where the prompt fills the row."""
    source, context = [], list(prompt.tokens)
    if lengths.start_token is not None:
        source, context = list(prompt.tokens), [lengths.start_token]
    sizes = {"target_length": lengths.target_length, "source_length": lengths.source_length}
    return data.cut(source, context, list(tokens), **sizes)[0]


def packed(examples: Sequence[Example | None], lengths: Lengths, seed: int) -> Dataset:
    """The texts that are not None, packed.

    Raises:
      ValueError: where there is none.
    """
    kept = [text for text in examples if text is not None]
    if not kept:
        raise ValueError(f"No text fits into target_length={lengths.target_length} tokens: raise it.")
    encoded = data.Encoded(kept, 0, 0)
    return data.dataset(encoded, seed=seed, **lengths._asdict())


@dataclasses.dataclass(eq=False)
class OwnTexts:
    """The texts of a distillation (`fit.Source`).

    Attributes:
      prompts: the prompts.
      shares: the shares of the kinds of text.
      target: the target.
      draft: the draft, whose parameters are those of the step.
      writing: how texts are written.
      lengths: the shape of a row.
      directory: where texts are kept.
      every: steps after which the draft writes new texts.
      num_texts: texts of such a round, of all three kinds.
      report: called while texts are written.
      name: what the files of the draft's texts begin with.
    """

    prompts: list[Prompt]
    shares: Shares
    target: Pretrained
    draft: Pretrained
    writing: Writing
    lengths: Lengths
    directory: pathlib.Path
    every: int
    num_texts: int
    report: Report = lambda done, total: None
    name: str = "draft"
    _round: tuple[int, Dataset] | None = None

    @property
    def target_length(self) -> int:
        """T."""
        return self.lengths.target_length

    @property
    def source_length(self) -> int:
        """S, or 0."""
        return 0 if self.lengths.start_token is None else self.lengths.source_length

    @property
    def checksum(self) -> int:
        """CRC-32 of all prompts and given texts."""
        value = 0
        for prompt in self.prompts:
            value = zlib.crc32(np.array(prompt.tokens, np.int32).tobytes(), value)
            value = value if prompt.given is None else zlib.crc32(prompt.given.text.tobytes(), value)
        return value

    def at(self, step: int, params: Tree) -> Dataset:
        """The texts that a step reads; where a round begins, the draft writes them with these parameters.

        Raises:
          ValueError: where the draft's texts are missing in the middle of a round.
        """
        number, since = divmod(step, self.every) if self.shares.draft else (0, 0)
        if self._round is None or self._round[0] != number:
            self._round = number, self._make(number, params, begins=since == 0)
        return self._round[1]

    def _make(self, number: int, params: Tree, *, begins: bool) -> Dataset:
        """The texts of a round: each of its prompts is continued in one of the three ways."""
        size = min(self.num_texts, len(self.prompts)) if self.shares.draft else len(self.prompts)
        order = np.random.default_rng([self.writing.seed, number]).permutation(len(self.prompts))[:size].tolist()
        from_draft = round(size * self.shares.draft)
        from_target = from_draft + round(size * self.shares.target)
        by_draft, by_target, fixed = order[:from_draft], order[from_draft:from_target], order[from_target:]
        examples = [self.prompts[n].given for n in fixed]
        if by_target:
            tokens = self.of_target(by_target)
            examples += [example(self.prompts[n], tokens[n], self.lengths) for n in by_target]
        if by_draft:
            texts = Texts(self.directory / f"{self.name}-{number:05}.jsonl", self._settings())
            if texts.missing(by_draft) and not begins:
                raise ValueError(
                    f"{texts.path} lacks texts that the draft wrote at step {number * self.every}: restore it, or give "
                    "--overwrite."
                )
            texts.fill(by_draft, self.prompts, self.draft._replace(params=params), self.writing, self.report)
            examples += [example(self.prompts[n], texts.by_number[n], self.lengths) for n in by_draft]
        return packed(examples, self.lengths, self.writing.seed)

    def of_target(self, numbers: Sequence[int]) -> Mapping[int, list[int]]:
        """The target's continuations of some prompts, by their numbers; others may be there too."""
        texts = Texts(self.directory / "target.jsonl", self._settings())
        texts.fill(numbers, self.prompts, self.target, self.writing, self.report)
        return texts.by_number

    def to_count(self) -> Iterator[Sequence[int]]:
        """The tokens that a reduced vocabulary is counted from: of prompts, given texts, and the target's text."""
        for prompt in self.prompts:
            yield prompt.tokens
            if prompt.given is not None:
                yield prompt.given.text.tolist()
        if self.shares.target:
            yield from self.of_target(range(len(self.prompts))).values()

    def _settings(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.writing), "prompts_checksum": self.checksum}


def held_out(
    prompts: Sequence[Prompt],
    target: Pretrained,
    writing: Writing,
    lengths: Lengths,
    path: pathlib.Path,
    report: Report,
) -> Dataset:
    """The target's own continuations of held-out prompts, on which the acceptance rate is measured."""
    checksum = 0
    for prompt in prompts:
        checksum = zlib.crc32(np.array(prompt.tokens, np.int32).tobytes(), checksum)
    texts = Texts(path, {**dataclasses.asdict(writing), "prompts_checksum": checksum})
    texts.fill(range(len(prompts)), prompts, target, writing, report)
    written = [example(prompt, texts.by_number[n], lengths) for n, prompt in enumerate(prompts)]
    return packed(written, lengths, writing.seed)
