"""SpecDec's training: a step reads slots as drafting does, glancing shows what it says, and a drafter learns."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compiled, tokenizer_of

import specjax
from specjax import launch
from specjax.api.pretrained import Pretrained
from specjax.models import families, relative
from specjax.models.config import DecoderConfig, T5Config
from specjax.text.tokenizer import Tokenizer
from specjax.training import data as data_lib
from specjax.training import masked, specdec, train
from specjax.training.config import TrainConfig
from specjax.training.data import Dataset, Encoded, Example
from specjax.types import Batch, Block, Inputs

V, MASK = 13, 12
CONFIG = T5Config(V, 16, 8, 32, 2, 1, 2)


COPYING = dataclasses.replace(CONFIG, mask_token=MASK, copy_source=True)
"""Whose slots read a copy of the source."""


def drafter(config: T5Config = CONFIG) -> Pretrained:
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), families.abstract_params(config))
    return Pretrained(families.model(config), params, None, config)


def texts(number: int = 6) -> Dataset:
    """Copies of their source, after the start token."""
    rng, examples = np.random.default_rng(1), []
    for _ in range(number):
        source = rng.integers(1, MASK, 6).astype(np.int32)
        examples.append(Example(np.concatenate([[0], source]).astype(np.int32), 0, source))
    return data_lib.dataset(Encoded(examples, 0, 0), start_token=0, target_length=14, source_length=14, seed=0)


def reads_what_is_drafted(config: T5Config = CONFIG) -> None:
    """In each slot of a batch the model says what it says behind a prefill of the text, and learns the token there."""
    side, data = drafter(config), specdec.with_slots(texts(), MASK, 3, 5)
    batch = data.batch(0, 1)
    assert side.model.score is not None
    logits = jax.jit(side.model.score)(side.params, batch)[0, 14:].reshape(3, 5, V)
    plain = texts().batch(0, 1)
    assert plain.source is not None
    assert plain.source_segments is not None
    tokens, segments = np.asarray(plain.tokens[0]), np.asarray(plain.segments[0])
    found = masked.choose(1, 14, data.counts, np.random.default_rng([0, 0]))
    seen = 0
    for number, point in enumerate(found.point[0, :5].tolist()):
        segment = segments[point]
        if not segment:
            continue
        text = tokens[int(np.flatnonzero(segments == segment)[0]) : point + 1].tolist()
        source = np.asarray(plain.source[0])[np.asarray(plain.source_segments[0]) == segment]
        given = jnp.asarray([text + [0] * (14 - len(text))]), jnp.asarray([len(text)])
        both = jnp.asarray(source)[None], jnp.asarray([len(source)])
        _, cache = compiled(side.model).prefill(side.params, Inputs(*given, *both), side.model.init_cache(1, 24, 6))
        slots = Block(jnp.full((1, 3), MASK), sees=jnp.ones((1, 3, 3), bool))
        wanted = compiled(side.model).apply(side.params, slots, cache)[0].logits[0]
        assert np.allclose(logits[:, number], wanted, atol=2e-4), "a slot is read otherwise than drafted"
        for place in range(3):
            at, ours = point + place, 14 + 5 * place + number
            inside = at < 14 and segments[at] == segment
            assert float(batch.weights[0, ours]) == float(inside), "a slot has the wrong weight"
            if inside:
                seen += 1
                assert batch.targets[0, ours] == plain.targets[0, at], "a slot has the wrong target"
    assert seen > 4
    assert not batch.weights[:, :14].any()


@pytest.mark.parametrize("config", [CONFIG, pytest.param(COPYING, marks=pytest.mark.slow)])
def test_training_reads_what_is_drafted(config: T5Config):
    reads_what_is_drafted(config)


def test_slots_read_the_embeddings_of_the_source_by_distance():
    """A table that prefers one distance copies the token that stands there; text reads its own embeddings."""
    table = jnp.zeros((CONFIG.num_buckets, 1)).at[int(relative.buckets(CONFIG, bidirectional=True)[128 + 2])].set(50.0)
    positions, source = np.asarray([[3, 4, 9]]), np.random.default_rng(0).normal(size=(1, 6, 16)).astype(np.float32)
    distance, sees = (
        jnp.asarray(positions)[:, :, None] - jnp.arange(6),
        jnp.ones((1, 3, 6), bool).at[0, 1, 5].set(False),
    )
    found = relative.copied(CONFIG, table, distance, sees, jnp.asarray(source))
    # The query two positions behind its key; nothing of the source is so far before position 9.
    np.testing.assert_allclose(found[0, :2], source[0, [1, 2]], atol=1e-5)
    np.testing.assert_allclose(found[0, 2], source[0].mean(axis=0), atol=1e-5)
    hidden = relative.copied(CONFIG, table * 0, distance, sees, jnp.asarray(source))
    np.testing.assert_allclose(hidden[0, 1], source[0, :5].mean(axis=0), atol=1e-5)
    np.testing.assert_array_equal(relative.places(jnp.asarray([[1, 1, 2, 2, 2, 0]])), [[0, 1, 0, 1, 2, 0]])


@pytest.mark.parametrize("copies", [False, True])
def test_a_source_matters_to_slots_only_where_they_copy_it(copies: bool):
    """Without attention to the source, a slot's output follows the source exactly where slots read a copy of it."""
    side = drafter(COPYING if copies else CONFIG)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if "cross" in jax.tree_util.keystr(path) else x, side.params
    )

    def said(source: list[int], tokens: list[int]) -> Any:
        inputs = Inputs(jnp.asarray([[0, 3]]), jnp.asarray([2]), jnp.asarray([source]), jnp.asarray([len(source)]))
        _, cache = compiled(side.model).prefill(params, inputs, side.model.init_cache(1, 24, 4))
        block = Block(jnp.asarray([tokens]), sees=jnp.ones((1, 2, 2), bool))
        return compiled(side.model).apply(params, block, cache)[0].logits

    changed = not np.allclose(said([1, 2, 3, 4], [MASK, MASK]), said([1, 7, 3, 4], [MASK, MASK]), atol=1e-5)
    assert changed == copies
    np.testing.assert_allclose(said([1, 2, 3, 4], [5, 6]), said([1, 7, 3, 4], [5, 6]), atol=1e-6)


