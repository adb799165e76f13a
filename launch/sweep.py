"""Runs `specjax.launch` for every combination of some flags' values, and collects one table and plot.

    python launch/sweep.py --sweep=config.num_draft_tokens=1,2,4,8 --sweep=config.temperature=0,1 \\
        --workdir=runs/sweep --config=configs/compare.py --config.target=SOURCE --config.data=FILE

Every other flag is passed on. Each combination is a cell: a run of its own, in a process of its own, with the directory
WORKDIR/cells/NAME, whose log.txt has the output. The same command skips finished cells, so an interrupted sweep
resumes; a cell that fails is reported at the end, with exit code 1, and does not stop the others. A value may contain
commas inside brackets or quotes: --sweep='config.num_draft_tokens=(1,2),(4,8)'.

On a cluster, `--write_jobs=slurm` writes WORKDIR/jobs.sbatch, a job array with a task for each cell, and
`--write_jobs=kubernetes --image=IMAGE --claim=CLAIM` WORKDIR/jobs.yaml, an indexed Job; the comments in them say how
they are submitted. Afterwards `--gather` with the same flags makes the table of all finished cells, and runs none.
"""

import csv
import io
import itertools
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import sweep_jobs
from absl import flags
from matplotlib.figure import Figure

from specjax import files, launch
from specjax.experiments import results
from specjax.experiments.reports import plots
from specjax.experiments.reports.tables import markdown
from specjax.experiments.results import Row

RECORD = "sweep.json"
"""The finished cells of a sweep, and what they were run with."""

MARK = "finished.json"
"""In the directory of a cell that ran as a task of its own: the seconds that it took."""

COLUMNS = {
    "draft": "{}",
    "temperature": "{:g}",
    "num_draft_tokens": "{}",
    "batch_size": "{}",
    "num_tokens": "{}",
    "acceptance_rate": "{:.3f}",
    "block_efficiency": "{:.2f}",
    "baseline_tokens_per_second": "{:.1f}",
    "tokens_per_second": "{:.1f}",
    "predicted_speedup": "{:.2f}x",
    "measured_speedup": "{:.2f}x",
    "identical": "{:.0%}",
}
"""Fields of a row that the table shows, and how."""

_SHORT = {"draft": "draft", "temperature": "T", "num_draft_tokens": "K", "batch_size": "batch"}
"""Fields by which the rows of one run differ, and their labels in the plot."""

_GRACE = 60
"""Seconds that a run may take to end after Ctrl-C."""


class Cell(NamedTuple):
    """A combination of values.

    Attributes:
      name: its name, and that of its directory.
      values: the value of each flag.
    """

    name: str
    values: dict[str, str]

    @property
    def flags(self) -> list[str]:
        """The flags of the run in addition to the common ones."""
        return [f"--{flag}={value}" for flag, value in self.values.items()]


OWN = ("sweep", "workdir", "dry_run", "write_jobs", "image", "claim", "cell", "gather")
"""The flags of a sweep itself, as its help lists them."""


