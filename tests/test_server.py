"""The HTTP server over an engine that answers by a script: frames, errors, limits, keys, disconnects, shutdown."""

import gc
import http.client
import json
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from serving_fakes import FakeEngine, Live, echo, wait_until

pytest.importorskip("uvicorn", reason="the server needs its extra: pip install -e '.[serve]'")

from specjax.serving import process
from specjax.serving.exchange import Exchange
from specjax.serving.requests import Snapshot
from specjax.serving.server import Settings
from specjax.serving.translate import Limits

USER = [{"role": "user", "content": "hello"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def script(prompt, options, index):
    """What a completion echoes; chats are answered with the text in braces of the prompt, if there is one."""
    text = echo(prompt, options, index)
    if "\nassistant\n" not in text and "assistant\n" not in text:
        return text
    inside = text.partition("{{")[2].partition("}}")[0]
    return {"call": "One moment. " + CALL, "broken": "<tool_call>no JSON</tool_call>!"}.get(
        inside, inside or f"hi{index}"
    )


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    server = Live(FakeEngine(script), Settings(limits=Limits(n=4, prompts=8), max_body=20_000))
    yield server
    server.close()


def send(live, path, body: Any = None, method=None, headers=None, raw=None) -> tuple[int, dict[str, str], Any]:
    """Status, headers and content; JSON is parsed."""
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=20)
    data = raw if raw is not None else None if body is None else json.dumps(body)
    own = {} if data is None else {"content-type": "application/json"}
    connection.request(method or ("GET" if data is None else "POST"), path, data, own | (headers or {}))
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    found = dict(answer.getheaders())
    return answer.status, found, json.loads(content) if "json" in found.get("content-type", "") else content.decode()


def chat(live, content="hello", **fields):
    status, _, body = send(live, "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields})
    assert status == 200, body
    return body


def completion(live, prompt, **fields):
    status, _, body = send(live, "/v1/completions", {"prompt": prompt, "max_tokens": 100, **fields})
    assert status == 200, body
    return body


def events(text: str) -> list[dict]:
    """The frames of a stream, which ends with [DONE]."""
    lines = [part for part in text.split("\n\n") if part and not part.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def stream(live, path="/v1/chat/completions", **fields):
    body = {"stream": True, **fields}
    if "prompt" not in body:
        body.setdefault("messages", USER)
    status, headers, text = send(live, path, body)
    assert status == 200, text
    assert headers["content-type"].startswith("text/event-stream")
    return events(text)


# Whole answers.


def test_a_chat_is_answered(live):
    body = chat(live)
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "specjax"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hi0", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] is None
    assert choice["logprobs"] is None
    usage = body["usage"]
    assert usage["completion_tokens"] == 4  # with the end token
    assert usage["total_tokens"] == usage["prompt_tokens"] + 4
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}
    assert usage["completion_tokens_details"]["accepted_prediction_tokens"] == 2
    assert usage["completion_tokens_details"]["rejected_prediction_tokens"] == 1
    speculation = body["metrics"]["speculative_decoding"]
    assert speculation["num_draft_tokens"] == 8
    assert speculation["num_accepted_draft_tokens"] == 5
    assert speculation["mean_acceptance_length"] == pytest.approx(1 + 5 / 4)
    assert speculation["acceptance_histogram"] == [1, 1, 2]
    assert sum(i * count for i, count in enumerate(speculation["acceptance_histogram"])) == 5


def test_choices_of_several_prompts_are_in_order(live):
    body = completion(live, ["ab", "cd", "é"], n=2)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert [choice["text"] for choice in body["choices"]] == ["ab", "ab", "cd", "cd", "é", "é"]
    assert body["usage"]["prompt_tokens"] == 6  # once a prompt, not once a sequence
    assert body["metrics"] is None
    ids = completion(live, [[97, 98], [99]])
    assert [choice["text"] for choice in ids["choices"]] == ["ab", "c"]


def test_stop_strings_and_lengths_end_a_text(live):
    (choice,) = completion(live, "one two three", stop=[" two", "zzz"], logprobs=0)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one", "stop", " two")
    assert choice["logprobs"]["tokens"] == ["o", "n", "e"]  # nothing of the stop string
    (choice,) = completion(live, "one two three", stop=" two", include_stop_str_in_output=True)["choices"]
    assert choice["text"] == "one two"
    (choice,) = completion(live, "one two three", max_tokens=3)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("one", "length")


def test_completions_have_16_tokens_by_default(live):
    (choice,) = send(live, "/v1/completions", {"prompt": "x" * 40, "max_tokens": None})[2]["choices"]
    assert len(choice["text"]) == 16


def test_logprobs_of_chats(live):
    (choice,) = chat(live, "{{hé}}", logprobs=True, top_logprobs=2)["choices"]
    content = choice["logprobs"]["content"]
    assert [entry["bytes"] for entry in content[:3]] == [[104], [0xC3], [0xA9]]
    assert content[1]["token"] == "\ufffd"  # half of a character
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * 4
    assert content[-1]["token"] == "<|im_end|>"
    (choice,) = chat(live, "{{hé}}", logprobs=True)["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []
    (choice,) = chat(live, "{{hé}}", logprobs=True, return_tokens_as_token_ids=True)["choices"]
    assert choice["logprobs"]["content"][0]["token"] == "token_id:104"


def test_logprobs_of_completions_and_their_offsets(live):
    (choice,) = completion(live, "aé b", logprobs=1)["choices"]
    found = choice["logprobs"]
    assert found["text_offset"] == [0, 1, 1, 2, 3, 4]
    assert {len(value) for value in found.values()} == {6}
    assert all(token in top for token, top in zip(found["tokens"], found["top_logprobs"], strict=True))
    # The sampled token is always listed, so that readers can compare it with the best one.
    (choice,) = completion(live, "ab", logprobs=0)["choices"]
    assert choice["logprobs"]["top_logprobs"][0] == {"a": -0.5}


def test_echo_scores_a_prompt(live):
    """What lm-eval asks for: token ids, echoed, one new token; it reads all but the last."""
    body = completion(live, [[97, 98, 99]], echo=True, logprobs=1, max_tokens=1)
    (choice,) = body["choices"]
    assert choice["text"] == "abca"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", "a"]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][0] is None
    for own, top in zip(choice["logprobs"]["token_logprobs"][1:], choice["logprobs"]["top_logprobs"][1:], strict=True):
        assert own == max(top.values())
    (choice,) = completion(live, "abc", echo=True, logprobs=1, max_tokens=0)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert len(choice["logprobs"]["tokens"]) == 3
    assert completion(live, "abc", echo=True, max_tokens=0)["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_of_vllm(live):
    (choice,) = completion(live, "ab", prompt_logprobs=2)["choices"]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second["98"] == {"logprob": -0.5, "rank": 1, "decoded_token": "b"}
    assert len(second) == 2
    assert chat(live, prompt_logprobs=0)["prompt_logprobs"][0] is None


def test_token_ids_are_returned(live):
    (choice,) = completion(live, "ab", return_token_ids=True)["choices"]
    assert choice["token_ids"] == [97, 98, 256]
    assert choice["prompt_token_ids"] == [97, 98]


# Streams.


def test_frames_of_a_stream(live):
    frames = stream(live, messages=[{"role": "user", "content": "{{some text é here}}"}], n=2)
    assert {frame["object"] for frame in frames} == {"chat.completion.chunk"}
    assert len({frame["id"] for frame in frames}) == 1
    assert all("usage" not in frame for frame in frames)
    for index in range(2):
        own = [choice for frame in frames for choice in frame["choices"] if choice["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert all("role" not in choice["delta"] for choice in own[1:])
        assert "".join(choice["delta"].get("content", "") for choice in own) == "some text é here"
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]
        assert own[-1]["finish_reason"] == "stop"


def test_a_frame_has_the_logprobs_of_all_its_tokens(live):
    frames = stream(live, messages=[{"role": "user", "content": "{{abcdefg}}"}], logprobs=True)
    entries = [choice["logprobs"] for frame in frames for choice in frame["choices"] if choice["logprobs"]]
    assert "".join(e["token"] for entry in entries for e in entry["content"]) == "abcdefg<|im_end|>"
    frames = stream(live, "/v1/completions", prompt="abcdefg", max_tokens=20, logprobs=1)
    offsets = [o for frame in frames for choice in frame["choices"] for o in choice["logprobs"]["text_offset"]]
    assert offsets == list(range(8))


def test_usage_comes_last_where_it_is_asked_for(live):
    frames = stream(live, stream_options={"include_usage": True})
    assert frames[-1]["choices"] == []
    assert frames[-1]["usage"]["completion_tokens"] == 4
    assert frames[-1]["metrics"]["speculative_decoding"]["num_draft_tokens"] == 8
    assert all(frame["usage"] is None for frame in frames[:-1])
    frames = stream(live, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [frame["usage"]["completion_tokens"] for frame in frames]
    assert counts == sorted(counts)
    assert counts[-1] == 4


def test_completions_stream_too(live):
    frames = stream(live, "/v1/completions", prompt=["abcd", "xy"], max_tokens=10, echo=True)
    for index, text in enumerate(["abcdabcd", "xyxy"]):
        own = [choice for frame in frames for choice in frame["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == text
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]
    assert {frame["object"] for frame in frames} == {"text_completion"}


def test_text_from_drafts_is_marked(live):
    frames = stream(live, messages=[{"role": "user", "content": "{{abcdef}}"}], stream_options={"include_drafts": True})
    pieces = [piece for frame in frames for choice in frame["choices"] for piece in choice.get("drafts", [])]
    assert "".join(piece["text"] for piece in pieces) == "abcdef"
    assert [(piece["text"], piece["from_draft"]) for piece in pieces][:2] == [("a", False), ("bc", True)]


# Tools.


def test_calls_are_parsed(live):
    body = chat(live, "{{call}}", tools=[TOOL])
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "One moment. "
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Bern"}
    (choice,) = chat(live, "{{call}}", tools=[TOOL], tool_choice="none")["choices"]
    assert "tool_calls" not in choice["message"]


def test_calls_are_streamed_and_never_as_text(live):
    frames = stream(live, messages=[{"role": "user", "content": "{{call}}"}], tools=[TOOL])
    deltas = [choice["delta"] for frame in frames for choice in frame["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "One moment. "
    (call,) = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert (call["index"], call["function"]["name"]) == (0, "weather")
    assert frames[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_what_is_no_call_is_text(live):
    (choice,) = chat(live, "{{broken}}", tools=[TOOL])["choices"]
    assert choice["message"]["content"] == "<tool_call>no JSON</tool_call>!"
    assert choice["finish_reason"] == "stop"


def test_earlier_calls_reach_the_template(live):
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "5 C"}]
    status, _, body = send(live, "/tokenize", {"messages": messages, "tools": [TOOL], "return_token_strs": True})
    assert status == 200, body
    text = "".join(body["token_strs"])
    assert '{"name": "weather", "arguments": {"city": "Bern"}}' in text
    assert "Tools:" in text


# Errors.

WRONG = [
    ({"messages": USER, "n": "many"}, "n"),
    ({"messages": USER, "n": 5}, "n"),
    ({"messages": USER, "n": 0}, "n"),
    ({"messages": USER, "temperature": 3}, "temperature"),
    ({"messages": USER, "temperature": "hot"}, "temperature"),
    ({"messages": USER, "temperature": 1.95}, None),  # The engine refuses it.
    ({"messages": USER, "top_p": -1}, "top_p"),
    ({"messages": USER, "max_tokens": 0}, "max_completion_tokens"),
    ({"messages": USER, "max_tokens": 10**6}, "max_tokens"),
    ({"messages": USER, "max_tokens": 10**30}, "max_tokens"),
    ({"messages": USER, "min_tokens": 9, "max_tokens": 5}, "min_tokens"),
    ({"messages": USER, "seed": 2**70}, "seed"),
    ({"messages": USER, "stop": ["x"] * 17}, "stop"),
    ({"messages": USER, "stop": ["x" * 300]}, "stop"),
    ({"messages": USER, "stop": 5}, "stop.str"),
    ({"messages": USER, "logit_bias": {"x": 1}}, "logit_bias"),
    ({"messages": USER, "logit_bias": {"9999": 1}}, "logit_bias"),
    ({"messages": USER, "logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"messages": USER, "logit_bias": {"²": 1}}, "logit_bias"),
    ({"messages": USER, "top_logprobs": 2}, "top_logprobs"),
    ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": USER, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": USER, "bad_words": ["x"]}, "bad_words"),
    ({"messages": USER, "echo": True}, "echo"),
    ({"messages": USER, "skip_special_tokens": False}, "skip_special_tokens"),
    ({"messages": USER, "response_format": {"type": "yaml"}}, "response_format.type"),
    ({"messages": USER, "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"messages": USER, "tools": [{"type": "other"}]}, "tools.0"),
    ({"messages": USER, "tools": [TOOL], "tool_choice": {"function": {"name": "x"}}}, "tool_choice"),
    ({"messages": USER, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"messages": USER, "chat_template": "x"}, "chat_template"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    ({}, "messages"),
]


@pytest.mark.parametrize(("body", "param"), WRONG, ids=lambda value: str(value)[:60])
def test_wrong_fields_of_chats_are_400(live, body, param):
    status, _, answer = send(live, "/v1/chat/completions", body)
    assert status == 400, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert "0x" not in error["message"]
    assert live.engine.running == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": []},
        {"prompt": ""},
        {"prompt": [[]]},
        {"prompt": [97, "b"]},
        {"prompt": [299, 300]},
        {"prompt": [-1]},
        {"prompt": ["a"] * 9},
        {"prompt": "a", "best_of": 3},
        {"prompt": "a", "logprobs": -1},
        {"prompt": "a", "logprobs": 21},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "suffix": "b"},
        {"prompt": "a", "prompt_logprobs": 1, "stream": True},
        {"prompt": "a", "guided_regex": "(", "max_tokens": 5},
        {"prompt": "a", "guided_choice": [], "max_tokens": 5},
        {"prompt": "a", "guided_choice": ["x"], "guided_regex": "y"},
        {"prompt": "a", "structured_outputs": {"grammar": "root ::= x"}},
        {"prompt": "a", "allowed_token_ids": []},
        {"prompt": None},
    ],
    ids=str,
)
def test_wrong_fields_of_completions_are_400(live, fields):
    status, _, answer = send(live, "/v1/completions", fields)
    assert status == 400, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"3", b'"x"', b"\xff\xfe", b'{"messages":' + b"[" * 9000, b'{"prompt": NaN}']
)
def test_bodies_that_are_no_requests_are_400(live, raw):
    status, _, answer = send(live, "/v1/chat/completions", raw=raw, method="POST")
    assert status == 400, answer


def test_other_errors_have_the_same_shape(live):
    cases = [
        (404, send(live, "/v1/chat/completions", {"model": "other", "messages": USER}), "model_not_found"),
        (404, send(live, "/v1/models/other"), "model_not_found"),
        (404, send(live, "/v1/nothing"), "http_404"),
        (405, send(live, "/v1/chat/completions"), "http_405"),
        (413, send(live, "/v1/completions", {"prompt": "x" * 30_000}), "body_too_large"),
        (
            415,
            send(live, "/v1/completions", {"prompt": "x"}, headers={"content-type": "text/plain"}),
            "unsupported_media_type",
        ),
    ]
    for status, (got, headers, body), code in cases:
        assert got == status, body
        assert body["error"]["code"] == code
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert headers["x-request-id"]


def test_a_body_without_a_length_is_bounded(live):
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=20)
    parts = iter([b'{"prompt": "' + b"x" * 9000] * 4)
    connection.request("POST", "/v1/completions", parts, {"content-type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413


def test_unknown_fields_are_named_and_ignored_ones_are_not(live, caplog):
    body = {"messages": USER, "metadata": {}, "user": "u", "tempreature": 1}
    with caplog.at_level(logging.WARNING, "specjax.serve"):
        status, headers, _ = send(live, "/v1/chat/completions", body)
    assert status == 200
    assert headers["x-ignored-fields"] == "tempreature"


def test_request_ids_are_kept_and_sane(live):
    assert send(live, "/health", headers={"x-request-id": "abc-1"})[1]["x-request-id"] == "abc-1"
    assert send(live, "/health", headers={"x-request-id": "a b" * 99})[1]["x-request-id"] != "a b" * 99


def test_the_access_log_has_no_text(live, caplog):
    with caplog.at_level(logging.INFO, "specjax.access"):
        chat(live, "a secret {{word}}")
        assert wait_until(lambda: "completion_tokens" in caplog.text)
    record = json.loads([line.message for line in caplog.records if line.name == "specjax.access"][-1])
    assert record["path"] == "/v1/chat/completions"
    assert (record["status"], record["completion_tokens"]) == (200, 5)
    assert "secret" not in caplog.text
    assert "word" not in caplog.text


# Other endpoints.


def test_models(live):
    listed = send(live, "/v1/models")[2]
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("specjax", "model", 512)
    assert send(live, "/v1/models/specjax")[2] == model


def test_tokens_and_back(live):
    tokens = send(live, "/tokenize", {"prompt": "é<|im_end|>"})[2]
    assert tokens == {"count": 3, "max_model_len": 512, "tokens": [195, 169, 256]}
    assert send(live, "/detokenize", {"tokens": tokens["tokens"]})[2] == {"prompt": "é<|im_end|>"}
    assert send(live, "/tokenize", {})[0] == 400
    assert send(live, "/detokenize", {"tokens": [300]})[0] == 400
    assert send(live, "/detokenize", {"tokens": ["x"]})[0] == 400


def test_health_and_readiness(live):
    assert send(live, "/health")[0] == 200
    assert send(live, "/ready")[0] == 200
    live.engine.ready = False
    assert send(live, "/ready")[0] == 503
    assert send(live, "/health")[0] == 200
    live.engine.ready = True


def test_the_description_names_every_endpoint(live):
    described = send(live, "/openapi.json")[2]
    routes = {route.path.replace(":path", "") for route in live.running.app.routes}
    assert set(described["paths"]) == routes - {"/", "/ping"}
    text = json.dumps(described)
    named = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named <= set(described["components"]["schemas"])


def metrics(live, **headers) -> dict[str, float]:
    lines = send(live, "/metrics", headers=headers)[2].splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def test_metrics_have_vllms_names(live):
    live.engine.counts = Snapshot(2, 3, 8, 0, 1000, 7, 100, 90, 40, 50, 20, 140, 60, (20, 15, 10, 15), 3.5, 0)
    chat(live, "{{words}}")
    found = metrics(live)
    labels = '{engine="0",model_name="specjax"}'
    assert found[f"vllm:spec_decode_num_drafts_total{labels}"] == 20
    assert found[f"vllm:spec_decode_num_draft_tokens_total{labels}"] == 140
    assert found[f"vllm:spec_decode_num_accepted_tokens_total{labels}"] == 60
    assert (
        found['vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="specjax",position="1"}'] == 15
    )
    assert found[f"vllm:prefix_cache_hits_total{labels}"] == 40
    assert found[f"vllm:generation_tokens_total{labels}"] == 50
    assert found[f"specjax:num_draft_tokens{labels}"] == 3.5
    assert found['vllm:request_success_total{engine="0",finished_reason="stop",model_name="specjax"}'] >= 1
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert found[f"vllm:{name}_count{labels}"] >= 1
    assert not [name for name in found if "_created" in name]


# Keys.


def test_keys_are_needed_and_told_apart():
    live = Live(FakeEngine(script), Settings(keys=("first", "sécond")))
    body = {"messages": USER}

    def status(**headers):
        return send(live, "/v1/chat/completions", body, headers=headers)

    got, headers, answer = status()
    assert (got, answer["error"]["code"]) == (401, "invalid_api_key")
    assert headers["WWW-Authenticate".lower()] == "Bearer"
    assert status(Authorization="Bearer FIRST")[0] == 401
    assert status(Authorization="Bearer first1")[0] == 401
    assert status(Authorization="Basic first")[0] == 401
    assert status(Authorization="Bearer first")[0] == 200
    assert status(**{"x-api-key": "first"})[0] == 200
    for path in ("/v1/models", "/metrics", "/v1/nothing"):
        assert send(live, path)[0] == 401
    assert send(live, "/tokenize", {"prompt": "x"})[0] == 401
    for path in ("/health", "/ready", "/", "/openapi.json"):
        assert send(live, path)[0] == 200
    found = metrics(live, Authorization="Bearer first")
    assert found['specjax:requests_refused_total{engine="0",model_name="specjax",status="401"}'] == 8
    # Cached prefixes of one key are not another's.
    assert live.engine.seen[-1].cache_salt
    assert status(Authorization="Bearer first")[0] == 200
    assert live.engine.seen[-1].cache_salt == live.engine.seen[-2].cache_salt
    live.close()


# Load, disconnects, the end.


def test_a_full_queue_is_429_and_leaves_nothing_behind():
    live = Live(FakeEngine(lambda *_: "x" * 100, delay=0.02, max_queued=4))
    parts = [threading.Thread(target=completion, args=(live, "a"), kwargs={"n": 3})]
    parts[0].start()
    assert wait_until(lambda: live.engine.running == 1)
    # The second prompt does not fit any more: the first one is withdrawn too.
    status, headers, body = send(live, "/v1/completions", {"prompt": ["a", "b"], "max_tokens": 50})
    assert status == 429
    assert headers["retry-after"] == "3"
    assert body["error"]["code"] == "queue_full"
    assert live.engine.cancellations == 1
    parts[0].join()
    assert wait_until(lambda: live.engine.running == 0)
    live.close()


def assert_slots_are_freed(streams: bool, times: int) -> None:
    """Clients that leave while their answers grow."""
    live = Live(FakeEngine(lambda *_: "x" * 400, delay=0.02))
    try:
        for _ in range(times):
            client = live.ask("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 400, "stream": streams})
            assert wait_until(lambda: live.engine.running == 2)
            if streams:
                client.recv(10)
            client.close()
            assert wait_until(lambda: live.engine.running == 0, 1), "the slots are still taken"
        assert live.engine.cancellations == 2 * times
        assert len(live.server.office) == 0
        assert wait_until(lambda: live.server.active == 0)
    finally:
        live.close()


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_frees_its_slots(streams):
    assert_slots_are_freed(streams, 5)


@pytest.mark.parametrize("streams", [False, True])
def test_slots_that_stay_taken_are_noticed(streams, monkeypatch, catches):
    monkeypatch.setattr(Exchange, "close", lambda self: None)
    with catches("a client that leaves keeps its slots", "slots are freed", "still taken"):
        assert_slots_are_freed(streams, 1)


def test_requests_run_side_by_side_and_none_is_mixed_up():
    live = Live(FakeEngine(delay=0.001))
    texts = [f"text number {i} " * (i % 5 + 1) for i in range(24)]
    answers: dict[int, str] = {}

    def one(i):
        if i % 2:
            frames = stream(live, "/v1/completions", prompt=texts[i], max_tokens=200)
            answers[i] = "".join(choice["text"] for frame in frames for choice in frame["choices"])
        else:
            answers[i] = completion(live, texts[i], max_tokens=200)["choices"][0]["text"]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == dict(enumerate(texts))
    assert live.engine.most_running > 3
    live.close()


def test_nothing_is_kept_of_requests_that_have_ended(live):
    for i in range(10):
        completion(live, f"text {i}")
        stream(live, "/v1/completions", prompt=f"text {i}", max_tokens=20)
    assert wait_until(lambda: live.server.active == 0 and len(live.server.office) == 0)
    gc.collect()
    assert wait_until(lambda: not [one for one in gc.get_objects() if isinstance(one, Exchange)])


def test_a_request_that_takes_too_long_ends():
    live = Live(FakeEngine(lambda *_: "x" * 400, delay=0.02), Settings(request_timeout=0.2))
    status, headers, body = send(live, "/v1/completions", {"prompt": "a", "max_tokens": 400})
    assert (status, body["error"]["code"]) == (504, "timeout")
    assert headers["x-should-retry"] == "false"
    frames = stream(live, "/v1/completions", prompt="a", max_tokens=400)
    assert frames[-1]["error"]["code"] == "timeout"  # and [DONE] after it
    assert frames[0]["choices"][0]["text"].startswith("x")
    live.close()


def test_draining_ends_accepted_requests_and_refuses_new_ones():
    live = Live(FakeEngine(lambda *_: "x" * 60, delay=0.02))
    answers = []
    client = threading.Thread(target=lambda: answers.append(completion(live, "a")))
    client.start()
    assert wait_until(lambda: live.engine.running == 1)
    live.running.stop_soon()
    client.join(10)
    assert answers[0]["choices"][0]["text"] == "x" * 60
    live.thread.join(10)
    assert live.code == 0


def test_draining_has_a_bound_and_tells_those_who_wait():
    live = Live(
        FakeEngine(lambda *_: "x" * 5000, delay=0.1, max_len=9000),
        place=process.Place(port=0, shutdown_timeout=0.3, poll=0.05),
    )
    frames: list[dict] = []
    client = threading.Thread(
        target=lambda: frames.extend(stream(live, "/v1/completions", prompt="a", max_tokens=5000))
    )
    client.start()
    assert wait_until(lambda: live.engine.running == 1)
    begin = time.monotonic()
    live.running.stop_soon()
    live.thread.join(10)
    assert time.monotonic() - begin < 4
    client.join(10)
    assert frames[-1]["error"]["code"] == "service_unavailable"
    assert live.code == 0


def test_a_dead_engine_ends_the_process_and_answers_those_who_wait():
    live = Live(FakeEngine(lambda *_: "x" * 5000, delay=0.1, max_len=9000))
    answers = []
    client = threading.Thread(
        target=lambda: answers.append(send(live, "/v1/completions", {"prompt": "a", "max_tokens": 5000}))
    )
    client.start()
    assert wait_until(lambda: live.engine.running == 1)
    live.engine.die()
    assert send(live, "/health")[0] == 503
    assert send(live, "/v1/completions", {"prompt": "a"})[0] == 503
    client.join(10)
    assert answers[0][0] == 503
    live.thread.join(10)
    assert live.code == process.DIED


def test_the_page_is_there_and_asks_nothing_of_others(live):
    status, headers, text = send(live, "/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text


def test_a_burst_does_not_slip_past_the_bound():
    """The place in the queue is taken when it is asked for, however many ask at the same moment."""
    live = Live(FakeEngine(lambda *_: "x" * 30, delay=0.05, max_queued=3))
    answers: list[int] = []
    body = {"prompt": "a", "max_tokens": 30}
    threads = [
        threading.Thread(target=lambda: answers.append(send(live, "/v1/completions", body)[0])) for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) == {200, 429}
    assert len(answers) == 20
    assert live.engine.most_running <= 3
    assert metrics(live)['specjax:requests_refused_total{engine="0",model_name="specjax",status="429"}'] == (
        answers.count(429)
    )
    live.close()


def test_a_second_signal_does_not_wait():
    place = process.Place(port=0, shutdown_timeout=60, poll=0.05)
    live = Live(FakeEngine(lambda *_: "x" * 5000, delay=0.05, max_len=9000), place=place)
    with live.ask("/v1/completions", {"prompt": "a", "max_tokens": 5000, "stream": True}):
        assert wait_until(lambda: live.engine.running == 1)
        live.running.stop_soon()
        assert not wait_until(lambda: live.code is not None, 0.3)
        live.running.stop_soon()
        live.thread.join(5)
    assert live.code == 0
