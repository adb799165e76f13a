"""Packed batches, the training step, and runs that are interrupted, resumed, and broken in many ways."""

import dataclasses
import json
import lzma
import pathlib
import signal
import subprocess
import sys
import types
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from helpers import usual, virtual_devices
from tokenizers import decoders, models, pre_tokenizers, processors

import specjax
from specjax import launch
from specjax.models import families
from specjax.models.config import DecoderConfig, T5Config
from specjax.text.tokenizer import Tokenizer
from specjax.training import data, fit, optimizers, sizes, train
from specjax.training.config import TrainConfig
from specjax.training.data import Example, Text

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "train.py")
LETTERS = [chr(ord("a") + i) for i in range(13)]
VOCABULARY = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *LETTERS])}

MODELS = {
    "t5": T5Config(
        vocab_size=16,
        hidden_size=32,
        head_dim=16,
        intermediate_size=64,
        num_encoder_layers=1,
        num_layers=1,
        num_heads=2,
        num_buckets=8,
        max_distance=16,
    ),
    "decoder": DecoderConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_position=64,
    ),
}
SHORT = TrainConfig(
    num_steps=24, batch_size=4, learning_rate=1e-2, warmup_steps=4, eval_every=10, save_every=8, log_every=5
)
SHORTER = dataclasses.replace(SHORT, num_steps=4, eval_every=1, save_every=2)


def make_tokenizer(more: tuple[str, ...] = ()) -> Tokenizer:
    vocab = VOCABULARY | {token: len(VOCABULARY) + i for i, token in enumerate(more)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return Tokenizer(backend, special_tokens={"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"})


def copies(number: int, seed: int = 0) -> list[Text]:
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(LETTERS, rng.integers(2, 7))) for _ in range(number)]
    return [Text(text, text) for text in texts]


def start_token(kind: str) -> int | None:
    return 0 if kind == "t5" else None


def make_dataset(texts: list[Text], kind: str = "t5", seed: int = 0, target_length: int = 24) -> data.Dataset:
    options = {"start_token": start_token(kind), "target_length": target_length, "source_length": 24}
    return data.dataset(data.encode(texts, make_tokenizer(), **options), seed=seed, **options)


def make_run(kind: str = "t5", config: TrainConfig = SHORT, **changes) -> fit.Run:
    run = fit.Run(
        MODELS[kind], config, make_dataset(copies(60), kind), make_dataset(copies(9, 1), kind), make_tokenizer()
    )
    return run._replace(**changes)


