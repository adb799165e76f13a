"""Plans a target and a draft on chips that you don't have: does it fit, how long is a step, which K is best."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Annotated, Any

import jax

from specjax import drafters, theory
from specjax.experiments import choices, plan_drafts
from specjax.experiments.reports import plan as report
from specjax.experiments.reports import plots
from specjax.experiments.reports.display import View
from specjax.experiments.results import Row
from specjax.experiments.settings import Check, Config, at_least, given, one_of, parse
from specjax.experiments.store import Store
from specjax.models import families
from specjax.models.config import ATTENTIONS, ModelConfig
from specjax.models.weights import shapes
from specjax.planning import aot, chips, kinds, plan
from specjax.planning.plan import Cost, Setup

FILES = ("config.json", "results.json", "summary.md")

_Costs = dict[str, Callable[[int], Cost]]
"""The cost of each call by the number of tokens that it reads, by the call's name."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `configs/plan.py`."""

    name: str
    target: Annotated[str, given("..., a preset, a directory or a hub id")]
    drafter: Annotated[str, one_of(*plan_drafts.DRAFTERS)]
    draft: str
    target_quantise: Annotated[str, choices.SPELLING]
    draft_quantise: Annotated[str, choices.SPELLING]
    dtype: str
    memory_gb: Annotated[float, at_least(0)]
    topology: str
    data: int
    draft_sharding: Annotated[str, one_of("split", "replicated")]
    num_draft_tokens: int
    max_draft_tokens: int
    trees: tuple[plan_drafts.Tree, ...]
    alpha: Annotated[float, Check(lambda alpha: 0 <= alpha <= 1, "a probability, from 0 to 1")]
    batch_size: int
    prompt_tokens: int
    max_new_tokens: int
    verify: str
    attention: Annotated[str, one_of(*ATTENTIONS)]
    temperature: Annotated[float, at_least(0)]
    compile: bool
    compiler_options: tuple[str, ...]
    layers: Annotated[str, Check(lambda name: name in ("few", "all"), "choose few (and extrapolate) or all")]
    reference_ms: dict[str, float]
    published: tuple[tuple[str, str, int, float, float], ...]
    lengths: tuple[tuple[str, tuple[int, ...], float, float, float], ...]

    def check(self) -> None:
        """Refuses a rule that does not exist, and values that do not fit each other."""
        choices.rule(self.verify)
        if self.target:
            plan_drafts.check(self.drafter, self.draft, self.trees, self.draft_quantise)
        choices.compiler_options(self.compiler_options)
        if self.max_draft_tokens < self.num_draft_tokens:
            raise ValueError(
                f"config.max_draft_tokens={self.max_draft_tokens} is less than "
                f"config.num_draft_tokens={self.num_draft_tokens}: raise it."
            )
        for row in self.published:
            if len(row) != 5:
                raise ValueError(f"config.published has {row}: give (task, draft, K, alpha, measured speedup).")
            if row[2] > self.max_draft_tokens:
                raise ValueError(
                    f"config.published has K = {row[2]}, more than config.max_draft_tokens={self.max_draft_tokens}: "
                    "raise that."
                )
        known = {(k,) for k in range(1, self.max_draft_tokens + 1)} | set(self.trees)
        for row in self.lengths:
            if len(row) != 5 or tuple(row[1]) not in known:
                raise ValueError(
                    f"config.lengths has {row}: give (source, drafts, tokens per step, ms/token, plain ms/token); "
                    f"drafts is (K,), at most config.max_draft_tokens={self.max_draft_tokens}, or one of config.trees."
                )


def _names(listed: str) -> list[str]:
    return [part.strip() for part in listed.split(",")]


def _within(topology: chips.Topology, gigabytes: float) -> chips.Topology:
    """The topology with no more memory on each chip than a budget; 0: all that it has."""
    memory = min(topology.chip.memory, int(gigabytes * 10**9) or topology.chip.memory)
    return dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, memory=memory))


