"""From fields of the API to the engine's options, calls found in text, and the forms of log-probabilities."""

import json
import re
from typing import Any

import numpy as np
import pytest
from serving_fakes import EOS, PLAIN, byte_tokenizer

pytest.importorskip("pydantic", reason="the server needs its extra: pip install -e '.[serve]'")

from specjax.serving import answers, openai, tools, translate
from specjax.serving.constraints import Grammars, any_object, choices
from specjax.serving.errors import ApiError, dumps
from specjax.serving.requests import TokenLogprobs, Usage
from specjax.serving.spelling import LOWEST, Marks, Offsets, Speller
from specjax.serving.translate import Facts, Limits

TOKENIZER = byte_tokenizer()
FACTS = Facts(TOKENIZER, 300, 400, Limits(), Grammars(TOKENIZER, 300))


def chat(**fields):
    request, _ = openai.parse(openai.ChatRequest, {"messages": [{"role": "user", "content": "hi"}], **fields})
    return translate.chat(FACTS, request, "salt")


def completion(prompt: Any = "hi", **fields):
    request, _ = openai.parse(openai.CompletionRequest, {"prompt": prompt, **fields})
    return translate.completion(FACTS, request)


def options(**fields):
    (found,) = chat(**fields).options
    return found


def text_of(plan) -> str:
    return TOKENIZER.decode(plan.prompts[0], skip_special_tokens=False)


def allows(grammar, text: str) -> bool:
    """Whether a grammar takes a whole text."""
    state = 0
    for token in [*text.encode(), EOS]:
        state = int(np.asarray(grammar.next_state)[state, int(np.asarray(grammar.token_class)[token])])
        if state < 0:
            return False
    return True


def test_defaults_are_openais():
    found = options()
    assert (found.temperature, found.top_p, found.top_k, found.n) == (1.0, 1.0, 0, 1)
    assert found.stop_tokens == (EOS,)
    assert found.logprobs is found.prompt_logprobs is found.grammar is found.prediction is None
    (plan,) = completion().options
    assert plan.max_new_tokens == 16
    plan = chat()
    assert plan.options[0].max_new_tokens == 400 - len(plan.prompts[0])


def test_every_option_reaches_the_engine():
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "typical_p": 0.8,
        "epsilon_cutoff": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "no_repeat_ngram_size": 3,
        "n": 3,
        "seed": 7,
    }
    found = options(**given, min_tokens=2, max_completion_tokens=9, max_tokens=99, stop="x")
    assert {name: getattr(found, name) for name in given} == given
    assert (found.min_new_tokens, found.max_new_tokens, found.stop_strings) == (2, 9, ("x",))
    assert options(stop=["a", "", "b"]).stop_strings == ("a", "b")
    assert options(top_k=-1).top_k == 0
    # The smallest nucleus holds one token.
    assert (options(top_p=0).temperature, options(top_p=0).top_p) == (0.0, 1.0)


def test_nulls_mean_defaults():
    names = set(openai.ChatRequest.model_fields) - {"messages", "seed"}
    assert options(**dict.fromkeys(names), seed=1) == options(seed=1)


def test_stop_tokens():
    assert options(stop_token_ids=[5, EOS]).stop_tokens == (EOS, 5)
    assert options(ignore_eos=True).stop_tokens == ()
    assert options(ignore_eos=True, stop_token_ids=[5]).stop_tokens == (5,)
    assert options(include_stop_str_in_output=True).include_stop


def test_seeds_are_random_unless_given_and_leave_room_for_all_sequences():
    assert options().seed != options().seed
    for seed in (-1, -(2**63), 2**63 - 1, 2**32 - 1, 0):
        found = options(seed=seed, n=4)
        assert 0 <= found.seed <= 2**32 - 4
    assert options(seed=12345).seed == 12345


def test_biases():
    assert options(logit_bias={"5": -100, "6": 3.5}).logit_bias == {5: float("-inf"), 6: 3.5}
    assert options(logit_bias={}).logit_bias is None


def test_a_prediction_becomes_tokens():
    part = {"type": "text", "text": "abc"}
    assert options(prediction={"type": "content", "content": "abc"}).prediction == (97, 98, 99)
    assert options(prediction={"type": "content", "content": [part]}).prediction == (97, 98, 99)
    assert options(prediction={"type": "content", "content": ""}).prediction is None


def test_prefixes_are_shared_only_within_a_key_and_salt():
    assert options().cache_salt == options().cache_salt
    assert options(cache_salt="a").cache_salt != options().cache_salt