def losses(directory: pathlib.Path, name: str = "loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (directory / "train.jsonl").read_text().splitlines()]
    found = [(line["step"], line[name]) for line in lines if name in line]
    assert len(dict(found)) == len(found), "a step was written twice"
    return dict(found)


# Packing


@hypothesis.given(
    sizes=st.lists(st.tuples(st.integers(1, 16), st.integers(0, 12)), min_size=1, max_size=80),
    window=st.integers(1, 100),
    seed=st.integers(0, 5),
)
@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
def test_every_text_is_packed_once_and_fits(sizes, window, seed):
    examples = [Example(np.ones(n + 1, np.int32), 0, np.ones(m, np.int32)) for n, m in sizes]
    rows = data.pack(examples, target_length=16, source_length=12, seed=seed, window=window)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    for row in rows:
        assert row
        assert sum(sizes[i][0] for i in row) <= 16
        assert sum(sizes[i][1] for i in row) <= 12
    if window >= len(sizes):
        # First-fit: of any two rows, the first text of the later one found no room in the earlier one.
        for i, row in enumerate(rows):
            for later in rows[i + 1 :]:
                n, m = sizes[later[0]]
                before = [sizes[j] for j in row if max(sizes[j][0] / 16, sizes[j][1] / 12) >= max(n / 16, m / 12)]
                assert sum(s[0] for s in before) + n > 16 or sum(s[1] for s in before) + m > 12


def test_little_is_padding():
    packed = make_dataset(copies(400), target_length=24)
    assert packed.padding < 0.1
    assert packed.num_tokens == sum(2 * (len(text.target.split()) + 1) for text in copies(400))


@pytest.mark.parametrize("kind", MODELS)
def test_rows_hold_their_texts(kind):
    texts = copies(50)
    packed = make_dataset(texts, kind)
    found = []
    for batch in packed.in_order(4):
        for row in range(4):
            segments = np.asarray(batch.segments[row])
            for segment in range(1, segments.max() + 1):
                where = segments == segment
                tokens, targets = np.asarray(batch.tokens[row])[where], np.asarray(batch.targets[row])[where]
                assert np.asarray(batch.positions[row])[where].tolist() == list(range(where.sum()))
                learnt = np.asarray(batch.weights[row])[where]
                if kind == "t5":
                    assert batch.source is not None
                    assert batch.source_segments is not None
                    source = np.asarray(batch.source[row])[np.asarray(batch.source_segments[row]) == segment]
                    assert tokens[0] == 0
                    assert tokens[1:].tolist() == targets[:-1].tolist() == source[:-1].tolist()
                    assert learnt.all()
                else:
                    assert batch.source is None
                    assert tokens[1:].tolist() == targets[:-1].tolist()
                    # The input and its end are given; the target, and its end, are learnt.
                    assert learnt.tolist() == [0] * (len(tokens) // 2) + [1] * (len(tokens) // 2 + 1)
                assert targets[-1] == 1
                found.append(" ".join(LETTERS[i - 3] for i in targets[learnt > 0][:-1]))
            assert not np.asarray(batch.weights[row])[segments == 0].any()
    assert sorted(found) == sorted(text.target for text in texts)


def test_a_text_alone_is_learnt_whole():
    encoded = data.encode([Text(None, "a b c")], make_tokenizer(), start_token=None, target_length=8, source_length=8)
    assert encoded.examples[0].text.tolist() == [3, 4, 5, 1]
    assert encoded.examples[0].num_given == 0


def test_what_is_too_long_is_cut_and_counted():
    texts = [Text("a b", "c"), Text("a b c d e f", "c"), Text("a", "a b c d e f")]
    encoded = data.encode(texts, make_tokenizer(), start_token=0, target_length=5, source_length=4)
    assert (encoded.num_cut, encoded.num_dropped) == (2, 0)
    assert encoded.examples[1].source.tolist() == [3, 4, 5, 1]
    assert encoded.examples[2].text.tolist() == [0, 3, 4, 5, 6, 7]
    encoded = data.encode(texts, make_tokenizer(), start_token=None, target_length=5, source_length=4)
    assert (encoded.num_cut, encoded.num_dropped) == (2, 1)
    assert encoded.examples[1].text.tolist() == [3, 1, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="target_length=1"):
        data.encode(texts, make_tokenizer(), start_token=None, target_length=1, source_length=4)


def test_every_epoch_reads_every_row_in_another_order():
    packed = make_dataset(copies(50))
    number = len(packed.rows)

    def rows(first: int, last: int) -> list[tuple[int, ...]]:
        batches = [packed.batch(step, 3) for step in range(first, last)]
        return [tuple(row) for batch in batches for row in np.asarray(batch.targets).tolist()]

    read = rows(0, 2 * number)
    epochs = [read[i : i + number] for i in range(0, len(read), number)]
    assert len(epochs) == 6
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert rows(7, 9) == read[21:27]
    again = make_dataset(copies(50))
    assert np.array_equal(again.batch(11, 3).tokens, packed.batch(11, 3).tokens)
    other = make_dataset(copies(50), seed=1)
    assert not np.array_equal(other.batch(0, 3).tokens, packed.batch(0, 3).tokens)


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_of_packed_texts_is_that_of_each_alone(kind):
    texts, config = copies(7), MODELS[kind]
    params = jax.tree.map(lambda x: 3 * x, families.init_params(config, jax.random.key(0)))
    packed = make_dataset(texts, kind, target_length=48 if kind == "decoder" else 24)
    assert len(packed.rows) < len(texts) / 2
    step = jax.jit(train.sums, static_argnums=0)
    both = []
    for dataset in (packed, dataclasses.replace(packed, rows=[[i] for i in range(len(texts))])):
        sums = [step(config, params, batch) for batch in dataset.in_order(len(texts))]
        both.append([float(sum(getattr(part, name) for part in sums)) for name in ("loss", "square", "weight")])
    assert both[0][2] == sum(len(text.target.split()) + 1 for text in texts)
    np.testing.assert_allclose(both[0], both[1], rtol=1e-5)


# The step


def test_the_loss_is_weighted_cross_entropy_and_its_gradient_does_not_see_padding():
    packed = make_dataset(copies(5))
    batch = next(iter(packed.in_order(2)))
    params = families.init_params(MODELS["t5"], jax.random.key(0))
    score = families.model(MODELS["t5"]).score
    assert score is not None
    logprobs = np.asarray(jax.nn.log_softmax(score(params, batch)))
    weights, targets = np.asarray(batch.weights), np.asarray(batch.targets)
    expected = -(np.take_along_axis(logprobs, targets[..., None], -1)[..., 0] * weights).sum()
    assert float(train.sums(MODELS["t5"], params, batch).loss) == pytest.approx(expected, rel=1e-5)
    other = batch._replace(tokens=jnp.where(batch.segments == 0, 5, batch.tokens))
    assert not np.array_equal(other.tokens, batch.tokens)
    assert float(train.sums(MODELS["t5"], params, other).loss) == pytest.approx(expected, rel=1e-5)


def _after(config: TrainConfig, steps: int = 3, kind: str = "decoder") -> tuple[train.TrainState, list[float]]:
    state, run, found = train.init(MODELS[kind], config), make_run(kind), []
    for step in range(steps):
        state, metrics = train.train_step(
            MODELS[kind], config, state, run.data.at(step, state.params).batch(step, config.batch_size)
        )
        found.append(float(metrics.loss))
    return state, found


def test_microbatches_change_nothing_but_rounding():
    config = dataclasses.replace(SHORT, batch_size=6, z_loss=1e-2, weight_decay=0.1)
    state, whole = _after(config)
    split, parts = _after(dataclasses.replace(config, num_microbatches=3))
    np.testing.assert_allclose(whole, parts, rtol=1e-5)
    # Adam divides by roots of squares, where rounding of small gradients shows.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, split.params)
    assert int(split.step) == 3


def test_bfloat16_products_follow_float32():
    _, exact = _after(SHORT)
    state, rounded = _after(dataclasses.replace(SHORT, dtype="bfloat16"))
    np.testing.assert_allclose(exact, rounded, rtol=0.02)
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["t5", *(pytest.param(k, marks=pytest.mark.slow) for k in ("decoder", "gpt2"))])
def test_bfloat16_gradients_follow_float32(kind, tied):
    base = MODELS["decoder" if kind == "gpt2" else kind]
    model: Any = dataclasses.replace(base, tie_embeddings=tied)
    if kind == "gpt2":
        model = dataclasses.replace(model, positions="learned", norm="layer", gated=False, activation="gelu_new")
    batch = make_dataset(copies(60), "t5" if kind == "t5" else "decoder").batch(0, 4)
    params = families.init_params(model, jax.random.key(0))

    def loss(params, dtype):
        return train.sums(*families.cast(model, params, dtype), batch).loss

    exact, rounded = (jax.jit(jax.grad(lambda p, d=dtype: loss(p, d)))(params) for dtype in ("float32", "bfloat16"))
    for (path, a), b in zip(jax.tree.leaves_with_path(exact), jax.tree.leaves(rounded), strict=True):
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(a), jax.tree_util.keystr(path)


def test_optimizers_do_what_they_say():
    params = {"matrix": jnp.full((4, 4), 2.0), "norm": jnp.ones(4)}
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 0.5), params)
    rate = 0.0025

    def moved(config: TrainConfig) -> dict[str, float]:
        optimizer = optimizers.optimizer(config)
        updates: Any = optimizer.update(grads, optimizer.init(params), params)[0]
        assert {float(x.min()) for x in updates.values()} == {float(x.max()) for x in updates.values()}
        return {name: float(x.ravel()[0]) for name, x in updates.items()}

    # Adam's first step is the sign of the gradient.
    assert moved(SHORT) == pytest.approx({"matrix": -rate, "norm": -rate}, rel=1e-4)
    decayed = moved(dataclasses.replace(SHORT, weight_decay=0.1))
    assert decayed == pytest.approx({"matrix": -1.2 * rate, "norm": -rate}, rel=1e-4)
    # A function of one's own; twenty gradients of 0.5 have the norm sqrt(5).
    own = dataclasses.replace(SHORT, optimizer=_sgd, clip_norm=0.0)
    assert moved(own) == pytest.approx({"matrix": -0.5 * rate, "norm": -0.5 * rate}, rel=1e-4)
    clipped = moved(dataclasses.replace(own, clip_norm=0.1))
    assert clipped["norm"] == pytest.approx(-0.5 * rate * 0.1 / 5**0.5, rel=1e-4)
    # Adafactor's steps are relative to the parameters.
    relative = moved(dataclasses.replace(SHORT, optimizer="adafactor"))
    assert relative == pytest.approx({"matrix": -2 * rate, "norm": -rate}, rel=1e-3)
    smaller = moved(dataclasses.replace(SHORT, optimizer="adafactor", weight_decay=0.1))
    assert smaller["matrix"] < relative["matrix"]
    assert smaller["norm"] == relative["norm"]


