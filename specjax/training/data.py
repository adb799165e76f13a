"""From files of texts to packed batches.

Texts share rows: they are packed once, first-fit, longest first, in windows of a shuffled order; every epoch then
reshuffles the rows, by grain. The batch of step n is determined by the seed and n, so that a resumed run reads the
batches of an uninterrupted one, and there is no state of an iterator to restore.

Rows are packed here, since `grain.experimental.FirstFitPackIterDataset` makes the same rows of the same windows in more
than ten times the time, and of texts that are not sorted, rows with several times the padding.
"""

import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from specjax import files
from specjax.parallel import sharding
from specjax.text.tokenizer import Tokenizer
from specjax.types import Batch, Tree

T = TypeVar("T")

HUB = "hub:"
"""What the name of a hub data set begins with."""

WINDOW = 8192
"""Texts that are packed together."""


class Text(NamedTuple):
    """One training example.

    Attributes:
      input: the text that the target answers, or None.
      target: the text to learn.
    """

    input: str | None
    target: str


class Example(NamedTuple):
    """A tokenised text.

    Attributes:
      text: `[n + 1]` the n tokens that a decoder reads, each followed by its target.
      num_given: how many of the n targets have no loss.
      source: `[m]` what an encoder reads; empty for a language model.
    """

    text: np.ndarray
    num_given: int
    source: np.ndarray

    @property
    def size(self) -> int:
        """How many tokens the decoder reads."""
        return len(self.text) - 1


class Encoded(NamedTuple):
    """Tokenised texts, and how many were cut or dropped.

    Attributes:
      examples: the texts.
      num_cut: how many were truncated, on either side.
      num_dropped: how many were left out, since truncation left no targets.
    """

    examples: list[Example]
    num_cut: int
    num_dropped: int


def _parse(fields: Any, where: str) -> Text:
    if isinstance(fields, dict):
        given, target, text = (fields.get(name) for name in ("input", "target", "text"))
        if isinstance(given, str) and isinstance(target, str):
            return Text(given, target)
        if isinstance(text, str):
            return Text(None, text)
    found = files.listed(fields) if isinstance(fields, dict) else type(fields).__name__
    raise ValueError(f"{where} has neither 'input' and 'target' nor 'text': it has {found}.")


def _read_hub(name: str) -> Iterator[Text]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"{HUB}{name} needs the datasets package: pip install datasets, or give a JSONL file."
        ) from error
    repo, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(repo, split=split or "train")
    except Exception as error:  # The package raises whatever its parts raise.
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"The data set {repo!r} (split {split or 'train'!r}) cannot be read ({type(error).__name__}: {reason}): "
            f"check the name, {HUB}NAME or {HUB}NAME:SPLIT, and the network."
        ) from error
    for number, fields in enumerate(rows):
        yield _parse(fields, f"{HUB}{name}, row {number},")


def read(source: str) -> list[Text]:
    """Reads the texts of a file or of a hub data set.

    Args:
      source: a JSONL file, unpacked where it ends in `.xz`, or `hub:NAME[:SPLIT]`. A line has an `input` and a
        `target`, or a `text`.

    Raises:
      FileNotFoundError: where there is no such file.
      OSError: where a hub data set cannot be loaded, or the file is a directory or cannot be read.
      ValueError: for a line that is not JSON or has other fields, a damaged file, a data set without texts, or where
        `datasets` is not installed.
    """
    if source.startswith(HUB):
        texts = list(_read_hub(source.removeprefix(HUB)))
    else:
        path = pathlib.Path(source).expanduser()
        files.check_file(path, "The data file", f"give a JSONL file, or {HUB}NAME[:SPLIT]")
        texts = [_parse(fields, where) for where, fields in files.read_json_lines(path)]
    if not texts:
        raise ValueError(f"{source} has no texts.")
    return texts


