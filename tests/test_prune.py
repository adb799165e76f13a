"""Pruning: what is left equals the whole model without the rest, importance finds it, and runs that resume."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import usual, virtual_devices
from jax.sharding import AbstractMesh
from test_distill import make_target
from test_training import MODELS, copies, make_dataset, write_texts

import specjax
from specjax import launch
from specjax.experiments import prune as experiment
from specjax.models import families
from specjax.models.config import ModelConfig
from specjax.training import fit, importance, optimizers, prune, train
from specjax.training.config import TrainConfig
from specjax.types import Tree

CONFIG = str(pathlib.Path(__file__).parents[1] / "configs" / "prune.py")

SHAPES: dict[str, Any] = {
    "decoder": dataclasses.replace(
        MODELS["decoder"], num_layers=3, num_heads=4, num_kv_heads=2, qkv_bias=True, output_bias=True, mlp_bias=True
    ),
    "t5": dataclasses.replace(MODELS["t5"], num_layers=2, num_encoder_layers=2, gated=True, activation="gelu_new"),
}
SHAPES["bfloat16"] = dataclasses.replace(SHAPES["decoder"], dtype="bfloat16")


def make(kind: str) -> tuple[ModelConfig, Tree]:
    config = SHAPES[kind]
    params = families.init_params(config, jax.random.key(3))
    return config, jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)


def make_batches(kind: str, rows: int = 2) -> list[Any]:
    return list(make_dataset(copies(12), "t5" if kind == "t5" else "decoder").in_order(rows))[:3]


def logits(config: ModelConfig, params: Tree, batch: Any) -> np.ndarray:
    score = families.model(config).score
    assert score is not None
    return np.asarray(jax.jit(score)(params, batch))


def kept_units(config: ModelConfig, heads: int, width: int) -> tuple[Any, Any]:
    """Other units in every layer, and the gates that close those that are not kept."""
    scores = jax.tree.map(
        lambda x: np.random.default_rng(x.size).permutation(x.size).reshape(x.shape).astype(float),
        prune.open_gates(config),
    )
    kept = importance.best_units(scores, heads, width)
    gates = prune.open_gates(config)
    for stack, parts in kept.items():
        for part, rows in parts.items():
            closed = np.zeros(gates[stack][part].shape, np.float32)
            for i, row in enumerate(rows):
                closed[i, list(row)] = 1
            gates[stack][part] = jnp.asarray(closed)
    return kept, gates


def check_units(kind: str) -> None:
    """Pruned units are those of the whole model with closed gates."""
    (config, params), batch = make(kind), make_batches(kind)[0]
    kept, gates = kept_units(config, 1, 40)
    small, pruned = prune.keep_units(config, params, kept)
    expected = families.abstract_params(small)
    assert jax.tree.structure(pruned) == jax.tree.structure(expected)
    assert jax.tree.leaves(jax.tree.map(lambda x: (x.shape, x.dtype), pruned)) == jax.tree.leaves(
        jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    )
    assert (prune.num_heads(small), small.intermediate_size) == (1, 40)
    masked = logits(config, prune.gated(config, params, gates), batch)
    assert np.abs(masked - logits(config, params, batch)).max() > 0.1
    error = 0.05 if kind == "bfloat16" else 1e-5
    np.testing.assert_allclose(logits(small, pruned, batch), masked, rtol=error, atol=10 * error)


def check_dead(kind: str) -> None:
    """Of one layer, and one head and 24 channels of every layer, that contribute nothing, nothing is left."""
    (config, params), batches = make(kind), make_batches(kind)
    stack = list(prune.stacks(config))[-1]
    _, gates = kept_units(config, 1, 40)
    gates[stack][prune.LAYER] = gates[stack][prune.LAYER].at[1].set(0)
    params = prune.gated(config, params, gates)
    before = logits(config, params, batches[0])
    costs = importance.removal_costs(config, params, batches)
    assert [i for i, cost in enumerate(costs[stack]) if abs(cost) < 1e-6] == [1]
    small, left = prune.keep_layers(config, params, {stack: [i for i in range(len(costs[stack])) if i != 1]})
    small, left = importance.shrink(small, left, importance.Sizes(prune.stacks(small), 1, 40), batches)
    assert (prune.num_heads(small), small.intermediate_size, small.dtype) == (1, 40, "float32")
    error = 0.05 if kind == "bfloat16" else 1e-5
    np.testing.assert_allclose(logits(small, left, batches[0]), before, rtol=error, atol=10 * error)


@pytest.mark.parametrize("kind", usual(SHAPES, "t5"))
def test_fewer_heads_and_channels_are_the_whole_model_with_these_closed(kind):
    check_units(kind)


@pytest.mark.parametrize("kind", usual(SHAPES, "decoder"))
def test_what_contributes_nothing_is_found_and_removing_it_changes_nothing(kind):
    check_dead(kind)


def _biases_of_other_heads(config, params):
    config, params = OWN_BIASES(config, params)
    turned = {
        i: layer | {"attention": layer["attention"] | {"bias": layer["attention"]["bias"][:, ::-1]}}
        for i, layer in params["decoder"].items()
    }
    return config, params | {"decoder": turned}


OWN_BIASES, TAKE, BEST = prune._own_biases, prune._take, importance.best


def _first_units(tree, axes, name, chosen):
    return TAKE(tree, axes, name, range(len(chosen)))


BUGS: dict[str, Any] = {
    "the position biases of other heads": (check_units, "t5", prune, "_own_biases", _biases_of_other_heads),
    "the first units instead of those that stay": (check_units, "decoder", prune, "_take", _first_units),
    "the least important units": (
        check_dead,
        "decoder",
        importance,
        "best",
        lambda scores, number: BEST(-scores, number),
    ),
}


@pytest.mark.parametrize("bug", usual(BUGS, "the least important units"))
def test_planted_bugs_are_noticed(bug, monkeypatch):
    check, kind, module, name, broken = BUGS[bug]
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(kind)


@pytest.mark.parametrize("kind", usual(SHAPES))
def test_the_cost_of_a_layer_is_that_of_the_model_without_it(kind):
    (config, params), batches = make(kind), make_batches(kind)
    costs = importance.removal_costs(config, params, batches)
    assert {stack: len(cost) for stack, cost in costs.items()} == prune.stacks(config)
    whole = importance.mean_loss(config, params, batches)
    for stack, cost in list(costs.items())[-1:]:
        kept = {stack: tuple(i for i in range(len(cost)) if i != 1)}
        found = importance.mean_loss(*prune.keep_layers(config, params, kept), batches) - whole
        assert found == pytest.approx(cost[1], abs=0.02 if kind == "bfloat16" else 1e-4)
        assert abs(found) > 1e-3


def test_importance_is_the_squared_change_that_gates_predict():
    (config, params), batches = make("decoder"), make_batches("decoder")
    scores = importance.taylor(config, params, batches)
    # Finite differences for one channel and one head.
    for part, place in (("mlp", (1, 5)), ("attention", (2, 1))):
        slopes = []
        for batch in batches:
            sides = []
            for gate in (0.95, 1.05):
                gates = prune.open_gates(config)
                gates["layers"][part] = gates["layers"][part].at[place].set(gate)
                sides.append(importance.mean_loss(config, params, [batch], gates))
            slopes.append((sides[1] - sides[0]) / 0.1)
        assert scores["layers"][part][place] == pytest.approx(np.mean(np.square(slopes)), rel=0.05, abs=1e-7)


# Magnitude


@pytest.mark.parametrize("kind", usual(MODELS, "decoder"))
def test_the_smallest_weights_of_every_matrix_are_zero(kind):
    config, params = make(kind)
    half = prune.by_magnitude(config, params, 0.5)
    assert prune.sparsity(config, params) == 0
    assert prune.sparsity(config, half) == 0.5
    stack = list(prune.stacks(config))[-1]
    for part in ("attention", "mlp"):
        for name, before in params[stack][1][part].items():
            if not isinstance(before, dict):
                np.testing.assert_array_equal(half[stack][1][part][name], before)
                continue
            old, new = np.asarray(before["values"]), np.asarray(half[stack][1][part][name]["values"])
            assert (new == 0).sum() == old.size // 2
            assert np.abs(old[new == 0]).max() <= np.abs(old[new != 0]).min()
            np.testing.assert_array_equal(new[new != 0], old[new != 0])
    np.testing.assert_array_equal(half["head"]["values"], params["head"]["values"])
    # Pruned further, the same weights and more are zero; without more, nothing changes.
    more, same = (prune.by_magnitude(config, half, share) for share in (0.75, 0.5))
    assert prune.sparsity(config, more) == 0.75
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(b)[np.asarray(a) == 0], 0), half, more)
    jax.tree.map(np.testing.assert_array_equal, same, half)


@pytest.mark.parametrize("name", usual({"adamw": 0, "adafactor": 0}, "adamw"))
def test_zeros_stay_zero_in_training(name):
    config, params = make("decoder")
    params = prune.by_magnitude(config, params, 0.5)
    optimizer = optimizers.keeping_zeros(name)
    assert optimizer is optimizers.keeping_zeros(name)
    options = TrainConfig(num_steps=2, batch_size=2, learning_rate=1e-2, weight_decay=0.1, optimizer=optimizer)
    assert options.identity()["optimizer"] == f"{name}, zeros kept"
    state = train.init(config, options, params=params)
    for batch in make_batches("decoder")[:2]:
        state, _ = train.train_step(config, options, state, batch)
    assert prune.sparsity(config, state.params) == 0.5
    moved = np.asarray(
        state.params["layers"][0]["mlp"]["down"]["values"] != params["layers"][0]["mlp"]["down"]["values"]
    )
    assert moved.mean() > 0.45


# What is refused


def test_what_cannot_be_pruned_is_refused():
    config, params = make("decoder")
    for changed, words in (
        (families.quantise(config, params, "int8"), "quantise='int8'.*prune it, and quantise what is left"),
        (families.stack_layers(config, params), "scan_layers=True.*Load the model without"),
    ):
        last: Any
        for pruned, last in ((prune.keep_layers, {"layers": (0,)}), (prune.keep_units, {}), (prune.by_magnitude, 0.5)):
            with pytest.raises(ValueError, match=words):
                pruned(*changed, last)
    for kept, words in (
        ({"encoder": (0,)}, r"kept\['encoder'\]: this decoder has layers"),
        ({"layers": (0, 3)}, r"kept\['layers'\]=\(0, 3\): one or more of 0 to 2"),
        ({"layers": ()}, "one or more of 0 to 2"),
    ):
        with pytest.raises(ValueError, match=words):
            prune.keep_layers(config, params, kept)
    for parts, words in (
        ({"mlp": [(0, 1)] * 2}, "has 2 rows: one for each layer"),
        ({"mlp": [(0, 1), (0, 1), (0,)]}, r"kept has \[1, 2\] units of mlp: the same number"),
        ({"mlp": [(1, 0)] * 3}, "in ascending order, each once"),
        ({"cross": [(0,)] * 3}, "no such part"),
    ):
        with pytest.raises(ValueError, match=words):
            prune.keep_units(config, params, {"layers": parts})
    with pytest.raises(ValueError, match=r"kept lacks decoder\.cross, encoder\.attention"):
        prune.keep_units(*make("t5"), {"decoder": {"attention": [(0,)] * 2}})
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"sparsity={share}"):
            prune.by_magnitude(config, params, share)


# The launcher


@pytest.fixture(scope="module")
def given_files(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("files")
    specjax.save(make_target(num_layers=3), directory / "target")
    specjax.save(make_target("t5", num_layers=2), directory / "t5")
    return {"target": str(directory / "target"), "data": write_texts(directory / "data.jsonl", copies(30))}


TINY = {
    "num_prompts": 16,
    "num_valid": 6,
    "prune.layers": 0.34,
    "prune.width": 0.5,
    "prune.weights": 0.25,
    "fractions": "(0.5,1.0)",
    "width_multiple": 8,
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
def test_a_resumed_run_ends_like_an_uninterrupted_one(given_files, tmp_path, monkeypatch, capsys):
    """Killed while a round's model is measured, asked to end within a round, and killed between two rounds."""
    values = given_files | {"mix__draft": 1}
    assert launch.main(command(tmp_path / "whole", **values)) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert "Round 2: 2 layers" in output
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert files == {
        "cells.json",
        "config.json",
        "model",
        "results.json",
        "round-1",
        "round-2",
        "summary.md",
        "written",
    }
    rows = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert [row["width"] for row in rows] == [64, 48, 32]
    assert [row["sparsity"] for row in rows] == [0, 0.125, 0.25]
    assert [row["layers"]["layers"] for row in rows] == [3, 2, 2]
    assert rows[0]["alpha"] == 1
    assert rows[2]["alpha"] >= rows[2]["alpha_pruned"]

    taylor, step, written = importance.taylor, fit._Loop.step, []

    def killed(*args):
        raise RuntimeError("killed")

    def stopped(self, number, state):
        written.append(number)
        if len(written) == 3:
            raise KeyboardInterrupt("stopped")
        return step(self, number, state)

    monkeypatch.setattr(importance, "taylor", killed)
    assert launch.main(command(tmp_path / "resumed", **values)) != 0
    monkeypatch.setattr(importance, "taylor", taylor)
    monkeypatch.setattr(fit._Loop, "step", stopped)
    assert launch.main(command(tmp_path / "resumed", **values)) == 130
    monkeypatch.setattr(fit._Loop, "step", step)
    monkeypatch.setattr(experiment._Rounds, "tidy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert launch.main(command(tmp_path / "resumed", **values)) == 130
    monkeypatch.undo()
    assert launch.main(command(tmp_path / "resumed", **values)) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "resumed" / "results.json").read_text()) == rows
    a, b = (specjax.load(tmp_path / name / "model") for name in ("whole", "resumed"))
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    # It drafts for its target, whose text stays what it is.
    target = specjax.load(given_files["target"])
    drafter = specjax.drafters.model(a, num_draft_tokens=3)
    ours = specjax.generate(target, ["a b c"], drafter=drafter, max_new_tokens=8)
    assert ours.tokens == specjax.generate(target, ["a b c"], max_new_tokens=8).tokens