def _sgd(rate, config):
    return optax.sgd(rate)


def test_schedules():
    rates = {
        name: [float(optimizers.schedule(dataclasses.replace(SHORT, schedule=name))(i)) for i in range(24)]
        for name in ("cosine", "inverse_sqrt", "constant")
    }
    for values in rates.values():
        np.testing.assert_allclose(values[:4], [0.0025, 0.005, 0.0075, 0.01], rtol=1e-5)
    assert rates["constant"][23] == pytest.approx(0.01)
    assert rates["cosine"][13] == pytest.approx(0.0055, rel=1e-5)
    assert rates["cosine"][23] == pytest.approx(0.001, rel=1e-5)
    assert rates["inverse_sqrt"][15] == pytest.approx(0.005, rel=1e-5)


@pytest.mark.parametrize("kind", usual(MODELS, "t5"))
def test_copying_is_learnt(kind):
    config = dataclasses.replace(SHORT, batch_size=8, schedule="constant")
    state, run = train.init(MODELS[kind], config), make_run(kind, data=make_dataset(copies(400), kind))
    found = []
    for step in range(150):
        state, metrics = train.train_step(
            MODELS[kind], config, state, run.data.at(step, state.params).batch(step, config.batch_size)
        )
        found.append(metrics.loss)
    found = np.asarray(jax.device_get(found))
    assert found[:3].mean() > 2.2
    assert found[-10:].mean() < 0.7 * found[:3].mean()


