"""Aggressive decoding: the input is copied, left, and found again, against plain Python."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import context_of, greedy_text

from specjax import decoding, drafters, testing
from specjax.decoding import verify
from specjax.drafters.aggressive import Place, resynchronise
from specjax.models import families
from specjax.models.config import T5Config
from specjax.types import Feedback, Inputs, ModelOutput, Params

MATCH = 3


@functools.partial(jax.jit, static_argnames=("window",))
def follow(place: Place, text: Any, length: Any, inputs: Any, size: Any, window: int = 5) -> Place:
    return resynchronise(place, text, length, inputs, size, window=window, min_match=1, max_match=MATCH)


class Reader:
    """The definition in plain Python: one text beside one input."""

    def __init__(self, inputs: list[int], copies: bool, begin: int) -> None:
        self.inputs, self.at, self.copies, self.read = inputs, 0, copies, begin

    def tell(self, text: list[int]) -> None:
        new, self.read = text[self.read :], len(text)
        for token in new:
            if not self.copies or self.at >= len(self.inputs) or self.inputs[self.at] != token:
                self.copies = False
                break
            self.at += 1
        if self.copies:
            return
        matches = {}
        for end in range(len(self.inputs) - 1):
            size = 0
            while size < min(MATCH, end + 1, len(text)) and self.inputs[end - size] == text[-1 - size]:
                size += 1
            if size:
                matches[end + 1] = size
        if not matches:
            return
        longest = [place for place, size in matches.items() if size == max(matches.values())]
        ahead = [place for place in longest if place > self.at]
        self.at, self.copies = (min(ahead) if ahead else max(longest)), True


def test_the_place_in_the_input_is_that_of_a_plain_search():
    rng = np.random.default_rng(0)
    left = returned = 0
    for _ in range(40):
        inputs = rng.integers(0, 6, rng.integers(2, 20)).tolist()
        text = [9]
        reader, place = Reader(inputs, True, 1), Place(jnp.int32(0), jnp.asarray(True), jnp.int32(1))
        padded = jnp.asarray(inputs + [7] * (20 - len(inputs)), jnp.int32)
        for _ in range(12):
            before = reader.copies
            # The text copies a few tokens and then, sometimes, writes one of its own.
            copied = inputs[reader.at : reader.at + int(rng.integers(0, 4))] if reader.copies else []
            text += copied + ([int(rng.integers(0, 8))] if not copied or rng.random() < 0.5 else [])
            reader.tell(text)
            # What lies behind the text is stale.
            buffer = jnp.asarray(text + rng.integers(0, 6, 60 - len(text)).tolist(), jnp.int32)
            place = follow(place, buffer, jnp.int32(len(text)), padded, jnp.int32(len(inputs)))
            assert (int(place.at), bool(place.copies), int(place.read)) == (reader.at, reader.copies, len(text))
            left += before and not reader.copies
            returned += reader.copies and not before
    assert left > 10
    assert returned > 10


def _told(drafter: Any, inputs: Inputs) -> Any:
    rows, width = inputs.tokens.shape
    output = ModelOutput(jnp.zeros((rows, 1, 1)), jnp.zeros((rows, width, 0, 1)))
    state = drafter.init(rows, 16, 0 if inputs.source is None else inputs.source.shape[1])
    prompt = Feedback(inputs.tokens, inputs.length, inputs.length, output.features, output, inputs)
    return drafter.update(Params((), ()), state, prompt)


def test_a_source_is_copied_from_its_first_token_on_and_the_nearest_place_ahead_is_taken():
    drafter = drafters.aggressive(num_draft_tokens=3)
    propose = jax.jit(lambda state, context: drafter.propose(Params((), ()), state, (), context)[:2])
    source = jnp.asarray([[5, 6, 2, 8, 2, 7, 2, 4]])
    state = _told(drafter, Inputs(jnp.asarray([[0]]), jnp.asarray([1]), source, jnp.asarray([8])))
    seen = []
    for text in ([0], [0, 5, 6, 2], [0, 5, 6, 2, 9], [0, 5, 6, 2, 9, 2], [0, 5, 6, 2, 9, 2, 7, 2, 4]):
        context = context_of([text], 3, 10)
        history = context.history
        tokens = jnp.pad(history.tokens, ((0, 0), (0, 16 - history.tokens.shape[1])))
        history = history._replace(tokens=tokens, prompt_length=jnp.asarray([1]))
        proposal, state = propose(state, context._replace(history=history, vocab_size=10))
        seen.append(proposal.tokens[0, : int(proposal.length[0])].tolist())
    # Copied; gone on; left at 8; back behind the next 2; at the end there is nothing to copy.
    assert seen == [[5, 6, 2], [8, 2, 7], [], [7, 2, 4], []]


@pytest.mark.parametrize("options", [{"min_match": 0}, {"min_match": 3, "max_match": 2}])
def test_matches_that_make_no_sense_are_said(options: dict[str, int]):
    with pytest.raises(ValueError, match="need 1 <= min_match <= max_match"):
        drafters.aggressive(**options)


@pytest.mark.slow
def test_greedy_text_is_plain_decodings():
    plain, _ = greedy_text(drafters.none(), ())
    # The model copies nothing from these prompts; the matrix has drafts that are accepted.
    assert greedy_text(drafters.aggressive(num_draft_tokens=6), ())[0] == plain


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aggressive", "suffix"])
def test_an_encoder_decoders_text_is_plain_decodings(name: str):
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4, "head_dim": 8}
    config = T5Config(vocab_size=12, num_encoder_layers=1, num_buckets=8, max_distance=12, **sizes)
    model, params = families.model(config), families.init_params(config, jax.random.key(1))
    rng = np.random.default_rng(0)
    inputs = decoding.read_inputs(model, [rng.integers(0, 12, n).tolist() for n in (9, 3, 6)])

    def run(drafter: Any) -> Any:
        state = decoding.prefill(
            model, drafter, Params(params, ()), inputs, max_new_tokens=[20, 12, 7], step_cost=0.0, max_len=32
        )
        rows = decoding.generate(model, drafter, verify.rejection, Params(params, ()), state).rows
        return [row[:n].tolist() for row, n in zip(np.asarray(rows.tokens), np.asarray(rows.length), strict=True)], rows

    plain, _ = run(drafters.none())
    drafted, rows = run(getattr(drafters, name)(num_draft_tokens=4))
    assert drafted == plain
    assert np.asarray(rows.stats.draft_steps).min() > 0


@pytest.mark.slow
def test_it_keeps_a_drafters_contract():
    testing.check_drafter(drafters.aggressive(num_draft_tokens=4))
