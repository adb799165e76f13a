"""Makes a statistical draft from a corpus: an n-gram table or a datastore. Says what it takes and what it is worth."""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import drafters, files
from specjax.api import pretrained
from specjax.drafters import store
from specjax.drafters.retrieval import Datastore, histogram, lookup, occurrences
from specjax.drafters.table import Table, distribution
from specjax.experiments import results, texts
from specjax.experiments.reports.display import View
from specjax.text.tokenizer import Tokenizer

Config = Any
"""An `ml_collections.ConfigDict` with the keys of `configs/count.py`."""

KINDS = ("ngram", "retrieval")

_AT_LEAST_ONE = ("order", "min_count", "max_successors", "max_entries", "depth", "max_tokens", "valid_tokens")
_MATCHES = (2, 8)
"""The matches, in tokens, that a datastore is tried with, as by `drafters.retrieval`; fewer where it is not so deep."""

_CHUNK = 64
"""Places that are predicted at once: each takes a distribution over the vocabulary."""

Predict = Callable[[np.ndarray], jax.Array]
"""From the last tokens of some texts, the newest first, `[B, C]`, to what each goes on with, `[B, V]`."""


def check(config: Config) -> None:
    """Refuses values that make no sense, before anything is loaded.

    Raises:
      ValueError: naming the key, its value and the remedy.
    """
    if config.kind not in KINDS:
        raise ValueError(f"config.kind={config.kind!r}: choose one of {', '.join(KINDS)}.")
    for key in _AT_LEAST_ONE:
        if config[key] < 1:
            raise ValueError(f"config.{key}={config[key]}: at least 1.")
    if config.num_texts < 0:
        raise ValueError(f"config.num_texts={config.num_texts}: at least 0, which reads all.")
    for key in ("data", "tokenizer"):
        if not config[key]:
            raise ValueError(f"config.{key} is empty: give --config.{key}=...")
    for path in filter(None, (config.data, config.valid)):
        texts.check(path)


def _claim(config: Config, workdir: pathlib.Path, overwrite: bool) -> bool:
    """Whether the workdir holds the same draft already."""
    path, text = workdir / "config.json", results.to_json(config.to_dict())
    if overwrite or not (workdir / store.FILE).exists():
        (workdir / store.FILE).unlink(missing_ok=True)
        return False
    if not path.exists() or path.read_bytes() != text.encode():
        raise ValueError(
            f"{workdir} holds a draft that was made with another config: choose another --workdir, or give --overwrite "
            "to replace it."
        )
    return True


def _special(tokenizer: Tokenizer, key: str, token: str) -> list[int]:
    if not token:
        return []
    number = tokenizer.vocab().get(token)
    if number is None:
        raise ValueError(f"config.{key}={token!r} is no token of this tokenizer: write it as its vocabulary does.")
    return [number]


def encode(path: str, config: Config, tokenizer: Tokenizer, view: View, what: str) -> list[np.ndarray]:
    """The texts of a file as token ids, the begin and end tokens around each."""
    read = texts.read(path, config.field, config.num_texts)
    begin, end = (_special(tokenizer, key, config[key]) for key in ("begin_token", "end_token"))
    encoded: list[np.ndarray] = []
    with view.progress(len(read), what=what) as bar:
        for start in range(0, len(read), 1000):
            batch = tokenizer.backend.encode_batch_fast(read[start : start + 1000], add_special_tokens=False)
            encoded += [np.asarray([*begin, *encoding.ids, *end], np.int32) for encoding in batch]
            bar.advance(bar.task_ids[0], len(batch))
    return encoded


def make(encoded: Sequence[np.ndarray], config: Config, tokenizer: Tokenizer) -> Table | Datastore:
    """Counts or indexes."""
    # Ids need not be dense: a vocabulary may be smaller than its largest id.
    vocab_size = max(tokenizer.vocab().values()) + 1
    if config.kind == "ngram":
        return drafters.count_ngrams(
            encoded,
            vocab_size=vocab_size,
            order=config.order,
            min_count=config.min_count,
            max_successors=config.max_successors,
            max_entries=config.max_entries,
            context_tokens=1 if config.begin_token else 0,
            tokenizer=tokenizer,
        )
    return drafters.index_corpus(
        encoded, vocab_size=vocab_size, depth=config.depth, max_tokens=config.max_tokens, tokenizer=tokenizer
    )


def predictor(source: Table | Datastore) -> tuple[Predict, int]:
    """What a draft makes of the last tokens of a text, and how many of them it looks at."""
    if isinstance(source, Table):

        def of_table(params: Any, last: Any) -> Any:
            return jax.vmap(lambda row: distribution(params, row, source.max_successors))(last)

        return functools.partial(jax.jit(of_table), source.params), source.order - 1
    longest = min(_MATCHES[1], source.depth)
    shortest = min(_MATCHES[0], longest)

    def of_datastore(params: Any, last: Any) -> Any:
        def of_row(row: Any) -> Any:
            found = occurrences(params, lookup(params, row, shortest), 64)
            count = histogram(params, *found, source.vocab_size)
            return count / jnp.maximum(jnp.sum(count), 1.0)

        return jax.vmap(of_row)(last)

    return functools.partial(jax.jit(of_datastore), source.params), longest


