"""Trained embeddings of masks: training sees what drafting computes, finds them, keeps them, resumes and drafts."""

import functools
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compiled, save_tiny_decoder, usual, virtual_devices

import specjax
from specjax import drafters, launch
from specjax.api.pretrained import Pretrained
from specjax.experiments import masks as experiment
from specjax.models import families
from specjax.models.config import DecoderConfig, T5Config
from specjax.text.tokenizer import Tokenizer
from specjax.training import data as data_lib
from specjax.training import masked, masks
from specjax.training.data import Dataset, Encoded, Example
from specjax.training.masked import Places
from specjax.types import Block, Inputs

V = 13
CONFIGS = {
    "decoder": DecoderConfig(V, 16, 32, 2, 2, 1, 8, max_position=64, tie_embeddings=True),
    "windowed": DecoderConfig(V, 16, 32, 2, 2, 1, 8, max_position=64, sliding_window=4, positions="learned"),
    "t5": T5Config(V, 16, 8, 32, 1, 2, 2),
}


@functools.cache
def target(name: str) -> Pretrained:
    """A random target in which attention matters."""
    rng = np.random.default_rng(0)
    shapes = families.abstract_params(CONFIGS[name])
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), shapes)
    return Pretrained(families.model(CONFIGS[name]), params, None, CONFIGS[name])


def texts(start: int | None = None, number: int = 8, longest: int = 9) -> Dataset:
    """Texts that share rows, so that the segments of a row matter."""
    rng = np.random.default_rng(1)

    def text() -> Example:
        own = rng.integers(0, V, rng.integers(4, longest)).astype(np.int32)
        source = rng.integers(0, V, 3).astype(np.int32) if start is not None else np.zeros(0, np.int32)
        return Example(own, 0, source)

    lengths = {"target_length": 16, "source_length": 12}
    return data_lib.dataset(Encoded([text() for _ in range(number)], 0, 0), start_token=start, seed=0, **lengths)


def behind(side: Pretrained, embeddings: Any, text: list[int], source: Any, number: int) -> np.ndarray:
    """What a target says behind a text and each of the masks after it, as it is decoded."""
    model = side.model
    cache = model.init_cache(1, 32, 8)
    more = (None, None) if source is None else (jnp.asarray([source]), jnp.asarray([len(source)]))
    head = Inputs(jnp.asarray([text[:1]]), jnp.asarray([1]), *more)
    _, cache = compiled(model).prefill(side.params, head, cache)
    ids = [*text[1:], *(model.vocab_size + i for i in range(number))]
    block = Block(jnp.asarray([ids]), embeddings=embeddings)
    return np.asarray(compiled(model).apply(side.params, block, cache)[0].logits)[0, -number:]


def reads_what_is_drafted(name: str) -> None:
    """The masks of a packed batch say what the same masks say when the texts are decoded, and are judged by p there."""
    side, number = target(name), 3
    start = side.model.start_token
    embeddings = jnp.asarray(np.random.default_rng(2).normal(0, 1, (number, 16)), jnp.float32)
    what = masks.of(side, number, num_points=16)
    batch = texts(start).batch(0, 1)
    places = masks.points(what, batch, 0)
    log_p, log_q, weights = jax.jit(masks._log_probs, static_argnums=0)(what, side.params, embeddings, batch, places)
    assert side.model.score is not None
    own = jax.nn.log_softmax(side.model.score(side.params, batch), axis=-1)
    tokens, segments = np.asarray(batch.tokens[0]), np.asarray(batch.segments[0])
    seen = 0
    for point in range(0, 16, 3):
        segment = segments[point]
        if not segment:
            continue
        begin = int(np.flatnonzero(segments == segment)[0])
        text = tokens[begin : point + 1].tolist()
        source = None
        if batch.source is not None and batch.source_segments is not None:
            source = np.asarray(batch.source[0])[np.asarray(batch.source_segments[0]) == segment].tolist()
        wanted = jax.nn.log_softmax(behind(side, embeddings, text, source, number), axis=-1)
        for place in range(number):
            at = int(np.flatnonzero((places.point[0] == point) & (places.place[0] == place))[0])
            assert np.allclose(log_q[0, at], wanted[place], atol=2e-4), "the masks are read otherwise than drafted"
            stands = point + 1 + place
            inside = stands < 16 and segments[stands] == segment
            assert bool(weights[0, at]) == inside, "a weight is wrong"
            if inside:
                seen += 1
                assert np.allclose(log_p[0, at], own[0, stands], atol=2e-4), "judged by the target elsewhere"
    assert seen > 4