def test_prompts_of_completions():
    assert completion(["ab", "c"]).prompts == ([97, 98], [99])
    assert completion([97, 98]).prompts == ([97, 98],)
    assert completion([[97], [98]]).prompts == ([97], [98])
    assert completion("abcdef", truncate_prompt_tokens=2).prompts == ([101, 102],)
    assert completion("x" * 500, truncate_prompt_tokens=-1, max_tokens=1).prompts == ([120] * 399,)
    plan = completion([97, 98], echo=True, logprobs=3)
    assert plan.echo == ("ab",)
    assert (plan.options[0].logprobs, plan.options[0].prompt_logprobs) == (3, 3)
    assert completion("a", logprobs=3).options[0].prompt_logprobs is None


def test_messages():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "rules"}, {"role": "user", "content": parts}]
    assert text_of(chat(messages=messages)) == (
        "<|im_start|>system\nrules<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Sure:"}]
    assert text_of(chat(messages=messages, continue_final_message=True)).endswith("assistant\nSure:")
    assert text_of(chat(messages=messages, add_generation_prompt=False)).endswith("Sure:<|im_end|>\n")


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    for name, properties in [("weather", {"city": {"type": "string"}}), ("now", {})]
]


def test_tools_reach_the_template_and_constrain_the_answer():
    assert '"name": "weather"' in text_of(chat(tools=TOOLS))
    assert options(tools=TOOLS).grammar is None
    assert "weather" not in text_of(chat(tools=TOOLS, tool_choice="none"))
    named = options(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "weather"}}).grammar
    assert allows(named, '{"city": "Bern"}')
    assert not allows(named, '{"name": "weather", "arguments": {"city": "Bern"}}')
    required = options(tools=TOOLS, tool_choice="required").grammar
    assert allows(required, '{"name": "weather", "arguments": {"city": "Bern"}}')
    assert not allows(required, '{"name": "other", "arguments": {}}')


def test_tools_need_a_template_with_them():
    plain = byte_tokenizer(PLAIN)
    facts = FACTS._replace(tokenizer=plain)
    request, _ = openai.parse(openai.ChatRequest, {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS})
    with pytest.raises(ApiError, match="has no tools"):
        translate.chat(facts, request)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"a": 1}',
        '{"a":[1,2.5,{"b":null}],\n"c": {"d": "\\n é \\" x"}}',
        '{"items": [{"name": "x", "n": -3}, {}], "ok": true}',
        "{ }",
        "[1]",
        '{"a" 1}',
        '{"a": 01}',
        '{"a": 1,}',
        '{"a": {"b": {"c": 1}}}',  # Deeper than the automaton goes.
    ],
)
def test_any_object_is_json(text):
    """What is taken is an object, and what is none is not taken."""
    assert re.fullmatch(any_object().replace(r"\x00", "\\x00"), text) is not None or not _is_flat_object(text)
    grammar = options(response_format={"type": "json_object"}).grammar
    assert allows(grammar, text) == _is_flat_object(text)


def _is_flat_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict) and text.count("{") - text.count("[") < 3
    except ValueError:
        return False


def test_grammars_by_all_their_names():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for fields in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}},
        {"structured_outputs": {"json": schema}},
        {"structured_outputs": {"json": json.dumps(schema)}},
        {"guided_json": schema},
    ):
        grammar = options(**fields).grammar
        assert allows(grammar, '{"a": 5}'), fields
        assert not allows(grammar, '{"b": 5}')
    for fields in ({"structured_outputs": {"choice": ["yes.", "no|"]}}, {"guided_choice": ["yes.", "no|"]}):
        grammar = options(**fields).grammar
        assert allows(grammar, "yes.")
        assert allows(grammar, "no|")
        assert not allows(grammar, "yesx")
    for fields in ({"structured_outputs": {"regex": "a+"}}, {"guided_regex": "a+"}):
        assert allows(options(**fields).grammar, "aaa")
    assert options(response_format={"type": "text"}).grammar is None


def test_grammars_are_compiled_once():
    assert options(guided_regex="b+c").grammar is options(guided_regex="b+c").grammar
    small = Grammars(TOKENIZER, 300, keep=1)
    first = small.regex("a", "x")
    small.regex("b", "x")
    assert small.regex("a", "x") is not first


def test_only_these_tokens():
    grammar = options(allowed_token_ids=[97, EOS], ignore_eos=True).grammar
    assert allows(grammar, "aaa")
    assert not allows(grammar, "b")


def test_choices_are_quoted():
    texts = ["a.b", "(c)", "d|e", "[f]", "g\\h", "i{2}", "^$", "-&~#"]
    assert all(re.fullmatch(choices(texts), text) for text in texts)
    assert not re.fullmatch(choices(texts), "axb")


# Calls.


def pieces(text: str, size: int, form: str = "auto"):
    reader = tools.Reader(tools.Tools(tuple(TOOLS), form, "weather" if form == "named" else ""))
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    content, calls = "", []
    for i, part in enumerate(parts):
        more, found = reader.read(part, i == len(parts) - 1)
        content, calls = content + more, calls + found
    return content, calls, reader