# Runs


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("uninterrupted")
    fit.fit(make_run(), directory)
    return directory


class Crash(Exception):
    """What a process does not survive."""


def _at(step: int, action):
    def report(lines):
        if lines and lines[-1]["step"] == step and "loss" in lines[-1]:
            action()

    return report


def _crash():
    raise Crash


def test_resumed_is_uninterrupted(uninterrupted, tmp_path):
    """Killed before the first checkpoint, killed after one, asked to end between two, and finished."""
    with pytest.raises(Crash):
        fit.fit(make_run(), tmp_path, _at(5, _crash))
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5]
    with pytest.raises(Crash):
        fit.fit(make_run(), tmp_path, _at(15, _crash))
    assert len(losses(tmp_path)) == 15
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"step": 16, "lo')
    with pytest.raises(KeyboardInterrupt, match="step 21 is saved in"):
        # After step 8, the newest checkpoint; the next step notices.
        fit.fit(make_run(), tmp_path, _at(20, lambda: signal.raise_signal(signal.SIGINT)))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["16", "21"]
    curve = fit.fit(make_run(), tmp_path)
    assert losses(tmp_path) == losses(uninterrupted)
    assert losses(tmp_path, "valid_loss") == losses(uninterrupted, "valid_loss")
    assert list(losses(tmp_path)) == list(range(1, 25))
    assert list(losses(tmp_path, "valid_loss")) == [10, 20, 24]
    assert curve.lines == [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    a, b = specjax.load(tmp_path / "model"), specjax.load(uninterrupted / "model")
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_a_finished_run_is_not_run_again(uninterrupted):
    before = (uninterrupted / "train.jsonl").read_text()
    fit.fit(make_run(), uninterrupted)
    assert (uninterrupted / "train.jsonl").read_text() == before


def test_the_model_is_that_of_least_validation_loss(uninterrupted):
    model = specjax.load(uninterrupted / "model")
    assert model.tokenizer is not None
    assert model.tokenizer.vocab() == VOCABULARY
    valid = losses(uninterrupted, "valid_loss")
    loss = fit.evaluate(make_run(), make_dataset(copies(9, 1)), model.params)["valid_loss"]
    assert loss == pytest.approx(min(valid.values()), rel=1e-5)
    out = specjax.generate(model, ["a b c"], drafter=specjax.drafters.none(), max_new_tokens=4)
    assert out.finish_reason[0] in ("stop", "length")


def test_a_worse_model_does_not_replace_a_better_one(tmp_path):
    run = make_run("decoder", SHORTER)
    values, seen = iter([{"valid_loss": loss} for loss in (2.0, 1.0, 3.0, 1.0)]), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "evaluate", lambda run, data, params: seen.append(jax.device_get(params)) or next(values))
        fit.fit(run, tmp_path)
    saved = specjax.load(tmp_path / "model").params
    jax.tree.map(np.testing.assert_array_equal, saved, seen[1])
    assert not np.array_equal(saved["head"]["values"], seen[3]["head"]["values"])


