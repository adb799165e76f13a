"""The engine: whoever shares the batch, a request gets the text that it would get alone."""

import functools
import random
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_prompts, tokenizer_of

import specjax
from specjax import testing
from specjax.models import families
from specjax.sampling import automaton
from specjax.serving import capacity, prefix, programs, scheduler, warmup
from specjax.serving.choices import choices_of
from specjax.serving.device import Device, to_host
from specjax.serving.requests import Closed, Options, Overloaded
from specjax.types import Block

VOCAB = 61
EOS = 60
WORDS = [f"\u2581w{i}" for i in range(VOCAB - 1)] + ["[unk]"]


def pretrained(seed: int = 0) -> specjax.Pretrained:
    model, params = testing.tiny_decoder(seed, vocab_size=VOCAB)
    tokenizer = tokenizer_of(WORDS)
    tokenizer.eos_token_ids = (EOS,)
    return specjax.Pretrained(model, params, tokenizer, specjax.DecoderConfig(VOCAB, 32, 64, 2, 4, 2, 8, 512))


TARGET = pretrained()
NGRAM = specjax.drafters.ngram(num_draft_tokens=4, min_match=1, lengths=(2,))
# Steps that cost nothing: what a busy machine measures would decide whether anything is drafted.
DRAFTING: dict[str, Any] = {"drafter": NGRAM, "max_prediction": 16, "num_top": 5, "step_cost": 0}
SIZES = {"num_slots": 4, "max_len": 160, "batch_sizes": (1, 4), "chunk_widths": (4, 16), "interval": 0.005}
ONE = {**SIZES, "num_slots": 1, "batch_sizes": (1,), "chunk_widths": (16,)}
"""Fewer programs, for requests that follow one another."""


@pytest.fixture(scope="module")
def engine():
    # Bound to a device, as parameters of checkpoints are. Those of other engines here are not.
    bound = TARGET._replace(params=jax.device_put(TARGET.params, jax.devices()[0]))
    with specjax.Engine(bound, **DRAFTING, **SIZES) as engine:
        yield engine
        assert engine.snapshot().compilations == 0


def alone(prompt, drafter: Any = NGRAM, target=TARGET, **options) -> Any:
    return specjax.generate(target, [prompt], drafter=drafter, verify="coupled", max_len=192, **options)


def mixed(count: int) -> list[dict]:
    """Requests with every value of every option: any three that follow each other have all values of each."""
    rng = random.Random(0)
    choices = {
        "temperature": (0.0, 0.7, 1.3),
        "top_k": (0, 5),
        "top_p": (1.0, 0.8),
        "min_p": (0.0, 0.1),
        "repetition_penalty": (1.0, 1.4),
        "presence_penalty": (0.0, 0.5),
        "frequency_penalty": (0.0, 0.3),
        "no_repeat_ngram_size": (0, 3),
        "min_new_tokens": (0, 6),
        "logit_bias": (None, {3: 2.0, 7: -np.inf}),
        "stop_tokens": (None, [*range(3, 50, 4)], []),
    }
    first = {name: rng.randrange(len(values)) for name, values in choices.items()}
    return [
        {name: values[(first[name] + i) % len(values)] for name, values in choices.items()}
        | {"max_new_tokens": rng.randint(1, 30), "seed": rng.randrange(1000)}
        for i in range(count)
    ]


def test_each_request_gets_the_text_that_it_would_get_alone(engine):
    requests = [{"max_new_tokens": 30}, *mixed(6)]
    prompts = random_prompts(7, VOCAB, longest=40)
    found = engine.generate(prompts, [Options(**request) for request in requests])
    for prompt, request, completion in zip(prompts, requests, found, strict=True):
        expected = alone(prompt, **request)
        assert completion.tokens == expected.tokens[0]
        assert completion.text == expected.text[0]
        assert completion.finish_reason == expected.finish_reason[0]
        assert completion.usage.completion_tokens == len(completion.tokens)
    assert sum(completion.usage.accepted for completion in found) > 0
    assert {completion.finish_reason for completion in found} == {"stop", "length"}


def test_increments_make_the_whole(engine):
    request = engine.submit([5, 6, 7], max_new_tokens=20, temperature=1.0, seed=4, n=2)
    parts = list(request)
    for index in range(2):
        own = [part for part in parts if part.index == index]
        expected = alone([5, 6, 7], max_new_tokens=20, temperature=1.0, seed=4 + index)
        assert [token for part in own for token in part.tokens] == expected.tokens[0]
        assert "".join(part.text for part in own) == expected.text[0]
        assert [part.finish_reason for part in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].usage is not None
    assert len(parts) > 4  # It was streamed.
    with pytest.raises(RuntimeError, match="read already"):
        request.result()


