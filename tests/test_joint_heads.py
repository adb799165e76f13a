"""Medusa-2: heads and target are trained together; what comes out is another target, whose text speculation has."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_distill import make_target
from test_medusa import CONFIGS, SHAPES, V, batch_of, command, heads, run_of, target
from test_training import copies, write_texts

import specjax
from specjax import drafters, launch
from specjax.training import fit, joint_heads, parallel_heads
from specjax.training.joint_heads import Joint, JointLoss, JointState
from specjax.types import Tree

JOINT = Joint(head_weight=0.5, target_rate=0.25, head_steps=10)


def run(steps: int = 40) -> parallel_heads.Run:
    given = run_of(steps=steps)
    return given._replace(config=dataclasses.replace(given.config, weight_decay=0.1))


def learner(steps: int = 40, joint: Joint = JOINT) -> fit.Learner:
    return joint_heads.learner(run(steps), joint)


def batch() -> Any:
    rng = np.random.default_rng(7)
    return batch_of(rng.integers(0, V, (2, 9)).astype(np.int32), np.ones((2, 8), bool))


def changed(before: Tree, after: Tree) -> float:
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True))


def test_the_loss_is_the_targets_own_and_a_share_of_the_heads():
    """Against numpy, with the hidden states of a target that is not the original."""
    other = jax.tree.map(lambda x: 0.9 * x, target().params)
    texts = batch()  # Made outside of what is compiled.
    of_heads = parallel_heads.HeadLoss(SHAPES["medusa"], CONFIGS["decoder"], parallel_heads.TEXT)
    params = JointState(heads().params, other)
    found = jax.jit(lambda p, frozen: JointLoss(of_heads, JOINT)(p, texts, frozen, None))(params, target().params)
    score = target().model.score
    assert score is not None
    logits, original = (np.asarray(jax.jit(score)(p, texts), np.float64) for p in (other, target().params))
    log_q, log_p = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (logits, original))
    own = -np.take_along_axis(log_q, np.asarray(texts.targets)[..., None], axis=-1).sum()
    alone = jax.jit(lambda p, frozen: of_heads(p, texts, frozen, None))(heads().params, other)
    assert float(found.measures["target_loss"]) == pytest.approx(own, rel=1e-4)
    assert float(found.loss) == pytest.approx(own + 0.5 * float(alone.loss), rel=1e-4)
    kept = JointLoss(of_heads, JOINT._replace(target_loss="forward_kl"))
    found = jax.jit(lambda p, frozen: kept(p, texts, frozen, None))(params, target().params)
    assert float(found.measures["target_loss"]) == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(), rel=1e-3)


def test_the_heads_are_trained_alone_at_first_and_the_target_more_slowly_then(tmp_path: Any):
    """Not even the decay of weights changes the target before; behind it, its updates are a fraction of Adam's."""
    given = learner()
    state = given.init()
    first = jax.device_get(state.params)
    for number in range(1, JOINT.head_steps + 1):
        state, _ = given.step(number, state)
    alone = jax.device_get(state.params)
    assert changed(first.target, alone.target) == 0
    assert changed(first.heads, alone.heads) > 0
    rate = 0.02
    state, begin = given.step(JOINT.head_steps + 1, state)
    end = begin
    moved = changed(alone.target, state.params.target)
    assert 0 < moved < 0.5 * rate
    for number in range(JOINT.head_steps + 2, 31):
        state, end = given.step(number, state)
    for name in ("target_loss", "heads_loss"):
        assert end.measures[name] < 0.95 * begin.measures[name]
    given.export(state.params, tmp_path)
    assert changed(drafters.load_medusa(tmp_path).params, state.params.heads) == 0
    assert changed(specjax.load(tmp_path / joint_heads.TARGET).params, state.params.target) == 0


def test_the_targets_learning_rate_is_a_fraction_of_the_heads():
    config = dataclasses.replace(run().config, weight_decay=0.0)
    made = joint_heads._optimizer("adamw", JOINT)(lambda step: 0.02, config)
    params = JointState(jnp.ones(3), jnp.ones(3))
    state, shares = made.init(params), []
    for _ in range(JOINT.head_steps + config.warmup_steps + 1):
        updates, state = made.update(params, state, params)
        shares.append(float((updates.target / updates.heads)[0]))
    # None while the heads are trained alone, then more and more, until the warm-up ends.
    wanted = [0.0] * JOINT.head_steps + [0.25 * (i + 1) / config.warmup_steps for i in range(config.warmup_steps)]
    np.testing.assert_allclose(shares, [*wanted, 0.25], rtol=1e-5)


