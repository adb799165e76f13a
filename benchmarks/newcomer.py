"""How long a newcomer takes, from `git clone` to the first speculative text, to an own model and to an own drafter.

    python benchmarks/newcomer.py --out=newcomer.json

Runs the commands of docs/tutorial.md one after another in a new directory: a clone of the committed state of this one,
a new virtual environment, an empty cache of compiled programs. Packages and model weights are taken from the user's
caches where they are there. The times of reading and typing are not in it. A command that fails ends it, with what the
command said. This file needs no package, so any Python 3.11 runs it.
"""

import argparse
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]

FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "XLA_FLAGS")
"""What a newcomer's shell does not have."""

STEPS = (
    ("clone", "git clone --quiet --depth=1 REPOSITORY specjax", "."),
    ("environment", "PYTHON -m venv .venv", "specjax"),
    ("install", "pip install --quiet -e .", "specjax"),
    ("first speculative text", 'specjax generate "Why is the sky blue?" --max_new_tokens=64', "specjax"),
    ("quickstart: six prompts on both sides", "specjax quickstart --workdir=runs/quickstart", "specjax"),
    ("a model of one's own", "python examples/bring_your_model.py", "specjax"),
    ("a drafter of one's own", "python examples/write_a_drafter.py", "specjax"),
    (
        "that drafter, measured on one prompt",
        "specjax compare --config.drafter=examples/write_a_drafter.py:successors --config.num_draft_tokens=4 "
        "--config.data=configs/quickstart_prompts.jsonl --config.num_prompts=1 --config.max_new_tokens=64 "
        "--workdir=runs/own",
        "specjax",
    ),
)
"""What is reached, the command, and the directory that it runs in."""


def environment(place: pathlib.Path) -> dict[str, str]:
    """The variables of the shell, with the virtual environment active."""
    inherited = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    path = f"{place / 'specjax' / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return inherited | {"PATH": path, "JAX_COMPILATION_CACHE_DIR": str(place / "programs")}


def run(place: pathlib.Path) -> dict[str, float]:
    """The seconds of each step; each is printed as it ends.

    Raises:
      RuntimeError: with the last lines of a command that failed.
    """
    seconds: dict[str, float] = {}
    for number, (name, command, directory) in enumerate(STEPS, start=1):
        print(f"[{number} of {len(STEPS)}] {name}: {command}", flush=True)
        known = {"REPOSITORY": ROOT.as_uri(), "PYTHON": sys.executable}
        words = [known.get(word, word) for word in shlex.split(command)]
        begin = time.perf_counter()
        done = subprocess.run(words, cwd=place / directory, env=environment(place), capture_output=True, text=True)
        seconds[name] = time.perf_counter() - begin
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
            raise RuntimeError(f"{command!r} ended with exit code {done.returncode}:\n{said}")
        print(f"    {seconds[name]:.1f} s", flush=True)
    return seconds


def table(seconds: dict[str, float]) -> str:
    """The times in Markdown, with their sum so far."""
    lines, total = ["| | seconds | in all |", "|---|---:|---:|"], 0.0
    for name, value in seconds.items():
        total += value
        lines.append(f"| {name} | {value:.0f} | {total / 60:.1f} min |")
    return "\n".join(lines)


def machine() -> str:
    """The processor, in words."""
    found = pathlib.Path("/proc/cpuinfo")
    lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} hardware threads, {model}, {time.strftime('%Y-%m-%d')}"


def main() -> None:
    """Prints the table, and writes the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the seconds of each command")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        try:
            seconds = run(pathlib.Path(directory))
        except RuntimeError as error:
            sys.exit(f"error: {error}")
    print(f"\n{table(seconds)}\n\n{machine()}")
    if arguments.out:
        arguments.out.write_text(json.dumps(seconds, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
