"""Damaged work directories and checkpoints: one sentence that names the file and the remedy, never a silent restart."""

import errno
import json
import os
import pathlib
import shutil
from collections.abc import Callable

import jax
import pytest
from helpers import save_tiny_decoder
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_experiments import row

from specjax import files
from specjax.api import pretrained
from specjax.experiments.reports import compare as report
from specjax.experiments.store import RowStore, Store
from specjax.models.weights import checkpoint
from specjax.training.curve import Curve

CONFIG = {"seed": 0, "target": "t", "batch_size": 1}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
garbage = JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40)
few = settings(max_examples=40, deadline=None, database=None)


def truncated(content: bytes, share: float) -> bytes:
    return content[: int(share * len(content))]


def replaced(value, path: list[int], by):
    """A JSON value with one of its parts, found by a path of numbers, replaced by another."""
    if not path or not isinstance(value, list | dict) or not value:
        return by
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[path[0] % len(keys)]
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = replaced(value[key], path[1:], by)
    return copy


def sound_or_refused(read: Callable[[], object], path: pathlib.Path) -> bool:
    """Whether it was read; else the error has to be a sentence with the file and a remedy."""
    try:
        read()
    except ValueError as error:
        text = str(error)
        assert path.name in text or str(path.parent) in text, text
        assert any(word in text for word in ("--overwrite", "save the model again", "Save the model again", "matching"))
        assert "\n" not in text
        return False
    return True


# ---- a comparison


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("finished")
    store = RowStore(path, CONFIG)
    for i in range(3):
        store.add([row(i)], [{"prompt": f"p{i}", "text": "a é"}])
    return path


def read_run(path: pathlib.Path) -> RowStore:
    store = RowStore(path, CONFIG)
    store.check_resumable(["p0", "p1", "p2"], "")
    assert store.rows, "the run began anew"
    report.findings(store.rows)
    report.summary({"name": "x"}, store.rows, [])
    return store


@pytest.mark.parametrize("name", ["results.json", "config.json", "samples.jsonl"])
@given(share=st.floats(0, 0.999))
@few
def test_a_truncated_file_of_a_run(name, share, finished, tmp_path_factory):
    path = copy(finished, tmp_path_factory)
    content = (path / name).read_bytes()
    (path / name).write_bytes(truncated(content, share))
    if sound_or_refused(lambda: read_run(path), path / name):
        assert truncated(content, share).strip() == content.strip(), "half of a file was taken for the whole"


@pytest.mark.parametrize("name", ["results.json", "config.json", "samples.jsonl"])
@given(content=garbage)
@example(content=b'{"\\n": false}')
@few
def test_a_file_of_a_run_that_is_something_else(name, content, finished, tmp_path_factory):
    path = copy(finished, tmp_path_factory)
    (path / name).write_bytes(content)
    assert not sound_or_refused(lambda: read_run(path), path / name)


@given(place=st.lists(st.integers(0, 50), min_size=1, max_size=3), by=JSON)
@settings(max_examples=100, deadline=None, database=None)
def test_a_part_of_the_results_that_is_something_else(place, by, finished, tmp_path_factory):
    """Either the value may stand there, or it is refused; no table fails later."""
    path = copy(finished, tmp_path_factory)
    content = replaced(json.loads((path / "results.json").read_text()), place, by)
    (path / "results.json").write_text(json.dumps(content))
    sound_or_refused(lambda: read_run(path), path / "results.json")


def copy(finished: pathlib.Path, factory) -> pathlib.Path:
    path = factory.getbasetemp() / "copy"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(finished, path)
    return path