@pytest.mark.parametrize("name", usual(CONFIGS, "decoder"))
def test_training_sees_what_drafting_computes(name: str):
    reads_what_is_drafted(name)


def _one_later(places: Places) -> Any:
    return places.point + 2 + places.place


@pytest.mark.slow
def test_drafting_catches_masks_that_are_off_by_one(monkeypatch: pytest.MonkeyPatch, catches: Any):
    monkeypatch.setattr(masked, "stands_for", _one_later)
    jax.clear_caches()
    with catches("masks learn the token after the next", "decoding", "judged by the target elsewhere|weight is wrong"):
        reads_what_is_drafted("decoder")
    jax.clear_caches()


@pytest.mark.slow
def test_drafting_catches_masks_that_see_each_other(monkeypatch: pytest.MonkeyPatch, catches: Any):
    visible = masked.visible

    def later(places: Places, width: int, **more: Any) -> Any:
        return visible(places._replace(point=places.point + 1), width, **more)

    monkeypatch.setattr(masked, "visible", later)
    jax.clear_caches()
    with catches("masks see the token that they stand for", "decoding", "read otherwise than drafted"):
        reads_what_is_drafted("decoder")
    jax.clear_caches()


def test_conditional_drop_keeps_the_masks_that_others_see():
    counts = masked.counts(40, 4, 0.7, 0.3)
    assert counts == (28, 19, 13, 12)
    found = masked.choose(2, 40, counts, np.random.default_rng(0))
    for points, places in zip(found.point, found.place, strict=True):
        have = set(zip(points.tolist(), places.tolist(), strict=True))
        assert len(have) == sum(counts)
        assert all((point, place - 1) in have for point, place in have if place)
    for keep, least in ((0.0, 0.1), (1.1, 0.1), (0.5, 2.0)):
        with pytest.raises(ValueError, match="share"):
            masked.counts(40, 4, keep, least)


def learns() -> None:
    """From the same text over and over, the masks learn what the target says about it."""
    side, data = target("decoder"), texts(number=2)
    what = masks.of(side, 2, num_points=8, num_steps=60, learning_rate=0.1)
    begin = masks.init(what, side, 3)
    assert np.allclose(begin.embeddings, families.embeddings(side.config, side.params, jnp.asarray([[3, 3]]))[0])
    state, losses = masks.fit(what, side.params, data, begin, batch_size=1)
    assert losses.shape == (60, 2)
    before, after = (masks.judge(what, side.params, s.embeddings, data.in_order(1)) for s in (begin, state))
    assert after.loss[0] < 0.7 * before.loss[0], f"nothing is learnt: {before.loss}, {after.loss}"
    assert after.alpha[0] > before.alpha[0]


def test_training_learns():
    learns()


@pytest.mark.slow
def test_training_catches_a_loss_without_gradient(monkeypatch: pytest.MonkeyPatch, catches: Any):
    log_probs = masks._log_probs
    monkeypatch.setattr(masks, "_log_probs", lambda *args: jax.lax.stop_gradient(log_probs(*args)))
    jax.clear_caches()
    with catches("the masks have no gradient", "masks", "nothing is learnt"):
        learns()
    jax.clear_caches()


def test_masks_are_kept(tmp_path: Any):
    rows = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    drafters.save_masks(rows, tmp_path)
    np.testing.assert_array_equal(drafters.load_masks(tmp_path), rows)
    np.testing.assert_array_equal(drafters.load_masks(tmp_path, target=target("decoder"), number=2), rows[:2])
    with pytest.raises(ValueError, match="holds 3 masks, and 4 are needed"):
        drafters.load_masks(tmp_path, number=4)
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        drafters.save_masks(np.zeros(3), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"configs/masks\.py makes them"):
        drafters.load_masks(tmp_path / "nowhere")
    drafters.save_masks(np.zeros((1, 4)), tmp_path)
    with pytest.raises(ValueError, match="masks of width 4"):
        drafters.load_masks(tmp_path, target=target("decoder"))