def test_stop_strings_end_the_text_before_them(engine):
    whole = alone([1, 2, 3], max_new_tokens=30).text[0]
    words = whole.split()
    stop = " " + " ".join(words[6:8])
    (found,) = engine.submit([1, 2, 3], max_new_tokens=30, stop_strings=[stop]).result()
    at = whole.index(stop)
    assert found.text == whole[:at]
    assert found.finish_reason == "stop"
    assert found.stop == stop
    assert found.usage.completion_tokens == len(found.tokens) == len(whole[:at].split())
    (included,) = engine.submit([1, 2, 3], max_new_tokens=30, stop_strings=[stop], include_stop=True).result()
    assert included.text == whole[: at + len(stop)]


def test_grammars_of_several_requests_share_a_table(engine):
    grammars = [
        automaton.from_table(np.where(np.arange(VOCAB)[None] % 3 == i, 0, -1).astype(np.int32)) for i in range(3)
    ]
    requests = [
        engine.submit([9, i], max_new_tokens=12, temperature=1.0, seed=i, grammar=grammars[i % 3]) for i in range(7)
    ]
    free = engine.submit([9, 9], max_new_tokens=12, temperature=1.0)
    for i, request in enumerate(requests):
        (found,) = request.result()
        assert {token % 3 for token in found.tokens} == {i % 3}
        expected = alone([9, i], max_new_tokens=12, temperature=1.0, seed=i, grammar=grammars[i % 3])
        assert found.tokens == expected.tokens[0]
    assert free.result()[0].tokens == alone([9, 9], max_new_tokens=12, temperature=1.0).tokens[0]
    assert not engine._setting.grammars._places


def test_log_probabilities(engine):
    (found,) = engine.submit([1, 2], max_new_tokens=9, temperature=1.0, logprobs=3).result()
    expected = alone([1, 2], max_new_tokens=9, temperature=1.0, logprobs=3)
    assert expected.logprobs is not None
    assert expected.top_logprobs is not None
    assert found.logprobs is not None
    np.testing.assert_allclose([one.logprob for one in found.logprobs], expected.logprobs[0], rtol=1e-4)
    assert max(one.logprob for one in found.logprobs) < 0
    for one, top in zip(found.logprobs, expected.top_logprobs[0], strict=True):
        assert list(one.top) == list(top)
        np.testing.assert_allclose(list(one.top.values()), list(top.values()), rtol=1e-4)


def test_log_probabilities_of_prompts(engine):
    prompt = random_prompts(1, VOCAB, longest=40, seed=3)[0] * 3
    request = engine.submit(prompt, max_new_tokens=2, logprobs=1, prompt_logprobs=2)
    (found,) = request.result()
    cache = TARGET.model.init_cache(1, 160)
    block = Block(jnp.asarray([prompt], jnp.int32))
    logits = np.asarray(TARGET.model.apply(TARGET.params, block, cache)[0].logits)[0]
    expected = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    assert found.prompt_logprobs is not None
    assert len(found.prompt_logprobs) == len(prompt)
    assert found.prompt_logprobs[0].logprob is None
    for i, one in enumerate(found.prompt_logprobs[1:]):
        np.testing.assert_allclose(one.logprob, expected[i, prompt[i + 1]], rtol=1e-4, atol=1e-5)
        assert list(one.top) == np.argsort(-expected[i], kind="stable")[:2].tolist()
        if prompt[i + 1] in one.top:  # What clients compare to see whether a token is the greedy one.
            assert one.logprob == one.top[prompt[i + 1]]
    assert found.tokens == alone(prompt, max_new_tokens=2).tokens[0]


def test_prompts_that_begin_alike_are_read_once(engine):
    start = [(7 * i) % 50 for i in range(40)]
    options = {"max_new_tokens": 12, "temperature": 1.0}
    tails = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [1]]
    cached = []
    for i, tail in enumerate(tails):
        (found,) = engine.submit(start + tail, seed=i, cache_salt="a", **options).result()
        assert found.tokens == alone(start + tail, seed=i, **options).tokens[0]
        cached.append(found.usage.cached_tokens)
    assert cached == [0, 32, 32, 32]
    (other,) = engine.submit([*start, 1, 2], cache_salt="b", **options).result()
    assert other.usage.cached_tokens == 0
    assert 0 < engine.snapshot().prefix_bytes <= 256 << 20