def test_a_drafter_begins_to_copy_where_it_has_a_source_and_a_mask():
    config, params = specdec.with_copies(dataclasses.replace(CONFIG, mask_token=MASK), drafter().params)
    assert config == COPYING
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, families.abstract_params(config))
    with pytest.raises(ValueError, match="only an encoder-decoder has a source"):
        specdec.with_copies(DecoderConfig(V, 16, 32, 1, 2, 1, 8, 64), {})
    with pytest.raises(ValueError, match="copy_source=True: it is mask_token that reads a copy"):
        dataclasses.replace(CONFIG, copy_source=True)


@pytest.mark.slow
def test_prefills_catch_a_slot_that_learns_the_next_token(monkeypatch: pytest.MonkeyPatch, catches: Any):
    monkeypatch.setattr(masked, "SLOTS", masked.SLOTS._replace(fills=False))
    with catches("a slot learns the token after its own", "prefills", "wrong weight|wrong target"):
        reads_what_is_drafted()


def shows_the_right_share(share: float) -> None:
    side, data = drafter(), specdec.with_slots(texts(), MASK, 4, 5)
    before = data.batch(0, 2)
    after = specdec.glance(CONFIG, (14, 4), side.params, before, jnp.float32(share), jax.random.key(0))
    assert side.model.score is not None
    filled = np.argmax(jax.jit(side.model.score)(side.params, before), axis=-1)

    def of_slots(values: Any) -> np.ndarray:
        return np.asarray(values)[:, 14:].reshape(2, 4, 5)

    counts, gold = of_slots(before.weights) > 0, of_slots(before.targets)
    wrong = (counts & (of_slots(filled) != gold)).sum(axis=1)
    shown = of_slots(after.tokens) != of_slots(before.tokens)
    assert (shown.sum(axis=1) == np.round(share * wrong)).all(), "another number of tokens is shown"
    np.testing.assert_array_equal(of_slots(after.tokens), np.where(shown, gold, MASK))
    np.testing.assert_array_equal(of_slots(after.weights), np.where(shown, 0.0, counts), "what is shown is learnt")
    np.testing.assert_array_equal(after.tokens[:, :14], before.tokens[:, :14])
    assert shown.any() == (share > 0)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_glancing_shows_a_share_of_what_was_wrong(share: float):
    shows_the_right_share(share)


