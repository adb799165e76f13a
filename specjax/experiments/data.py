"""Fetches or makes the files of prompts, texts and pairs that the README and the config files name."""

import dataclasses
import importlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

from specjax import files
from specjax.experiments import download, edits, prompts, stdlib_texts
from specjax.experiments.reports.display import View
from specjax.experiments.settings import Check, Config, at_least, parse


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `configs/data.py`."""

    sets: tuple[str, ...]
    num_prompts: Annotated[int, at_least(1)]
    max_pairs: Annotated[int, at_least(1)]
    mirror: str
    sha256: Annotated[str, Check(lambda digits: len(digits) in (0, 64), "64 digits, or nothing")]

    def check(self) -> None:
        """Refuses names of sets that are not known."""
        if not self.sets or not set(self.sets) <= set(SETS):
            known = ", ".join(SETS)
            raise ValueError(f"config.sets={self.sets}: choose from {known}, such as \"('prompts', 'corpus')\".")


class Source(NamedTuple):
    """A set of files.

    Attributes:
      files: their names.
      licence: their licence.
      origin: where they come from.
      make: writes them: `(settings, directory, view)`.
    """

    files: tuple[str, ...]
    licence: str
    origin: str
    make: Callable[[Settings, pathlib.Path, View], None]


def _write(path: pathlib.Path, lines: Iterable[stdlib_texts.Line]) -> None:
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    files.write(path, text)


def _prompts(chosen: Settings, directory: pathlib.Path, view: View) -> None:
    del view
    _write(directory / "prompts.jsonl", stdlib_texts.prompts(chosen.num_prompts))


def _corpus(chosen: Settings, directory: pathlib.Path, view: View) -> None:
    del chosen, view
    _write(directory / "corpus.jsonl", stdlib_texts.corpus())


def _edits(chosen: Settings, directory: pathlib.Path, view: View) -> None:
    del chosen, view
    for split, lines in edits.edits().items():
        _write(directory / f"edits.{split}.jsonl", lines)


def _pairs(chosen: Settings, directory: pathlib.Path, view: View) -> None:
    del chosen, view
    for split, lines in stdlib_texts.pairs().items():
        _write(directory / f"pairs.{split}.jsonl", lines)


SPEC_BENCH = "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl"


def _spec_bench(chosen: Settings, directory: pathlib.Path, view: View) -> None:
    url = f"{chosen.mirror.rstrip('/')}/question.jsonl" if chosen.mirror else SPEC_BENCH
    path = directory / "spec_bench.jsonl"
    download.download(url, path, view, chosen.sha256)
    try:
        prompts.read(path)
    except ValueError as error:
        path.unlink()
        raise ValueError(f"{url} did not give Spec-Bench ({error})") from error


class _Hub(NamedTuple):
    """A data set of the Hugging Face hub; `pair` makes input and target from a row."""

    name: str
    config: str | None
    pair: Callable[[dict[str, Any]], tuple[str, str]]
    licence: str = "its data card states none"
    splits: Mapping[str, str] = {"train": "train", "valid": "validation", "test": "test"}


def _first_words(row: dict[str, Any]) -> tuple[str, str]:
    words = row["text"].split(" ")
    return " ".join(words[:8]), " ".join(words[8:])


_WMT = "no licence is stated; the WMT shared tasks gave it out for research"
_HUB = {
    "wmt14": _Hub("wmt/wmt14", "de-en", lambda row: (row["translation"]["en"], row["translation"]["de"]), _WMT),
    "cnn_dailymail": _Hub(
        "abisee/cnn_dailymail", "3.0.0", lambda row: (row["article"], row["highlights"]), "Apache-2.0 by its data card"
    ),
    "xsum": _Hub(
        "EdinburghNLP/xsum",
        None,
        lambda row: (row["document"], row["summary"]),
        "its data card states none; the articles are the BBC's",
    ),
    "lm1b": _Hub("billion-word-benchmark/lm1b", None, _first_words, splits={"train": "train", "test": "test"}),
}


def _rows(hub: _Hub, split: str, limit: int) -> Iterator[stdlib_texts.Line]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise OSError(f"{hub.name} comes from the Hugging Face hub: pip install datasets.") from error
    try:
        rows = datasets.load_dataset(hub.name, hub.config, split=split, streaming=True)
        for number, row in enumerate(rows):
            if number == limit:
                return
            source, target = hub.pair(row)
            if source.strip() and target.strip():
                yield {"input": source, "target": target}
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise OSError(
            f"The hub did not give {hub.name}, split {split} ({type(error).__name__}: {error}): check the network, or "
            f"download it elsewhere from https://huggingface.co/datasets/{hub.name}."
        ) from error


def _from_hub(name: str, hub: _Hub) -> Source:
    def make(chosen: Settings, directory: pathlib.Path, view: View) -> None:
        for split, theirs in hub.splits.items():
            with view.status(f"Fetching {name}, {split}"):
                _write(directory / f"{name}.{split}.jsonl", _rows(hub, theirs, chosen.max_pairs))

    names = tuple(f"{name}.{split}.jsonl" for split in hub.splits)
    return Source(names, hub.licence, f"https://huggingface.co/datasets/{hub.name}", make)


_PSF = "PSF licence, as Python itself"

SETS: dict[str, Source] = {
    "prompts": Source(("prompts.jsonl",), _PSF, "Python's language reference (pydoc_data)", _prompts),
    "corpus": Source(("corpus.jsonl",), _PSF, "Python's language reference (pydoc_data)", _corpus),
    "pairs": Source(
        tuple(f"pairs.{split}.jsonl" for split in ("train", "valid", "test")),
        _PSF,
        "docstrings of Python's standard library",
        _pairs,
    ),
    "edits": Source(
        tuple(f"edits.{split}.jsonl" for split in ("train", "valid", "test")),
        _PSF,
        "docstrings of Python's standard library, with slips of the keyboard made from a seed",
        _edits,
    ),
    "spec_bench": Source(("spec_bench.jsonl",), "Apache-2.0", SPEC_BENCH, _spec_bench),
} | {name: _from_hub(name, hub) for name, hub in _HUB.items()}
"""The sets by the names that `config.sets` may hold."""


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Makes the files that do not exist yet, as `EXPERIMENTS` says."""
    view, directory = view or View(), pathlib.Path(workdir)
    chosen = parse(Settings, config)
    directory.mkdir(parents=True, exist_ok=True)
    for name in chosen.sets:
        source = SETS[name]
        paths = [directory / file for file in source.files]
        if overwrite:
            for path in paths:
                path.unlink(missing_ok=True)
        if all(path.exists() for path in paths):
            view.line(f"{name}: there already ({', '.join(map(str, paths))}).")
            continue
        source.make(chosen, directory, view)
        for path in paths:
            lines = sum(1 for _ in path.open(encoding="utf-8"))
            view.line(f"{path}: {lines} lines, from {source.origin} ({source.licence}).")
    view.line(f"The files are in {directory}{os.sep}.", "bold")
