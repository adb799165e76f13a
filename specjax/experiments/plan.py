"""Plans a target and a draft on chips that are not here: does it fit, what does a step take, which K is best."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from specjax import files
from specjax.experiments import choices, results
from specjax.experiments.reports import plan as report
from specjax.experiments.reports import plots
from specjax.experiments.reports.display import View
from specjax.experiments.results import Row
from specjax.models import families
from specjax.models.weights import shapes
from specjax.planning import aot, chips, plan
from specjax.planning.plan import Cost, Setup

Config = Any
"""An `ml_collections.ConfigDict` with the keys of `configs/plan.py`."""

FILES = ("config.json", "results.json", "summary.md", "plan.png")


def check(config: Config) -> None:
    """Refuses values that make no sense, before anything is read.

    Raises:
      ValueError: naming the key, its value and the remedy.
    """
    for key in ("target", "draft"):
        if not config[key]:
            raise ValueError(f"config.{key} is empty: give --config.{key}=..., a preset, a directory or a hub id.")
    if config.layers not in ("few", "all"):
        raise ValueError(f"config.layers={config.layers!r}: choose few (and extrapolate) or all.")
    if config.draft_sharding not in ("split", "replicated"):
        raise ValueError(f"config.draft_sharding={config.draft_sharding!r}: choose split or replicated.")
    if not 0 <= config.alpha <= 1:
        raise ValueError(f"config.alpha={config.alpha} is not a probability.")
    choices.rule(config.verify)
    if config.temperature < 0:
        raise ValueError(f"config.temperature={config.temperature} is negative.")
    if config.max_draft_tokens < config.num_draft_tokens:
        raise ValueError(
            f"config.max_draft_tokens={config.max_draft_tokens} is less than "
            f"config.num_draft_tokens={config.num_draft_tokens}: raise it."
        )


def _claim(config: Config, workdir: pathlib.Path, overwrite: bool) -> bool:
    """Whether the workdir holds this plan already."""
    path, text = workdir / "config.json", results.to_json(config.to_dict())
    if overwrite or not (workdir / "results.json").exists():
        for name in FILES:
            (workdir / name).unlink(missing_ok=True)
        return False
    if not path.exists() or path.read_bytes() != text.encode():
        raise ValueError(
            f"{workdir} holds a plan of another config: choose another --workdir, or give --overwrite to replace it."
        )
    return True


def setups(config: Config) -> dict[str, Setup]:
    """What the config asks for, by the name of the draft.

    Raises:
      ValueError: for a topology or a model that is not known.
      OSError: where a shape cannot be read.
    """
    topology = chips.parse(config.topology)
    target = shapes.read(config.target, config.dtype)
    return {
        name: Setup(
            target=target,
            draft=shapes.read(name, config.dtype),
            topology=topology,
            data=config.data,
            num_draft_tokens=config.num_draft_tokens,
            batch_size=config.batch_size,
            prompt_tokens=config.prompt_tokens,
            max_new_tokens=config.max_new_tokens,
            draft_replicated=config.draft_sharding == "replicated",
        )
        for name in (part.strip() for part in config.draft.split(","))
    }


def _collectives(counts: aot.Counts) -> list[Row]:
    return [
        {"part": part or "rest", "kind": kind, "count": round(count, 3), "bytes": size, "largest": largest}
        for (part, kind), (count, size, largest) in counts.items()
    ]


def _compiled(setup: Setup, config: Config) -> aot.Compiled | None:
    """What XLA makes of it; None where even the few layers that are compiled do not fit."""
    rule = choices.rule(config.verify)
    mesh = aot.make_mesh(setup.topology, setup.data)
    every = config.layers == "all"
    try:
        return aot.extrapolate(setup, mesh, temperature=config.temperature, rule=rule, every_layer=every)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _call(setup: Setup, side: str, tokens: int, cost: Cost, computed: Cost, program: aot.Program | None) -> Row:
    """A row of the table of calls."""
    times = plan.times(setup, cost)
    return {
        "side": side,
        "tokens": tokens,
        "flops": cost.flops,
        "parameter_bytes": cost.parameter_bytes,
        "cache_bytes": cost.cache_bytes,
        "collectives": cost.all_reduces,
        "collective_bytes": cost.all_reduce_bytes,
        "computed_all_reduces": computed.all_reduces,
        "arithmetic_ms": 1e3 * times.arithmetic,
        "memory_ms": 1e3 * times.memory,
        "collectives_ms": 1e3 * times.collectives,
        "ms": 1e3 * times.total,
        "compiled_flops": program.flops if program else None,
        "compiled_bytes_accessed": program.bytes_accessed if program else None,
        "compiled_optimal_ms": 1e3 * program.optimal_seconds if program and program.optimal_seconds else None,
    }


def _with_compiled(cost: Callable[[int], Cost], side: str, compiled: aot.Compiled | None) -> Callable[[int], Cost]:
    """Costs with what XLA made of the collectives, where it was asked."""
    if compiled is None:
        return cost
    seen = {}
    for (of, tokens), program in compiled.calls.items():
        if of == side:
            counts = program.collectives.values()
            seen[tokens] = (sum(count for count, _, _ in counts), sum(size for _, size, _ in counts))
    return plan.with_collectives(cost, seen)


def make_row(name: str, setup: Setup, config: Config, compiled: aot.Compiled | None, exhausted: bool = False) -> Row:
    """Everything that is known of one target and one draft on one topology, as plain values.

    Args:
      name: of the draft.
      setup: the plan.
      config: as `configs/plan.py` has it.
      compiled: what XLA made of it, or None.
      exhausted: whether XLA found that it does not fit.
    """
    computed = {side: plan.call_cost(setup, side) for side in plan.SIDES}
    cost = {side: _with_compiled(computed[side], side, compiled) for side in plan.SIDES}
    programs = compiled.calls if compiled else {}
    wanted = [("draft", 1), *(("target", tokens) for tokens in range(1, setup.num_draft_tokens + 2))]
    calls = [
        _call(setup, side, tokens, cost[side](tokens), computed[side](tokens), programs.get((side, tokens)))
        for side, tokens in wanted
    ]
    target_seconds = [plan.times(setup, cost["target"](t)).total for t in range(1, config.max_draft_tokens + 2)]
    forecast = plan.forecast(target_seconds, plan.times(setup, cost["draft"](1)).total, config.alpha)
    memory = plan.memory(setup)
    overhead = 0
    if compiled:
        # Arguments that no step reads, such as an encoder, are not the program's, but they are in memory.
        padding = max(compiled.step.argument_bytes - sum(memory), 0)
        overhead = math.ceil(padding + compiled.step.temporary_bytes + compiled.step.code_bytes)
    fit = plan.fit(setup, overhead)
    reference = config.reference_ms.to_dict()
    k = setup.num_draft_tokens
    return {
        "task": "plan",
        "target": config.target,
        "draft": name,
        "topology": setup.topology.name,
        "chips": setup.topology.num_chips,
        "devices": setup.topology.num_devices,
        "mesh": {"data": setup.mesh_shape[0], "model": setup.mesh_shape[1]},
        "replicated": {side: plan.replicated(setup, side) for side in plan.SIDES},
        "draft_sharding": config.draft_sharding,
        "dtype": config.dtype,
        "verify": config.verify,
        "temperature": config.temperature,
        "num_draft_tokens": k,
        "batch_size": setup.batch_size,
        "buffer": setup.buffer,
        "num_parameters": {side: families.num_params(setup.side(side)) for side in plan.SIDES},
        "compiled": compiled is not None,
        "compiled_layers": compiled.layers if compiled else None,
        "extrapolated": compiled is not None and not compiled.exact,
        "compile_seconds": compiled.seconds if compiled else None,
        "memory": {
            **memory._asdict(),
            "temporaries": compiled.step.temporary_bytes if compiled else None,
            "code": compiled.step.code_bytes if compiled else None,
            "compiled_arguments": compiled.step.argument_bytes if compiled else None,
            "needed": fit.needed,
            "available": fit.available,
        },
        "exhausted": exhausted,
        "fits": fit.fits and not exhausted,
        "remedies": fit.remedies,
        "step": {
            "collectives": _collectives(compiled.step.collectives),
            "cache_copies": compiled.step.cache_copies,
            "output_bytes": compiled.step.output_bytes,
            "alias_bytes": compiled.step.alias_bytes,
        }
        if compiled
        else None,
        "calls": calls,
        "reference_ms": {side: reference.get(of) for side, of in (("target", config.target), ("draft", name))},
        "alpha": config.alpha,
        "cost_ratio": forecast.cost_ratio,
        "target_ms_by_tokens": [1e3 * seconds for seconds in forecast.target],
        "draft_ms": 1e3 * forecast.draft,
        "ms_per_token_by_draft_tokens": forecast.milliseconds,
        "best_num_draft_tokens": forecast.best,
        "predicted_ms_per_token": forecast.milliseconds[k],
        "predicted_speedup": forecast.milliseconds[0] / forecast.milliseconds[k],
        "chip": dataclasses.asdict(setup.topology.chip),
        "jax_version": jax.__version__,
    }


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Makes the plan and writes its files.

    Args:
      config: as `configs/plan.py` has it.
      workdir: where the results go.
      overwrite: replace a plan that is there.
      view: the screen; by default standard output.

    Raises:
      ValueError: for values that make no sense, a topology or a model that is not known, libtpu missing, or a workdir
        that holds another plan.
      OSError: where a shape cannot be read.
    """
    view, workdir = view or View(), pathlib.Path(workdir)
    check(config)
    if _claim(config, workdir, overwrite):
        view.line(f"The plan is finished in {workdir}{os.sep}; --overwrite makes it anew.")
        return
    # Nothing is computed: whatever accelerator is here stays free. And a program for a TPU that is not here can be
    # written to the compilation cache, but not read from it.
    jax.config.update("jax_platforms", jax.config.values["jax_platforms"] or "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    rows = []
    for name, setup in setups(config).items():
        compiled, compiles = None, setup.topology.chip.tpu and config.compile
        if compiles:
            with view.status(f"Compiling {config.target} with {name} for {setup.topology.name} (a minute or two)"):
                compiled = _compiled(setup, config)
        rows.append(make_row(name, setup, config, compiled, exhausted=compiles and compiled is None))
    workdir.mkdir(parents=True, exist_ok=True)
    files.write(workdir / "config.json", results.to_json(config.to_dict()))
    files.write(workdir / "summary.md", report.summary(config.name, rows))
    plots.save(workdir, {"plan.png": report.figure(rows)})
    files.write(workdir / "results.json", json.dumps(rows, indent=1) + "\n")
    for line in report.headlines(rows):
        view.line(line)
    view.line(f"Results: {workdir}{os.sep} ({', '.join(FILES)})", "bold")
