"""TensorBoard beside the curve: what the event files say is what `train.jsonl` says, also where a run is resumed."""

import pathlib
import signal
from collections import defaultdict
from typing import Any

import pytest
from test_training import command, copies, make_tokenizer, write_texts

from specjax import launch
from specjax.experiments import board
from specjax.training.curve import Curve

pytest.importorskip("tensorboardX")

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def points(workdir: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    """The points of all files of a directory, by tag, in the order of the files."""
    from tensorboardX.proto import event_pb2

    found = defaultdict(list)
    for path in sorted((workdir / board.DIRECTORY).iterdir()):
        data = path.read_bytes()
        while data:
            # A record: its length in 8 bytes, 4 of checksum, the event, 4 of checksum.
            size = int.from_bytes(data[:8], "little")
            event: Any = event_pb2.Event.FromString(data[12 : 12 + size])  # pyright: ignore[reportAttributeAccessIssue]
            data = data[16 + size :]
            for value in event.summary.value:
                found[value.tag].append((event.step, value.simple_value))
    return dict(found)


def a_step(step: int, loss: float) -> dict[str, Any]:
    names = ("grad_norm", "learning_rate", "num_targets", "num_tokens", "seconds", "tokens_per_second")
    return {"step": step, "loss": loss, **dict.fromkeys(names, 0.5)}


def test_a_resumed_run_has_one_point_for_each_step(tmp_path):
    """A run that ends after step 4, with a checkpoint of step 2."""
    path = tmp_path / "train.jsonl"
    killed, before = board.Board(tmp_path), Curve(path, 0)
    before.add([*(a_step(step, 8.0 / step) for step in (1, 2, 3, 4)), {"step": 2, "valid_loss": 6.0, "alpha": 0.25}])
    killed(before.lines)
    killed.close()
    assert points(tmp_path)["train/loss"] == [(1, 8.0), (2, 4.0), (3, pytest.approx(8 / 3)), (4, 2.0)]
    for file in (tmp_path / board.DIRECTORY).iterdir():
        file.rename(file.with_name(f"events.out.tfevents.1.{file.name}"))  # Both might have the name of one second.
    after = Curve(path, 2)
    with board.beside(lambda lines: None, tmp_path, True) as told:
        told(after.lines)
        told([a_step(3, 3.0), a_step(4, 1.0)])
    written = points(tmp_path)
    assert written["train/loss"] == [(1, 8.0), (2, 4.0), (3, 3.0), (4, 1.0)]
    assert (written["valid/loss"], written["valid/alpha"]) == ([(2, 6.0)], [(2, 0.25)])
    assert "train/step" not in written


def test_lists_are_numbered(tmp_path):
    with board.beside(lambda lines: None, tmp_path, True) as told:
        told([{"step": 0, "valid_loss": 2.0, "greedy": [0.5, 0.125]}])
    assert points(tmp_path) == {"valid/loss": [(0, 2.0)], "valid/greedy/1": [(0, 0.5)], "valid/greedy/2": [(0, 0.125)]}


def test_nothing_is_written_unless_it_is_wanted(tmp_path):
    told: list = []
    with board.beside(told.extend, tmp_path, False) as report:
        report([{"step": 1, "loss": 1.0}])
    assert told == [{"step": 1, "loss": 1.0}]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["train", "distill", "prune", "head"])
def test_without_the_package_it_is_refused_before_anything_is_loaded(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = [f"--workdir={tmp_path / 'run'}", "--nocompilation_cache", "--config.tensorboard=True"]
    assert launch.main(["launch", f"--config={CONFIGS / name}.py", *flags]) == 1
    error = capsys.readouterr().err
    assert "config.tensorboard=True: tensorboardX is not installed: pip install -e '.[tensorboard]'" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_launched_interrupted_and_resumed(tmp_path, monkeypatch, capsys):
    make_tokenizer().save(tmp_path / "vocabulary")
    files = {"data": write_texts(tmp_path / "train.jsonl", copies(40)), "vocabulary": str(tmp_path / "vocabulary")}
    files["valid"] = write_texts(tmp_path / "valid.jsonl", copies(8, 1))
    run, add = tmp_path / "run", board.Board._add
    flags = command(run, **files, tensorboard=True, log_every=1)

    def stop(self, tag, value, step):
        add(self, tag, value, step)
        if step == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(board.Board, "_add", stop)
    assert launch.main(flags) == 130
    assert [step for step, _ in points(run)["train/loss"]][:4] == [1, 2, 3, 4]
    monkeypatch.setattr(board.Board, "_add", add)
    assert launch.main(flags) == 0, capsys.readouterr().err
    written, lines = points(run), Curve(run / "train.jsonl", 6).lines
    for tag, field in (("train/loss", "loss"), ("train/learning_rate", "learning_rate"), ("valid/loss", "valid_loss")):
        theirs = [(line["step"], pytest.approx(line[field], rel=1e-6)) for line in lines if field in line]
        assert written[tag] == theirs
    assert [step for step, _ in written["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert launch.main([*flags[:-1], "--config.tensorboard=False", "--overwrite"]) == 0
    assert not (run / board.DIRECTORY).exists()
