"""`configs/data.py`: files from what Python brings with it, and downloads from a server of this machine."""

import contextlib
import difflib
import functools
import hashlib
import http.server
import json
import pathlib
import sys
import threading
import types
from collections.abc import Iterator

import numpy as np
import pytest

from specjax import launch
from specjax.experiments import data, download, edits, prompts, stdlib_texts, texts
from specjax.experiments.reports.display import View

CONFIG = str(pathlib.Path(__file__).parents[1] / "configs" / "data.py")
CONTENT = b"".join(b'{"category": "qa", "turns": ["Question %d?"]}\n' % i for i in range(2000))


class _Server(http.server.BaseHTTPRequestHandler):
    """Serves `CONTENT`; the first answers are cut off, ranges are honoured unless `ranges` is False."""

    cut, ranges, seen = 0, True, []

    def do_GET(self) -> None:
        kind = type(self)
        asked = self.headers.get("Range")
        kind.seen.append(asked)
        if self.path != "/question.jsonl":
            self.send_error(404)
            return
        begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked and kind.ranges else 0
        if begin >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(CONTENT) - begin))
        self.end_headers()
        end = len(CONTENT)
        if kind.cut:
            kind.cut, end = kind.cut - 1, begin + (len(CONTENT) - begin) // 2
        self.wfile.write(CONTENT[begin:end])

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def _serving(cut: int = 0, ranges: bool = True) -> Iterator[tuple[str, list]]:
    handler = type("Handler", (_Server,), {"cut": cut, "ranges": ranges, "seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler.seen
        finally:
            server.shutdown()
            thread.join()


def _main(workdir: pathlib.Path, **values: str) -> int:
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return launch.main(["launch", f"--config={CONFIG}", f"--workdir={workdir}", "--nocompilation_cache", *flags])


_pairs = functools.cache(functools.partial(stdlib_texts.pairs, "asyncio"))  # All of the library takes seconds.


def test_files_without_network_are_what_the_experiments_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stdlib_texts, "pairs", _pairs)
    assert _main(tmp_path) == 0
    found = prompts.read(tmp_path / "prompts.jsonl")
    assert len(found) == 80
    assert {prompt.task for prompt in found} == {"summary", "rewrite", "question", "copy-edit"}
    assert len({prompt.text for prompt in found}) == 80
    corpus = texts.read(tmp_path / "corpus.jsonl")
    assert len(corpus) > 200
    assert sum(map(len, corpus)) > 100_000
    for split in ("train", "valid", "test"):
        inputs, targets = (texts.read(tmp_path / f"pairs.{split}.jsonl", field) for field in ("input", "target"))
        assert len(inputs) == len(targets) > 0
        assert max(map(len, targets)) <= 100
        assert not set(inputs) & set(targets)
    before = (tmp_path / "prompts.jsonl").stat().st_mtime_ns
    assert "PSF licence" in capsys.readouterr().out
    assert _main(tmp_path) == 0
    assert (tmp_path / "prompts.jsonl").stat().st_mtime_ns == before
    assert "prompts: there already" in capsys.readouterr().out


def test_edits_are_copies_with_slips(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib_texts, "pairs", _pairs)
    assert _main(tmp_path, sets="('edits',)") == 0
    changed = []
    for split in ("train", "valid", "test"):
        inputs, targets = (texts.read(tmp_path / f"edits.{split}.jsonl", field) for field in ("input", "target"))
        assert len(inputs) == len(targets) > 0
        for given, text in zip(inputs, targets, strict=True):
            words, wanted = given.split(), text.split()
            assert 8 <= len(wanted) <= 24
            kept = sum(block.size for block in difflib.SequenceMatcher(a=words, b=wanted).get_matching_blocks())
            changed.append(len(wanted) - kept)
            assert len(words) <= len(wanted)
    assert 0.5 < np.mean(changed) < 3
    assert edits.edits() == edits.edits()


def test_splits_share_no_text():
    splits = [{line["input"] for line in lines} for lines in _pairs().values()]
    assert not splits[0] & splits[1] | splits[0] & splits[2] | splits[1] & splits[2]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_is_cut_off_goes_on(ranges: bool, tmp_path, capsys):
    checksum = hashlib.sha256(CONTENT).hexdigest()
    with _serving(cut=1, ranges=ranges) as (url, seen):
        values = {"sets": "('spec_bench',)", "mirror": url, "sha256": checksum}
        assert _main(tmp_path, **values) == 1
        error = capsys.readouterr().err
        assert "could not be downloaded" in error
        assert "the same command goes on where it stopped" in error
        assert error.count("\n") == 1
        assert not (tmp_path / "spec_bench.jsonl").exists()
        assert _main(tmp_path, **values) == 0
    assert seen == [None, f"bytes={len(CONTENT) // 2}-"]
    assert (tmp_path / "spec_bench.jsonl").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["spec_bench.jsonl"]
    assert checksum in capsys.readouterr().out


def test_a_file_with_another_checksum_is_refused(tmp_path, capsys):
    with _serving() as (url, _):
        assert _main(tmp_path, sets="('spec_bench',)", mirror=url, sha256="0" * 64) == 1
    assert "not 0000" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_whole_partial_file_that_is_too_long_is_begun_anew(tmp_path):
    (tmp_path / "x.part").write_bytes(CONTENT + b"more")
    with _serving() as (url, seen):
        download.download(f"{url}/question.jsonl", tmp_path / "x", View())
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert len(seen) == 2


def test_a_directory_of_this_machine_can_be_the_mirror(tmp_path):
    (tmp_path / "question.jsonl").write_bytes(CONTENT)
    assert _main(tmp_path / "out", sets="('spec_bench',)", mirror=tmp_path.as_uri()) == 0
    assert (tmp_path / "out" / "spec_bench.jsonl").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("mirror", "words"),
    [
        ("http://127.0.0.1:9", ["could not be downloaded", "check the network", "save it as"]),
        ("ftp://127.0.0.1", ["is not the URL of a file"]),
        ("file:///no/such/directory", ["could not be downloaded"]),
        ("http://no-such-host.invalid", ["could not be downloaded"]),
    ],
)
def test_a_server_that_is_not_there_is_named(mirror: str, words: list[str], tmp_path, capsys):
    assert _main(tmp_path, sets="('spec_bench',)", mirror=mirror) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_something_else_in_the_place_of_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "question.jsonl").write_text("<html>Log in</html>")
    assert _main(tmp_path / "out", sets="('spec_bench',)", mirror=tmp_path.as_uri()) == 1
    assert "did not give Spec-Bench" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.jsonl"))


