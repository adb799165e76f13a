"""A norm of its own for an early exit: that it is found, kept, resumed and drafted with."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import save_tiny_decoder

import specjax
from specjax import launch
from specjax.api.pretrained import Pretrained
from specjax.experiments import exit_norm as experiment
from specjax.models import families
from specjax.models.config import DecoderConfig
from specjax.text.tokenizer import Tokenizer
from specjax.training import data as data_lib
from specjax.training import exit_norm
from specjax.training.data import Dataset, Encoded, Example

CONFIG = DecoderConfig(31, 16, 32, 2, 2, 1, 8, max_position=32)


def idle_after_the_first_layer() -> Pretrained:
    """A target whose second layer adds nothing, so that the early exit before it needs the target's own norm."""
    rng = np.random.default_rng(0)
    params = families.init_params(CONFIG, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), params)
    idle = params["layers"][1]
    for part, output in (("attention", "out"), ("mlp", "down")):
        idle = idle | {part: idle[part] | {output: jax.tree.map(jnp.zeros_like, idle[part][output])}}
    params["norm"] = jnp.asarray(rng.uniform(0.5, 2, params["norm"].shape), jnp.float32)
    return Pretrained(families.model(CONFIG), params | {"layers": params["layers"] | {1: idle}}, None, CONFIG)


def texts() -> Dataset:
    rng = np.random.default_rng(1)
    examples = [Example(rng.integers(0, 31, 17).astype(np.int32), 0, np.zeros(0, np.int32)) for _ in range(16)]
    return data_lib.dataset(Encoded(examples, 0, 0), start_token=None, target_length=16, source_length=0, seed=0)


def finds_the_norm() -> None:
    """From a wrong norm, training comes to the one that makes both distributions equal."""
    target, data = idle_after_the_first_layer(), texts()
    exits = exit_norm.of(target, 1, learning_rate=0.1, num_steps=120)
    wrong = jnp.ones_like(target.params["norm"])
    exact, before = (
        exit_norm.agreement(exits, target.params, scale, data.in_order(4)) for scale in (target.params["norm"], wrong)
    )
    np.testing.assert_allclose(exact, (0, 1, 1), atol=1e-5)
    assert before.kl > 0.05
    begin = exit_norm.init(exits, target.params)._replace(scale=wrong)
    state, losses = exit_norm.fit(exits, target.params, data, state=begin)
    after = exit_norm.agreement(exits, target.params, state.scale, data.in_order(4))
    assert len(losses) == 120
    assert after.kl < 0.01 * before.kl, f"the norm is not found: {before} before, {after} after"
    assert after.alpha > 0.99


def test_training_finds_the_norm():
    finds_the_norm()


@pytest.mark.slow
def test_training_catches_a_loss_of_constant_distributions(monkeypatch, catches):
    log_probs = exit_norm._log_probs
    monkeypatch.setattr(exit_norm, "_log_probs", lambda *args: jax.lax.stop_gradient(log_probs(*args)))
    jax.clear_caches()
    with catches("the exit's distribution has no gradient", "exit norm", "the norm is not found"):
        finds_the_norm()
    jax.clear_caches()


def command(target, data, workdir, *more):
    return [
        *("launch", "--config=configs/exit_norm.py", f"--config.target={target}", f"--config.data={data}"),
        *(f"--config.valid={data}", f"--workdir={workdir}", "--nocompilation_cache", "--config.exit_layer=1"),
        *("--config.num_steps=4", "--config.save_every=2", "--config.target_length=16", "--config.num_valid=2", *more),
    ]


@pytest.mark.slow
def test_a_run_goes_on_and_is_drafted_with(tmp_path, capfd, monkeypatch):
    plain = specjax.load(save_tiny_decoder(tmp_path / "plain", 0, num_layers=2))
    # Training texts end with a token of the vocabulary.
    assert plain.tokenizer is not None
    tokenizer = Tokenizer(plain.tokenizer.backend, special_tokens={"eos_token": "[unk]"})
    target, data = str(tmp_path / "target"), tmp_path / "texts.jsonl"
    specjax.save(plain._replace(tokenizer=tokenizer), target)
    data.write_text("".join(json.dumps({"text": f"the {who} sat on the mat"}) + "\n" for who in ("cat", "dog", "mat")))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert launch.main(command(target, data, whole)) == 0, capfd.readouterr().err
    fit, calls = exit_norm.fit, []

    def interrupted(*args, **options):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return fit(*args, **options)

    monkeypatch.setattr(exit_norm, "fit", interrupted)
    assert launch.main(command(target, data, broken)) in (130, 143)
    monkeypatch.setattr(exit_norm, "fit", fit)
    assert launch.main(command(target, data, broken)) == 0, capfd.readouterr().err
    assert (whole / experiment.FILE).read_text() == (broken / experiment.FILE).read_text()
    assert experiment.load(whole)[0] == 1
    row = json.loads((whole / "results.json").read_text())[0]
    assert row["kl_after"] < row["kl_before"]
    assert (whole / "exit_norm.png").stat().st_size > 5_000
    assert "alpha at temperature 1" in (whole / "summary.md").read_text()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "the cat sat on the mat"}) + "\n")
    done = launch.main(
        [
            *("launch", "--config=configs/compare.py", f"--config.target={target}", f"--config.data={prompts}"),
            *("--config.drafter=early_exit", f"--config.draft={whole}", "--config.max_new_tokens=8"),
            *("--nocompilation_cache", "--config.repeats=1", f"--workdir={tmp_path / 'compared'}"),
        ]
    )
    assert done == 0, capfd.readouterr().err
    row = json.loads((tmp_path / "compared" / "results.json").read_text())[0]
    assert (row["drafter"], row["identical"]) == ("early_exit", 1.0)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"exit_norm\.py makes it"):
        experiment.load(tmp_path)
    (tmp_path / experiment.FILE).write_text('{"layer": 1}')
    with pytest.raises(ValueError, match="is broken"):
        experiment.load(tmp_path)
    with pytest.raises(ValueError, match="layer=2: the target has 2 layers; run 1 to 1"):
        exit_norm.of(idle_after_the_first_layer(), 2)