def held_out(
    source: Table | Datastore, encoded: Sequence[np.ndarray], config: Config, view: View
) -> dict[str, float | None]:
    """What a draft knows of texts that it was not made from.

    Returns:
      `tokens` that were predicted; `hit_rate`, how often the most probable token is the text's; `known_rate`, how often
      there is any (always, for a table); `hit_rate_known`, the hit rate among these; `perplexity` of the text, None
      where the draft gives a token no chance.
    """
    predict, size = predictor(source)
    first = 1 if config.begin_token else 0
    lasts, wanted = [], []
    left = config.valid_tokens
    for text in encoded:
        for place in range(first, min(len(text), first + left)):
            last = text[max(place - size, 0) : place][::-1]
            lasts.append(np.pad(last, (0, size - len(last)), constant_values=-1))
            wanted.append(text[place])
        left = config.valid_tokens - len(wanted)
        if left <= 0:
            break
    tokens = np.asarray(wanted)
    padded = -(-len(tokens) // _CHUNK) * _CHUNK
    rows = np.zeros((padded, size), np.int32)
    rows[: len(tokens)] = np.asarray(lasts, np.int32).reshape(len(tokens), size)
    chosen, best, top = (np.zeros(padded) for _ in range(3))
    with view.progress(padded, what="held-out tokens") as bar:
        for start in range(0, padded, _CHUNK):
            probs = np.asarray(predict(rows[start : start + _CHUNK]))
            inside = tokens[start : start + _CHUNK]
            part = slice(start, start + len(inside))
            chosen[part] = probs[np.arange(len(inside)), inside]
            best[part], top[part] = probs[: len(inside)].argmax(axis=1), probs[: len(inside)].max(axis=1)
            bar.advance(bar.task_ids[0], _CHUNK)
    chosen, best, known = chosen[: len(tokens)], best[: len(tokens)], top[: len(tokens)] > 0
    hit = known & (best == tokens)
    return {
        "tokens": len(tokens),
        "hit_rate": float(hit.mean()),
        "known_rate": float(known.mean()),
        "hit_rate_known": float(hit[known].mean()) if known.any() else None,
        "perplexity": float(np.exp(-np.log(chosen).mean())) if chosen.all() else None,
    }


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def describe(source: Table | Datastore) -> list[str]:
    """What was made and what was left out, in lines."""
    info = source.info
    if isinstance(source, Datastore):
        left_out = info["dropped"]["max_tokens"]
        lines = [
            f"{info['texts']} texts, {info['tokens']} tokens, ordered by {info['depth']} tokens: "
            f"{_megabytes(info['bytes'])}."
        ]
        return [*lines, f"{left_out} texts were left out beyond config.max_tokens."] if left_out else lines
    entries = ", ".join(f"{kept} of {seen}" for kept, seen in zip(info["entries"], info["seen"], strict=True))
    lines = [f"{info['texts']} texts, {info['tokens']} tokens: unigrams of {info['vocab_size']} tokens."]
    if entries:
        orders = " and ".join(str(n) for n in range(2, info["order"] + 1))
        lines.append(f"n-grams of {orders} tokens kept: {entries}; {info['contexts']} contexts.")
    lines.append(f"The table takes {_megabytes(info['bytes'])}.")
    lines += [f"{number} n-grams were dropped by config.{key}." for key, number in info["dropped"].items() if number]
    return lines


def describe_held_out(found: dict[str, float | None]) -> str:
    """The held-out figures in a line."""
    parts = [f"Held out ({found['tokens']} tokens): next token right {found['hit_rate']:.1%}"]
    if found["known_rate"] != 1:
        rate = "none" if found["hit_rate_known"] is None else f"{found['hit_rate_known']:.1%}"
        parts.append(f"something found {found['known_rate']:.1%}, then right {rate}")
    if found["perplexity"] is not None:
        parts.append(f"perplexity {found['perplexity']:.1f}")
    return ", ".join(parts) + "."


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Makes the draft and writes its files.

    Args:
      config: as `configs/count.py` has it.
      workdir: where the draft goes.
      overwrite: replace a draft that is there.
      view: the screen; by default standard output.

    Raises:
      ValueError: for values that make no sense, or a workdir that holds another draft.
      OSError: for files that cannot be read or written.
    """
    view, workdir = view or View(), pathlib.Path(workdir)
    check(config)
    loader = "load_table" if config.kind == "ngram" else "load_datastore"
    use = f"drafter={'table' if config.kind == 'ngram' else 'retrieval'}"
    if _claim(config, workdir, overwrite):
        view.line(f"The draft is finished in {workdir}{os.sep}; --overwrite makes it anew.")
        return
    with view.status(f"Loading the tokenizer of {config.tokenizer}{pretrained.download_note(config.tokenizer)}"):
        tokenizer = pretrained.load_tokenizer(config.tokenizer)
    encoded = encode(config.data, config, tokenizer, view, "texts")
    with view.status("Counting" if config.kind == "ngram" else "Sorting"):
        source = make(encoded, config, tokenizer)
    for line in describe(source):
        view.line(line)
    rows: dict[str, Any] = {"kind": config.kind, **source.info}
    if config.valid:
        valid = encode(config.valid, config, tokenizer, view, "held-out texts")
        rows["held_out"] = held_out(source, valid, config, view)
        view.line(describe_held_out(rows["held_out"]))
    save: Any = drafters.save_table if isinstance(source, Table) else drafters.save_datastore
    workdir.mkdir(parents=True, exist_ok=True)
    files.write(workdir / "config.json", results.to_json(config.to_dict()))
    files.write(workdir / "results.json", json.dumps(rows, indent=1) + "\n")
    save(source, workdir)
    size = (workdir / store.FILE).stat().st_size
    view.line(
        f"Draft: {workdir}{os.sep} ({_megabytes(size)}); specjax.drafters.{loader}({str(workdir)!r}) loads it, "
        f"configs/compare.py takes it with --config.{use} --config.draft={workdir}.",
        "bold",
    )
