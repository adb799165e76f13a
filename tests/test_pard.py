"""PARD: one call of a small model drafts K tokens. What it reads, what it states, what it leaves in its cache."""

import functools
import importlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Group, Pair, assert_exact, greedy_text, right_pad, sample, usual

import specjax
from specjax import decoding, drafters, testing
from specjax.api.pretrained import Pretrained
from specjax.decoding import step as step_lib
from specjax.decoding import verify
from specjax.models import families
from specjax.models.config import DecoderConfig
from specjax.models.weights.decoder_configs import parse_config
from specjax.types import Block, Drafter, Inputs, Params

PARD, ONE_CALL = (importlib.import_module(f"specjax.drafters.{name}") for name in ("pard", "one_call"))
V, MASK, K = 61, 60, 3
TARGET, PARAMS = testing.tiny_decoder(0)
DRAFT, DRAFT_PARAMS = testing.tiny_decoder(1, num_layers=1)
TEXTS = ([0, 1, 2, 3, 0, 1, 2, 4], [3, 1, 4, 1, 5], [7])
BOTH = Params(PARAMS, DRAFT_PARAMS)


@functools.cache
def chain() -> Drafter:
    return drafters.pard(DRAFT, mask_token=MASK, num_draft_tokens=K)


@jax.jit
def _fresh(tokens: Any, length: Any) -> tuple[Any, Any]:
    output, cache = DRAFT.prefill(DRAFT_PARAMS, Inputs(tokens, length), DRAFT.init_cache(*tokens.shape))
    return output.logits[:, 0], cache


def follows_the_text(drafter: Drafter, calls: int = 3) -> None:
    """In each of some steps, each token is drafted behind the text and so many masks, which leave nothing behind."""
    prompts = right_pad(TEXTS, 16)
    state = decoding.prefill(TARGET, drafter, BOTH, prompts, max_new_tokens=20, step_cost=0.0, max_len=64)
    depth = drafter.topology.depth

    @jax.jit
    def proposed(state: Any) -> Any:
        keys = step_lib.step_keys(state.rows.seed, state.rows.length, depth)
        room = jnp.full(len(TEXTS), depth)
        context = step_lib.context_of(TARGET, drafter, verify.greedy, state, room, *keys)
        return drafter.propose(BOTH, state.rows.drafter, state.rows.cache, context)

    advance = jax.jit(functools.partial(decoding.advance, TARGET, drafter, verify.greedy))
    for _ in range(calls):
        proposal, cache, _ = proposed(state)
        texts = [np.asarray(row)[:n].tolist() for row, n in zip(state.rows.tokens, state.rows.length, strict=True)]
        assert cache.length.tolist() == [len(text) for text in texts], "the draft's cache is not that of the text"
        for row, text in enumerate(texts):
            behind = right_pad([text + [MASK] * i for i in range(depth)], 40)
            logits, fresh = _fresh(behind.tokens, behind.length)
            size = len(text)
            for ours, theirs in zip(cache.keys, fresh.keys, strict=True):
                close = np.allclose(ours[row, :, :size], theirs[0, :, :size], atol=1e-4)
                assert close, "a mask is left in the draft's cache"
            wanted = np.argmax(logits, axis=-1).tolist()
            assert proposal.tokens[row].tolist() == wanted, "another draft than behind the masks"
        state = advance(BOTH, state, np.int32(1))


def test_each_token_is_drafted_behind_the_text_and_masks():
    follows_the_text(chain())


@pytest.mark.slow
def test_text_is_plain_decodings():
    plain = greedy_text(drafters.none(), None)[0]
    long = drafters.pard(TARGET, mask_token=MASK, num_draft_tokens=12)
    for drafter, params in ((chain(), DRAFT_PARAMS), (long, PARAMS)):
        texts, accepted = greedy_text(drafter, params)
        assert texts == plain
        assert accepted > 0


@pytest.mark.slow
def test_a_short_text_in_a_small_buffer_is_drafted_for():
    """A call writes 2 K entries, more than the text's buffer has here."""
    drafter = drafters.pard(DRAFT, mask_token=MASK, num_draft_tokens=12)
    prompts = right_pad([[5], [7, 8]], 2)
    made = {}
    for name, one in (("ours", drafter), ("plain", drafters.none())):
        both = BOTH if name == "ours" else Params(PARAMS, ())
        state = decoding.prefill(TARGET, one, both, prompts, max_new_tokens=3, step_cost=0.0, max_len=18)
        made[name] = decoding.generate(TARGET, one, verify.greedy, both, state).rows.tokens[:, :4]
    np.testing.assert_array_equal(made["ours"], made["plain"])


def _late(reader: Any, history: Any) -> Any:
    asked = PARD.block_of(reader, history)
    return asked._replace(at=asked.at + 1)


def _rolled(reader: Any, history: Any) -> Any:
    """Leaves a mask of the last call where a token of the text belongs."""
    asked = PARD.block_of(reader, history)
    tokens = jnp.where(asked.begin[:, None] > 0, jnp.roll(asked.block.tokens, 1, axis=1), asked.block.tokens)
    return asked._replace(block=Block(tokens))


