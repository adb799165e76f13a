"""The lock of a work directory, and which directory a run takes by default."""

import errno
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from specjax import launch
from specjax.experiments import workdir
from specjax.parallel import distributed

ROOT = pathlib.Path(__file__).parents[1]
HOLD = """
import sys, time
from specjax.experiments import workdir
with workdir.locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path / "run"`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def owner(**changes) -> str:
    return json.dumps(workdir._self() | changes)


def test_a_second_run_is_refused_and_the_first_is_named(holder, tmp_path, capsys, monkeypatch):
    with pytest.raises(ValueError, match="is in use by another run") as refused, workdir.locked(tmp_path / "run"):
        pass
    for word in (f"process {holder.pid} on {socket.gethostname()}", "since 20", "-c", "choose another --workdir"):
        assert word in str(refused.value)
    # Every kind of run is asked the same, before it looks at anything else.
    for config in ("compare", "train", "count", "plan", "leviathan/mini_ende", "chinchilla/humaneval"):
        argv = ["launch", f"--config={ROOT / 'configs' / config}.py", f"--workdir={tmp_path / 'run'}"]
        assert launch.main([*argv, "--nocompilation_cache"]) == 1
        error = capsys.readouterr().err
        assert "is in use by another run" in error
        assert error.count("\n") == 1
    # However it ends, the system lets go of its lock.
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / workdir.LOCK).exists()
    with workdir.locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / workdir.LOCK).read_text())["pid"] == os.getpid()


STALE = {
    "a dead process": owner(pid=2**22 + 1),
    "a number that another process has got": owner(pid=1, process_start="0"),
    "nothing": "",
    "half a file": owner()[:20],
    "binary": "\x00\x01",
    "another type": "[1]",
    "other values": '{"pid": "x", "host": 3}',
}


@pytest.mark.parametrize("has_locks", [True, False])
@pytest.mark.parametrize("content", STALE.values(), ids=STALE)
def test_a_stale_lock_holds_nobody_up(content, has_locks, tmp_path, monkeypatch):
    if not has_locks:
        monkeypatch.setattr(workdir.fcntl, "flock", _no_locks)
    (tmp_path / workdir.LOCK).write_text(content)
    with workdir.locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def _no_locks(*_):
    raise OSError(errno.ENOTSUP, "Operation not supported")


def test_where_the_file_system_has_no_locks_the_file_counts(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(workdir.fcntl, "flock", _no_locks)
    with pytest.raises(ValueError, match=rf"process {holder.pid} on .*if it has ended, delete .*\.lock"):
        workdir.locked(tmp_path / "run").__enter__()
    (tmp_path / "run" / workdir.LOCK).write_text(owner(host="elsewhere", pid=1))
    with pytest.raises(ValueError, match="process 1 on elsewhere"):
        workdir.locked(tmp_path / "run").__enter__()


def test_what_a_run_leaves(tmp_path):
    with workdir.locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / workdir.LOCK).exists()
    assert not list(tmp_path.iterdir()), "a run that wrote nothing leaves no directory"
    (tmp_path / "there").mkdir()
    with workdir.locked(tmp_path / "there"):
        pass
    assert (tmp_path / "there").is_dir(), "a directory that was there stays"
    with workdir.locked(tmp_path / "a"):
        (tmp_path / "a" / "results.json").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["results.json"]
    with workdir.locked(tmp_path / "a"):
        pass


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/run/\.lock cannot be written"):
        workdir.locked(tmp_path / "file" / "run").__enter__()


def test_only_the_first_of_several_processes_takes_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    with workdir.locked_by_first(tmp_path / "run"):
        assert not (tmp_path / "run").exists()
    # What the first was told is told to all.
    monkeypatch.setattr(distributed, "from_first", lambda value: "the directory is in use")
    with pytest.raises(ValueError, match="the directory is in use"):
        workdir.locked_by_first(tmp_path / "run").__enter__()
    monkeypatch.undo()
    with workdir.locked_by_first(tmp_path / "run"):
        assert (tmp_path / "run" / workdir.LOCK).exists()


def test_the_first_of_several_processes_is_refused_in_all(holder, tmp_path):
    with pytest.raises(ValueError, match="is in use by another run"):
        workdir.locked_by_first(tmp_path / "run").__enter__()


def test_the_default_directory_is_that_of_the_config_and_its_values():
    values = {"seed": 0, "batch_sizes": (1, 2), "inner": {"x": 1.5}}
    path = workdir.default("configs/compare.py", ConfigDict(values).to_dict())
    assert path.parent == pathlib.Path("runs")
    assert path.name.startswith("compare-")
    assert path == workdir.default("configs/compare.py", dict(reversed(values.items())))
    others = [{"seed": 1}, {"batch_sizes": (2, 1)}, {"inner": {"x": 1.0}}, {"more": None}]
    assert len({path, *(workdir.default("configs/compare.py", values | other) for other in others)}) == 5
    assert workdir.default("b/train.py", values).name.startswith("train-")


def test_the_launcher_says_where_a_run_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = []
    for more in ([], [], ["--config.seed=1"]):
        argv = ["launch", f"--config={ROOT / 'configs' / 'compare.py'}", "--nocompilation_cache", *more]
        assert launch.main(argv) == 1
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert said[0].startswith("Work directory: runs/compare-")
    assert "the same command goes on there; --workdir=DIR" in said[0]
    assert not list(tmp_path.iterdir())
