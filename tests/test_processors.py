"""The processors are transformers', place by place, also inside a draft block; and the oracle's, in plain Python."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from specjax import testing
from specjax.sampling import automaton, processors
from specjax.types import Automaton, History

SIZE, BUFFER = 7, 16


def history(text: list[int], prompt_length: int, stop_tokens: list[int], grammar: Automaton | None = None) -> History:
    """Of one row, whose buffer is full of stale tokens beyond the text."""
    stale = np.random.default_rng(len(text)).integers(0, SIZE, BUFFER - len(text)).tolist()
    return History(
        jnp.asarray([text + stale], jnp.int32),
        jnp.asarray([len(text)]),
        jnp.asarray([prompt_length]),
        jnp.asarray([[*stop_tokens, -1]], jnp.int32),
        grammar,
        jnp.zeros((1, 1), jnp.int32),
    )


@jax.jit
def _process(logits: Any, options: Any, before: History, drafts: Any) -> Any:
    return processors.process(logits, options, processors.follow(before, drafts, options))


def process(logits: np.ndarray, text: list[int], drafts: list[int], prompt_length: int, **options: Any) -> np.ndarray:
    """`[T, V]` logits after a text and after each of its drafts."""
    stop_tokens = options.pop("stop_tokens", [])
    grammar = options.pop("grammar", None)
    before = history(text, prompt_length, stop_tokens, grammar)
    values, block = jnp.asarray(logits, jnp.float32)[None], jnp.asarray([drafts], jnp.int32)
    return np.asarray(_process(values, processors.penalties(1, **options), before, block))[0]


def random_block(seed: int, places: int = 3) -> tuple[np.ndarray, list[int], list[int], int]:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((places, SIZE)) * 2
    length = int(rng.integers(3, 11))
    text, drafts = rng.integers(0, SIZE, length).tolist(), rng.integers(0, SIZE, places - 1).tolist()
    return logits, text, drafts, int(rng.integers(1, length + 1))


TRANSFORMERS: dict[str, tuple[dict[str, Any], Any]] = {
    "repetition_penalty": ({"repetition_penalty": 1.7}, lambda prompt: RepetitionPenaltyLogitsProcessor(1.7)),
    "repetition_reward": ({"repetition_penalty": 0.6}, lambda prompt: RepetitionPenaltyLogitsProcessor(0.6)),
    "no_repeat_ngram_size 1": ({"no_repeat_ngram_size": 1}, lambda prompt: NoRepeatNGramLogitsProcessor(1)),
    "no_repeat_ngram_size 2": ({"no_repeat_ngram_size": 2}, lambda prompt: NoRepeatNGramLogitsProcessor(2)),
    "no_repeat_ngram_size 3": ({"no_repeat_ngram_size": 3}, lambda prompt: NoRepeatNGramLogitsProcessor(3)),
    "logit_bias": (
        {"logit_bias": {1: 2.5, 4: -1.0}},
        lambda prompt: SequenceBiasLogitsProcessor([[[1], 2.5], [[4], -1.0]]),
    ),
    "suppress_tokens": ({"suppress_tokens": [0, 5]}, lambda prompt: SuppressTokensLogitsProcessor([0, 5])),
    "min_new_tokens": (
        {"min_new_tokens": 4, "stop_tokens": [2, 6]},
        lambda prompt: MinNewTokensLengthLogitsProcessor(prompt, 4, torch.tensor([2, 6])),  # pyright: ignore
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_processors_equal_those_of_transformers_at_every_place_of_a_block(name: str):
    options, make = TRANSFORMERS[name]
    changed = 0
    for seed in range(40):
        logits, text, drafts, prompt_length = random_block(seed)
        got = process(logits, text, drafts, prompt_length, **options)
        for place, row in enumerate(logits):
            ids = torch.tensor([text + drafts[:place]])
            wanted = make(prompt_length)(ids, torch.tensor(row, dtype=torch.float32)[None])[0].numpy()
            np.testing.assert_allclose(got[place], wanted, rtol=1e-6)
            changed += int((wanted != row.astype(np.float32)).any())
    assert changed > 10


GRAMMAR = ((1, 0, 0, 1, -1, 0, 0), (0, 1, 1, -1, 0, 1, -1))

OPTIONS = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 0.8, -0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "no_repeat_ngram_size": st.sampled_from([0, 1, 2, 3]),
        "min_new_tokens": st.sampled_from([0, 2, 5]),
        "logit_bias": st.sampled_from([(), ((3, 1.0),), ((0, -np.inf), (6, -2.0))]),
        "grammar": st.sampled_from([None, GRAMMAR]),
    }
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), OPTIONS)
def test_processors_equal_the_oracle(seed: int, options: dict[str, Any]):
    logits, text, drafts, _ = random_block(seed)
    # The grammar begins where the new text does.
    prompt_length = len(text)
    table = options["grammar"]
    ours = options | {
        "logit_bias": dict(options["logit_bias"]),
        "grammar": None if table is None else automaton.from_table(np.array(table)),
        "stop_tokens": [2],
    }
    got = process(logits, text, drafts, prompt_length, **ours)
    alive = True
    for place, row in enumerate(logits):
        if alive:
            before = text + drafts[:place]
            wanted = testing.processed(row, before, prompt_length, stop_tokens=[2], **options)
            np.testing.assert_allclose(got[place], wanted, rtol=1e-5, atol=1e-5)
            # What comes after a forbidden draft does not count.
            alive = place < len(drafts) and wanted[drafts[place]] > -np.inf


def test_extend_is_follow_one_token_at_a_time():
    options = processors.penalties(1, repetition_penalty=1.5)
    grammar = automaton.from_table(np.array(GRAMMAR))
    before = history([1, 2, 3], 3, [], grammar)
    drafts = [0, 1, 2]
    block = processors.follow(before, jnp.asarray([drafts], jnp.int32), options)
    one = before
    for i, token in enumerate(drafts):
        one = processors.extend(one, jnp.asarray([token], jnp.int32), options)
        assert int(one.length[0]) == 4 + i
        assert int(one.grammar_state[0, 0]) == int(block.grammar_state[0, i + 1])
    np.testing.assert_array_equal(one.tokens[0, :6], block.tokens[0, :6])


def test_no_penalties_are_none_so_that_the_program_has_none():
    assert processors.penalties(3) is None
    assert processors.penalties(3, repetition_penalty=[1.0, 1.0, 1.0], logit_bias=[{}, {}, {}]) is None
    some = processors.penalties(2, logit_bias=[{}, {3: 1.0}])
    assert some is not None
    assert some.bias_tokens.shape == (2, 8)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0\.0 is outside \[1e-06"),
        ({"no_repeat_ngram_size": -1}, r"no_repeat_ngram_size=-1 is outside"),
        ({"presence_penalty": [0.1, 0.2, 0.3]}, r"presence_penalty has shape \(3,\)"),
        ({"logit_bias": {-1: 1.0}}, "names token -1"),
        ({"logit_bias": {1: float("inf")}}, r"token 1 is inf: give a finite number, or -inf"),
        ({"logit_bias": {1: float("nan")}}, "token 1 is nan"),
        ({"logit_bias": [{}]}, "has 1 mappings: give one, or one for each of 2 rows"),
    ],
)
def test_bad_penalties_are_named(options: dict[str, Any], remedy: str):
    with pytest.raises(ValueError, match=remedy):
        processors.penalties(2, **options)