def test_other_runs_are_refused(uninterrupted):
    with pytest.raises(ValueError, match=r"train\.learning_rate: 0\.01 before, 0\.1 now.*--overwrite"):
        fit.fit(make_run(config=dataclasses.replace(SHORT, learning_rate=0.1)), uninterrupted)
    model = dataclasses.replace(MODELS["t5"], num_layers=2)
    with pytest.raises(ValueError, match=r"model\.num_layers: 1 before, 2 now"):
        fit.fit(make_run(model_config=model), uninterrupted)
    with pytest.raises(ValueError, match="data_checksum"):
        fit.fit(make_run(data=make_dataset(copies(61))), uninterrupted)
    wider = make_run(tokenizer=make_tokenizer(("more",)), model_config=dataclasses.replace(MODELS["t5"], vocab_size=32))
    with pytest.raises(ValueError, match="vocabulary_checksum"):
        fit.fit(wider, uninterrupted)
    fit.fit(make_run(config=dataclasses.replace(SHORT, log_every=3, save_every=2, keep=9)), uninterrupted)


def _largest(directory: pathlib.Path) -> pathlib.Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_corrupt_checkpoints_are_refused(tmp_path):
    run = make_run("decoder", SHORTER, valid=None)
    fit.fit(run, tmp_path)
    newest = tmp_path / "checkpoints" / "4"
    path = _largest(newest)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(ValueError, match=f"{newest} is corrupt .* is damaged.*delete"):
        fit.fit(run, tmp_path)
    # Without checksums, orbax has to notice.
    path.unlink()
    (newest / "checksums.json").unlink()
    with pytest.raises(ValueError, match=f"{newest} is corrupt"):
        fit.fit(run, tmp_path)
    for broken in newest.rglob("*"):
        if broken.is_file():
            broken.unlink()
    for broken in sorted(newest.rglob("*"), reverse=True):
        broken.rmdir()
    newest.rmdir()
    before = losses(tmp_path)
    fit.fit(run, tmp_path)
    assert losses(tmp_path) == before


def test_a_curve_that_lacks_steps_is_refused(tmp_path):
    run = make_run("decoder", SHORTER, valid=None)
    fit.fit(run, tmp_path)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(ValueError, match=r"train\.jsonl lacks some of the 4 steps"):
        fit.fit(run, tmp_path)


def test_what_does_not_fit_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocabulary has 17 tokens, but the model's logits are 16 wide"):
        fit.fit(make_run(tokenizer=make_tokenizer(("more",))), tmp_path)
    with pytest.raises(ValueError, match="target_length=80, but the model knows 64 positions"):
        fit.fit(make_run("decoder", data=make_dataset(copies(9), "decoder", target_length=80)), tmp_path)
    with pytest.raises(ValueError, match="parameters are trained in float32"):
        fit.fit(make_run(model_config=dataclasses.replace(MODELS["t5"], dtype="bfloat16")), tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.eos_token_ids = ()
    with pytest.raises(ValueError, match="no end token"):
        data.encode(copies(1), tokenizer, start_token=0, target_length=8, source_length=8)
    with pytest.raises(ValueError, match="Text 0 has no input"):
        data.encode([Text(None, "a")], make_tokenizer(), start_token=0, target_length=8, source_length=8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_steps": 0}, "num_steps=0: at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: at least 0"),
        ({"schedule": "linear"}, "schedule='linear': choose one of cosine, inverse_sqrt, constant"),
        ({"optimizer": "sgd"}, "optimizer='sgd': choose one of adamw, adafactor"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"num_microbatches": 3}, "batch_size=4 is not a multiple of num_microbatches=3"),
    ],
)
def test_bad_options_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SHORT, **changes)


