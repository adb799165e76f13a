"""What `faults.py` found: memory over time, checks, the summary that a person reads and its picture."""

import csv
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from specjax import files
from specjax.experiments.reports import plots


class Sample(NamedTuple):
    """A look at the server.

    Attributes:
      minutes: since the server was ready.
      phase: what was going on.
      rss_mib: resident memory of the process and its children.
      files: open files and sockets of the process.
      threads: of the process.
      running: sequences that have a slot.
      waiting: sequences that wait for one.
      slots: sequences that can have one.
      used: share of the cache in use.
    """

    minutes: float
    phase: str
    rss_mib: float
    files: int
    threads: int
    running: int
    waiting: int
    slots: int
    used: float


class Check(NamedTuple):
    """Something that had to hold.

    Attributes:
      name: what.
      passed: whether it did.
      found: what was found.
    """

    name: str
    passed: bool
    found: str


class Usage(NamedTuple):
    """What the operating system says of a process and its children; see `Sample`."""

    rss_mib: float
    files: int
    threads: int


def usage(pid: int) -> Usage:
    """The resources of a process, and the memory of its children.

    Raises:
      OSError: where the process is gone, or there is no /proc.
    """
    own = pathlib.Path("/proc", str(pid))
    status = (own / "status").read_text()
    threads = int(re.findall(r"^Threads:\s+(\d+)", status, re.MULTILINE)[0])
    return Usage(_rss(pid), len(list((own / "fd").iterdir())), threads)


def _rss(pid: int) -> float:
    own = pathlib.Path("/proc", str(pid))
    found = re.findall(r"^VmRSS:\s+(\d+) kB", (own / "status").read_text(), re.MULTILINE)
    total = int(found[0]) / 1024 if found else 0.0
    for listed in own.glob("task/*/children"):
        for child in listed.read_text().split():
            try:
                total += _rss(int(child))
            except OSError:  # It has ended meanwhile.
                continue
    return total


def metric(text: str, name: str, **labels: str) -> float:
    """The sum of a metric over all its labels but the given ones, in Prometheus' text format."""
    total = 0.0
    for line in text.splitlines():
        head, _, value = line.rpartition(" ")
        if head.partition("{")[0] == name and all(f'{key}="{word}"' in head for key, word in labels.items()):
            total += float(value)
    return total


class Growth(NamedTuple):
    """How memory changed.

    Attributes:
      slope: MiB a minute, by least squares.
      total: MiB: the median of the last quarter less that of the first.
      minutes: the time that this is about.
    """

    slope: float
    total: float
    minutes: float


def growth(samples: Sequence[Sample], skip: float = 0.2) -> Growth | None:
    """How memory changed, the first part left out, in which caches fill; None for fewer than eight samples."""
    kept = samples[int(len(samples) * skip) :]
    if len(kept) < 8:
        return None
    minutes, rss = np.array([s.minutes for s in kept]), np.array([s.rss_mib for s in kept])
    quarter = len(kept) // 4
    total = float(np.median(rss[-quarter:]) - np.median(rss[:quarter]))
    return Growth(float(np.polyfit(minutes, rss, 1)[0]), total, float(minutes[-1] - minutes[0]))


def write_samples(path: pathlib.Path, samples: Iterable[Sample]) -> None:
    """Adds samples to a CSV file."""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(Sample._fields)
        writer.writerows(samples)


