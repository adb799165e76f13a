"""The training of PARD: what a step reads is what drafting reads, it learns, resumes, and is drafted with."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compiled, save_tiny_decoder

import specjax
from specjax import launch
from specjax.api.pretrained import Pretrained
from specjax.models import families
from specjax.models.config import DecoderConfig
from specjax.text.tokenizer import Tokenizer
from specjax.training import data as data_lib
from specjax.training import masked, pard, slots, train
from specjax.training.config import TrainConfig
from specjax.training.data import Dataset, Encoded, Example
from specjax.types import Inputs

V, MASK = 13, 12
CONFIG = DecoderConfig(V, 16, 32, 2, 2, 1, 8, max_position=64, tie_embeddings=True)


def draft() -> Pretrained:
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), families.abstract_params(CONFIG))
    return Pretrained(families.model(CONFIG), params, None, CONFIG)


def texts(number: int = 6) -> Dataset:
    rng = np.random.default_rng(1)
    examples = [Example(rng.integers(0, MASK, 9).astype(np.int32), 0, np.zeros(0, np.int32)) for _ in range(number)]
    return data_lib.dataset(Encoded(examples, 0, 0), start_token=None, target_length=16, source_length=0, seed=0)


def reads_what_is_drafted() -> None:
    """Behind each mask of a batch the model says what it says behind the same text and masks in a prefill."""
    side, data = draft(), pard.with_masks(texts(), MASK, 3, keep=0.8, least=0.3)
    batch = data.batch(0, 1)
    assert batch.tokens.shape == (1, 16 + sum(data.counts))
    assert side.model.score is not None
    logits = jax.jit(side.model.score)(side.params, batch)
    plain = texts().batch(0, 1)
    tokens, segments = np.asarray(plain.tokens[0]), np.asarray(plain.segments[0])
    found = masked.choose(1, 16, data.counts, np.random.default_rng([0, 0]))
    prefill = compiled(side.model).prefill
    seen = 0
    for number, (point, place) in enumerate(zip(found.point[0].tolist(), found.place[0].tolist(), strict=True)):
        if not segments[point] or number % 3:
            continue
        begin = int(np.flatnonzero(segments == segments[point])[0])
        whole = [*tokens[begin : point + 1].tolist(), *[MASK] * (place + 1)]
        text = jnp.asarray([whole + [0] * (16 - len(whole))])
        wanted = prefill(side.params, Inputs(text, jnp.asarray([len(whole)])), side.model.init_cache(1, 24))[0].logits
        assert np.allclose(logits[0, 16 + number], wanted[0, 0], atol=2e-4), "a mask is read otherwise than drafted"
        stands = point + 1 + place
        inside = stands < 16 and segments[stands] == segments[point]
        assert float(batch.weights[0, 16 + number]) == float(inside), "a mask has the wrong weight"
        if inside:
            seen += 1
            assert batch.targets[0, 16 + number] == plain.targets[0, stands], "a mask has the wrong target"
    assert seen > 3
    np.testing.assert_array_equal(batch.tokens[:, :16], plain.tokens)


def test_training_reads_what_is_drafted():
    reads_what_is_drafted()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "name", "change", "message"),
    [
        (
            "masks learn one place later",
            "stands_for",
            lambda f: lambda places: f(places) + 1,
            "wrong weight|wrong target",
        ),
        (
            "masks see each other out of order",
            "visible",
            lambda f: lambda places, width, **more: f(places._replace(place=-places.place), width, **more),
            "read otherwise than drafted",
        ),
    ],
)
def test_prefills_catch(bug: str, name: str, change: Any, message: str, monkeypatch: Any, catches: Any):
    monkeypatch.setattr(masked, name, change(getattr(masked, name)))
    jax.clear_caches()
    with catches(bug, "prefills", message):
        reads_what_is_drafted()
    jax.clear_caches()


def test_a_model_learns_to_look_ahead():
    """On a few texts over and over, it learns behind masks what it learns behind the text."""
    side, data = draft(), pard.with_masks(texts(2), MASK, 2)
    objective = data.objective
    config = TrainConfig(num_steps=60, batch_size=1, learning_rate=1e-2)
    state = train.init(CONFIG, config, params=side.params)
    found = []
    for step in range(60):
        state, metrics = train.train_step(CONFIG, config, state, data.batch(step, 1), objective=objective)
        found.append(metrics)
    assert set(found[0].measures) == {"same_1", "same_2", "same_3"}
    first, last = (float(np.mean([m.loss for m in part])) for part in (found[:3], found[-3:]))
    assert last < 0.5 * first
    assert all(float(found[-1].measures[f"same_{i}"]) > 0.6 for i in (1, 2, 3)), found[-1].measures


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="some text has this token"):
        pard.with_masks(texts(), 3, 2)
    with pytest.raises(ValueError, match="num_masks=0"):
        pard.with_masks(texts(), MASK, 0)
    with pytest.raises(ValueError, match="mask_token=13: an id of the vocabulary"):
        slots.adapted(CONFIG, V)


def command(draft: str, data: Any, workdir: Any, *more: str) -> list[str]:
    return [
        *("launch", "--config=configs/pard.py", f"--config.draft={draft}", f"--config.data={data}"),
        *(f"--config.valid={data}", f"--workdir={workdir}", "--nocompilation_cache", "--config.num_masks=2"),
        *("--config.mask_token=15", "--config.num_steps=4", "--config.eval_every=2", "--config.save_every=2"),
        *("--config.target_length=16", "--config.batch_size=2", "--config.num_microbatches=1", *more),
    ]


@pytest.mark.slow
def test_a_run_goes_on_and_is_drafted_with(tmp_path: Any, capfd: Any):
    plain = specjax.load(save_tiny_decoder(tmp_path / "plain", 0))
    assert plain.tokenizer is not None
    tokenizer = Tokenizer(plain.tokenizer.backend, special_tokens={"eos_token": "[unk]"})
    source, data = str(tmp_path / "model"), tmp_path / "texts.jsonl"
    specjax.save(plain._replace(tokenizer=tokenizer), source)
    data.write_text("".join(json.dumps({"text": f"the {who} sat on the mat"}) + "\n" for who in ("cat", "dog", "mat")))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert launch.main(command(source, data, whole)) == 0, capfd.readouterr().err
    assert launch.main(command(source, data, broken, "--config.num_steps=2")) == 0, capfd.readouterr().err
    lines = [json.loads(line) for line in (whole / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 2, 4]
    assert {"same_1", "same_2", "same_3"} <= set(lines[0])
    first = [json.loads(line) for line in (broken / "train.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in first if "loss" in line] == [line["loss"] for line in lines if "loss" in line][:2]
    assert "| 3 |" in (whole / "summary.md").read_text()
    assert (whole / "acceptance.png").stat().st_size > 5_000
    made = specjax.load(whole / "model")
    assert made.config.mask_token == 15
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "the cat sat on the mat"}) + "\n")
    compared = [
        *("launch", "--config=configs/compare.py", f"--config.target={source}", f"--config.data={prompts}"),
        *("--config.drafter=pard", f"--config.draft={whole / 'model'}", "--config.max_new_tokens=8"),
        *("--config.num_draft_tokens=3", "--nocompilation_cache", "--config.repeats=1", f"--workdir={tmp_path / 'c'}"),
    ]
    assert launch.main(compared) == 0, capfd.readouterr().err
    row = json.loads((tmp_path / "c" / "results.json").read_text())[0]
    assert (row["drafter"], row["identical"]) == ("pard", 1.0)