def test_a_prompt_is_never_cached_to_its_last_token(engine):
    for prompt in ([3] * 16, [3] * 32, [3] * 33):
        texts = [engine.submit(prompt, max_new_tokens=5, cache_salt="x").result()[0] for _ in range(2)]
        assert texts[0].tokens == texts[1].tokens == alone(prompt, max_new_tokens=5).tokens[0]
        assert texts[1].usage.cached_tokens == (len(prompt) - 1) // 16 * 16


def test_predictions_are_accepted(engine):
    expected = alone([1, 2, 3], max_new_tokens=14).tokens[0]
    (found,) = engine.submit([1, 2, 3], max_new_tokens=14, prediction=expected).result()
    (without,) = engine.submit([1, 2, 3], max_new_tokens=14).result()
    assert found.tokens == without.tokens == expected
    assert found.usage.accepted_prediction > 0
    assert without.usage.accepted_prediction == 0
    assert found.usage.steps < without.usage.steps


def test_nothing_is_asked_for(engine):
    (found,) = engine.submit([1, 2, 3], max_new_tokens=0, prompt_logprobs=0).result()
    assert (found.tokens, found.text, found.finish_reason) == ([], "", "length")
    assert found.prompt_logprobs is not None


def test_requests_come_and_go(engine):
    """No slot leaks, nothing is lost, and those who stay get their own text."""
    rng = random.Random(1)
    prompts = random_prompts(60, VOCAB, longest=30, seed=5)
    requests = []
    for i, prompt in enumerate(prompts):
        options = {"max_new_tokens": rng.randint(1, 40), "temperature": rng.choice([0.0, 1.0]), "seed": i}
        requests.append((prompt, options, engine.submit(prompt, **options)))
        if rng.random() < 0.3:
            threading.Timer(rng.random() * 0.1, requests[-1][2].cancel).start()
        if rng.random() < 0.3:
            time.sleep(0.01)
    kept = 0
    for prompt, options, request in requests:
        last = list(request)[-1]
        assert last.finish_reason in ("stop", "length", "cancelled")
        kept += last.finish_reason != "cancelled"
        if last.finish_reason != "cancelled" and kept <= 5:
            again = engine.submit(prompt, **options).result()[0]
            assert again.tokens == alone(prompt, **options).tokens[0]
    assert kept > 20
    state = engine.snapshot()
    assert (state.running, state.waiting, state.used_tokens) == (0, 0, 0)
    assert engine._queue.open == engine._queue.sequences == engine._queue.tokens == 0
    assert not engine._scheduler._unfinished


def test_time_runs_out(engine):
    request = engine.submit([1, 2], max_new_tokens=120, stop_tokens=(), n=40, timeout=60)
    parts = iter(request)
    next(parts)
    request.deadline = time.monotonic()
    assert list(parts)[-1].finish_reason == "timeout"
    with pytest.raises(RuntimeError, match="timeout"):
        engine.submit([1, 2], max_new_tokens=120, stop_tokens=(), timeout=1e-9).result()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1] * 100, {"max_new_tokens": 61}, "make 161 tokens, but"),
        ([], {}, "empty"),
        ([1], {"temperature": -1}, "temperature=-1"),
        ([1], {"n": 0}, "n=0"),
        ([1], {"logprobs": 6}, "logprobs=6"),
        ([1], {"seed": -1}, "seed=-1"),
        ([1], {"logit_bias": {99: 1.0}}, "token 99"),
        ([1], {"stop_strings": [""]}, "empty string"),
        ([1], {"stop_tokens": range(33)}, "33 stop_tokens"),
        ([1], {"prediction": [1] * 17}, "17 tokens"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens=-1"),
        ([61], {}, "token 61"),
    ],
)
def test_what_makes_no_sense_is_refused(engine, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, **options)


def test_unknown_options_are_refused(engine):
    with pytest.raises(TypeError, match="topk"):
        engine.submit([1], topk=3)


def test_a_full_queue_says_so():
    with specjax.Engine(TARGET, max_queued_requests=3, prefix_bytes=0, score_prompts=False, **SIZES) as engine:
        requests, refused = [], None
        while refused is None:
            try:
                requests.append(engine.submit([1, 2, 3], max_new_tokens=100, stop_tokens=()))
            except Overloaded as error:
                refused = error
        assert refused.retry_after >= 1
        assert "wait already" in str(refused)
        assert 3 <= len(requests) <= 40
        # Those that were accepted are answered, and closing waits for them.
        closing = threading.Thread(target=engine.close, args=(60.0,))
        closing.start()
        assert [len(request.result()[0].tokens) for request in requests] == [100] * len(requests)
        closing.join()
        with pytest.raises(Closed):
            engine.submit([1])
        assert not engine.alive


