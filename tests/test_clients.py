"""Clients that people use, pointed at the server: each is skipped with a message where it is not installed."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving_fakes import FakeEngine, Live, byte_tokenizer, echo, wait_until

pytest.importorskip("uvicorn", reason="the server needs its extra: pip install -e '.[serve]'")

from specjax.serving.server import Settings

HERE = "pip install -e '.[serve-test]'"
MESSAGES: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def script(prompt, options, index):
    text = echo(prompt, options, index)
    if "Tools:" in text and "call it" in text:
        return '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'
    if options.grammar is not None:
        return '{"name": "Ada", "age": 36}'
    return f"Bonjour é {index}" if "assistant" in text else text


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    server = Live(FakeEngine(script, max_len=2048, max_queued=8), Settings(model="m", keys=("right",)))
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(live) -> Iterator[Any]:
    openai = pytest.importorskip("openai", reason=f"openai is not installed: {HERE}")
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="right", max_retries=0) as one:
        yield one


def test_openai_chats(client):
    answer = client.chat.completions.create(model="m", messages=MESSAGES, n=2, logprobs=True, top_logprobs=2)
    assert [choice.message.content for choice in answer.choices] == ["Bonjour é 0", "Bonjour é 1"]
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == 4
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content[:-1]).decode() == "Bonjour é 0"
    assert len(content[0].top_logprobs) == 2
    assert client.models.list().data[0].id == "m"
    assert client.models.retrieve("m").id == "m"


def test_openai_streams(client):
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True, stream_options=options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Bonjour é 0"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 13
    with client.chat.completions.stream(model="m", messages=MESSAGES) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Bonjour é 0"
    assert [event.type for event in events].count("content.done") == 1
    text = client.completions.create(model="m", prompt="abc", stream=True)
    assert "".join(chunk.choices[0].text for chunk in text) == "abc"


def test_openai_parses_answers(client):
    pydantic = pytest.importorskip("pydantic")
    person = pydantic.create_model("Person", name=(str, ...), age=(int, ...))
    answer = client.chat.completions.parse(model="m", messages=MESSAGES, response_format=person)
    assert answer.choices[0].message.parsed == person(name="Ada", age=36)


def test_openai_reads_calls(client):
    messages = [{"role": "user", "content": "call it"}]
    answer = client.chat.completions.create(model="m", messages=messages, tools=[WEATHER])
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert json.loads(call.function.arguments) == {"city": "Bern"}
    # The answer and the result go back as the client has them.
    messages += [answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "5 C"}]
    assert client.chat.completions.create(model="m", messages=messages).choices[0].message.content
    with client.chat.completions.stream(model="m", messages=messages[:1], tools=[WEATHER]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name == "weather"


def test_openai_raises_the_right_errors(client, live):
    openai = pytest.importorskip("openai")
    for error, fields in [
        (openai.BadRequestError, {"model": "m", "temperature": 5}),
        (openai.BadRequestError, {"model": "m", "max_tokens": 5000}),
        (openai.NotFoundError, {"model": "other"}),
        (openai.RateLimitError, {"model": "m", "n": 9}),
    ]:
        with pytest.raises(error) as caught:
            client.chat.completions.create(messages=MESSAGES, **fields)
        assert caught.value.request_id
        assert caught.value.type
    with (
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()


def test_openai_obeys_retry_after(live):
    openai = pytest.importorskip("openai", reason=f"openai is not installed: {HERE}")
    slow = Live(FakeEngine(lambda *_: "x" * 60, delay=0.05, max_queued=1), Settings(model="m"))
    with (
        openai.OpenAI(base_url=f"{slow.url}/v1", api_key="x", max_retries=2) as one,
        slow.ask("/v1/completions", {"prompt": "a", "max_tokens": 60}),
    ):
        assert wait_until(lambda: slow.engine.running == 1)
        assert one.completions.create(model="m", prompt="b", max_tokens=4).choices[0].text == "xxxx"
    slow.close()


def test_openai_is_told_of_an_error_in_a_stream():
    openai = pytest.importorskip("openai", reason=f"openai is not installed: {HERE}")
    slow = Live(FakeEngine(lambda *_: "x" * 400, delay=0.05), Settings(model="m", request_timeout=0.3))
    with openai.OpenAI(base_url=f"{slow.url}/v1", api_key="x", max_retries=0) as one:
        chunks = []
        with pytest.raises(openai.APIError, match="took longer"):
            chunks.extend(one.completions.create(model="m", prompt="a", max_tokens=400, stream=True))
    slow.close()


@pytest.mark.slow
def test_langchain(live):
    module = pytest.importorskip("langchain_openai", reason=f"langchain-openai is not installed: {HERE}")
    chat = module.ChatOpenAI(base_url=f"{live.url}/v1", api_key="right", model="m", max_retries=0)
    assert chat.invoke("hello").content == "Bonjour é 0"
    assert "".join(chunk.content for chunk in chat.stream("hello")) == "Bonjour é 0"
    (call,) = chat.bind_tools([WEATHER]).invoke("call it").tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Bern"})


@pytest.mark.slow
def test_litellm(live, monkeypatch):
    """A chat, a stream, and its exceptions by status; prices are read from the package, not from the net."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    # Not in the extra: two later releases, 1.82.7 and 1.82.8, had been tampered with. This one was tried.
    litellm = pytest.importorskip("litellm", reason="litellm is not installed: pip install litellm==1.81.0")
    fixed: Any = {"api_base": f"{live.url}/v1", "api_key": "right", "messages": MESSAGES, "num_retries": 0}
    answer = litellm.completion(model="hosted_vllm/m", **fixed)
    assert answer.choices[0].message.content == "Bonjour é 0"
    assert answer.usage.completion_tokens == 13
    chunks = list(litellm.completion(model="hosted_vllm/m", stream=True, **fixed))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Bonjour é 0"
    text = litellm.text_completion(
        model="text-completion-openai/m", prompt="abc", api_base=f"{live.url}/v1", api_key="right"
    )
    assert text.choices[0].text == "abc"
    for error, fields in [
        (litellm.BadRequestError, {"temperature": 5}),
        (litellm.NotFoundError, {"model": "hosted_vllm/other"}),
        (litellm.RateLimitError, {"n": 9}),
        (litellm.AuthenticationError, {"api_key": "wrong"}),
    ]:
        with pytest.raises(error) as caught:
            litellm.completion(**{"model": "hosted_vllm/m", **fixed, **fields})
        assert type(caught.value) is error