ROWS = {
    "wmt14": {"translation": {"en": "A house.", "de": "Ein Haus."}},
    "cnn_dailymail": {"article": "Long.", "highlights": "Short."},
    "xsum": {"document": "Long.", "summary": "Short."},
    "lm1b": {"text": "one two three four five six seven eight nine ten"},
}


@pytest.mark.parametrize("name", ROWS)
def test_pairs_of_the_hub(name: str, tmp_path, monkeypatch):
    asked = []

    def load_dataset(path: str, config: str | None, *, split: str, streaming: bool):
        asked.append((path, split))
        return iter([ROWS[name]] * 5)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert _main(tmp_path, sets=f"('{name}',)", max_pairs="3") == 0
    lines = [json.loads(line) for line in (tmp_path / f"{name}.train.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert set(lines[0]) == {"input", "target"}
    assert {path.name for path in tmp_path.iterdir()} == set(data.SETS[name].files)
    assert len(asked) == len(data.SETS[name].files)


def test_the_hub_needs_its_package_and_a_network(tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setitem(sys.modules, "datasets", None)
    assert _main(tmp_path, sets="('xsum',)") == 1
    assert "pip install datasets" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fails))
    assert _main(tmp_path, sets="('xsum',)") == 1
    error = capsys.readouterr().err
    assert "The hub did not give EdinburghNLP/xsum" in error
    assert "huggingface.co/datasets/EdinburghNLP/xsum" in error
    assert not list(tmp_path.iterdir())


def test_the_page_names_every_set():
    page = (pathlib.Path(CONFIG).parents[1] / "docs" / "data.md").read_text()
    for name, source in data.SETS.items():
        assert f"`{name}`" in page
        for file in source.files:
            assert file in page or f"{name}.{{train,valid,test}}.jsonl" in page