def assert_calls_are_found(size: int) -> None:
    """Two calls in a text that comes in pieces of a size."""
    one = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    two = '<tool_call>{"name": "now", "arguments": {}}'  # Some models stop before the end mark.
    content, calls, reader = pieces(f"Let me see <b>.{one}\n{two}", size)
    assert content == "Let me see <b>.", f"a part of a call is text: {content!r}"
    assert [(call.place, call.name) for call in calls] == [(0, "weather"), (1, "now")]
    assert json.loads(calls[0].arguments) == {"city": "Bern"}
    assert len({call.id for call in calls}) == 2
    assert reader.reason("stop") == "tool_calls"
    assert reader.reason("length") == "length"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_calls_are_found_however_the_text_is_cut(size):
    assert_calls_are_found(size)
    for text in ("<tool_call>no</tool_call>", "a < b <tool", "<tool_call>", "<tool_call>{}"):
        assert pieces(text, size)[0] == text
        assert pieces(text, size)[2].reason("stop") == "stop"


def test_a_call_that_is_not_held_back_is_noticed(monkeypatch, catches):
    monkeypatch.setattr(tools, "_overlap", lambda text: 0)
    with catches("the beginning of a call is sent as text", "calls are found", "a part of a call is text"):
        assert_calls_are_found(3)


@pytest.mark.parametrize("size", [1, 5, 100])
def test_an_answer_that_has_to_be_a_call(size):
    content, calls, reader = pieces('{"city": "Bern"}', size, "named")
    assert content == ""
    assert "".join(call.arguments for call in calls) == '{"city": "Bern"}'
    assert [call.name for call in calls if call.name] == ["weather"]
    assert reader.reason("stop") == "stop"
    content, calls, reader = pieces('{"name": "now", "arguments": {}}', size, "required")
    assert (content, [call.name for call in calls]) == ("", ["now"])
    assert reader.reason("stop") == "tool_calls"


# Tokens as clients read them.

SPELLER = Speller(TOKENIZER)


def test_tokens_of_the_same_text_do_not_hide_the_best_one():
    """Greedy flags compare a token's log-probability with the greatest: halves of characters look all the same."""
    worse, better = 0xC3, 0xE2
    found = Offsets(SPELLER, 2).take([worse], [TokenLogprobs(-2.0, {better: -0.5, 97: -3.0})])
    assert found["top_logprobs"] == [{"\ufffd": -0.5, "a": -3.0}]
    assert found["token_logprobs"] == [-2.0]
    found = Offsets(SPELLER, 1, as_ids=True).take([worse], [TokenLogprobs(-2.0, {better: -0.5, 97: -3.0})])
    assert found["top_logprobs"] == [{"token_id:226": -0.5, "token_id:195": -2.0}]


def test_what_is_impossible_is_a_number():
    found = Offsets(SPELLER, 1).take([97], [TokenLogprobs(float("-inf"), {98: 0.0})])
    assert found["token_logprobs"] == [LOWEST]
    assert "Infinity" not in dumps(SPELLER.chat([97], [TokenLogprobs(float("-inf"), {})], 0)).decode()


def test_marks_follow_text_that_lags_behind_its_tokens():
    marks = Marks(SPELLER)
    assert marks.take("a", [97, 0xC3], [False, True]) == [("a", False)]
    assert marks.take("éb", [0xA9, 98], [False, True]) == [("é", False), ("b", True)]
    assert marks.take("?", [], []) == [("?", False)]  # What no token accounts for.


def test_half_a_surrogate_pair_can_be_answered():
    assert json.loads(dumps({"a": "x\ud800y"})) == {"a": "x?y"}


def test_speculation_is_told_only_of_single_choices():
    usage = Usage(5, 0, 12, 6, 5, 20, 7, (4, 2, 1))
    assert answers.metrics_json([usage, usage]) is None
    assert answers.metrics_json([Usage()]) is None
    found = (answers.metrics_json([usage]) or {})["speculative_decoding"]
    assert found["acceptance_histogram"] == [1, 2, 1, 1]
    assert found["mean_acceptance_length"] == pytest.approx(1 + 7 / 5)
    plain = (answers.metrics_json([Usage(5, 0, 12, 12)]) or {})["speculative_decoding"]
    assert plain["draft_acceptance_rate"] is None
    assert plain["mean_acceptance_length"] == 1


def test_a_prompt_costs_once():
    usages = [Usage(5, 2, 3), Usage(5, 2, 4), Usage(7, 0, 1), Usage(7, 0, 1)]
    found = answers.usage_json(usages, 2)
    assert (found["prompt_tokens"], found["completion_tokens"], found["total_tokens"]) == (12, 9, 21)
    assert found["prompt_tokens_details"] == {"cached_tokens": 2}