def setups(chosen: Settings) -> list[tuple[str, Setup]]:
    """The plans that the settings ask for, each with the name of its draft: every draft on every topology.

    Raises:
      ValueError: for an unknown topology or model.
      OSError: where a shape cannot be read.
    """
    topologies = [_within(chips.parse(name), chosen.memory_gb) for name in _names(chosen.topology)]

    def read(name: str, how: str) -> ModelConfig:
        config = families.with_quantisation(shapes.read(name, chosen.dtype), how)
        return families.with_attention(config, chosen.attention)

    target, planned = read(chosen.target, chosen.target_quantise), plan_drafts.DRAFTERS[chosen.drafter]

    def read_draft(name: str) -> Any:
        shape = planned.shape(name, target, chosen.dtype)
        return families.with_quantisation(shape, chosen.draft_quantise) if chosen.draft_quantise else shape

    drafts = {name: read_draft(name) for name in _names(chosen.draft)}
    return [
        (
            name,
            Setup(
                target=target,
                draft=draft,
                topology=topology,
                data=chosen.data,
                num_draft_tokens=chosen.num_draft_tokens,
                batch_size=chosen.batch_size,
                prompt_tokens=chosen.prompt_tokens,
                max_new_tokens=chosen.max_new_tokens,
                draft_replicated=chosen.draft_sharding == "replicated",
                kind=planned.kind(None),
            ),
        )
        for topology in topologies
        for name, draft in drafts.items()
    ]


def _collectives(counts: aot.Counts) -> list[Row]:
    return [
        {"part": part or "rest", "kind": kind, "count": round(count, 3), "bytes": size, "largest": largest}
        for (part, kind), (count, size, largest) in counts.items()
    ]


def _compiled(setup: Setup, chosen: Settings) -> aot.Compiled | None:
    """The compiled step; None where even the few layers that are compiled do not fit."""
    rule = choices.rule(chosen.verify)
    mesh = aot.make_mesh(setup.topology, setup.data)
    options = choices.compiler_options(chosen.compiler_options)
    how: dict[str, Any] = {"every_layer": chosen.layers == "all", "compiler_options": options}
    try:
        return aot.extrapolate(setup, mesh, temperature=chosen.temperature, rule=rule, **how)
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


def _with_compiled(cost: Callable[[int], Cost], name: str, compiled: aot.Compiled | None) -> Callable[[int], Cost]:
    """Costs of a call with the collectives that XLA compiled, where it was compiled."""
    seen = {}
    if compiled is None or not any(of == name for of, _ in compiled.calls):
        return cost
    for (of, tokens), program in compiled.calls.items():
        if of == name:
            counts = program.collectives.values()
            seen[tokens] = (sum(count for count, _, _ in counts), sum(size for _, size, _ in counts))
    return plan.with_collectives(cost, seen)


def _memory(setup: Setup, compiled: aot.Compiled | None) -> tuple[Row, plan.Fit]:
    """The contents of the memory of a device, and whether they fit."""
    memory, step, overhead = plan.memory(setup), compiled.step if compiled else None, 0
    if step:
        # Arguments that no step reads, such as an encoder, are not the program's, but they are in memory.
        padding = max(step.argument_bytes - sum(memory), 0)
        overhead = math.ceil(padding + step.temporary_bytes + step.code_bytes)
    fit = plan.fit(setup, overhead)
    return {
        **memory._asdict(),
        "temporaries": step.temporary_bytes if step else None,
        "code": step.code_bytes if step else None,
        "compiled_arguments": step.argument_bytes if step else None,
        "needed": fit.needed,
        "available": fit.available,
    }, fit


def _of_drafts(setup: Setup, chosen: Settings, cost: _Costs) -> list[tuple[tuple[int, ...], plan.StepTimes]]:
    """The times of the steps of chains, (K,), and of trees, (width, depth, nodes)."""
    most = min(chosen.max_draft_tokens, setup.kind.most(setup.draft) or chosen.max_draft_tokens)
    sizes: list[tuple[tuple[int, ...], Setup]] = [
        ((k,), dataclasses.replace(setup, num_draft_tokens=k)) for k in range(1, most + 1)
    ]
    for tree in chosen.trees:
        dynamic = drafters.Dynamic(*tree)
        kind = plan_drafts.DRAFTERS[chosen.drafter].kind(dynamic)
        sizes.append((tuple(tree), dataclasses.replace(setup, num_draft_tokens=dynamic.num_nodes, kind=kind)))
    return [(size, plan.step_times(found, cost)) for size, found in sizes]