def test_closing_cancels_what_is_left():
    engine = specjax.Engine(TARGET, prefix_bytes=0, score_prompts=False, **SIZES)
    requests = [engine.submit([1, 2, 3], max_new_tokens=150, stop_tokens=()) for _ in range(8)]
    engine.close()
    reasons = [list(request)[-1].finish_reason for request in requests]
    assert set(reasons) <= {"cancelled", "length"}
    assert "cancelled" in reasons


def test_what_steps_cost_is_measured():
    """For each size of the batch, by the number of draft tokens: a step costs what the program that holds them does."""
    with specjax.Engine(TARGET, drafter=NGRAM, prefix_bytes=0, score_prompts=False, **SIZES) as engine:
        (found,) = engine.submit([1, 2, 3], max_new_tokens=20).result()
        assert engine._scheduler is not None
        device = engine._scheduler._device
        assert sorted(device.step_costs) == [1, 4]
        for costs in device.step_costs.values():
            assert costs[0] == 1
            assert costs[1] == costs[2] >= 1
            assert costs[3] == costs[4] >= 1
        assert min(device.step_seconds.values()) > 0
        assert engine.snapshot().compilations == 0
    assert found.tokens == alone([1, 2, 3], max_new_tokens=20).tokens[0]


def test_a_dead_engine_answers_everyone(monkeypatch):
    with specjax.Engine(TARGET, prefix_bytes=0, score_prompts=False, **SIZES) as engine:
        all_sent = threading.Event()
        monkeypatch.setattr(scheduler, "news_of", lambda *_: all_sent.wait() / 0)
        requests = [engine.submit([1, 2, 3], max_new_tokens=50) for _ in range(3)]
        all_sent.set()
        for request in requests:
            last = list(request)[-1]
            assert last.finish_reason == "error"
            assert "ZeroDivisionError" in (last.error or "")
        assert not engine.alive
        with pytest.raises(Closed):
            engine.submit([1])


def test_an_engine_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(warmup, "measure", lambda _: 1 / 0)
    with pytest.raises(RuntimeError, match=r"could not start.*ZeroDivisionError"):
        specjax.Engine(TARGET, **SIZES)


def test_memory_is_checked_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(capacity, "free_bytes", lambda: 1 << 20)
    with pytest.raises(ValueError, match=r"num_slots=4 sequences of max_len=160 .* GiB are free"):
        specjax.Engine(TARGET, **SIZES)


def test_draft_models_and_prefixes():
    """The draft's cache begins at the same length as the target's."""
    draft = specjax.drafters.model(pretrained(1), num_draft_tokens=3)
    target = TARGET
    same = specjax.drafters.model(target, num_draft_tokens=3)  # Every draft is accepted, if its cache is right.
    for drafter in (draft, same):
        with specjax.Engine(target, drafter=drafter, step_cost=0, score_prompts=False, **ONE) as engine:
            start = [(11 * i) % 50 for i in range(50)]
            for i in range(3):
                options = {"max_new_tokens": 20, "temperature": 0.8, "seed": i}
                (found,) = engine.submit([*start, i], **options).result()
                expected = alone([*start, i], drafter=drafter, **options)
                assert found.tokens == expected.tokens[0]
                assert found.usage.cached_tokens == (48 if i else 0)
                if drafter is same:
                    assert found.usage.accepted == found.usage.drafted > 0
            assert engine.snapshot().compilations == 0


def test_plain_decoding_and_listeners():
    heard = []
    with specjax.Engine(TARGET, prefix_bytes=0, score_prompts=False, **SIZES) as engine:
        engine.listen(lambda pairs: heard.append(list(pairs)))
        requests = [engine.submit([i, 2], max_new_tokens=10, listen=True) for i in range(3)]
        quiet = engine.submit([9, 2], max_new_tokens=10).result()[0]
        while engine.snapshot().running or engine.snapshot().waiting:
            time.sleep(0.01)
        assert quiet.tokens == alone([9, 2], drafter=None, max_new_tokens=10).tokens[0]
    for i, request in enumerate(requests):
        tokens = [t for pairs in heard for of, part in pairs for t in part.tokens if of is request]
        assert tokens == alone([i, 2], drafter=None, max_new_tokens=10).tokens[0]


def test_an_encoder_decoder():
    config = specjax.T5Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_encoder_layers=2,
        num_heads=4,
        head_dim=8,
    )
    params = families.init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)
    target = specjax.Pretrained(families.model(config), params, None, config)
    with specjax.Engine(target, drafter=NGRAM, max_prediction=32, score_prompts=False, **ONE) as engine:
        for prompt in random_prompts(3, VOCAB, longest=20):
            options = {"max_new_tokens": 12, "temperature": 1.0, "stop_tokens": ()}
            (found,) = engine.submit(prompt, **options).result()
            assert found.tokens == alone(prompt, target=target, **options).tokens[0]
            assert found.usage.prompt_tokens == len(prompt)


