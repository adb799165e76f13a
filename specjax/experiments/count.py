"""Makes a statistical draft from a corpus, an n-gram table or a datastore. Reports its size and its hit rate."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import drafters
from specjax.api import pretrained
from specjax.drafters.retrieval import Datastore, histogram, lookup, occurrences
from specjax.drafters.store import FILE as DRAFT_FILE
from specjax.drafters.table import Table, distribution
from specjax.experiments import texts
from specjax.experiments.reports.display import View
from specjax.experiments.settings import Config, at_least, given, one_of, parse
from specjax.experiments.store import Store
from specjax.text.tokenizer import Tokenizer

_MATCHES = (2, 8)
"""The shortest and longest match, in tokens, that a datastore is tested with, as in `drafters.retrieval`."""

_CHUNK = 64
"""Positions that are predicted at once: each needs a distribution over the vocabulary."""

Predict = Callable[[np.ndarray], jax.Array]
"""Maps the last tokens of texts, newest first, `[B, C]`, to the distribution of the next token, `[B, V]`."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `configs/count.py`."""

    kind: Annotated[str, one_of("ngram", "retrieval")]
    data: Annotated[str, given("FILE")]
    valid: str
    field: str
    num_texts: Annotated[int, at_least(0, ", which reads all")]
    tokenizer: Annotated[str, given("SOURCE")]
    begin_token: str
    end_token: str
    order: Annotated[int, at_least(1)]
    min_count: Annotated[int, at_least(1)]
    max_successors: Annotated[int, at_least(1)]
    max_entries: Annotated[int, at_least(1)]
    depth: Annotated[int, at_least(1)]
    max_tokens: Annotated[int, at_least(1)]
    valid_tokens: Annotated[int, at_least(1)]

    def check(self) -> None:
        """Refuses files that do not exist."""
        for path in filter(None, (self.data, self.valid)):
            texts.check(path)


def _special(tokenizer: Tokenizer, key: str, token: str) -> list[int]:
    if not token:
        return []
    number = tokenizer.vocab().get(token)
    if number is None:
        raise ValueError(f"config.{key}={token!r} is not a token of this tokenizer: write it as its vocabulary does.")
    return [number]


def encode(path: str, chosen: Settings, tokenizer: Tokenizer, view: View, what: str) -> list[np.ndarray]:
    """The texts of a file as token ids, each between the begin and end tokens."""
    found = texts.read(path, chosen.field, chosen.num_texts)
    begin, end = (_special(tokenizer, key, getattr(chosen, key)) for key in ("begin_token", "end_token"))
    encoded: list[np.ndarray] = []
    with view.progress(len(found), what=what) as bar:
        for start in range(0, len(found), 1000):
            batch = tokenizer.backend.encode_batch_fast(found[start : start + 1000], add_special_tokens=False)
            encoded += [np.asarray([*begin, *encoding.ids, *end], np.int32) for encoding in batch]
            bar.advance(bar.task_ids[0], len(batch))
    return encoded


def make(encoded: Sequence[np.ndarray], chosen: Settings, tokenizer: Tokenizer) -> Table | Datastore:
    """Counts the n-grams of a table, or indexes a datastore."""
    # Ids need not be dense: a vocabulary may be smaller than its largest id.
    vocab_size = max(tokenizer.vocab().values()) + 1
    if chosen.kind == "ngram":
        return drafters.count_ngrams(
            encoded,
            vocab_size=vocab_size,
            order=chosen.order,
            min_count=chosen.min_count,
            max_successors=chosen.max_successors,
            max_entries=chosen.max_entries,
            context_tokens=1 if chosen.begin_token else 0,
            tokenizer=tokenizer,
        )
    return drafters.index_corpus(
        encoded, vocab_size=vocab_size, depth=chosen.depth, max_tokens=chosen.max_tokens, tokenizer=tokenizer
    )


def predictor(source: Table | Datastore) -> tuple[Predict, int]:
    """A draft's function from the last tokens of a text to its prediction, and how many of them it reads."""
    if isinstance(source, Table):

        def of_table(params: Any, last: Any) -> Any:
            return jax.vmap(lambda tokens: distribution(params, tokens, source.max_successors))(last)

        return functools.partial(jax.jit(of_table), source.params), source.order - 1
    longest = min(_MATCHES[1], source.depth)
    shortest = min(_MATCHES[0], longest)

    def of_datastore(params: Any, last: Any) -> Any:
        def of_text(tokens: Any) -> Any:
            found = occurrences(params, lookup(params, tokens, shortest), 64)
            count = histogram(params, *found, source.vocab_size)
            return count / jnp.maximum(jnp.sum(count), 1.0)

        return jax.vmap(of_text)(last)

    return functools.partial(jax.jit(of_datastore), source.params), longest