def split_values(text: str) -> list[str]:
    """The values between commas; commas within brackets or quotes do not separate."""
    found, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += 0 if quote else (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += letter
    return [value.strip() for value in found]


def read_axis(text: str) -> tuple[str, list[str]]:
    """A flag's name and its values from `NAME=VALUE,VALUE,...`.

    Raises:
      UsageError: for no values, an empty or a repeated one.
    """
    name, _, values = text.partition("=")
    found = split_values(values)
    if not name or not all(found) or len(set(found)) < len(found):
        raise launch.UsageError(f"--sweep={text}: write --sweep=config.KEY=VALUE,VALUE,..., each value once.")
    return name.removeprefix("--"), found


def grid(axes: Sequence[tuple[str, list[str]]]) -> list[Cell]:
    """All combinations; the last axis changes fastest.

    Raises:
      UsageError: for an axis given twice, or values whose directories would have one name.
    """
    names = [name for name, _ in axes]
    if not names:
        raise launch.UsageError("Nothing to sweep: give --sweep=config.KEY=VALUE,VALUE,...")
    if len(set(names)) < len(names):
        raise launch.UsageError(f"--sweep names {max(names, key=names.count)} twice: give all its values at once.")
    cells = []
    for values in itertools.product(*(values for _, values in axes)):
        chosen = dict(zip(names, values, strict=True))
        shown = ",".join(f"{name.removeprefix('config.')}={value}" for name, value in chosen.items())
        cells.append(Cell(re.sub(r"[^\w.=,+-]", "_", shown), chosen))
    directories = [cell.name for cell in cells]
    if len(set(directories)) < len(cells):
        raise launch.UsageError(f"Two cells would be called {max(directories, key=directories.count)}: rename files.")
    return cells


class Record:
    """The finished cells on disk: by name, the seconds that each took."""

    def __init__(self, directory: pathlib.Path, common: Sequence[str]):
        """Opens or makes the file.

        Raises:
          ValueError: where it is broken, or was made with other flags.
        """
        self.path, self.common = directory / RECORD, list(common)
        self.finished: dict[str, float] = {}
        if not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            before, self.finished = content["flags"], content["finished"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is broken ({error!r}): delete it, or choose another --workdir.") from error
        if sorted(before) != sorted(self.common):
            differ = sorted(set(before) ^ set(self.common))
            raise ValueError(
                f"{self.path} is of a sweep with other flags ({', '.join(differ)}): choose another --workdir, or "
                "delete that one."
            )

    def collect(self, cells: Sequence[Cell]) -> None:
        """Adds the cells that have been finished as tasks of their own."""
        for cell in cells:
            mark = self.path.parent / "cells" / cell.name / MARK
            if cell.name not in self.finished and mark.is_file():
                self.add(cell, json.loads(mark.read_text(encoding="utf-8"))["seconds"])

    def add(self, cell: Cell, seconds: float) -> None:
        """Writes that a cell is finished."""
        self.finished[cell.name] = seconds
        files.write(self.path, results.to_json({"flags": self.common, "finished": self.finished}))


def command(common: Sequence[str], cell: Cell, directory: pathlib.Path) -> list[str]:
    """The command of a cell."""
    return [
        sys.executable,
        "-m",
        "specjax.launch",
        *common,
        *cell.flags,
        f"--workdir={directory / 'cells' / cell.name}",
    ]


def run_cell(argv: Sequence[str], directory: pathlib.Path) -> int:
    """Runs a cell; what it prints goes to `log.txt`.

    Returns:
      its exit code.

    Raises:
      KeyboardInterrupt: after the run has ended too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            return process.wait()
        except KeyboardInterrupt:
            # A terminal has interrupted the run already; a second interrupt would stop it while it cleans up.
            if not sys.stdin.isatty():
                process.send_signal(signal.SIGINT)
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise


def last_line(path: pathlib.Path) -> str:
    """The last line of a file that is not empty; errors end a run's log."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it said nothing")


def rows_of(cell: Cell, directory: pathlib.Path) -> list[Row]:
    """What a cell has measured: the row of all prompts where there is one, else all rows; and its values."""
    path = directory / "cells" / cell.name / "results.json"
    found: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    rows = [row for row in found if isinstance(row, dict) and "measured_speedup" in row]
    rows = [row for row in rows if row["task"] == "all"] or rows
    return [{"cell": cell.name, "flags": cell.values} | row for row in rows]


def table(cells: Sequence[Cell], rows: Sequence[Row], finished: dict[str, float], failed: dict[str, str]) -> str:
    """A line per row; a cell without rows has one too."""
    axes = list(cells[0].values)
    shown = {name: how for name, how in COLUMNS.items() if f"config.{name}" not in axes}
    lines = [[*(axis.removeprefix("config.") for axis in axes), *shown, "state"]]
    for cell in cells:
        state = "finished" if cell.name in finished else "FAILED" if cell.name in failed else "not run"
        for row in [row for row in rows if row["cell"] == cell.name] or [{}]:
            values = [how.format(row[name]) if row.get(name) is not None else "-" for name, how in shown.items()]
            lines.append([*cell.values.values(), *values, state])
    return markdown(lines)


def plot(axes: Sequence[tuple[str, list[str]]], rows: Sequence[Row]) -> Figure:
    """Measured speedup against the first axis, a line for each combination of the others (and of a run's own rows)."""
    figure, (panel,) = plots.panels(1, 7, 4)
    first, values = axes[0]
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        parts = [f"{name.removeprefix('config.')}={row['flags'][name]}" for name, _ in axes[1:]]
        # A run may have swept a key by itself.
        parts += [
            f"{short} {row[name]}"
            for name, short in _SHORT.items()
            if f"config.{name}" not in row["flags"] and len({str(other[name]) for other in rows}) > 1
        ]
        lines.setdefault(", ".join(parts), {})[values.index(row["flags"][first])] = row["measured_speedup"]
    for (label, points), (color, marker) in zip(lines.items(), itertools.cycle(plots.STYLES), strict=False):
        places = sorted(points)
        panel.plot(places, [points[place] for place in places], f"{marker}-", color=color, label=label)
    panel.axhline(1, color=plots.GREY, linewidth=0.8, linestyle=":")
    panel.set_xticks(range(len(values)), values)
    # Show whole markers, also the highest one and those at the edges.
    panel.set_ylim(0, 1.08 * max(1.0, *(row["measured_speedup"] for row in rows)))
    panel.margins(x=0.05)
    name = first.removeprefix("config.")
    plots.finish(panel, "", name, "speedup over plain decoding", legend=len(lines) > 1)
    return figure


def to_csv(rows: Sequence[Row]) -> str:
    """All rows as CSV, with a column for each field that is one value."""
    flat = [row["flags"] | {name: x for name, x in row.items() if not isinstance(x, (list, dict))} for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in flat for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def gather(
    axes: Sequence[tuple[str, list[str]]],
    cells: Sequence[Cell],
    directory: pathlib.Path,
    record: Record,
    failed: dict[str, str],
) -> str:
    """Writes the table of all cells so far, their rows, and the plot.

    Returns:
      the table.
    """
    rows = [row for cell in cells if cell.name in record.finished for row in rows_of(cell, directory)]
    files.write(directory / "results.json", results.to_json(rows))
    files.write(directory / "results.csv", to_csv(rows))
    parts = [f"# {directory.name}", f"`specjax.launch {shlex.join(record.common)}`"]
    found = table(cells, rows, record.finished, failed)
    parts.append(found)
    parts += [f"- **{name} FAILED**: {why}" for name, why in failed.items()]
    if rows:
        plot(axes, rows).savefig(directory / "speedup.png", dpi=plots.DPI)
        parts.append("![speedup](speedup.png)")
    seconds = sum(record.finished[cell.name] for cell in cells if cell.name in record.finished)
    parts.append(f"The finished cells took {seconds / 60:.1f} min.")
    files.write(directory / "summary.md", "\n\n".join(parts) + "\n")
    return found


def duration(seconds: float) -> str:
    """Such as 42 s, 3.5 min, 2.1 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def progress(taken: Sequence[float], elapsed: float, left: int) -> str:
    """How long a sweep has run, and about how long it still will.

    Args:
      taken: seconds of the finished cells.
      elapsed: seconds since this command began.
      left: cells that are not run yet, this one included.
    """
    text = f"{duration(elapsed)} elapsed"
    if taken:
        text += f", about {duration(left * sum(taken) / len(taken))} remaining"
    return text


def outcome_of(row: Row) -> str:
    """The result of a finished cell, for a line of progress."""
    return ", ".join(
        f"{name} {COLUMNS[key].format(row[key])}"
        for key, name in (("measured_speedup", "speedup"), ("acceptance_rate", "acceptance"))
        if row.get(key) is not None
    )


def run_all(
    axes: Sequence[tuple[str, list[str]]],
    cells: Sequence[Cell],
    common: Sequence[str],
    directory: pathlib.Path,
    record: Record,
) -> int:
    """Runs the cells that are not finished, and prints its progress.

    Returns:
      the exit code, see `main`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    start = time.monotonic()
    for number, cell in enumerate(cells, start=1):
        title = f"[{number} of {len(cells)}] {cell.name}"
        if cell.name in record.finished:
            print(f"{title}: finished before", flush=True)
            continue
        left = sum(other.name not in record.finished for other in cells[number - 1 :])
        taken = [record.finished[other.name] for other in cells if other.name in record.finished]
        print(f"{title} ... ({progress(taken, time.monotonic() - start, left)})", flush=True)
        begin, workdir = time.monotonic(), directory / "cells" / cell.name
        try:
            code = run_cell(command(common, cell, directory), workdir)
        except KeyboardInterrupt:
            code = 130
        seconds = time.monotonic() - begin
        if code == 130:
            gather(axes, cells, directory, record, failed)
            done = f"{len(record.finished)} of {len(cells)} cells are finished in {directory}"
            print(f"\nInterrupted: {done}; the same command continues.", file=sys.stderr)
            return 130
        if code:
            failed[cell.name] = f"exit code {code}: {last_line(workdir / 'log.txt')}"
            print(f"{title} FAILED after {duration(seconds)}, {failed[cell.name]}", file=sys.stderr, flush=True)
        else:
            record.add(cell, seconds)
            found = "; ".join(filter(None, map(outcome_of, rows_of(cell, directory))))
            print(f"{title}: {duration(seconds)}{f'; {found}' if found else ''}", flush=True)
        gather(axes, cells, directory, record, failed)
    print(f"\n{gather(axes, cells, directory, record, failed)}\n")
    print(f"summary.md, results.json and the cells are in {directory}.")
    if failed:
        print(f"error: {len(failed)} of {len(cells)} cells failed: {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0


def run_one(cells: Sequence[Cell], number: int, common: Sequence[str], directory: pathlib.Path) -> int:
    """Runs one cell as a task of its own, unless it is finished.

    Returns:
      the exit code of its run.

    Raises:
      UsageError: for a number that no cell has.
    """
    if not 0 <= number < len(cells):
        raise launch.UsageError(f"--cell={number}: the sweep has the cells 0 to {len(cells) - 1}.")
    cell = cells[number]
    workdir = directory / "cells" / cell.name
    if (workdir / MARK).is_file():
        print(f"{cell.name}: finished before")
        return 0
    begin = time.monotonic()
    code = run_cell(command(common, cell, directory), workdir)
    if code:
        print(f"error: {cell.name}: exit code {code}: {last_line(workdir / 'log.txt')}", file=sys.stderr)
    else:
        files.write(workdir / MARK, results.to_json({"seconds": time.monotonic() - begin}))
    return code


def read_flags(argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
    """The sweep's own flags, and those that are passed on.

    Raises:
      UsageError: in one sentence.
    """
    own = flags.FlagValues()
    flags.DEFINE_multi_string("sweep", [], "config.KEY=VALUE,VALUE,...", flag_values=own)
    flags.DEFINE_string("workdir", "runs/sweep", "Where the table and the cells go.", flag_values=own)
    flags.DEFINE_bool("dry_run", False, "Print the commands, and run nothing.", flag_values=own)
    flags.DEFINE_bool("gather", False, "Make the table of what is finished, and run nothing.", flag_values=own)
    jobs = ["slurm", "kubernetes"]
    flags.DEFINE_enum("write_jobs", None, jobs, "Write a job with a task for each cell.", flag_values=own)
    flags.DEFINE_string("image", "IMAGE", "With Kubernetes: what the pods run.", flag_values=own)
    flags.DEFINE_string("claim", "CLAIM", "With Kubernetes: a volume for all pods, at /data.", flag_values=own)
    flags.DEFINE_integer("cell", None, "Run the cell of this number alone, from 0.", flag_values=own)
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=own)
    try:
        return own, own(list(argv), known_only=True)[1:]
    except flags.Error as error:
        raise launch.UsageError(" ".join(str(error).split())) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
      the exit code: 0, 1 where a cell failed or nothing could be run, 130 after an interrupt.
    """
    argv = list(sys.argv if argv is None else argv)
    try:
        own, common = read_flags(argv)
        if own.help:
            print(__doc__)
            print("\n".join(f"  --{name}: {' '.join((own[name].help or '').split())}" for name in OWN))
            return 0
        axes = [read_axis(text) for text in own.sweep]
        cells = grid(axes)
        for cell in cells:
            # Check all of them before the first is run.
            launch.parse(["launch", *common, *cell.flags])
        directory = pathlib.Path(own.workdir)
        if own.dry_run:
            print("\n".join(shlex.join(command(common, cell, directory)) for cell in cells))
            return 0
        if own.write_jobs:
            task = [*(f"--sweep={text}" for text in own.sweep), f"--workdir={directory}", *common]
            job = sweep_jobs.Job(task, len(cells), directory, own.image, own.claim)
            path = sweep_jobs.write(own.write_jobs, job)
            print(f"{path} has a task for each of {len(cells)} cells; its first lines say how it is submitted.")
            if own.write_jobs == "kubernetes" and not directory.is_relative_to("/data"):
                print(
                    f"warning: the pods write to {directory}, which is not on their volume, so that it is lost with "
                    "them: give --workdir=/data/NAME.",
                    file=sys.stderr,
                )
            return 0
        if own.cell is not None:
            return run_one(cells, own.cell, common, directory)
        record = Record(directory, common)
        record.collect(cells)
        if own.gather:
            directory.mkdir(parents=True, exist_ok=True)
            print(gather(axes, cells, directory, record, {}))
            return 0
    except (launch.UsageError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return run_all(axes, cells, common, directory, record)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
