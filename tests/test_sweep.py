"""A grid of runs: every cell in a process of its own, resumed, interrupted and with one that fails."""

import json
import os
import pathlib
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml
from helpers import WORDS, save_tiny_decoder

ROOT = pathlib.Path(__file__).parents[1]
SWEEP = ROOT / "launch" / "sweep.py"

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({"experiment": "stub", "k": 1, "name": "", "pair": (1, 2), "pause": 0.0})
"""

STUB = '''
"""A run that measures nothing: what a sweep makes of a run's files and exit codes is tested, not the run."""
import json, pathlib, sys, time
from specjax import experiments, launch

def run(config, workdir, *, overwrite):
    time.sleep(config.pause)
    if config.name == "bad":
        raise ValueError("the name is bad")
    workdir.mkdir(parents=True, exist_ok=True)
    rows = [{"task": task, "k": config.k, "measured_speedup": 1 + config.k / 8, "num_tokens": 7,
             "temperature": 0.0, "draft": "", "num_draft_tokens": config.k, "batch_size": 1} for task in ("one", "all")]
    (workdir / "results.json").write_text(json.dumps(rows))

experiments.get = lambda name: run
sys.exit(launch.main())
'''


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def sweep(tmp_path, config, monkeypatch):
    """The module, whose cells run a stub in a process of their own."""
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    found = runpy.run_path(str(SWEEP))
    original = found["command"]

    def command(common, cell, directory):
        return [sys.executable, str(stub), *original(common, cell, directory)[3:], "--nocompilation_cache"]

    found["main"].__globals__["command"] = command
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return lambda *more: found["main"](["sweep", f"--config={config}", f"--workdir={tmp_path / 'out'}", *more])


def test_a_grid_is_run_once_gathered_and_continued(sweep, tmp_path, capfd):
    out = tmp_path / "out"
    assert sweep("--sweep=config.k=2,4", "--sweep=config.name=a,bad") == 1
    said = capfd.readouterr()
    assert "2 of 4 cells failed: k=2,name=bad, k=4,name=bad" in said.err
    lines = said.out.splitlines()
    assert lines[0].startswith("[1 of 4] k=2,name=a ... (0 s elapsed)")
    assert re.fullmatch(r"\[1 of 4\] k=2,name=a: \d+ s; speedup 1.25x", lines[1])
    assert re.search(r"^\[2 of 4\] k=2,name=bad ... \(\d+ s elapsed, about \d+ (s|min|h) remaining\)$", said.out, re.M)
    # The table stands on the terminal, too.
    printed = [line for line in lines if line.startswith("|")]
    assert printed == [line for line in (out / "summary.md").read_text().splitlines() if line.startswith("|")]
    assert "error: ValueError: the name is bad" in said.err
    rows = json.loads((out / "results.json").read_text())
    assert [(row["cell"], row["task"], row["measured_speedup"]) for row in rows] == [
        ("k=2,name=a", "all", 1.25),
        ("k=4,name=a", "all", 1.5),
    ]
    summary = (out / "summary.md").read_text()
    assert "| 2 | a |" in summary
    assert "1.50x" in summary
    assert summary.count("FAILED") == 4
    assert (out / "speedup.png").read_bytes()[:4] == b"\x89PNG"
    # The finished cells are not run again, the others are; more cells can be added.
    (out / "cells" / "k=2,name=a" / "log.txt").write_text("untouched")
    assert sweep("--sweep=config.k=2,4,8", "--sweep=config.name=a") == 0
    assert capfd.readouterr().out.count("finished before") == 2
    assert (out / "cells" / "k=2,name=a" / "log.txt").read_text() == "untouched"
    summary = (out / "summary.md").read_text()
    assert "2.00x" in summary
    assert "FAILED" not in summary
    # With other flags it is another sweep.
    assert sweep("--sweep=config.k=2", "--config.pause=0.1") == 1
    assert "other flags (--config.pause=0.1)" in capfd.readouterr().err


def test_a_sweep_runs_as_tasks_of_a_job(sweep, tmp_path, capfd):
    out, grid = tmp_path / "out", "--sweep=config.k=2,4"
    assert sweep(grid, "--write_jobs=slurm") == 0
    assert "warning" not in capfd.readouterr().err
    assert sweep(grid, "--write_jobs", "kubernetes", "--image=me/specjax:1", "--claim=disk") == 0
    assert "is not on their volume" in capfd.readouterr().err
    script = (out / "jobs.sbatch").read_text()
    assert "#SBATCH --array=0-1\n" in script
    assert subprocess.run(["bash", "-n", str(out / "jobs.sbatch")], check=False).returncode == 0
    line = next(line for line in script.splitlines() if line.startswith("python "))
    assert line.endswith('--cell="$SLURM_ARRAY_TASK_ID"')
    assert grid in shlex.split(line)
    assert "write_jobs" not in line
    job = yaml.safe_load((out / "jobs.yaml").read_text())
    assert (job["kind"], job["spec"]["completions"], job["spec"]["completionMode"]) == ("Job", 2, "Indexed")
    pod = job["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "me/specjax:1"
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}
    task = pod["containers"][0]["command"][2]
    assert task.startswith("exec python launch/sweep.py --sweep=config.k=2,4 --workdir=")
    assert task.endswith(' --cell="$JOB_COMPLETION_INDEX"')
    assert "write_jobs" not in task
    assert "kubernetes" not in task
    # Nothing was run; then one task runs its cell, once, and the table has it.
    assert sweep(grid, "--cell=1") == 0
    assert sweep(grid, "--cell=1") == 0
    assert "k=4: finished before" in capfd.readouterr().out
    assert sweep(grid, "--gather") == 0
    table = capfd.readouterr().out
    assert re.search(r"\| 2 \|.*not run \|", table)
    assert re.search(r"\| 4 \|.*1.50x.*finished \|", table)
    header, row = (out / "results.csv").read_text().splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["measured_speedup"] == "1.5"
    assert sweep(grid, "--cell=2") == 1
    assert "--cell=2: the sweep has the cells 0 to 1" in capfd.readouterr().err


@pytest.mark.parametrize("speedups", [[0.4, 0.5], [1.0, 1.25], [2.0, 9.0]])
def test_no_point_of_the_plot_is_clipped(speedups):
    found = runpy.run_path(str(SWEEP))
    axes = [("config.k", ["2", "4"])]
    same = {"draft": "", "temperature": 0.0, "num_draft_tokens": 2, "batch_size": 1}
    pairs = zip(axes[0][1], speedups, strict=True)
    rows = [same | {"flags": {"config.k": k}, "measured_speedup": x} for k, x in pairs]
    figure = found["plot"](axes, rows)
    figure.canvas.draw()
    (panel,) = figure.axes
    box = panel.get_window_extent()
    line = panel.lines[0]
    radius = line.get_markersize() / 2 * figure.dpi / 72 + 1
    for x, y in panel.transData.transform(line.get_xydata()):
        assert box.x0 + radius <= x <= box.x1 - radius
        assert box.y0 + radius <= y <= box.y1 - radius


def test_time_left_is_that_of_the_cells_before():
    found = runpy.run_path(str(SWEEP))
    assert found["progress"]([], 5.0, 3) == "5 s elapsed"
    assert found["progress"]([60.0, 180.0], 240.0, 3) == "4.0 min elapsed, about 6.0 min remaining"
    assert found["duration"](9000) == "2.5 h"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "Nothing to sweep"),
        (("--sweep=config.k",), "write --sweep=config.KEY=VALUE"),
        (("--sweep=config.k=1,,2",), "write --sweep=config.KEY=VALUE"),
        (("--sweep=config.k=1,1",), "each value once"),
        (("--sweep=config.k=1", "--sweep=config.k=2"), "config.k twice"),
        (("--sweep=config.nope=1,2",), "no key 'nope'"),
        (("--sweep=config.k=one",), "config.k"),
        (("--sweep=config.k=1", "--nope"), "Unknown flag --nope"),
        (("--sweep=config.name=a/b,a b",), "Two cells"),
    ],
)
def test_wrong_flags_end_in_a_line_before_anything_runs(flags, message, sweep, tmp_path, capfd):
    assert sweep(*flags) == 1
    error = capfd.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_values_with_commas_stay_whole():
    split = runpy.run_path(str(SWEEP))["split_values"]
    assert split("1,2") == ["1", "2"]
    assert split("(1,2),(3,4)") == ["(1,2)", "(3,4)"]
    assert split("'a,b',\"c(\",d") == ["'a,b'", '"c("', "d"]


def test_a_dry_run_prints_the_commands(sweep, tmp_path, capfd):
    assert sweep("--sweep=config.pair=(1,2),(3,4)", "--dry_run") == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "'--config.pair=(3,4)'" in lines[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(tmp_path):
    """The real command on the real comparison: the second of two cells is interrupted."""
    target = save_tiny_decoder(tmp_path / "target", 0)
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": " ".join(WORDS[i : i + 5])}) + "\n" for i in range(2)))
    out = tmp_path / "out"
    keys = {"target": target, "data": data, "max_new_tokens": 8, "repeats": 1}
    argv = [sys.executable, str(SWEEP), f"--workdir={out}", "--sweep=config.num_draft_tokens=2,3"]
    argv += [f"--config={ROOT / 'configs' / 'compare.py'}", "--nocompilation_cache"]
    argv += [f"--config.{key}={value}" for key, value in keys.items()]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "[2 of 2]" in line:
            break
    # The cell's process has to have started to be interrupted.
    log = out / "cells" / "num_draft_tokens=3" / "log.txt"
    end = time.monotonic() + 60
    while not log.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "1 of 2 cells are finished" in error
    rows = json.loads((out / "results.json").read_text())
    assert [(row["num_draft_tokens"], row["task"], row["identical"]) for row in rows] == [(2, "all", 1.0)]
    assert "not run" in (out / "summary.md").read_text()