def check_texts(engine):
    """Texts, prefixes, stop strings and seeds of a few requests; what the planted bugs below break."""
    start = [(7 * i) % 50 for i in range(40)]
    requests = [
        (prompt, {"max_new_tokens": 3 + 5 * i, "temperature": i % 2, "seed": i, "cache_salt": "m"})
        for i, prompt in enumerate([[1, 2], [*start, 3], [5], [*start, 4], [8, 8], [*start, 5]])
    ]
    handles = [engine.submit(prompt, **options) for prompt, options in requests]
    for handle, (prompt, options) in zip(handles, requests, strict=True):
        options.pop("cache_salt")
        assert handle.result()[0].tokens == alone(prompt, **options).tokens[0], "another text"
    twice = engine.submit([3, 1], max_new_tokens=12, temperature=1.0, n=2, seed=5).result()
    for i, found in enumerate(twice):
        expected = alone([3, 1], max_new_tokens=12, temperature=1.0, seed=5 + i).tokens[0]
        assert found.tokens == expected, "another seed"
        assert found.usage.completion_tokens == len(expected), "another count"


def shifted(function, **changes):
    """The function with one of its results' fields changed."""

    def changed(*args, **kwargs):
        result = function(*args, **kwargs)
        return result._replace(**{name: change(getattr(result, name)) for name, change in changes.items()})

    return changed


PLANTED = {
    "a prefix of the wrong length": (prefix.PrefixCache, "find", lambda f: shifted(f, length=lambda n: n and n - 4)),
    "sequences share a seed": (scheduler, "choices_of", lambda f: lambda *a, **k: f(*a, **(k | {"index": 0}))),
    "a limit of one token more": (
        scheduler,
        "choices_of",
        lambda f: lambda *a, **k: f(*a, **(k | {"limit": k["limit"] + 1})),
    ),
    "rows change places": (
        scheduler.Scheduler,
        "_resize",
        lambda f: lambda self, source: self._device.resize(source[::-1]) or f(self, source),
    ),
    "the last token of a call is lost": (
        scheduler,
        "to_host",
        lambda f: (
            lambda *a, **k: (lambda rows: rows._replace(numbers=rows.numbers | {"length": rows.numbers["length"] - 1}))(
                f(*a, **k)
            )
        ),
    ),
}


def test_sound_engine_passes(engine):
    check_texts(engine)


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(bug, monkeypatch):
    where, name, plant = PLANTED[bug]
    with specjax.Engine(TARGET, **DRAFTING, **SIZES) as engine:
        monkeypatch.setattr(where, name, plant(getattr(where, name)))
        with pytest.raises(AssertionError, match="another"):
            check_texts(engine)
        monkeypatch.undo()


def test_a_row_that_is_stopped_gains_nothing_more(engine):
    """As after a stop string, or where its client has left."""
    s = engine._setting
    device = Device(s.programs, s.params, s.batch_sizes, s.chunk_widths, s.choices, s.grammars.table())
    device.allocate(4)
    text = device.read(device.begin(), warmup.inputs_of(device, 4))
    options = Options(max_new_tokens=50)
    choices = choices_of(options, s.programs.sizes, s.choices.sampling, (), limit=50)
    for slot in range(2):
        device.insert(slot, text, choices)
    rows = to_host(s.programs, device.advance(np.arange(4) == 1, 3, leave_early=False), with_logprobs=False)
    gained = rows.numbers["length"] - rows.numbers["begin"]
    assert gained[0] >= 3
    assert gained[1:].tolist() == [0, 0, 0]
    assert rows.numbers["done"].tolist() == [0, 1, 1, 1]


def test_a_row_is_inserted_in_place():
    """Neither an insertion nor a call copies the state, which it is given."""
    setting = capacity.settle(
        TARGET,
        NGRAM,
        "coupled",
        num_slots=4,
        max_len=400,
        batch_sizes=(4,),
        chunk_widths=(16,),
        max_source=0,
        num_top=2,
        grammar=(16, 16),
    )
    build = functools.partial(programs.empty, setting.programs, 4)
    state = jax.eval_shape(build, setting.choices, np.ones(5, np.float32), setting.grammars.table())
    text = jax.eval_shape(functools.partial(programs.begin, setting.programs))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    compiled = programs.insert.lower(setting.programs, state, np.int32(0), text, setting.choices).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 10