def test_sizes_are_what_they_are_called():
    for kind, known in sizes.SIZES.items():
        for name in known:
            if name.endswith("m"):
                number = families.num_params(sizes.model_config(kind, name, 8192))
                assert number == pytest.approx(1e6 * float(name[:-1]), rel=0.2), (kind, name, number)
    assert sizes.model_config("t5", "6m", 8192, {"num_layers": 3, "num_heads": 0}).num_layers == 3
    with pytest.raises(ValueError, match=r"model\.num_kv_heads=2 is not used by a t5"):
        sizes.model_config("t5", "6m", 8192, {"num_kv_heads": 2})
    with pytest.raises(ValueError, match=r"size='7b' is not a decoder size: choose one of 0\.4m, 1\.5m, 6m"):
        sizes.model_config("decoder", "7b", 8192)


# Files


def write_texts(path: pathlib.Path, texts: list[Text]) -> str:
    lines = [{"input": text.input, "target": text.target} for text in texts]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    if path.suffix == ".xz":
        path.write_bytes(lzma.compress(content.encode()))
    else:
        path.write_text(content + "\n")
    return str(path)


def test_files_are_read(tmp_path):
    texts = copies(5)
    assert data.read(write_texts(tmp_path / "a.jsonl", texts)) == texts
    assert data.read(write_texts(tmp_path / "a.jsonl.xz", texts)) == texts
    (tmp_path / "b.jsonl").write_text('{"text": "a b", "id": 3}\n')
    assert data.read(str(tmp_path / "b.jsonl")) == [Text(None, "a b")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "line 1, is not JSON"),
        ('{"input": "a"}', "line 1, has neither 'input' and 'target' nor 'text': it has 'input'"),
        ('{"input": "a", "target": 3}', "has neither"),
        ("[1]", "it has list"),
        ("\n", "has no texts"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_bad_files_are_refused(content, words, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words):
        data.read(str(path))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl does not exist"):
        data.read(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "a.xz").write_bytes(b"no xz")
    with pytest.raises(ValueError, match="cannot be read"):
        data.read(str(tmp_path / "a.xz"))


def test_hub_data_sets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="hub:owner/name needs the datasets package: pip install datasets"):
        data.read("hub:owner/name")

    def load_dataset(name, split):
        if name == "owner/missing":
            raise RuntimeError("404")
        return [{"input": f"{name} {split}", "target": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert data.read("hub:owner/name") == [Text("owner/name train", "a")]
    assert data.read("hub:owner/name:test") == [Text("owner/name test", "a")]
    with pytest.raises(OSError, match=r"'owner/missing' \(split 'train'\) cannot be read .*404"):
        data.read("hub:owner/missing")


# The launcher


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("files")
    make_tokenizer().save(directory / "vocabulary")
    return {
        "data": write_texts(directory / "train.jsonl.xz", copies(200)),
        "valid": write_texts(directory / "valid.jsonl", copies(20, 1)),
        "vocabulary": str(directory / "vocabulary"),
    }


TINY = {
    "size": "0.4m",
    "model.hidden_size": 16,
    "model.intermediate_size": 16,
    "model.head_dim": 8,
    "target_length": 24,
    "source_length": 24,
    "batch_size": 4,
    "num_microbatches": 1,
    "num_steps": 6,
    "warmup_steps": 2,
    "eval_every": 3,
    "save_every": 3,
}


def command(workdir: pathlib.Path, **values) -> list[str]:
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in (TINY | values).items()]
    return ["launch", f"--config={CONFIG}", f"--workdir={workdir}", "--nocompilation_cache", *flags]


@pytest.mark.slow
def test_launched(files, tmp_path, capsys):
    assert launch.main(command(tmp_path, **files)) == 0
    output = capsys.readouterr().out
    assert "200 texts" in output
    assert "padding" in output
    assert "Step 3: validation loss" in output
    assert "which model/ holds" in output
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoints", "config.json", "loss.png", "model", "summary.md", "train.jsonl"}
    assert "| validation loss (least) |" in (tmp_path / "summary.md").read_text()
    model = specjax.load(tmp_path / "model")
    assert isinstance(model.config, T5Config)
    assert (model.config.hidden_size, model.config.vocab_size) == (16, 128)
    before = losses(tmp_path)
    assert launch.main(command(tmp_path, **files)) == 0
    assert "Going on after step 6 of 6" in capsys.readouterr().out
    assert losses(tmp_path) == before
    assert launch.main(command(tmp_path, **files, seed=1)) == 1
    assert "train.seed: 0 before, 1 now" in capsys.readouterr().err
    (tmp_path / "summary.md").write_text("old")
    assert launch.main([*command(tmp_path, **files), "--overwrite"]) == 0
    assert "Going on" not in capsys.readouterr().out
    assert losses(tmp_path) == before
    assert (tmp_path / "summary.md").read_text() != "old"


def test_launched_with_a_vocabulary_of_its_own(files, tmp_path, capsys):
    pytest.importorskip("sentencepiece")
    options = {"vocab_size": 28, "kind": "decoder", "valid": "", "data": files["data"], "num_steps": 2}
    assert launch.main(command(tmp_path, **options)) == 0, capsys.readouterr().err
    model = specjax.load(tmp_path / "model")
    assert isinstance(model.config, DecoderConfig)
    assert model.tokenizer is not None
    assert model.tokenizer.vocab_size == 28
    assert (tmp_path / "spiece.model").is_file()


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(files, tmp_path):
    arguments = command(tmp_path, **files, num_steps=100_000, save_every=100_000, eval_every=100_000, log_every=1)[1:]
    program = [sys.executable, "-m", "specjax.launch", *arguments]
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        curve = tmp_path / "train.jsonl"
        while not (curve.exists() and len(curve.read_text()) > 500) and process.poll() is None:
            pass
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    step = max(losses(tmp_path))
    assert f"Interrupted: step {step} is saved in" in error
    assert "the same command continues" in error
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(step)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": ""}, ["--config.data=FILE"]),
        ({"data": "nowhere.jsonl"}, ["nowhere.jsonl does not exist"]),
        ({"vocabulary": "nowhere"}, ["vocabulary nowhere does not exist", "spiece.model"]),
        ({"size": "7b"}, ["config.size='7b'", "0.4m, 1.5m, 6m"]),
        ({"kind": "rnn"}, ["config.kind='rnn'", "t5, decoder"]),
        ({"model__depth": 3}, ["'model.depth'", "model.num_layers"]),
        ({"model__num_kv_heads": 3}, ["config.model.num_kv_heads=3"]),
        ({"optimizer": "sgd"}, ["config.optimizer='sgd'", "adamw, adafactor"]),
        ({"target_length": 0}, ["config.target_length=0"]),
        ({"mesh_data": 3}, ["data=3"]),
        ({"num_microbatches": 3}, ["config.batch_size=4", "num_microbatches=3"]),
        ({"learning_rate": 1e38, "clip_norm": 0, "warmup_steps": 0}, ["Step", "lower learning_rate"]),
    ],
)
def test_errors_are_one_line(changes, words, files, tmp_path, capsys):
    assert launch.main(command(tmp_path, **(files | changes))) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


# Meshes


@pytest.mark.slow
def test_a_mesh_trains_what_one_device_trains():
    env = virtual_devices(8)
    program = str(ROOT / "tests" / "training_mesh_program.py")
    done = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["devices"] == 8
    np.testing.assert_allclose(report["mesh"], report["one"], rtol=1e-4)
    assert report["one"][-1] < report["one"][0]
    assert report["resumed"] == report["mesh"][2:]
    for names in (report["head"], report["moment"]):
        assert names == [[32, 128], [32, 32]]
    assert report["tokens"] == [[8, 24], [4, 24]]
    assert report["all_to_all"] == 0