@pytest.mark.slow
def test_any_body_that_the_description_allows_gets_an_answer():
    """No body, valid or not, is answered with a bug's 500."""
    schemathesis = pytest.importorskip("schemathesis", reason=f"schemathesis is not installed: {HERE}")
    hypothesis = pytest.importorskip("hypothesis")
    server = Live(FakeEngine(echo), Settings(model="m"))
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen: dict[str, set[int]] = {}
    for operation in schema.get_all_operations():
        found = operation.ok()
        settings = hypothesis.settings(
            max_examples=60, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
        )

        @hypothesis.seed(0)
        @settings
        @hypothesis.given(case=found.as_strategy())
        def check(case):
            answer = case.call(base_url=server.url)
            assert answer.status_code < 500, (answer.status_code, answer.text, case.body)
            if answer.status_code >= 400:
                assert set(json.loads(answer.content)["error"]) == {"message", "type", "param", "code"}
            seen.setdefault(case.path, set()).add(answer.status_code)

        check()
    assert 200 in seen["/v1/completions"]
    assert server.engine.running == 0
    server.close()


@pytest.mark.slow
def test_lm_eval_scores_texts(tmp_path):
    """Sums of log-probabilities, and which answers are greedy, as its client for completions reads them."""
    pytest.importorskip("lm_eval", reason=f"lm-eval is not installed: {HERE}")
    Instance = pytest.importorskip("lm_eval.api.instance").Instance
    LocalCompletionsAPI = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI

    class Scores(FakeEngine):
        """Whose best token is always an a."""

        def _logprobs(self, count):
            from specjax.serving.requests import TokenLogprobs

            def entry(token):
                own = -0.25 if token == 97 else -3.0
                return TokenLogprobs(own, dict([(97, -0.25), (98, -3.0)][:count]))

            return entry

    server = Live(Scores(lambda *_: "a" * 9), Settings(model="m"))
    byte_tokenizer().save(tmp_path)
    client: Any = LocalCompletionsAPI(
        model="m", base_url=f"{server.url}/v1/completions", tokenizer=str(tmp_path), num_concurrent=1, max_retries=1
    )
    requests = [Instance("loglikelihood", {}, ("x", text), i) for i, text in enumerate(("aaa", "aab", "b"))]
    found = client.loglikelihood(requests, disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([-0.75, -3.5, -3.0])
    assert [greedy for _, greedy in found] == [True, False, False]
    assert sorted(bytes(prompt) for prompt in server.engine.prompts) == [b"xaaa", b"xaab", b"xb"]
    server.close()