@pytest.mark.slow
def test_both_learn_and_are_saved_and_the_text_is_the_new_targets(tmp_path: Any):
    curve = joint_heads.fit_joint(run(), JOINT, tmp_path)
    first, last = curve.valid[0], curve.valid[-1]
    for name in ("valid_loss", "target_loss", "heads_loss"):
        assert last[name] < first[name]
    for name in ("loss", "target_loss", "heads_loss"):
        assert curve.steps[-1][name] < curve.steps[0][name]
    model = tmp_path / fit.MODEL
    read, new = drafters.load_medusa(model), specjax.load(model / joint_heads.TARGET)
    assert new.config == target().config
    assert changed(target().params, new.params) > 1e-3
    again = joint_heads.evaluate(run(), JOINT, JointState(read.params, new.params))
    assert again["valid_loss"] == pytest.approx(curve.best["valid_loss"], rel=1e-5)
    prompts = [[1, 2, 3], [7, 8]]
    options: dict[str, Any] = {"max_new_tokens": 12, "step_cost": 0.0}
    plain = specjax.generate(new, prompts, **options)
    drafted = specjax.generate(new, prompts, drafter=drafters.medusa(read, new), **options)
    assert drafted.tokens == plain.tokens
    assert (drafted.stats.acceptance_rate or 0) > 0
    assert plain.tokens != specjax.generate(target(), prompts, **options).tokens, "the new target is the original"


@pytest.mark.slow
def test_a_run_that_resumes_has_the_losses_of_one_that_does_not(tmp_path: Any):
    whole = joint_heads.fit_joint(run(30), JOINT, tmp_path / "whole")

    def until(lines: Any) -> None:
        if any(line["step"] >= 20 and "loss" in line for line in lines):
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        joint_heads.fit_joint(run(30), JOINT, tmp_path / "parts", until)
    rest = joint_heads.fit_joint(run(30), JOINT, tmp_path / "parts")
    assert [line["loss"] for line in rest.steps] == [line["loss"] for line in whole.steps]
    with pytest.raises(ValueError, match=r"joint"):
        joint_heads.fit_joint(run(30), JOINT._replace(head_weight=0.1), tmp_path / "parts")


def test_what_cannot_be_trained_is_refused():
    half = run()._replace(target=target()._replace(config=dataclasses.replace(target().config, dtype="bfloat16")))
    with pytest.raises(ValueError, match="its parameters are trained in float32"):
        joint_heads.learner(half, JOINT)
    with pytest.raises(ValueError, match="head_steps=40 of num_steps=40"):
        learner(joint=JOINT._replace(head_steps=40))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"target_dtype": "bfloat16"}, "config.target_dtype=bfloat16: a target that is trained is float32"),
        ({"head_steps": 400}, "config.head_steps=400 of config.num_steps=400"),
        ({"target_loss": "words"}, "config.target_loss='words': text, or"),
        ({"remat": True}, "config.remat=True is not done for config.joint=True"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_anything_is_loaded(values: Any, words: str, tmp_path: Any, capsys: Any):
    (tmp_path / "data.jsonl").write_text('{"prompt": "x"}\n')
    given = command(f"--workdir={tmp_path / 'run'}", data=tmp_path / "data.jsonl", joint=True, **values)
    assert launch.main(given) == 1
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_one_command_makes_another_target_and_says_so(tmp_path: Any, capfd: Any):
    path, made = tmp_path / "target", tmp_path / "run"
    specjax.save(make_target("decoder"), path)
    values: dict[str, Any] = {"target": path, "data": write_texts(tmp_path / "data.jsonl", copies(30)), "joint": True}
    values |= {"num_prompts": 16, "num_valid": 6, "max_new_tokens": 8, "write_batch_size": 4, "target_length": 24}
    values |= {"batch_size": 4, "num_microbatches": 1, "num_steps": 20, "eval_every": 10, "head_steps": 5}
    assert launch.main(command(f"--workdir={made}", **values)) == 0, capfd.readouterr().err
    assert "model/target, the new target," in capfd.readouterr().out.replace("\n", " ")
    said = (made / "summary.md").read_text()
    assert "the result is another target" in said
    assert "the target's own loss on held-out texts" in said
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
    assert all("target_loss" in row for row in rows)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text.target}) + "\n" for text in copies(3)))
    given = {"target": made / "model" / "target", "drafter": "medusa", "draft": made / "model", "data": prompts}
    flags = [f"--config.{key}={value}" for key, value in given.items()]
    flags += ["--config.num_draft_tokens=3", "--config.max_new_tokens=12", f"--workdir={tmp_path / 'compared'}"]
    assert launch.main(["launch", "--config=configs/compare.py", *flags, "--nocompilation_cache"]) == 0
    results = json.loads((tmp_path / "compared" / "results.json").read_text())
    assert all(row["identical"] == 1.0 for row in results)
