"""The fault run of the server: what its clients read, what it calls a fault, and the whole run on a tiny model."""

import json
import os
import pathlib
import random
import subprocess
import sys
from typing import Any

import pytest
from helpers import WORDS, save_tiny_decoder

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
import faults_client as clients  # pyright: ignore[reportMissingImports]
import faults_report as report  # pyright: ignore[reportMissingImports]
from faults_client import Answer, Case  # pyright: ignore[reportMissingImports]
from faults_phase import Bounds, Phase  # pyright: ignore[reportMissingImports]

ROOT = pathlib.Path(__file__).parents[1]
EVENTS = (
    b'data: {"choices": [{"index": 1, "text": "x"}]}\n\n'
    b": waiting\n\n"
    b'data: {"choices": [{"index": 0, "text": "a"}, {"index": 1, "text": "y"}]}\n\n'
)


def chunked(body: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:], b""))


def test_an_answer_is_read_to_its_end_and_what_follows_is_counted():
    body = b'{"choices": [{"text": "a"}]}'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    found = clients._answer("id", False, whole)
    assert (found.status, found.texts, found.complete, found.extra) == (200, ("a",), True, 0)
    assert clients._answer("id", False, whole + whole).extra == len(whole)
    cut = clients._answer("id", True, whole[:-1])
    assert (cut.status, cut.texts, cut.complete) == (200, (), False)
    assert clients._answer("id", False, whole[:20]).status == 0
    in_chunks = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(body)
    assert clients._answer("id", False, in_chunks) == found._replace(
        headers={"content-type": "application/json", "transfer-encoding": "chunked"}
    )
    assert not clients._answer("id", False, in_chunks[:-3]).complete
    assert clients._answer("id", False, in_chunks + b"abc").extra == 3


def test_a_stream_is_whole_only_with_its_last_event():
    assert clients.read_events(EVENTS) == (("a", "xy"), None, False)
    assert clients.read_events(EVENTS + b"data: [DONE]\n\n") == (("a", "xy"), None, True)
    error = {"type": "service_unavailable_error"}
    events = EVENTS + b"data: " + json.dumps({"error": error}).encode() + b"\n\ndata: [DONE]\n\n"
    assert clients.read_events(events) == (("a", "xy"), error, True)
    assert clients.read_events(EVENTS[:-1])[0] == ("x",), "half an event is none"


def test_cases_fit_and_are_the_same_each_time():
    made = clients.cases(range(50), 64, 16, 24, 0)
    assert made == clients.cases(range(50), 64, 16, 24, 0)
    assert all(1 <= len(case.prompt) <= 48 for case in made)
    seen = {name for case in made for name in case.fields}
    assert seen == {"max_tokens", "seed", "temperature", "n", "logprobs", "stop", "ignore_eos"}


METRICS = """# HELP vllm:request_success_total Sequences
vllm:request_success_total{engine="0",finished_reason="stop"} 3.0
vllm:request_success_total{engine="0",finished_reason="abort"} 2.0
vllm:request_success_total_other{engine="0"} 7.0
specjax:num_slots{engine="0"} 8.0
"""


def test_metrics_are_summed_over_labels():
    assert report.metric(METRICS, "vllm:request_success_total") == 5
    assert report.metric(METRICS, "vllm:request_success_total", finished_reason="stop") == 3
    assert report.metric(METRICS, "specjax:num_slots") == 8


def samples(rss: Any) -> list[report.Sample]:
    return [report.Sample(i / 60, "soak", rss(i), 10, 5, 1, 0, 8, 0.1) for i in range(600)]


def test_growth_is_told_from_noise_and_from_a_start():
    noise = random.Random(0)
    flat = report.growth(samples(lambda i: 500 + noise.random() - 100 * (i < 60)))
    leak = report.growth(samples(lambda i: 500 + noise.random() + i / 6))
    assert flat is not None
    assert leak is not None
    assert abs(flat.total) < 1
    assert abs(flat.slope) < 0.2
    assert leak.slope == pytest.approx(10, rel=0.05)
    assert leak.total == pytest.approx(60, rel=0.05)
    assert report.growth(samples(lambda i: 1)[:5]) is None


def test_samples_come_back_and_are_drawn(tmp_path):
    written = samples(lambda i: 500 + i)
    for some in (written[:300], written[300:]):
        report.write_samples(tmp_path / "samples.csv", some)
    assert report.read_samples(tmp_path / "samples.csv") == written
    report.picture(tmp_path, written)
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_memory_of_this_process_is_read():
    found = report.usage(os.getpid())
    assert 20 < found.rss_mib < 100_000
    assert found.files > 2
    assert found.threads >= 1


class Idle:
    """In the place of a server: nobody asks it anything."""

    client, begin = None, 0.0


OK = Answer("a", 200, {}, ("yes",), None, True, False, 0)


@pytest.fixture
def phase(tmp_path) -> Phase:
    store = report.Store(tmp_path, {})
    store.references = [["yes"]]
    server: Any = Idle()
    return Phase("faults", server, store, [Case((1,), {})], Bounds(8, 32, 64, 16, True, 1.0, 0))