def read_samples(path: pathlib.Path) -> list[Sample]:
    """The samples of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Sample._make([float(m), phase, float(rss), *map(int, whole), float(used)])
            for m, phase, rss, *whole, used in list(csv.reader(file))[1:]
        ]


def picture(directory: pathlib.Path, samples: Sequence[Sample]) -> None:
    """Draws memory, and how many sequences ran and waited, over time."""
    figure, (left, right) = plots.panels(2, 5.2, 3.4)
    minutes = [s.minutes for s in samples]
    left.plot(minutes, [s.rss_mib for s in samples], color=plots.BLUE, linewidth=1, label="resident memory")
    soak = [s for s in samples if s.phase == "soak"]
    if (found := growth(soak)) is not None:
        kept = soak[int(len(soak) * 0.2) :]
        x = np.array([s.minutes for s in kept])
        line = np.polyval(np.polyfit(x, [s.rss_mib for s in kept], 1), x)
        label = f"soak: {found.total:+.1f} MiB in {found.minutes:.1f} minutes"
        left.plot(x, line, color=plots.ORANGE, linestyle="--", label=label)
    left.set_ylim(0, 1.25 * max(s.rss_mib for s in samples))
    plots.finish(left, "Memory of the server", "minutes", "MiB", legend=True)
    right.plot(minutes, [s.running for s in samples], color=plots.BLUE, linewidth=1, label="running")
    right.plot(minutes, [s.waiting for s in samples], color=plots.ORANGE, linewidth=1, linestyle="--", label="waiting")
    plots.finish(right, "Sequences", "minutes", "number", legend=True)
    plots.save(directory, {"memory.png": figure})


def _phase(name: str, phase: dict[str, Any], samples: Sequence[Sample]) -> str:
    own = [s for s in samples if s.phase == name]
    memory = f"{own[0].rss_mib:.0f}, {max(s.rss_mib for s in own):.0f}, {own[-1].rss_mib:.0f}" if own else ""
    counts = ", ".join(f"{number} {what}" for what, number in phase["counts"].items())
    return f"| {name} | {phase['seconds']:.0f} | {counts} | {memory} |"


def summary(about: dict[str, Any], phases: dict[str, dict[str, Any]], samples: Sequence[Sample]) -> str:
    """The tables that a person reads."""
    lines = [
        f"`{about['command']}`",
        "",
        f"{about['target']} in {about['dtype']}, {about['num_slots']} slots, {about['threads']} hardware threads, "
        f"specjax {about['specjax']}, {about['date']}.",
        "",
        "| phase | seconds | requests | memory, MiB: first, most, last |",
        "|---|---:|---|---|",
        *(_phase(name, phase, samples) for name, phase in phases.items()),
        "",
        "| phase | what had to hold | holds | found |",
        "|---|---|---|---|",
    ]
    for name, phase in phases.items():
        for check in phase["checks"]:
            lines.append(f"| {name} | {check['name']} | {'yes' if check['passed'] else '**no**'} | {check['found']} |")
    if (found := growth([s for s in samples if s.phase == "soak"])) is not None:
        lines += [
            "",
            f"Memory in the last {found.minutes:.1f} minutes of the soak: {found.slope:+.2f} MiB a minute by least "
            f"squares; {found.total:+.1f} MiB from the median of their first quarter to that of their last.",
        ]
    return "\n".join(lines) + "\n"


class Store:
    """What has been found, kept in the work directory."""

    def __init__(self, directory: pathlib.Path, about: dict[str, Any]):
        """Reads what an earlier run has left, if it asked for the same.

        Args:
          directory: the work directory.
          about: what is asked for.

        Raises:
          ValueError: where it asked for something else.
        """
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self.about, self.phases = about, dict[str, dict[str, Any]]()
        self.references: list[list[str]] = []
        self.pool: list[int] = []
        path = self.directory / "results.json"
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            own = ("date", "command")
            if any(kept["about"].get(key) != value for key, value in about.items() if key not in own):
                raise ValueError(f"{path} is of another run: choose another --workdir.")
            self.references, self.pool = kept["references"], kept["pool"]
            # What did not hold is tried again.
            self.phases = {
                name: phase
                for name, phase in kept["phases"].items()
                if all(check["passed"] for check in phase["checks"])
            }

    @property
    def seconds_each(self) -> float:
        """The mean time of an undisturbed answer."""
        reference = self.phases.get("reference", {"seconds": 1.0})
        return reference["seconds"] / max(len(self.references), 1)

    @property
    def samples_path(self) -> pathlib.Path:
        """Where samples are kept."""
        return self.directory / "samples.csv"

    def begin(self, name: str) -> None:
        """Forgets what an interrupted run has seen of a phase."""
        kept = [sample for sample in self.samples() if sample.phase != name]
        self.samples_path.unlink(missing_ok=True)
        write_samples(self.samples_path, kept)

    def samples(self) -> list[Sample]:
        """All samples so far."""
        return read_samples(self.samples_path) if self.samples_path.exists() else []

    def add(self, name: str, seconds: float, counts: dict[str, int], checks: Sequence[Check]) -> None:
        """Keeps a phase."""
        listed = [check._asdict() for check in checks]
        self.phases[name] = {"seconds": seconds, "counts": counts, "checks": listed}
        for check in checks:
            print(f"{name}: {'ok' if check.passed else 'FAILED'}: {check.name}: {check.found}", flush=True)
        self.write()

    def write(self) -> None:
        """Writes everything anew."""
        value = {"about": self.about, "phases": self.phases, "references": self.references, "pool": self.pool}
        files.write(self.directory / "results.json", json.dumps(value, indent=1))
        samples = self.samples()
        if samples:
            picture(self.directory, samples)
        files.write(self.directory / "summary.md", summary(self.about, self.phases, samples))

    def failed(self) -> list[str]:
        """What did not hold."""
        return [
            f"{name}: {check['name']}: {check['found']}"
            for name, phase in self.phases.items()
            for check in phase["checks"]
            if not check["passed"]
        ]
