"""The server of `faults.py` as a process, and a phase: who asks it, what becomes of that, and what must hold then."""

import asyncio
import collections
import contextlib
import pathlib
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

import faults_client as clients
import faults_report as report
from faults_client import Answer, Case, Client
from faults_report import Check, Sample, Store


class Bounds(NamedTuple):
    """What the server was started with, and how it is looked at.

    Attributes:
      slots: sequences that decode at once.
      queue: sequences that may wait.
      max_len: the longest prompt and answer, in tokens.
      new_tokens: the most new tokens of an answer.
      exact: whether texts must not differ at all.
      every: seconds between two looks.
      seed: of what is chosen.
    """

    slots: int
    queue: int
    max_len: int
    new_tokens: int
    exact: bool
    every: float
    seed: int


class Process:
    """The server."""

    def __init__(self, directory: pathlib.Path, server_flags: Sequence[str]):
        """Starts it, and waits until it listens.

        Args:
          directory: for its log.
          server_flags: of python -m specjax.serve, all but the port.

        Raises:
          RuntimeError: where it ends before.
        """
        self.log = directory / "server.log"
        self._log_begin = self.log.stat().st_size if self.log.exists() else 0
        command = [sys.executable, "-m", "specjax.serve", "--port=0", *server_flags]
        print(f"starting {shlex.join(command[1:])}", flush=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log)
        try:
            self.client = self._wait()
        except BaseException:
            self.kill()
            raise

    def written(self) -> str:
        """What it has written to its log."""
        with self.log.open("rb") as log:
            log.seek(self._log_begin)
            return log.read().decode("utf-8", "replace")

    def _wait(self) -> Client:
        shown = 0
        while self.process.poll() is None:
            lines = self.written().splitlines()
            for line in lines[shown:]:
                print(f"  server: {line}", flush=True)
            shown = len(lines)
            if found := re.search(r"listening at http://([^:\s]+):(\d+)", self.written()):
                self.begin = time.monotonic()
                return Client(found[1], int(found[2]))
            time.sleep(0.2)
        raise RuntimeError(f"The server ended with code {self.process.returncode}: see {self.log}.")

    def kill(self) -> None:
        """Ends it at once, if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Phase:
    """A phase that goes on: what is asked, what has come of it, and how the server does meanwhile."""

    def __init__(self, name: str, server: Process, store: Store, cases: Sequence[Case], bounds: Bounds):
        self.name, self.server, self.store, self.cases, self.bounds = name, server, store, cases, bounds
        self.client = server.client
        self.rng = random.Random(f"{name} {bounds.seed}")
        self.counts: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.names: dict[str, bool] = {}
        self.choices = [0, 0]
        self.samples: list[Sample] = []
        self._begin = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._begin

    def problem(self, what: str) -> None:
        """Notes something that must not be."""
        self.counts["PROBLEMS"] += 1
        if len(self.problems) < 20:
            self.problems.append(what)
            print(f"{self.name}: {what}", flush=True)

    # What becomes of requests.

    def _note(self, answer: Answer, choices: int) -> None:
        """Remembers a request, for the access log and the counters of the server."""
        whole = answer.status == 200 and answer.complete and answer.error is None
        self.names[answer.id] = not answer.left
        self.choices[0] += choices if whole else 0
        self.choices[1] += choices if answer.status in (0, 200) else 0
        if answer.extra:
            self.problem(f"{answer.extra} bytes came behind the answer to {answer.id}: a second answer")

    def judge(self, number: int, answer: Answer, allowed: Sequence[str]) -> str:
        """What has become of the request for a case; a problem where that is not among those allowed."""
        case, wanted = self.cases[number], tuple(self.store.references[number])
        self._note(answer, case.fields.get("n", 1))
        is_prefix = all(w.startswith(t) for t, w in zip(answer.texts, wanted, strict=False))
        if answer.status == 200 and answer.complete and answer.error is None:
            what = "answered" if answer.texts == wanted else "other text"
        elif answer.status == 200 and answer.texts and not is_prefix:
            what = "other text"
        elif answer.left:
            what = "left"
        elif answer.status == 429:
            seconds = answer.headers.get("retry-after", "")
            what = "told to wait" if seconds.isdigit() and int(seconds) >= 1 else f"429 with Retry-After {seconds!r}"
        elif answer.complete and "service_unavailable" in str(answer.error):
            what = "told that the server ends"
        elif answer.status == 0:
            what = "not answered"
        else:
            what = f"answered {answer.status} with {str(answer.error)[:200]}"
        self.counts[what] += 1
        rounded = what == "other text" and not self.bounds.exact
        if what not in allowed and not rounded:
            self.problem(f"case {number} ({case.fields}) was {what}: {answer.texts!r:.200} for {wanted!r:.200}")
        return what

    async def leave(self, number: int) -> None:
        """Asks, and leaves at some moment, or in the middle of its own body."""
        kind = self.rng.random()
        seconds = 0.0 if kind < 0.2 else self.rng.uniform(0, 2 * self.store.seconds_each)
        answer = await self.client.complete(
            self.cases[number], stream=self.rng.random() < 0.5, leave=seconds, cut=kind > 0.85
        )
        self.judge(number, answer, ("answered", "left", "told to wait"))

    async def ask(self, number: int, allowed: Sequence[str] = ("answered",)) -> str:
        """Asks, and waits for the answer; again where the server says so."""
        while True:
            answer = await self.client.complete(self.cases[number], stream=self.rng.random() < 0.5)
            what = self.judge(number, answer, (*allowed, "told to wait"))
            if what != "told to wait" or what in allowed:
                return what
            await asyncio.sleep(int(answer.headers["retry-after"]))

    async def refuse(self, number: int) -> None:
        """Asks for something wrong."""
        kinds = clients.wrong(self.cases[0].prompt)
        kind = kinds[number % len(kinds)]
        answer = await self.client.refused(kind)
        self._note(answer, 0)
        shape = {"message", "type", "param", "code"}
        is_right = answer.status == kind.status and isinstance(answer.error, dict) and set(answer.error) == shape
        self.counts["refused as wrong"] += is_right
        if not is_right:
            self.problem(f"{kind.name} was answered {answer.status} with {str(answer.error)[:200]}, not {kind.status}")

    async def fresh(self, pool: Sequence[int]) -> None:
        """Asks with a long prompt that nobody has asked before, which is kept in the prefix cache."""
        new = min(8, self.bounds.new_tokens)
        prompt = [self.rng.choice(pool) for _ in range(self.bounds.max_len - new)]
        salt = f"{self.rng.getrandbits(64):x}" if self.rng.random() < 0.5 else None
        case = Case(tuple(prompt), {"max_tokens": new, "temperature": 0.0, "cache_salt": salt})
        answer = await self.client.complete(case, stream=False)
        self._note(answer, 1)
        self.counts["answered, of new prompts"] += answer.status == 200
        if answer.status not in (200, 429):
            self.problem(f"a new prompt was answered {answer.status} with {str(answer.error)[:200]}")

    # How the server does.

    async def look(self) -> Sample:
        """Its metrics and resources now; a problem where more runs than there are slots."""
        text = await self.client.get("/metrics")
        use = await asyncio.to_thread(report.usage, self.server.process.pid)
        running, waiting, slots = (
            int(report.metric(text, name))
            for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "specjax:num_slots")
        )
        used = report.metric(text, "vllm:kv_cache_usage_perc")
        minutes = (time.monotonic() - self.server.begin) / 60
        if not (0 <= running <= slots == self.bounds.slots and 0 <= used <= 1 and 0 <= waiting <= self.bounds.queue):
            self.problem(f"{running} sequences run in {slots} slots, {waiting} wait, {used:.0%} of the cache is used")
        return Sample(minutes, self.name, *use, running, waiting, slots, used)

    async def _watch(self) -> None:
        said = time.monotonic()
        while True:
            try:
                sample = await self.look()
            except (OSError, TimeoutError) as error:
                self.problem(f"/metrics: {error}")
            else:
                self.samples.append(sample)
                report.write_samples(self.store.samples_path, [sample])
                if time.monotonic() > said + 5:
                    said = time.monotonic()
                    counts = ", ".join(f"{number} {what}" for what, number in self.counts.items())
                    print(
                        f"{self.name}: {self.seconds:.0f} s, {counts}; {sample.running} run, {sample.waiting} wait, "
                        f"{sample.rss_mib:.0f} MiB",
                        flush=True,
                    )
            await asyncio.sleep(self.bounds.every)

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Looks at the server meanwhile."""
        watch = asyncio.ensure_future(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def idle(self, seconds: float = 60.0) -> Check:
        """Waits until nothing runs or waits."""
        begin = time.monotonic()
        while True:
            sample = await self.look()
            is_idle = not (sample.running or sample.waiting or sample.used)
            took = time.monotonic() - begin
            if is_idle or took > seconds:
                found = (
                    f"{sample.running} run, {sample.waiting} wait, {sample.used:.0%} of the cache, {took:.1f} s later"
                )
                return Check("afterwards nothing runs, waits or takes room", is_idle, found)
            await asyncio.sleep(0.05)

    async def all_slots(self, seconds: float = 60.0) -> Check:
        """Asks until all slots are taken at once: none has been lost."""
        stopping, most, begin = False, 0, time.monotonic()

        async def client(number: int) -> None:
            while not stopping:
                await self.ask(number % len(self.cases))

        tasks = [asyncio.ensure_future(client(i)) for i in range(self.bounds.slots + 2)]
        while most < self.bounds.slots and time.monotonic() < begin + seconds:
            most = max(most, (await self.look()).running)
            await asyncio.sleep(0.01)
        stopping = True
        await asyncio.gather(*tasks)
        return Check("all slots can be taken at once", most == self.bounds.slots, f"{most} of {self.bounds.slots}")

    def once(self, log: str) -> Check:
        """No request has two lines in the access log, and each that was answered has one."""
        lines = collections.Counter(re.findall(r'"id": "([0-9a-f]{32})"', log))
        many = [name for name in self.names if lines[name] > 1]
        none = [name for name, stayed in self.names.items() if stayed and not lines[name]]
        found = f"{len(self.names)} requests: {len(many)} with two or more, {len(none)} without"
        return Check("the access log has one line of each request", not many and not none, found)

    def ended(self, before: str, after: str) -> Check:
        """The server has ended as many sequences as clients have got, and at most as many as they have asked for."""
        reasons = ("stop", "length", "abort", "error")
        by_reason = {
            reason: report.metric(after, "vllm:request_success_total", finished_reason=reason)
            - report.metric(before, "vllm:request_success_total", finished_reason=reason)
            for reason in reasons
        }
        whole, total = by_reason["stop"] + by_reason["length"], sum(by_reason.values())
        holds = self.choices[0] <= whole and total <= self.choices[1] and not by_reason["error"]
        said = ", ".join(f"{int(number)} {reason}" for reason, number in by_reason.items())
        found = f"{said}; clients have got {self.choices[0]} of {self.choices[1]}"
        return Check("every sequence ends once", holds, found)