def _contexts(encoded: Sequence[np.ndarray], size: int, first: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens of some texts, at most `limit`, and the `size` tokens before each, the newest first.

    Tokens before the position `first` of a text are not predicted; -1 means that there is no token.
    """
    positions = ((text, i) for text in encoded for i in range(first, len(text)))
    contexts, wanted = [], []
    for text, i in itertools.islice(positions, limit):
        last = text[max(i - size, 0) : i][::-1]
        contexts.append(np.pad(last, (0, size - len(last)), constant_values=-1))
        wanted.append(text[i])
    return np.asarray(contexts, np.int32).reshape(len(wanted), size), np.asarray(wanted)


def held_out(
    source: Table | Datastore, encoded: Sequence[np.ndarray], chosen: Settings, view: View
) -> dict[str, float | None]:
    """How well a draft predicts texts that it was not made from.

    Returns:
      `tokens` that were predicted; `hit_rate`, how often the most probable token is the text's; `known_rate`, how often
      there is any (always, for a table); `hit_rate_known`, the hit rate among these; `perplexity` of the text, None
      where the draft gives a token the probability 0.
    """
    predict, size = predictor(source)
    contexts, tokens = _contexts(encoded, size, 1 if chosen.begin_token else 0, chosen.valid_tokens)
    padded = -(-len(tokens) // _CHUNK) * _CHUNK
    # One program for all chunks: the last one is padded.
    contexts = np.pad(contexts, ((0, padded - len(tokens)), (0, 0)))
    probability, best, top = (np.zeros(len(tokens)) for _ in range(3))
    with view.progress(padded, what="held-out tokens") as bar:
        for start in range(0, padded, _CHUNK):
            part = slice(start, min(start + _CHUNK, len(tokens)))
            probs = np.asarray(predict(contexts[start : start + _CHUNK]))[: part.stop - start]
            probability[part] = probs[np.arange(len(probs)), tokens[part]]
            best[part], top[part] = probs.argmax(axis=1), probs.max(axis=1)
            bar.advance(bar.task_ids[0], _CHUNK)
    known = top > 0
    hit = known & (best == tokens)
    return {
        "tokens": len(tokens),
        "hit_rate": float(hit.mean()),
        "known_rate": float(known.mean()),
        "hit_rate_known": float(hit[known].mean()) if known.any() else None,
        "perplexity": float(np.exp(-np.log(probability).mean())) if probability.all() else None,
    }


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def describe(source: Table | Datastore) -> list[str]:
    """The size of the draft, and the parts of the corpus that were left out, as lines of text."""
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
    """Makes the draft, as `EXPERIMENTS` says."""
    view, chosen = view or View(), parse(Settings, config)
    store = Store(workdir, config.to_dict(), overwrite=overwrite, names=(DRAFT_FILE,))
    directory = store.directory
    if store.holds(DRAFT_FILE):
        view.line(f"The draft is finished in {directory}{os.sep}; --overwrite makes it anew.")
        return
    with view.status(f"Loading the tokenizer of {chosen.tokenizer}{pretrained.download_note(chosen.tokenizer)}"):
        tokenizer = pretrained.load_tokenizer(chosen.tokenizer)
    encoded = encode(chosen.data, chosen, tokenizer, view, "texts")
    with view.status("Counting" if chosen.kind == "ngram" else "Sorting"):
        source = make(encoded, chosen, tokenizer)
    for line in describe(source):
        view.line(line)
    found: dict[str, Any] = {"kind": chosen.kind, **source.info}
    if chosen.valid:
        valid = encode(chosen.valid, chosen, tokenizer, view, "held-out texts")
        found["held_out"] = held_out(source, valid, chosen, view)
        view.line(describe_held_out(found["held_out"]))
    store.write_config()
    store.write("results.json", json.dumps(found, indent=1) + "\n")
    if isinstance(source, Table):
        drafters.save_table(source, directory)
    else:
        drafters.save_datastore(source, directory)
    loader, name = ("load_table", "table") if isinstance(source, Table) else ("load_datastore", "retrieval")
    view.line(
        f"Draft: {directory}{os.sep} ({_megabytes((directory / DRAFT_FILE).stat().st_size)}); "
        f"specjax.drafters.{loader}({str(directory)!r}) loads it, configs/compare.py takes it with "
        f"--config.drafter={name} --config.draft={directory}.",
        "bold",
    )