def _times(setup: Setup, chosen: Settings, compiled: aot.Compiled | None) -> Row:
    """The calls of a step, and what they predict for every K and every tree."""
    computed = plan.costs(setup)
    cost = {name: _with_compiled(found, name, compiled) for name, found in computed.items()}
    programs, k = compiled.calls if compiled else {}, setup.num_draft_tokens
    wanted = [(reads.call, reads.tokens) for reads in setup.step.drafting if reads.call != kinds.TARGET]
    wanted += [(kinds.TARGET, tokens) for tokens in range(1, setup.step.scored + 1)]
    found = _of_drafts(setup, chosen, cost)
    chains = [times for size, times in found if len(size) == 1]
    plain = chains[0].plain
    drafting = [0.0, *(times.drafting for times in chains)]
    forecast = plan.forecast([plain, *(times.scoring for times in chains)], drafting, chosen.alpha)
    return {
        "calls": [
            _call(setup, name, tokens, cost[name](tokens), computed[name](tokens), programs.get((name, tokens)))
            for name, tokens in wanted
        ],
        "alpha": chosen.alpha,
        "cost_ratio": forecast.cost_ratio(k),
        "target_ms_by_tokens": [1e3 * seconds for seconds in forecast.target],
        "draft_ms": 1e3 * forecast.drafting[k] / k,
        "drafting_ms_by_draft_tokens": [1e3 * seconds for seconds in forecast.drafting],
        "ms_per_token_by_draft_tokens": forecast.milliseconds,
        "best_num_draft_tokens": forecast.best,
        "predicted_ms_per_token": forecast.milliseconds[k],
        "predicted_speedup": forecast.milliseconds[0] / forecast.milliseconds[k],
        "steps": [
            {
                "drafts": list(size),
                "drafting_ms": 1e3 * times.drafting,
                "scoring_ms": 1e3 * times.scoring,
                "ms": 1e3 * times.total,
                "pays_above": times.pays_above,
            }
            for size, times in found
        ],
        "lengths": [_at_length(row, dict(found)) for row in chosen.lengths if tuple(row[1]) in dict(found)],
    }


def _at_length(row: tuple[str, tuple[int, ...], float, float, float], found: dict[Any, plan.StepTimes]) -> Row:
    """What the plan predicts at a published number of tokens per step, beside the times that were published with it."""
    source, drafts, tokens, measured, plain = row
    times = found[tuple(drafts)]
    return {
        "source": source,
        "drafts": list(drafts),
        "tokens_per_step": tokens,
        "predicted_ms_per_token": times.milliseconds(tokens),
        "predicted_speedup": times.speedup(tokens),
        "measured_ms_per_token": measured or None,
        "measured_speedup": plain / measured if measured and plain else None,
    }


def _published(row: Row, chosen: Settings) -> list[Row]:
    """What the plan predicts at published acceptance rates, beside the speedups that were measured with them."""
    target, drafting = row["target_ms_by_tokens"], row["drafting_ms_by_draft_tokens"]
    found = []
    for task, draft, k, alpha, measured in chosen.published:
        if draft != row["draft"]:
            continue
        c = drafting[k] / (k * target[0])
        found.append(
            {
                "task": task,
                "num_draft_tokens": k,
                "alpha": alpha,
                "measured_speedup": measured,
                "theorem_speedup": theory.walltime_factor(alpha, k, c),
                "predicted_speedup": theory.walltime_factor(alpha, k, c, target[k] / target[0]),
            }
        )
    return found


def _step(compiled: aot.Compiled) -> Row:
    """The collectives and copies of the compiled step."""
    step = compiled.step
    return {
        "collectives": _collectives(step.collectives),
        "cache_copies": step.cache_copies,
        "gathered_bytes": step.gathered_bytes,
        "temporary_bytes": step.temporary_bytes,
        "kernels_per_step": step.kernels,
        "host_predicates": step.host_predicates,
        "output_bytes": step.output_bytes,
        "alias_bytes": step.alias_bytes,
    }