@pytest.mark.slow
def test_a_drafter_learns_to_fill_slots():
    side, data = drafter(), specdec.with_slots(texts(4), MASK, 2, 8)
    glanced = specdec.glanced(data, CONFIG, 260)
    config = TrainConfig(num_steps=260, batch_size=1, learning_rate=1e-2)
    state = train.init(CONFIG, config, params=side.params)
    for step in range(260):
        batch: Batch = glanced.at(step, state.params).batch(step, 1)
        state, _ = train.train_step(CONFIG, config, state, batch, objective=data.objective)
    held = train.eval_step(CONFIG, "float32", state.params, next(data.in_order(2)), objective=data.objective)
    assert set(held.measures) == {"same_1", "same_2"}
    assert all(float(value / held.weight) > 0.8 for value in held.measures.values()), held


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="num_slots=0"):
        specdec.with_slots(texts(), MASK, 0, 2)
    with pytest.raises(ValueError, match="some text has this token"):
        specdec.with_slots(texts(), 3, 2, 2)
    with pytest.raises(ValueError, match="last=2: a share"):
        specdec.glanced(specdec.with_slots(texts(), MASK, 2, 2), CONFIG, 10, last=2)


@pytest.mark.slow
@pytest.mark.parametrize("copies", [False, True])
def test_a_run_is_made_and_drafted_with(copies: bool, tmp_path: Any, capfd: Any):
    plain = tokenizer_of("<pad> [end] [mask] ▁the ▁cat ▁dog ▁sat ▁on ▁mat [unk]")
    tokenizer = Tokenizer(plain.backend, special_tokens={"eos_token": "[end]"})
    config = T5Config(10, 16, 8, 32, 2, 2, 2)
    params = jax.tree.map(lambda x: 2 * x if x.ndim > 1 else x, families.init_params(config, jax.random.key(0)))
    source, data = str(tmp_path / "target"), tmp_path / "texts.jsonl"
    specjax.save(Pretrained(families.model(config), params, tokenizer, config), source)
    lines = [{"input": f"the {who} sat", "target": f"on the {who} mat"} for who in ("cat", "dog", "mat")]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def command(workdir: Any, steps: int) -> list[str]:
        return [
            *("launch", "--config=configs/specdec.py", f"--config.target={source}", f"--config.data={data}"),
            *(f"--config.valid={data}", f"--workdir={workdir}", "--nocompilation_cache", "--config.num_slots=2"),
            *(f"--config.num_steps={steps}", "--config.eval_every=2", "--config.save_every=2"),
            *("--config.target_length=16", "--config.source_length=16", "--config.batch_size=2"),
            *("--config.num_microbatches=1", "--config.warmup_steps=2", f"--config.copy_source={copies}"),
        ]

    whole = tmp_path / "whole"
    assert launch.main(command(whole, 4)) == 0, capfd.readouterr().err
    lines = [json.loads(line) for line in (whole / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 2, 4]
    made = specjax.load(whole / "model")
    assert isinstance(made.config, T5Config)
    assert (made.config.mask_token, made.config.num_layers, made.config.copy_source) == (2, 1, copies)
    assert ("copy_bias" in made.params) == copies
    assert "| 2 |" in (whole / "summary.md").read_text()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "the cat sat"}) + "\n")
    compared = [
        *("launch", "--config=configs/compare.py", f"--config.target={source}", f"--config.data={prompts}"),
        *("--config.drafter=nonautoregressive", f"--config.draft={whole / 'model'}", "--config.max_new_tokens=8"),
        *("--config.num_draft_tokens=2", "--nocompilation_cache", "--config.repeats=1", f"--workdir={tmp_path / 'c'}"),
    ]
    assert launch.main(compared) == 0, capfd.readouterr().err
    row = json.loads((tmp_path / "c" / "results.json").read_text())[0]
    assert (row["drafter"], row["identical"]) == ("nonautoregressive", 1.0)