@pytest.mark.slow
def test_an_encoder_decoder_is_pruned(given_files, tmp_path, capsys):
    target = str(pathlib.Path(given_files["target"]).parent / "t5")
    values = given_files | {"target": target, "prune__heads": 0.5, "prune__layers": 0.5, "fractions": "(1.0,)"}
    assert launch.main(command(tmp_path, **values)) == 0, capsys.readouterr().err
    config: Any = specjax.load(tmp_path / "model").config
    assert (config.num_layers, config.num_encoder_layers, config.num_heads, config.intermediate_size) == (1, 1, 1, 32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": ""}, ["--config.data=FILE"]),
        ({"divergence": "kl"}, ["config.divergence='kl'", "forward_kl"]),
        ({"prune__width": 1.0}, ["config.prune.width=1.0", "below 1"]),
        ({"prune__width": 0, "prune__layers": 0, "prune__weights": 0}, ["config.prune has only zeros"]),
        ({"fractions": "(0.5,)"}, ["config.fractions=(0.5,)", "ascending"]),
        ({"fractions": "(1.0,0.5)"}, ["config.fractions=(1.0, 0.5)", "(0.7, 0.96, 1.0)"]),
        ({"width_multiple": 0}, ["config.width_multiple=0"]),
        ({"prune__encoder_layers": 0.5}, ["config.prune.encoder_layers=0.5", "has no encoder"]),
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


def test_sizes_that_do_not_divide_over_a_mesh_are_refused():
    mesh, sizes = AbstractMesh((2, 4), ("data", "model")), importance.Sizes({"layers": 2}, 4, 64)
    experiment.check_placed(sizes, mesh)
    experiment.check_placed(sizes._replace(heads=3), None)
    with pytest.raises(ValueError, match=r"config\.prune\.heads leaves 3.* mesh_model=4: leave a multiple"):
        experiment.check_placed(sizes._replace(heads=3), mesh)
    with pytest.raises(ValueError, match=r"config\.prune\.width leaves 66"):
        experiment.check_placed(sizes._replace(width=66), mesh)


@pytest.mark.slow
def test_a_mesh_prunes_what_one_device_prunes():
    program = str(pathlib.Path(__file__).parent / "prune_mesh_program.py")
    done = subprocess.run(
        [sys.executable, program], env=virtual_devices(8), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kind, (one, mesh) in json.loads(done.stdout).items():
        assert one["down"] == [[64, 32], [64, 32]], kind
        assert mesh["down"] == [[64, 32], [16, 32]], kind
        # Which units stay is decided by the same numbers but for rounding: the same ones stay.
        np.testing.assert_allclose(mesh["sums"], one["sums"], rtol=1e-4)