def make_row(name: str, setup: Setup, chosen: Settings, compiled: aot.Compiled | None, exhausted: bool) -> Row:
    """Everything that is known about one target and the draft `name` on one topology, as plain values.

    `exhausted` says that XLA ran out of memory.
    """
    memory, fit = _memory(setup, compiled)
    row = {
        "task": "plan",
        "target": chosen.target,
        "drafter": chosen.drafter,
        "draft": name or chosen.drafter,
        "topology": setup.topology.name,
        "chips": setup.topology.num_chips,
        "devices": setup.topology.num_devices,
        "mesh": {"data": setup.mesh_shape[0], "model": setup.mesh_shape[1]},
        "replicated": {side: plan.replicated(setup, side) for side in plan.SIDES},
        "draft_sharding": chosen.draft_sharding,
        "dtype": chosen.dtype,
        "quantised": {side: setup.shapes(side).quantised_as(setup.side(side)) for side in plan.SIDES},
        "attention": {side: plan.attention(setup, side)._asdict() for side in plan.SIDES},
        "verify": chosen.verify,
        "temperature": chosen.temperature,
        "num_draft_tokens": setup.num_draft_tokens,
        "batch_size": setup.batch_size,
        "buffer": setup.buffer,
        "num_parameters": {side: plan.num_params(setup, side) for side in plan.SIDES},
        "compiled": compiled is not None,
        "compiled_layers": compiled.layers if compiled else None,
        "extrapolated": compiled is not None and not compiled.exact,
        "compile_seconds": compiled.seconds if compiled else None,
        "memory": memory,
        "exhausted": exhausted,
        "fits": fit.fits and not exhausted,
        "remedies": fit.remedies,
        "step": _step(compiled) if compiled else None,
        **_times(setup, chosen, compiled),
        "reference_ms": {
            side: chosen.reference_ms.get(shape) for side, shape in (("target", chosen.target), ("draft", name))
        },
        "chip": dataclasses.asdict(setup.topology.chip),
        "jax_version": jax.__version__,
    }
    return {**row, "published": _published(row, chosen)}


def _images(chosen: Settings) -> dict[str, str]:
    """The file of the plot of each topology."""
    names = [chips.parse(name).name for name in _names(chosen.topology)]
    return {name: f"plan_{name.replace(':', '_')}.png" if len(names) > 1 else "plan.png" for name in names}


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Makes the plan, as `EXPERIMENTS` says; ValueError also for an unknown topology, or where libtpu is missing."""
    view, chosen = view or View(), parse(Settings, config)
    store = Store(workdir, config.to_dict(), overwrite=overwrite, names=(*FILES, *_images(chosen).values()))
    if store.holds("results.json"):
        view.line(f"The plan is finished in {store.directory}{os.sep}; --overwrite makes it anew.")
        return
    # Nothing is computed, so an accelerator of this machine stays free.
    jax.config.update("jax_platforms", jax.config.values["jax_platforms"] or "cpu")
    rows = []
    for name, setup in setups(chosen):
        chip = setup.topology.chip
        # Without a compiler for GPUs, shapes alone say much; for TPUs, the error names the compiler.
        compiled, compiles = None, chosen.compile and (chip.tpu or aot.is_available(chip))
        if chosen.compile and not compiles:
            view.line(
                f"Computed from shapes: JAX's CUDA plugin, which compiles for {chip.name} without a GPU, is not "
                "installed (pip install -e '.[cuda-plan]')."
            )
        if compiles:
            with view.status(f"Compiling {chosen.target} with {name} for {setup.topology.name} (a minute or two)"):
                compiled = _compiled(setup, chosen)
        rows.append(make_row(name, setup, chosen, compiled, exhausted=compiles and compiled is None))
    store.write_config()
    store.write("summary.md", report.summary(chosen.name, rows))
    images = plots.save(
        store.directory,
        {
            file: report.figure([row for row in rows if row["topology"] == name])
            for name, file in _images(chosen).items()
        },
    )
    store.write("results.json", json.dumps(rows, indent=1) + "\n")
    for line in report.headlines(rows):
        view.line(line)
    view.line(f"Results: {store.directory}{os.sep} ({', '.join((*FILES, *images))})", "bold")