ALLOWED = ("answered", "left", "told to wait", "told that the server ends")
GOING = {"type": "service_unavailable_error"}


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (OK, "answered"),
        (OK._replace(left=True, complete=False, texts=("ye",)), "left"),
        (OK._replace(left=True, status=0, complete=False, texts=()), "left"),
        (OK._replace(status=429, headers={"retry-after": "3"}, texts=(), error={}), "told to wait"),
        (OK._replace(status=503, texts=(), error=GOING), "told that the server ends"),
        (OK._replace(texts=("y",), error=GOING), "told that the server ends"),
    ],
)
def test_what_may_become_of_a_request_is_no_problem(phase, answer, what):
    assert phase.judge(0, answer, ALLOWED) == what
    assert phase.problems == []
    phase.judge(0, answer, ())
    assert len(phase.problems) == 1


@pytest.mark.parametrize(
    "answer",
    [
        OK._replace(texts=("no",)),
        OK._replace(texts=("yes", "yes")),
        OK._replace(left=True, complete=False, texts=("no",)),
        OK._replace(extra=9),
        OK._replace(complete=False),
        OK._replace(status=0, complete=False, texts=()),
        OK._replace(status=429, texts=(), error={}),
        OK._replace(status=500, texts=(), error={"type": "server_error"}),
        OK._replace(texts=("no",), error=GOING),
    ],
)
def test_what_must_not_become_of_a_request_is_a_problem(phase, answer):
    phase.judge(0, answer, ALLOWED)
    assert len(phase.problems) == 1


def test_a_request_with_two_lines_or_none_in_the_log_is_found(phase):
    names = [f"{i:032x}" for i in range(3)]
    for name, left in zip(names, (False, False, True), strict=True):
        phase.judge(0, OK._replace(id=name, left=left), ALLOWED)
    log = "".join(f'INFO: {{"id": "{name}", "status": 200}}\n' for name in names[:2])
    assert phase.once(log).passed
    assert not phase.once(log + log.splitlines()[0]).passed
    assert not phase.once(log.splitlines()[0]).passed


def test_sequences_that_end_twice_or_never_are_found(phase):
    for _ in range(3):
        phase.judge(0, OK, ALLOWED)
    phase.judge(0, OK._replace(left=True, complete=False), ALLOWED)

    def ended(stop: int, abort: int = 0, error: int = 0) -> bool:
        counts = {"stop": stop, "abort": abort, "error": error}
        after = "".join(
            f'vllm:request_success_total{{finished_reason="{reason}"}} {n}\n' for reason, n in counts.items()
        )
        return phase.ended("", after).passed

    assert ended(3)
    assert ended(3, 1)
    assert ended(4)
    assert not ended(2, 1), "one that was answered has not ended"
    assert not ended(4, 1), "one more has ended than was asked for"
    assert not ended(3, 0, 1)


def test_what_did_not_hold_is_tried_again_and_another_run_is_refused(tmp_path):
    about = {
        "command": "c",
        "date": "d",
        "target": "t",
        "dtype": "float32",
        "num_slots": 8,
        "threads": 2,
        "specjax": "0",
    }
    store = report.Store(tmp_path, about)
    store.add("faults", 1.0, {"answered": 3}, [report.Check("good", True, "3 of 3")])
    store.add("soak", 1.0, {}, [report.Check("bad", False, "1 of 3")])
    assert store.failed() == ["soak: bad: 1 of 3"]
    assert "| soak | bad | **no** | 1 of 3 |" in (tmp_path / "summary.md").read_text()
    assert set(report.Store(tmp_path, about | {"date": "other"}).phases) == {"faults"}
    with pytest.raises(ValueError, match="another --workdir"):
        report.Store(tmp_path, about | {"num_slots": 4})


@pytest.mark.slow
def test_the_run_on_a_tiny_model(tmp_path):
    target = save_tiny_decoder(tmp_path / "target", 0)
    flags = {
        "target": target,
        "num_slots": 2,
        "max_len": 96,
        "max_queued_requests": 8,
        "prefix_mib": 1,
        "num_requests": 60,
        "num_cases": 12,
        "max_new_tokens": 24,
        "soak_minutes": 1 / 6,
        "sample_seconds": 0.25,
        "max_growth_mib": 100,
        "shutdown_timeout": 5,
        "workdir": tmp_path / "run",
        "server_flags": "--nocompilation_cache,--max_prediction=0,--num_draft_tokens=1",
    }
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), *(f"--{k}={v}" for k, v in flags.items())]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(found["phases"]) == {"reference", "faults", "overload", "soak", "end", "generate"}
    counts = found["phases"]["faults"]["counts"]
    assert counts["refused as wrong"] == 6
    assert counts["left"] > 5
    assert found["phases"]["overload"]["counts"]["told to wait"] > 0
    texts = {text for reference in found["references"] for text in reference}
    assert len(texts) > 6
    assert set(" ".join(texts).replace("[unk]", " ").split()) <= set(WORDS)
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "starting" not in again.stdout, "nothing is missing"