def test_mistakes_are_named():
    side = target("decoder")
    with pytest.raises(ValueError, match="num_masks=0"):
        masks.of(side, 0)
    with pytest.raises(ValueError, match="mask_token=13: an id of the vocabulary, from 0 to 12"):
        masks.init(masks.of(side, 1), side, V)


def command(target: str, data: Any, workdir: Any, *more: str) -> list[str]:
    return [
        *("launch", "--config=configs/masks.py", f"--config.target={target}", f"--config.data={data}"),
        *(f"--config.valid={data}", f"--workdir={workdir}", "--nocompilation_cache", "--config.num_masks=2"),
        *("--config.mask_token=1", "--config.num_steps=4", "--config.save_every=2", "--config.target_length=16"),
        *("--config.num_points=8", "--config.num_valid=2", *more),
    ]


@pytest.mark.slow
def test_a_run_goes_on_and_is_drafted_with(tmp_path: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch):
    plain = specjax.load(save_tiny_decoder(tmp_path / "plain", 0))
    assert plain.tokenizer is not None
    tokenizer = Tokenizer(plain.tokenizer.backend, special_tokens={"eos_token": "[unk]"})
    source, data = str(tmp_path / "target"), tmp_path / "texts.jsonl"
    specjax.save(plain._replace(tokenizer=tokenizer), source)
    data.write_text("".join(json.dumps({"text": f"the {who} sat on the mat"}) + "\n" for who in ("cat", "dog", "mat")))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert launch.main(command(source, data, whole)) == 0, capfd.readouterr().err
    fit, calls = masks.fit, []

    def interrupted(*args: Any, **options: Any) -> Any:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return fit(*args, **options)

    monkeypatch.setattr(masks, "fit", interrupted)
    assert launch.main(command(source, data, broken)) in (130, 143)
    monkeypatch.setattr(masks, "fit", fit)
    assert launch.main(command(source, data, broken)) == 0, capfd.readouterr().err
    for name in ("results.json", "summary.md"):
        assert (whole / name).read_text() == (broken / name).read_text()
    np.testing.assert_array_equal(drafters.load_masks(whole), drafters.load_masks(broken))
    rows = json.loads((whole / "results.json").read_text())
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[-1]["loss"][0] < rows[0]["loss"][0]
    assert (whole / "masks.png").stat().st_size > 5_000
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "the cat sat on the mat"}) + "\n")
    for name in ("mask_tokens", "parallel_masks"):
        compared = [
            *("launch", "--config=configs/compare.py", f"--config.target={source}", f"--config.data={prompts}"),
            *(f"--config.drafter={name}", f"--config.draft={whole}", "--config.max_new_tokens=8"),
            *("--config.num_draft_tokens=2", "--nocompilation_cache", "--config.repeats=1"),
            f"--workdir={tmp_path / name}",
        ]
        assert launch.main(compared) == 0, capfd.readouterr().err
        row = json.loads((tmp_path / name / "results.json").read_text())[0]
        assert (row["drafter"], row["identical"]) == (name, 1.0)


def test_a_broken_state_is_named(tmp_path: Any):
    (tmp_path / experiment.STATE).mkdir(parents=True)
    (tmp_path / experiment.STATE / "draft.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is truncated, or no safetensors file"):
        experiment.read_state(tmp_path, masks.init(masks.of(target("decoder"), 1), target("decoder"), 0))


@pytest.mark.slow
def test_a_mesh_trains_what_one_device_trains():
    program = str(pathlib.Path(__file__).parent / "masked_mesh_program.py")
    env = virtual_devices(4)
    done = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (one, mesh) in json.loads(done.stdout).items():
        np.testing.assert_allclose(mesh, one, rtol=1e-4, err_msg=name)
