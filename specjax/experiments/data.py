"""Fetches or makes the files of prompts, texts and pairs that the README and the config files name."""

import importlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from specjax import files
from specjax.experiments import download, prompts, stdlib_texts
from specjax.experiments.reports.display import View

Config = Any
"""An `ml_collections.ConfigDict` with the keys of `configs/data.py`."""


class Source(NamedTuple):
    """A set of files.

    Attributes:
      files: their names.
      licence: under which they come.
      origin: where they come from.
      make: writes them: `(config, directory, view)`.
    """

    files: tuple[str, ...]
    licence: str
    origin: str
    make: Callable[[Config, pathlib.Path, View], None]


def _write(path: pathlib.Path, lines: Iterable[stdlib_texts.Line]) -> None:
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    files.write(path, text)


def _prompts(config: Config, directory: pathlib.Path, view: View) -> None:
    del view
    _write(directory / "prompts.jsonl", stdlib_texts.prompts(config.num_prompts))


def _corpus(config: Config, directory: pathlib.Path, view: View) -> None:
    del config, view
    _write(directory / "corpus.jsonl", stdlib_texts.corpus())


def _pairs(config: Config, directory: pathlib.Path, view: View) -> None:
    del config, view
    for split, lines in stdlib_texts.pairs().items():
        _write(directory / f"pairs.{split}.jsonl", lines)


SPEC_BENCH = "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl"


def _spec_bench(config: Config, directory: pathlib.Path, view: View) -> None:
    url = f"{config.mirror.rstrip('/')}/question.jsonl" if config.mirror else SPEC_BENCH
    path = directory / "spec_bench.jsonl"
    download.download(url, path, view, config.sha256)
    try:
        prompts.read(path)
    except ValueError as error:
        path.unlink()
        raise ValueError(f"{url} gave something else than Spec-Bench ({error})") from error


class _Hub(NamedTuple):
    """A data set of the Hugging Face hub; `pair` makes input and target of a row."""

    name: str
    config: str | None
    pair: Callable[[dict[str, Any]], tuple[str, str]]


def _first_words(row: dict[str, Any]) -> tuple[str, str]:
    words = row["text"].split(" ")
    return " ".join(words[:8]), " ".join(words[8:])


_HUB = {
    "wmt14": _Hub("wmt/wmt14", "de-en", lambda row: (row["translation"]["en"], row["translation"]["de"])),
    "cnn_dailymail": _Hub("abisee/cnn_dailymail", "3.0.0", lambda row: (row["article"], row["highlights"])),
    "xsum": _Hub("EdinburghNLP/xsum", None, lambda row: (row["document"], row["summary"])),
    "lm1b": _Hub("billion-word-benchmark/lm1b", None, _first_words),
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


def _from_hub(name: str) -> Callable[[Config, pathlib.Path, View], None]:
    def make(config: Config, directory: pathlib.Path, view: View) -> None:
        for split, theirs in {"train": "train", "valid": "validation", "test": "test"}.items():
            if name == "lm1b" and split == "valid":
                continue  # lm1b has two splits.
            with view.status(f"Fetching {name}, {split}"):
                _write(directory / f"{name}.{split}.jsonl", _rows(_HUB[name], theirs, config.max_pairs))

    return make


def _hub_files(name: str) -> tuple[str, ...]:
    splits = ("train", "test") if name == "lm1b" else ("train", "valid", "test")
    return tuple(f"{name}.{split}.jsonl" for split in splits)


_HUB_LICENCES = {
    "wmt14": "no licence is stated; the WMT shared tasks gave it out for research",
    "cnn_dailymail": "Apache-2.0 by its data card",
    "xsum": "its data card states none; the articles are the BBC's",
    "lm1b": "its data card states none",
}

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
    "spec_bench": Source(("spec_bench.jsonl",), "Apache-2.0", SPEC_BENCH, _spec_bench),
} | {
    name: Source(_hub_files(name), _HUB_LICENCES[name], f"https://huggingface.co/datasets/{hub.name}", _from_hub(name))
    for name, hub in _HUB.items()
}
"""By name, what `config.sets` may hold."""


def check(config: Config) -> None:
    """Refuses values that make no sense, before anything is fetched.

    Raises:
      ValueError: naming the key, its value and the remedy.
    """
    sets = tuple(config.sets)
    unknown = [name for name in sets if name not in SETS]
    if unknown or not sets:
        raise ValueError(f"config.sets={sets}: choose from {', '.join(SETS)}, such as \"('prompts', 'corpus')\".")
    for key in ("num_prompts", "max_pairs"):
        if config[key] < 1:
            raise ValueError(f"config.{key}={config[key]}: at least 1.")
    if config.sha256 and len(config.sha256) != 64:
        raise ValueError(f"config.sha256={config.sha256!r} has {len(config.sha256)} digits, not 64.")


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Makes the files that are not there yet.

    Args:
      config: as `configs/data.py` has it.
      workdir: where they go.
      overwrite: make those anew that are there.
      view: the screen; by default standard output.

    Raises:
      ValueError: for values that make no sense, or a file that is not what it should be.
      OSError: where a file cannot be fetched or written.
    """
    view, directory = view or View(), pathlib.Path(workdir)
    check(config)
    directory.mkdir(parents=True, exist_ok=True)
    for name in config.sets:
        source = SETS[name]
        paths = [directory / file for file in source.files]
        if overwrite:
            for path in paths:
                path.unlink(missing_ok=True)
        if all(path.exists() for path in paths):
            view.line(f"{name}: there already ({', '.join(map(str, paths))}).")
            continue
        source.make(config, directory, view)
        for path in paths:
            lines = sum(1 for _ in path.open(encoding="utf-8"))
            view.line(f"{path}: {lines} lines, from {source.origin} ({source.licence}).")
    view.line(f"The files are in {directory}{os.sep}.", "bold")