def _ids(tokenizer: Tokenizer, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    return [found.ids for found in tokenizer.backend.encode_batch(list(texts), add_special_tokens=special)]


def end_token(tokenizer: Tokenizer) -> int:
    """The token that a text is taught to end with.

    Raises:
      ValueError: where the tokenizer has none.
    """
    if not tokenizer.eos_token_ids:
        raise ValueError("The vocabulary has no end token (eos_token), which texts are taught to end with.")
    return tokenizer.eos_token_ids[0]


def cut(
    source: list[int], context: list[int], target: list[int], *, target_length: int, source_length: int
) -> tuple[Example | None, bool]:
    """A tokenised text that fits into a row, or None where no target is left; and whether it was cut.

    Args:
      source: what an encoder reads; a source that is too long keeps its last token, the end token.
      context: what the decoder is given, one token at least.
      target: what it learns.
      target_length: T, the most tokens that a decoder reads.
      source_length: S, the most that an encoder reads.
    """
    fits = source if len(source) <= source_length else [*source[: source_length - 1], source[-1]]
    whole = [*context, *target]
    kept = whole[: target_length + 1]
    num_given = max(len(context) - 1, 0)
    was_cut = len(fits) < len(source) or len(kept) < len(whole)
    if num_given >= len(kept) - 1:
        return None, was_cut
    return Example(np.array(kept, np.int32), num_given, np.array(fits, np.int32)), was_cut


def encode(
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    *,
    start_token: int | None,
    target_length: int,
    source_length: int,
) -> Encoded:
    """Tokenises texts, and cuts those that do not fit into a row.

    An encoder-decoder reads the input as the tokenizer encodes a prompt, and learns the target and the end token after
    its start token. A language model reads the input, encoded in the same way, and the target as one sequence, of which
    it learns the target; of a `text` it learns all tokens, after the begin token where the vocabulary has one.

    Args:
      texts: the texts; for an encoder-decoder, all with an input.
      tokenizer: the vocabulary.
      start_token: the start token of an encoder-decoder's decoder; None for a language model.
      target_length: T, the most tokens that a decoder reads.
      source_length: S, the most that an encoder reads.

    Raises:
      ValueError: for a text that the model cannot use, or a vocabulary without an end token.
    """
    end = end_token(tokenizer)
    if start_token is not None:
        for number, text in enumerate(texts):
            if text.input is None:
                raise ValueError(f"Text {number} has no input, which an encoder-decoder reads: give input and target.")
    inputs = _ids(tokenizer, [text.input or "" for text in texts], special=True)
    targets = _ids(tokenizer, [text.target for text in texts], special=False)
    begin = [i for i in [tokenizer.backend.token_to_id(tokenizer.bos_token or "")] if i is not None]
    examples, num_cut, num_dropped = [], 0, 0
    for text, given, target in zip(texts, inputs, targets, strict=True):
        source: list[int] = []
        if start_token is not None:
            source, context = given, [start_token]
        else:
            context = given if text.input is not None else begin
        lengths = {"target_length": target_length, "source_length": source_length}
        example, was_cut = cut(source, context, [*target, end], **lengths)
        num_cut += was_cut
        num_dropped += example is None
        if example is not None:
            examples.append(example)
    if not examples:
        raise ValueError(f"All {len(texts)} texts are too long or empty: raise target_length={target_length}.")
    return Encoded(examples, num_cut, num_dropped)


def pack(
    examples: Sequence[Example], *, target_length: int, source_length: int, seed: int, window: int = WINDOW
) -> list[list[int]]:
    """Which texts share a row: each once, in the first row that has room on both sides, the longest texts first.

    Args:
      examples: the texts.
      target_length: T, the tokens of a row.
      source_length: S, those of its source.
      seed: determines the order that windows are cut from.
      window: how many texts are packed together. More leave less padding, fewer mix better.

    Returns:
      the indices of the texts in each row.
    """
    targets = np.array([example.size for example in examples])
    sources = np.array([len(example.source) for example in examples])
    filled = np.maximum(targets / target_length, sources / max(source_length, 1))
    order, rows = np.random.default_rng(seed).permutation(len(examples)), []
    for begin in range(0, len(order), window):
        texts = order[begin : begin + window]
        texts = texts[np.argsort(-filled[texts], kind="stable")]
        room = np.tile([[target_length], [source_length]], len(texts))
        packed: list[list[int]] = []
        for text in texts.tolist():
            size = np.array([targets[text], sources[text]])
            row = int(np.argmax((room[:, : len(packed) + 1] >= size[:, None]).all(axis=0)))
            if row == len(packed):
                packed.append([])
            packed[row].append(text)
            room[:, row] -= size
        rows += packed
    return rows


def of_step(elements: Sequence[T], step: int, *, batch_size: int, seed: int) -> list[T]:
    """What a step of training reads: every epoch has each element once, in an order that the seed and its number give.

    Epochs follow each other without a gap. Steps may be read in any order.
    """
    import grain  # Takes half a second, and only training needs it.

    shuffled = grain.MapDataset.source(elements).seed(seed).shuffle().repeat()
    chosen = shuffled.batch(batch_size, batch_fn=list)[step]
    assert chosen is not None  # As what a filter leaves out would be.
    return chosen


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Packed texts.

    Attributes:
      examples: the texts.
      rows: which of them share a row.
      target_length: T.
      source_length: S, or 0 for a language model.
      seed: determines the order of the rows.
    """

    examples: list[Example]
    rows: list[list[int]]
    target_length: int
    source_length: int
    seed: int

    @functools.cached_property
    def num_tokens(self) -> int:
        """The number of tokens of all texts, sources included."""
        return sum(example.size + len(example.source) for example in self.examples)

    @property
    def padding(self) -> float:
        """The share of padding in all rows."""
        return 1 - self.num_tokens / (len(self.rows) * (self.target_length + self.source_length))

    @property
    def checksum(self) -> int:
        """CRC-32 of all texts."""
        value = 0
        for example in self.examples:
            value = zlib.crc32(example.source.tobytes(), zlib.crc32(example.text.tobytes(), value))
        return value

    def _assemble(self, rows: Sequence[Sequence[int]], batch_size: int) -> Batch:
        text = {name: np.zeros((batch_size, self.target_length), np.int32) for name in Batch._fields[:4]}
        weights = np.zeros((batch_size, self.target_length), np.float32)
        source, source_segments = (np.zeros((batch_size, self.source_length), np.int32) for _ in range(2))
        for i, row in enumerate(rows):
            begin = source_begin = 0
            for segment, number in enumerate(row, start=1):
                example = self.examples[number]
                place = slice(begin, begin := begin + example.size)
                text["tokens"][i, place] = example.text[:-1]
                text["targets"][i, place] = example.text[1:]
                text["segments"][i, place] = segment
                text["positions"][i, place] = np.arange(example.size)
                weights[i, place.start + example.num_given : place.stop] = 1
                place = slice(source_begin, source_begin := source_begin + len(example.source))
                source[i, place] = example.source
                source_segments[i, place] = segment
        both: Any = (source, source_segments) if self.source_length else (None, None)
        arrays: Any = (*text.values(), weights, *both)
        return Batch(*arrays)

    def at(self, step: int, params: Tree) -> "Dataset":
        """The texts that a step reads (`fit.Source`): these."""
        del step, params
        return self

    def batch(self, step: int, batch_size: int, mesh: Mesh | None = None) -> Batch:
        """What a step of training reads.

        Args:
          step: the step, from 0; steps may be read in any order.
          batch_size: B, in rows.
          mesh: where to place it, split over `data`; None for the default device.
        """
        rows = of_step(self.rows, step, batch_size=batch_size, seed=self.seed)
        return place(self._assemble(rows, batch_size), mesh)

    def in_order(self, batch_size: int, mesh: Mesh | None = None) -> Iterator[Batch]:
        """All rows once; the last batch is padded with empty rows."""
        for begin in range(0, len(self.rows), batch_size):
            yield place(self._assemble(self.rows[begin : begin + batch_size], batch_size), mesh)


def place(batch: Batch, mesh: Mesh | None) -> Batch:
    """Moves a batch to the devices of a mesh, or to the default device."""
    if mesh is None:
        return jax.device_put(batch)
    axes: Any = [None if array is None else ("batch", "tokens") for array in batch]
    return sharding.shard(batch, Batch(*axes), mesh)


def dataset(encoded: Encoded, *, start_token: int | None, target_length: int, source_length: int, seed: int) -> Dataset:
    """Packs tokenised texts, with the arguments that `encode` was given."""
    source_length = 0 if start_token is None else source_length
    rows = pack(encoded.examples, target_length=target_length, source_length=source_length, seed=seed)
    return Dataset(encoded.examples, rows, target_length, source_length, seed)