def _committed(look_ahead: Any) -> Any:
    def changed(reader: Any, params: Any, cache: Any, context: Any) -> Any:
        logits, cache = look_ahead(reader, params, cache, context)
        return logits, reader.draft.commit(cache, None, jnp.ones_like(cache.length))

    return changed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "read", "message"),
    [
        ("the masks are read one place too late", _late, "another draft than behind"),
        ("entries of masks are not overwritten", _rolled, "left in the draft's cache"),
    ],
)
def test_prefills_catch(bug: str, read: Any, message: str, catches: Any):
    with catches(bug, "prefills", message):
        follows_the_text(ONE_CALL.chain(ONE_CALL.Reader(DRAFT, MASK, K, read)), calls=2)


@pytest.mark.slow
def test_prefills_catch_a_mask_that_is_committed(monkeypatch: pytest.MonkeyPatch, catches: Any):
    monkeypatch.setattr(ONE_CALL, "look_ahead", _committed(ONE_CALL.look_ahead))
    with catches("a mask's entry is committed", "prefills", "not that of the text"):
        follows_the_text(ONE_CALL.chain.__wrapped__(ONE_CALL.Reader(DRAFT, MASK, K, PARD.block_of)), calls=2)


# Distributions.

TABULAR, TABLE = testing.tabular(0)
OTHER, OTHER_TABLE = testing.tabular(1)
GROUPS = [Group((0, 1, 2), 6_000), Group((2, 1), 6_000, temperature=0.7, repetition_penalty=1.5)]


def is_exact(drafter: Drafter, rule: Any = verify.rejection) -> None:
    result = sample(Pair(TABULAR, TABLE, drafter, OTHER_TABLE), GROUPS, rule=rule)
    assert_exact(result)
    assert np.asarray(result.state.rows.stats.accepted).sum(axis=0).min() > 50


def make(**options: Any) -> Drafter:
    return drafters.pard(OTHER, mask_token=1, **options)


SHAPES: dict[str, dict[str, Any]] = {
    "chain": {"num_draft_tokens": 3},
    "sure": {"num_draft_tokens": 3, "min_confidence": 0.32},
    "lengths": {"num_draft_tokens": 3, "lengths": (1,)},
    "tree": {"topology": (2, 2)},
    "sampled tree": {"topology": (2, 2), "children": drafters.children.without_replacement},
}


@pytest.mark.parametrize("name", usual(SHAPES, "chain"))
def test_text_is_distributed_as_the_targets(name: str):
    is_exact(make(**SHAPES[name]))


def _given_drafted(propose: Any) -> Any:
    """States for each place what the draft would say after the token that was drafted before, which it did not see."""

    def changed(params: Any, state: Any, cache: Any, context: Any) -> Any:
        proposal, *rest = propose(params, state, cache, context)
        length = context.history.length - 1
        last = jnp.take_along_axis(context.history.tokens, length[:, None], axis=1)
        chain = jnp.concatenate([last, proposal.tokens[:, :-1]], axis=1)
        seen = OTHER.commit(rest[0], None, length - rest[0].length)
        stated = jax.nn.softmax(OTHER.apply(params.draft, Block(chain), seen)[0].logits, axis=-1)
        return proposal._replace(probs=stated), *rest

    return changed


@pytest.mark.slow
def test_enumeration_catches_a_distribution_given_drafted_tokens(catches: Any):
    drafter = make(num_draft_tokens=3)
    with catches("the q of a place is given drafted tokens that it did not see", "enumeration", "is not distributed"):
        is_exact(drafter._replace(propose=_given_drafted(drafter.propose)))


# Where the mask comes from.

RAW = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def test_the_mask_is_read_from_config_json():
    assert parse_config(RAW | {"pard_token": 7, "spd_type": "pard"}).mask_token == 7
    assert parse_config(RAW).mask_token is None
    assert parse_config(RAW | {"pard_token": -1}).mask_token is None
    for wrong in (31, -2, "7"):
        with pytest.raises(ValueError, match="mask_token"):
            parse_config(RAW | {"pard_token": wrong})


@pytest.mark.slow
def test_a_published_draft_is_loaded_and_drafts(tmp_path: Any):
    import torch
    import transformers

    torch.manual_seed(0)
    fields = {name: value for name, value in RAW.items() if name != "model_type"}
    config = transformers.LlamaConfig(**fields | {"pard_token": 7, "spd_type": "pard"})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pard_token"] == 7
    draft = specjax.load(tmp_path)
    assert draft.config.mask_token == 7
    out = specjax.generate(draft, [[1, 2, 3]], drafter=drafters.pard(draft), max_new_tokens=12, temperature=0.0)
    assert out.tokens == specjax.generate(draft, [[1, 2, 3]], max_new_tokens=12, temperature=0.0).tokens


def test_a_saved_draft_keeps_its_mask(tmp_path: Any):
    config = DecoderConfig(31, 16, 32, 1, 2, 1, 8, max_position=64, mask_token=5)
    params = families.init_params(config, jax.random.key(0))
    specjax.save(Pretrained(families.model(config), params, None, config), tmp_path)
    assert specjax.load(tmp_path).config == config


def test_mistakes_are_named():
    plain = Pretrained(DRAFT, DRAFT_PARAMS, None, DecoderConfig(31, 16, 32, 1, 2, 1, 8, max_position=64))
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "names no mask token: give a model that was trained"),
        ({"mask_token": V}, "mask_token=61 is out of range"),
        ({"mask_token": 1, "num_draft_tokens": 0}, "num_draft_tokens=0: at least 1"),
        ({"mask_token": 1, "min_confidence": 2.0}, "min_confidence=2.0: a probability"),
        ({"mask_token": 1, "topology": (2, 2), "num_draft_tokens": 2}, "says what is drafted"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            drafters.pard(plain, **wrong)