def test_files_that_are_missing(finished, tmp_path):
    for name in ("results.json", "config.json", "samples.jsonl"):
        shutil.copytree(finished, tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(ValueError, match=f"{name}.*--overwrite"):
            RowStore(tmp_path / name, CONFIG)
        assert RowStore(tmp_path / name, CONFIG, overwrite=True).rows == []


# ---- the cells of a sweep


@given(share=st.floats(0, 0.999) | st.none(), content=garbage, place=st.lists(st.integers(0, 9), max_size=4), by=JSON)
@few
def test_damaged_cells(share, content, place, by, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "cells"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    store = Store(path, CONFIG, overwrite=False)
    store.get("a", lambda: {"alpha": 0.5, "seconds": [1.25, float("nan")]})
    whole = store.path.read_bytes()
    assert Store(path, CONFIG, overwrite=False).cells == store.cells
    changed = json.dumps(replaced(json.loads(whole), place, by)).encode()
    for damaged in (truncated(whole, share) if share is not None else content, content, changed):
        store.path.write_bytes(damaged)
        if sound_or_refused(lambda: Store(path, CONFIG, overwrite=False), store.path):
            assert damaged.strip() == whole.strip() or json.loads(damaged) == json.loads(whole)


# ---- the curve of a training


def step(number: int) -> dict:
    names = ("loss", "grad_norm", "learning_rate", "num_targets", "num_tokens", "seconds", "tokens_per_second")
    return {"step": number} | dict.fromkeys(names, 0.5)


@given(share=st.floats(0, 1), where=st.integers(0, 5), content=garbage.filter(lambda b: b"\n" not in b))
@few
def test_a_damaged_curve(share, where, content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "train.jsonl"
    path.unlink(missing_ok=True)
    Curve(path, 0).add([*map(step, range(1, 6)), {"step": 5, "valid_loss": 0.5}])
    whole = path.read_bytes()
    assert len(Curve(path, 5).steps) == 5
    path.write_bytes(truncated(whole, share))
    if sound_or_refused(lambda: Curve(path, 5), path):
        assert len(Curve(path, 5).steps) == 5
    lines = whole.split(b"\n")
    lines[where] = content
    path.write_bytes(b"\n".join(lines))
    assert not sound_or_refused(lambda: Curve(path, 5), path)


# ---- the description of a checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    return pathlib.Path(save_tiny_decoder(tmp_path_factory.mktemp("model"), 0))


@given(share=st.floats(0, 0.999), content=garbage, place=st.lists(st.integers(0, 60), max_size=3), by=JSON)
@few
def test_a_damaged_description(share, content, place, by, model, tmp_path_factory):
    path = copy(model, tmp_path_factory) / checkpoint.CONFIG_FILE
    whole = path.read_bytes()
    changed = json.dumps(replaced(json.loads(whole), place, by)).encode()
    for damaged in (truncated(whole, share), content, changed):
        path.write_bytes(damaged)
        if sound_or_refused(lambda: checkpoint.read_description(path.parent), path):
            assert damaged.strip() == whole.strip() or json.loads(damaged) == json.loads(whole)


EDITS = [
    ("rope_theta", 5.0),
    ("hidden_size", 10**6),
    ("num_layers", 10**6),
    ("num_heads", -4),
    ("tie_embeddings", True),
]


@pytest.mark.parametrize(("key", "value"), EDITS)
def test_an_edited_configuration_is_refused_before_anything_is_read(key, value, model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "edited")
    path = tmp_path / "edited" / checkpoint.CONFIG_FILE
    content = json.loads(path.read_text())
    content["config"][key] = value
    path.write_text(json.dumps(content))
    monkeypatch.setattr(checkpoint.families, "abstract_params", lambda config: pytest.fail("sizes were computed"))
    with pytest.raises(ValueError, match=r"specjax\.json is corrupt: its checksum does not match"):
        pretrained.load(tmp_path / "edited")


def test_another_configuration_does_not_fit_these_weights(model, tmp_path):
    """One that was edited and given its checksum too: the shapes of the arrays tell."""
    shutil.copytree(model, tmp_path / "edited")
    path = tmp_path / "edited" / checkpoint.CONFIG_FILE
    content = json.loads(path.read_text())
    for key, value in (("intermediate_size", 10**6), ("vocab_size", 10**6), ("num_layers", 3)):
        values = content["config"] | {key: value}
        path.write_text(json.dumps(checkpoint.describe(checkpoint.config_from_json(values), content["files"])))
        with pytest.raises(ValueError, match="does not fit the weights") as refused:
            pretrained.load(tmp_path / "edited")
        assert "\n" not in str(refused.value)


def test_a_checkpoint_loads(model):
    assert jax.tree.leaves(pretrained.load(model).params)


# ---- writes that fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("fails", ["write_text", "replace"])
def test_a_failed_write_names_the_file_and_leaves_nothing(number, fails, tmp_path, monkeypatch):
    files.write(tmp_path / "config.json", "before")

    def fail(self, *args, **kwargs):
        if fails == "write_text":
            open(self, "w").close()
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((pathlib.Path, "write_text") if fails == "write_text" else (os, "replace")), fail)
    with pytest.raises(OSError, match=r"config\.json cannot be written: ") as error:
        files.write(tmp_path / "config.json", "after")
    assert error.value.errno == number
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "before"


def test_a_full_disk(tmp_path):
    """The device that is always full, by a name that leads to it."""
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "train.jsonl").write_text("")
    curve = Curve(tmp_path / "train.jsonl", 0)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"train\.jsonl cannot be written: the disk is full"):
        curve.add([step(1)])
    with pytest.raises(OSError, match=r"missing/config\.json cannot be written"):
        files.write(tmp_path / "missing" / "config.json", "text")
