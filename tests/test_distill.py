"""Distillation: divergences, drafts made of targets, texts that models write, and runs that are interrupted."""

import dataclasses
import functools
import json
import pathlib
import signal
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import usual, virtual_devices
from jax.sharding import Mesh
from test_training import MODELS, SHORT, copies, losses, make_tokenizer, start_token, write_texts

import specjax
from specjax import launch
from specjax.api.pretrained import Pretrained
from specjax.models import families
from specjax.training import data, distill, divergences, drafts, fit, own_text, train
from specjax.training.own_text import Lengths, OwnTexts, Prompt, Shares, Writing
from specjax.types import Batch, Skips

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "distill.py")
LENGTHS = {kind: Lengths(24, 24, start_token(kind)) for kind in MODELS}
WRITING = Writing(temperature=1.0, max_new_tokens=6, batch_size=4, prompt_width=16, seed=0)
MIXED = Shares(0.2, 0.4, 0.4)
OPTIMISATION = dataclasses.replace(SHORT, num_steps=12, eval_every=4, save_every=5, log_every=1)


# Divergences

P = np.array([[0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
Q = np.array([[0.2, 0.2, 0.5, 0.1], [0.0, 0.0, 0.5, 0.5], [0.0, 1.0, 0.0, 0.0]])


def _log(p: np.ndarray) -> np.ndarray:
    return np.log(p, where=p > 0, out=np.full_like(p, -np.inf))


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    floored = np.maximum(_log(p), divergences.FLOOR), np.maximum(_log(q), divergences.FLOOR)
    return (p * (floored[0] - floored[1])).sum(-1)


def _jsd(p: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    m = beta * p + (1 - beta) * q
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


EXPECTED = {
    "forward_kl": _kl,
    "reverse_kl": lambda p, q: _kl(q, p),
    "jsd": functools.partial(_jsd, beta=0.5),
    "jsd:0.1": functools.partial(_jsd, beta=0.1),
    "total_variation": lambda p, q: 1 - np.minimum(p, q).sum(-1),
    "nla": lambda p, q: -np.log(np.minimum(p, q).sum(-1) + 1e-9),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_divergences_are_what_they_say(name):
    divergence = divergences.named(name)
    assert divergence is divergences.named(name)
    found = divergence(jnp.asarray(_log(P), jnp.float32), jnp.asarray(_log(Q), jnp.float32))
    np.testing.assert_allclose(found, EXPECTED[name](P, Q), rtol=1e-5, atol=1e-6)
    same = divergence(jnp.asarray(_log(P), jnp.float32), jnp.asarray(_log(P), jnp.float32))
    np.testing.assert_allclose(same, 0, atol=1e-6)


@pytest.mark.parametrize("name", EXPECTED)
def test_gradients_are_finite_with_zero_probabilities(name):
    divergence = divergences.named(name)

    def loss(logits):
        return jnp.sum(divergence(jnp.asarray(_log(P), jnp.float32), jax.nn.log_softmax(logits)))

    # Tokens that the draft lacks have logits of -inf; others are as improbable as float32 knows.
    for logits in (_log(Q), np.where(Q > 0, _log(Q), -200.0)):
        gradient = jax.grad(loss)(jnp.asarray(logits, jnp.float32))
        assert np.isfinite(gradient).all()
    assert np.abs(jax.grad(loss)(jnp.zeros((3, 4)))).max() > 1e-3


def test_unknown_divergences_are_refused():
    for name in ("kl", "nla:0.5", "jsd:2", "jsd:x", "jsd:nan"):
        with pytest.raises(ValueError, match=f"divergence='{name}'"):
            divergences.named(name)


# The objective


def make_target(kind: str = "decoder", num_layers: int = 2, **changes: int) -> Pretrained:
    config: Any = dataclasses.replace(MODELS[kind], num_layers=num_layers, **changes)
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, families.init_params(config, jax.random.key(7)))
    return Pretrained(families.model(config), params, make_tokenizer(), config)


def make_prompts(number: int, kind: str = "decoder", seed: int = 0) -> list[Prompt]:
    tokenizer, found = make_tokenizer(), []
    for text in copies(number, seed):
        tokens = tuple(tokenizer.encode(text.target))
        source, context = ([], list(tokens)) if kind == "decoder" else (list(tokens), [0])
        example = data.cut(source, context, [*tokens[:-1], 1], target_length=24, source_length=24)[0]
        found.append(Prompt(tokens, example))
    return found


def make_valid(target: Pretrained, directory: pathlib.Path, kind: str = "decoder") -> data.Dataset:
    path = directory / "written" / "held_out.jsonl"
    return own_text.held_out(make_prompts(8, kind, 1), target, WRITING, LENGTHS[kind], path, lambda done, total: None)


def first_batch(kind: str) -> Any:
    lengths = LENGTHS[kind]
    given = [prompt.given for prompt in make_prompts(4, kind)]
    return own_text.packed(given, lengths, 0).batch(0, 2)


@pytest.mark.parametrize("kind", usual(MODELS, "decoder"))
def test_the_objective_is_the_divergence_at_the_learnt_tokens(kind):
    target, batch, temperature = make_target(kind), first_batch(kind), 0.7
    score = families.model(target.config).score
    assert score is not None
    logits = np.asarray(score(target.params, batch))
    draft = np.random.default_rng(0).normal(size=(*logits.shape[:2], logits.shape[2] - 3)).astype(np.float32)
    objective = distill.Distillation(target.config, divergences.named("total_variation"), temperature)
    assert objective == distill.Distillation(target.config, divergences.named("total_variation"), temperature)
    sums = jax.jit(objective)(jnp.asarray(draft), batch, target.params)
    # The draft knows three tokens less: they have no probability.
    p = np.exp(logits / temperature)
    q = np.concatenate([np.exp(draft / temperature), np.zeros((*draft.shape[:2], 3))], axis=-1)
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    weights = np.asarray(batch.weights)
    alpha = np.minimum(p, q).sum(-1)
    assert 0 < weights.sum() < weights.size
    assert float(sums.weight) == weights.sum()
    assert float(sums.measures["alpha"]) == pytest.approx((weights * alpha).sum(), rel=1e-4)
    assert float(sums.loss) == pytest.approx((weights * (1 - alpha)).sum(), rel=1e-4)
    agrees = p.argmax(-1) == q.argmax(-1)
    assert float(sums.measures["agreement"]) == (weights * agrees).sum()
    # The target as its own draft is always accepted.
    same = jax.jit(objective)(jnp.asarray(logits), batch, target.params)
    assert float(same.measures["alpha"]) == pytest.approx(weights.sum(), rel=1e-5)
    assert float(same.loss) == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_rematerialisation_changes_nothing_but_memory(kind):
    config: Any = dataclasses.replace(MODELS[kind], num_layers=4, intermediate_size=256)
    tokens = jax.random.randint(jax.random.key(1), (4, 128), 0, 16)
    one = jnp.ones_like(tokens)
    source: Any = (tokens, one) if kind == "t5" else (None, None)
    batch = Batch(tokens, tokens, one, one * jnp.arange(128), jnp.ones(one.shape), *source)
    params = families.init_params(config, jax.random.key(0))
    # XLA:CPU takes the least memory only where it is told to; accelerators do anyway.
    options: Any = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

    def program(remat):
        def loss(params):
            return train.sums(config, params, batch, remat=remat).loss

        return jax.jit(jax.grad(loss)).lower(params).compile(options)

    plain, again = program(False), program(True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain(params), again(params))
    analyses: Any = [compiled.memory_analysis() for compiled in (plain, again)]
    sizes = [analysis.temp_size_in_bytes for analysis in analyses]
    if kind == "decoder":
        assert sizes[1] < 0.6 * sizes[0], sizes


# Drafts made of a target


@pytest.mark.parametrize("kind", MODELS)
def test_a_draft_of_all_layers_is_the_target(kind):
    target, batch = make_target(kind, 3), first_batch(kind)
    config, params = drafts.from_layers(target.config, target.params, (0, 1, 2))
    assert config == target.config
    jax.tree.map(np.testing.assert_array_equal, params, target.params)
    # Other layers make another model, which is the target without the others.
    config, params = drafts.from_layers(target.config, target.params, (1, 2))
    assert jax.tree.structure(params) == jax.tree.structure(families.abstract_params(config))
    score = families.model(config).score
    assert score is not None
    without = dict.fromkeys(("attention", "mlp"), (0,))
    model = target.model.with_skips
    assert model is not None
    skipping = model(Skips(**without)).score
    assert skipping is not None
    both = jax.jit(score)(params, batch), jax.jit(skipping)(target.params, batch)
    np.testing.assert_allclose(both[0], both[1], rtol=1e-5, atol=1e-5)


def test_layers_keep_their_windows():
    config: Any = dataclasses.replace(MODELS["decoder"], num_layers=4, sliding_window=8, global_layers=(1, 3))
    params = families.init_params(config, jax.random.key(0))
    draft: Any = drafts.from_layers(config, params, (0, 3))[0]
    assert (draft.num_layers, draft.global_layers) == (2, (1,))


def test_layers_that_do_not_exist_are_refused():
    target = make_target()
    assert drafts.spread(30, 3) == (0, 14, 29)
    assert drafts.spread(30, 1) == (0,)
    with pytest.raises(ValueError, match="num_layers=31: from 1 to the target's 30"):
        drafts.spread(30, 31)
    with pytest.raises(ValueError, match=r"init_layers=\(0, 2\).* 0 to 1"):
        drafts.from_layers(target.config, target.params, (0, 2))
    with pytest.raises(ValueError, match="a language model has no encoder"):
        drafts.from_layers(target.config, target.params, (0,), (0,))
    with pytest.raises(ValueError, match=r"model\.num_encoder_layers=2 is not used by a decoder"):
        drafts.with_changes(target.config, {"num_encoder_layers": 2})
    assert drafts.with_changes(target.config, {"num_layers": 1, "hidden_size": 0}).num_layers == 1


@pytest.mark.parametrize("kind", usual(MODELS, "decoder"))
def test_a_reduced_head_is_the_head_without_the_other_tokens(kind, tmp_path):
    target, batch = make_target(kind, tie_embeddings=kind == "decoder"), first_batch(kind)
    tokens = [1, 3, 5, 11]
    config, params = drafts.with_head(target.config, target.params, tokens)
    assert jax.tree.structure(params) == jax.tree.structure(families.abstract_params(config))
    specjax.save(Pretrained(families.model(config), params, target.tokenizer, config), tmp_path)
    draft = specjax.load(tmp_path)
    assert draft.config == config
    assert draft.config.head_tokens == tuple(tokens)
    whole, reduced = (families.model(c).score for c in (target.config, draft.config))
    assert whole is not None
    assert reduced is not None
    logits, probs = jax.jit(whole)(target.params, batch), jax.nn.softmax(jax.jit(reduced)(draft.params, batch))
    others = [token for token in range(16) if token not in tokens]
    assert not np.asarray(probs)[..., others].any()
    kept = jax.nn.softmax(logits[..., jnp.asarray(tokens)])
    np.testing.assert_allclose(probs[..., jnp.asarray(tokens)], kept, rtol=1e-4)
    # The text stays the target's, and tokens that the draft lacks are in it.
    options: Any = {"max_new_tokens": 12, "temperature": [0.0, 1.0, 9.0], "verify": "coupled", "stop_tokens": ()}
    drafter = specjax.drafters.model(draft, num_draft_tokens=3)
    ours = specjax.generate(target, ["a b c", "a", "d e"], drafter=drafter, **options)
    assert ours.tokens == specjax.generate(target, ["a b c", "a", "d e"], **options).tokens
    marked = [pair for row in zip(ours.tokens, ours.from_draft, strict=True) for pair in zip(*row, strict=True)]
    assert {token for token, accepted in marked if accepted} <= set(tokens)
    assert any(accepted for _, accepted in marked)
    assert {token for token, _ in marked} - set(tokens)


def test_the_most_frequent_tokens_are_counted():
    assert drafts.most_frequent([[3, 3, 5], [5, 3, 7]], 3, [1], 16) == [1, 3, 5]
    assert drafts.most_frequent([[3, 3, 5], [5, 3, 7]], 6, [1], 16) == [0, 1, 2, 3, 5, 7]
    config = MODELS["decoder"]
    for tokens in ((3, 1), (1, 1), (15, 16), (-1, 3)):
        with pytest.raises(ValueError, match="head_tokens has 2 entries"):
            dataclasses.replace(config, head_tokens=tokens)
    with pytest.raises(ValueError, match="tie_embeddings=True"):
        dataclasses.replace(config, head_tokens=(1, 2), tie_embeddings=True)


# Texts


def make_texts(
    tmp_path: pathlib.Path, shares: Shares, kind: str = "decoder", target: Pretrained | None = None, **changes
) -> OwnTexts:
    target = target or make_target(kind)
    config, params = drafts.from_layers(target.config, target.params, (0,))
    draft = Pretrained(families.model(config), params, target.tokenizer, config)
    options: Any = {"every": 4, "num_texts": 8} | changes
    return OwnTexts(
        make_prompts(12, kind), shares, target, draft, WRITING, LENGTHS[kind], tmp_path / "written", **options
    )


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", usual(MODELS, "t5"))
def test_rounds_have_texts_of_all_kinds(kind, tmp_path):
    texts = make_texts(tmp_path, Shares(0.25, 0.25, 0.5), kind)
    first = texts.at(0, texts.draft.params)
    assert texts.at(3, texts.draft.params) is first
    assert len(first.examples) == 8
    by_draft, by_target = (_lines(texts.directory / f"{name}.jsonl") for name in ("draft-00000", "target"))
    assert (len(by_draft), len(by_target)) == (4, 2)
    learnt = [tuple(example.text[example.num_given + 1 :].tolist()) for example in first.examples]
    given = {tuple(p.given.text[p.given.num_given + 1 :].tolist()) for p in texts.prompts if p.given is not None}
    assert sum(text in given for text in learnt) == 2
    for line in (*by_target, *by_draft):
        assert tuple(line["tokens"]) in learnt
        assert line["text"] == make_tokenizer().decode(line["tokens"])
    # The texts are those that each model writes, with the options and a seed of their own.
    number = by_draft[0]["number"]
    again = make_texts(tmp_path / "again", Shares(0.0, 0.0, 1.0), kind, num_texts=12)
    again.at(0, texts.draft.params)
    same = {line["number"]: line["tokens"] for line in _lines(again.directory / "draft-00000.jsonl")}
    assert same[number] == by_draft[0]["tokens"]
    other = make_texts(tmp_path / "other", Shares(0.0, 1.0, 0.0), kind)
    other.at(0, texts.draft.params)
    assert {line["number"] for line in _lines(other.directory / "target.jsonl")} == set(range(12))
    # A draft that has changed writes other texts in the next round.
    changed = jax.tree.map(lambda x: -x, texts.draft.params)
    second = texts.at(4, changed)
    assert second is not first
    assert (texts.directory / "draft-00001.jsonl").is_file()


def test_written_texts_are_not_written_again(tmp_path, monkeypatch):
    texts = make_texts(tmp_path, Shares(0.0, 0.0, 1.0))
    before = texts.at(0, texts.draft.params)
    path = texts.directory / "draft-00000.jsonl"
    content = path.read_text()
    # Killed while a line was written: this line and those after it are missing.
    whole = content.splitlines(keepends=True)
    path.write_text("".join(whole[:6]) + whole[6][:9])
    calls = []
    write = own_text.write
    monkeypatch.setattr(
        own_text, "write", lambda model, prompts, *rest: calls.append(prompts) or write(model, prompts, *rest)
    )
    again = make_texts(tmp_path, Shares(0.0, 0.0, 1.0))
    after = again.at(0, texts.draft.params)
    assert sum(map(len, calls)) == 3
    assert path.read_text() == content
    assert after.checksum == before.checksum
    # In the middle of a round the draft is another.
    path.write_text("".join(whole[:6]))
    with pytest.raises(ValueError, match=r"draft-00000\.jsonl lacks texts that the draft wrote at step 0"):
        make_texts(tmp_path, Shares(0.0, 0.0, 1.0)).at(2, texts.draft.params)
    hot = make_texts(tmp_path, Shares(0.0, 0.0, 1.0))
    hot.writing = dataclasses.replace(WRITING, temperature=2.0)
    with pytest.raises(ValueError, match=r"other settings \(temperature\)"):
        hot.at(0, texts.draft.params)
    path.write_text("{\n" + content)
    with pytest.raises(ValueError, match=r"draft-00000\.jsonl is broken"):
        make_texts(tmp_path, Shares(0.0, 0.0, 1.0)).at(0, texts.draft.params)


# Runs


def make_run(
    directory: pathlib.Path,
    kind: str = "decoder",
    shares: Shares = MIXED,
    target: Pretrained | None = None,
    divergence: str = "forward_kl",
    mesh: Mesh | None = None,
    **changes,
) -> fit.Run:
    texts = make_texts(directory, shares, kind, target)
    target, draft = texts.target, texts.draft
    objective = distill.Distillation(target.config, divergences.named(divergence))
    config = dataclasses.replace(OPTIMISATION, **changes)
    task = fit.Task(objective, target.params, distill.by_alpha, {"distill": shares._asdict()})
    valid = make_valid(target, directory, kind)
    return fit.Run(draft.config, config, texts, valid, make_tokenizer(), mesh, task, draft.params)


class Crash(Exception):
    """What a process does not survive."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("uninterrupted")
    fit.fit(make_run(directory), directory)
    return directory


def test_resumed_is_uninterrupted(uninterrupted, tmp_path, monkeypatch):
    """Killed while the draft writes, killed in the middle of a round, and asked to end."""
    written, add, both = [], own_text.Texts._add, (tmp_path, uninterrupted)

    def note(self, found, model):
        add(self, found, model)
        written.extend((self.path.name, number) for number in found)

    def crash(self, found, model):
        note(self, found, model)
        if self.path.name == "draft-00001.jsonl":
            raise Crash

    monkeypatch.setattr(own_text.Texts, "_add", crash)
    with pytest.raises(Crash):
        fit.fit(make_run(tmp_path), tmp_path)
    monkeypatch.setattr(own_text.Texts, "_add", note)
    assert max(losses(tmp_path)) == 4

    def stop(lines):
        if lines and lines[-1]["step"] == 6:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="step 7 is saved"):
        fit.fit(make_run(tmp_path), tmp_path, stop)
    fit.fit(make_run(tmp_path), tmp_path)
    # What was written before the crash was not written again.
    assert len(written) == len(set(written))
    for name in ("loss", "alpha"):
        found = [{line["step"]: line[name] for line in _curve(path) if "loss" in line} for path in both]
        assert found[0] == found[1]
    valid = [[line for line in _curve(path) if "valid_loss" in line] for path in both]
    assert valid[0] == valid[1]
    assert [line["step"] for line in valid[0]] == [0, 4, 8, 12]
    for path in sorted((uninterrupted / "written").iterdir()):
        assert path.read_text() == (tmp_path / "written" / path.name).read_text()
    a, b = specjax.load(tmp_path / "model"), specjax.load(uninterrupted / "model")
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def _curve(directory: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "train.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_model_is_that_of_the_greatest_alpha(uninterrupted, tmp_path):
    valid = [line for line in _curve(uninterrupted) if "valid_loss" in line]
    best = max(valid, key=lambda line: line["alpha"])
    assert best["step"] > 0
    assert best["alpha"] > valid[0]["alpha"]
    run = make_run(tmp_path)
    model = specjax.load(uninterrupted / "model")
    assert run.valid is not None
    assert fit.evaluate(run, run.valid, model.params)["alpha"] == pytest.approx(best["alpha"], rel=1e-5)
    # It drafts for its target, whose text stays what it is.
    target = make_target()
    drafter = specjax.drafters.model(model, num_draft_tokens=3)
    ours = specjax.generate(target, ["a b c"], drafter=drafter, max_new_tokens=8)
    assert ours.tokens == specjax.generate(target, ["a b c"], max_new_tokens=8).tokens


@pytest.mark.slow
def test_it_ends_when_alpha_no_longer_rises(tmp_path, monkeypatch):
    values = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    monkeypatch.setattr(fit, "evaluate", lambda *_: {"valid_loss": 1.0, "alpha": next(values), "agreement": 0.0})
    shares = Shares(1.0, 0.0, 0.0)
    curve = fit.fit(make_run(tmp_path, shares=shares, eval_every=1, patience=2), tmp_path)
    assert [line["step"] for line in curve.valid] == [0, 1, 2, 3]
    assert curve.best is not None
    assert curve.best["step"] == 1
    # So does the same command again; with more patience it goes on.
    fit.fit(make_run(tmp_path, shares=shares, eval_every=1, patience=2), tmp_path)
    monkeypatch.setattr(fit, "evaluate", lambda *_: {"valid_loss": 1.0, "alpha": 0.9, "agreement": 0.0})
    curve = fit.fit(make_run(tmp_path, shares=shares, eval_every=1, patience=4), tmp_path)
    assert curve.valid[-1]["step"] == 8


@pytest.mark.slow
def test_alpha_rises_for_an_encoder_decoder(tmp_path):
    options = {"num_steps": 24, "eval_every": 24, "divergence": "total_variation"}
    curve = fit.fit(make_run(tmp_path, "t5", Shares(0.0, 1.0, 0.0), **options), tmp_path)
    assert curve.valid[-1]["alpha"] > curve.valid[0]["alpha"] + 0.01, curve.valid


# The launcher


@pytest.fixture(scope="module")
def given_files(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("files")
    specjax.save(make_target(), directory / "target")
    specjax.save(make_target(num_layers=1), directory / "draft")
    return {"target": str(directory / "target"), "data": write_texts(directory / "data.jsonl", copies(30))}


TINY = {
    "num_prompts": 16,
    "num_valid": 6,
    "model.num_layers": 1,
    "max_new_tokens": 6,
    "write_batch_size": 4,
    "texts_per_round": 8,
    "regenerate_every": 2,
    "target_length": 24,
    "source_length": 24,
    "batch_size": 4,
    "num_microbatches": 1,
    "num_steps": 4,
    "eval_every": 2,
    "save_every": 2,
    "learning_rate": 1e-2,
}


def command(workdir: pathlib.Path, **values) -> list[str]:
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in (TINY | values).items()]
    return ["launch", f"--config={CONFIG}", f"--workdir={workdir}", "--nocompilation_cache", *flags]


@pytest.mark.slow
def test_launched(given_files, tmp_path, capsys):
    values = {"mix__fixed": 1, "mix__target": 1, "mix__draft": 2, "draft_vocab_size": 9}
    assert launch.main(command(tmp_path, **given_files, **values)) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert "Step 0: alpha 0." in output
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoints", "config.json", "distill.png", "model", "summary.md", "train.jsonl", "written"}
    assert "| held out, before | alpha 0." in (tmp_path / "summary.md").read_text()
    assert len(specjax.load(tmp_path / "model").config.head_tokens) == 9
    before = losses(tmp_path)
    assert launch.main(command(tmp_path, **given_files, **values)) == 0
    output = capsys.readouterr().out
    assert "Going on after step 4 of 4" in output
    assert "Writing" not in output
    assert losses(tmp_path) == before
    assert launch.main(command(tmp_path, **given_files, **values, divergence="nla")) == 1
    assert "distill.divergence: 'forward_kl' before, 'nla' now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": ""}, ["--config.data=FILE"]),
        ({"data": "nowhere.jsonl"}, ["nowhere.jsonl does not exist"]),
        ({"divergence": "kl"}, ["config.divergence='kl'", "forward_kl", "jsd:BETA"]),
        ({"mix__target": 0}, ["mix.fixed=0.0", "mix.target=0.0", "more than 0"]),
        ({"mix__draft": -1}, ["mix.draft=-1"]),
        ({"temperature": 0}, ["config.temperature=0", "more than 0"]),
        ({"init": "zeros"}, ["config.init='zeros'", "layers, random"]),
        ({"init": "random", "init_layers": "(0,)"}, ["config.init_layers=(0,)", "init=random"]),
        ({"model__hidden_size": 8}, ["config.model.hidden_size=8", "init=random"]),
        ({"model__num_layers": 9}, ["config.num_layers=9", "1 to the target's 2"]),
        ({"init_layers": "(0, 5)"}, ["config.init_layers=(0, 5)", "0 to 1"]),
        ({"draft": "nowhere", "init_layers": "(0,)"}, ["config.draft='nowhere'", "leave init and init_layers out"]),
        ({"num_valid": 30}, ["has 30 lines", "config.num_valid=30"]),
        ({"draft_vocab_size": 17}, ["config.draft_vocab_size=17", "16 tokens"]),
        ({"optimizer": "sgd"}, ["config.optimizer='sgd'"]),
    ],
)
def test_errors_are_one_line(changes, words, given_files, tmp_path, capsys):
    assert launch.main(command(tmp_path, **(given_files | changes))) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


# Meshes


@pytest.mark.slow
def test_a_mesh_distils_what_one_device_distils():
    program = str(ROOT / "tests" / "distill_mesh_program.py")
    done = subprocess.run(
        [sys.executable, program], env=virtual_devices(8), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["devices"] == 8
    assert report["head"] == [[32, 128], [32, 32]]
    for name in ("loss", "alpha", "valid_loss"):
        one, mesh = ([line[name] for line in report[side] if name in line] for side in ("one", "mesh"))
        assert len(one) == len(mesh) > 2
        np.testing.assert_allclose(mesh, one, rtol=1e-3)
