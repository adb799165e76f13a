"""Speculative against plain decoding of the same prompts, in one process: same buffer, same batch, in turn.

Every batch is decoded by both sides `config.repeats` times, and the medians count. What is timed is decoding alone,
to the last token; reading the prompts (prefill) and compiling are reported apart.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from specjax import api, decoding, drafters, files, metrics
from specjax.api import pretrained
from specjax.api.pretrained import Pretrained
from specjax.experiments import choices, prompts, results
from specjax.experiments.prompts import Prompt
from specjax.experiments.reports import compare as report
from specjax.experiments.reports import plots
from specjax.experiments.reports.accepted_text import segments
from specjax.experiments.reports.display import View
from specjax.experiments.results import Row
from specjax.parallel import distributed, sharding
from specjax.sampling import automaton
from specjax.types import Automaton, DecodeState, Drafter

Config = Any
"""An `ml_collections.ConfigDict` with the keys of `configs/compare.py`."""

CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "chat": ("auto", "true", "false"),
    "draft_sharding": ("split", "replicated"),
}

_AT_LEAST_ONE = ("max_new_tokens", "batch_size", "repeats", "mesh_data", "mesh_model")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts that are decoded together. The last batch is filled up with rows that are done at once.

    Attributes:
      number: which batch of the run it is.
      prompts: at most as many as the run's batch size.
      tokens: their token ids, filled up.
      max_new_tokens: of each row.
      seeds: one a row: that of the run plus the prompt's number, so that a text does not depend on the batching.
    """

    number: int
    prompts: list[Prompt]
    tokens: list[list[int]]
    max_new_tokens: list[int]
    seeds: list[int]


@dataclasses.dataclass(frozen=True)
class Decoded:
    """One decoding of a batch by one side.

    Attributes:
      generation: the texts.
      state: the counters lie in it.
      prefill_seconds: of checking, reading and prefilling the prompts.
      seconds: of decoding.
    """

    generation: api.Generation
    state: DecodeState
    prefill_seconds: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all batches of a run share.

    Attributes:
      target: the target.
      drafter: the drafter of the speculative side.
      options: of `api.prepare`, without what differs between sides or batches.
      repeats: how often each side decodes a batch.
    """

    target: Pretrained
    drafter: Drafter
    options: dict[str, Any]
    repeats: int

    @property
    def plain(self) -> Drafter:
        """Plain decoding: at a fixed shape, that of the drafter."""
        k = self.drafter.num_draft_tokens if self.options["fixed_shape"] else 0
        return drafters.none(num_draft_tokens=k)

    def prepare(self, drafter: Drafter, batch: Batch) -> api.Request:
        """Reads a batch's prompts into the caches of one side."""
        request = api.prepare(
            self.target,
            batch.tokens,
            drafter=drafter,
            max_new_tokens=batch.max_new_tokens,
            seed=batch.seeds,
            **self.options,
        )
        return request._replace(state=jax.block_until_ready(request.state))

    def decode(self, drafter: Drafter, batch: Batch) -> Decoded:
        """Decodes a batch and takes the time."""
        begin = time.perf_counter()
        request = self.prepare(drafter, batch)
        prefilled = time.perf_counter()
        state = api.run(request)
        seconds = time.perf_counter() - prefilled
        return Decoded(api.finish(request, state), state, prefilled - begin, seconds)

    def compile(self, drafter: Drafter, batch: Batch) -> float:
        """Compiles what one side needs for a batch, by one step of it, and then decodes the batch to its end.

        A program's branches, for steps that draft and steps that do not, take longer when they are first run.

        Returns:
          the seconds until the first step was done.
        """
        begin = time.perf_counter()
        request = self.prepare(drafter, batch)
        with sharding.on_mesh(request.mesh):
            # The number of steps is an argument of the program that `generate` runs.
            state = decoding.advance(
                request.target.model,
                request.drafter,
                request.rule,
                request.params,
                request.state,
                np.int32(1),
                request.fixed_shape,
            )
        state = jax.block_until_ready(api.readable(request, state))
        seconds = time.perf_counter() - begin
        api.run(request._replace(state=state))
        return seconds

    def measure_costs(self, batch: Batch) -> metrics.Costs:
        """Times the parts of a step at this batch."""
        request = self.prepare(self.drafter, batch)
        with sharding.on_mesh(request.mesh):
            return metrics.measure_costs(request.target.model, request.drafter, request.params, request.state)


def check(config: Config) -> None:
    """Refuses values that make no sense, before anything is loaded.

    Raises:
      ValueError: naming the key, its value and the remedy.
    """
    for key, known in CHOICES.items():
        if config[key] not in known:
            raise ValueError(f"config.{key}={config[key]!r}: choose one of {', '.join(known)}.")
    for key in _AT_LEAST_ONE:
        if config[key] < 1:
            raise ValueError(f"config.{key}={config[key]}: at least 1.")
    if config.num_prompts < 0:
        raise ValueError(f"config.num_prompts={config.num_prompts}: at least 0, which reads all.")
    if config.batch_size > choices.MAX_BATCH:
        raise ValueError(f"config.batch_size={config.batch_size}: at most {choices.MAX_BATCH}.")
    choices.check_drafter(config)
    sharding.with_whole(config.mesh_whole)
    for key in ("target", "data"):
        if not config[key]:
            raise ValueError(f"config.{key} is empty: give --config.{key}=...")
    choices.check_num_draft_tokens(config.num_draft_tokens)
    choices.check_seed(config.seed, config.num_prompts)
    choices.check_sampling({name: config[name] for name in results.SAMPLING})
    if not math.isfinite(config.step_cost):
        raise ValueError(f"config.step_cost={config.step_cost} is no finite number: below 0, it is measured.")
    choices.check_rule(config.verify, config.temperature)
    if config.regex and config.json_schema:
        raise ValueError("config.regex and config.json_schema are both given: choose one.")
    if config.json_schema and not pathlib.Path(config.json_schema).is_file():
        raise FileNotFoundError(f"config.json_schema={config.json_schema!r} is no file: give one with a JSON schema.")
    if config.batch_size % config.mesh_data:
        raise ValueError(f"config.batch_size={config.batch_size} is not a multiple of mesh_data={config.mesh_data}.")


def device_name() -> str:
    """The devices of this process in words."""
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    if jax.default_backend() == "cpu":
        return f"cpu ({os.cpu_count()} cores)" if count == 1 else f"cpu ({os.cpu_count()} cores, {count} devices)"
    return kind if count == 1 else f"{count} x {kind}"


def load(config: Config, view: View) -> tuple[Pretrained, Callable[[int], Drafter]]:
    """The target and its drafter, by K, as the keys of `configs/compare.py` name them.

    Raises:
      ValueError: where the target has no tokenizer, or what is loaded does not fit.
      OSError: for files that cannot be read.
    """
    mesh = None
    if config.mesh_data * config.mesh_model > 1:
        mesh = sharding.make_mesh(data=config.mesh_data, model=config.mesh_model)

    target_rules = sharding.with_whole(config.mesh_whole)

    def read(source: str, rules: sharding.Rules = target_rules, int8: bool = False) -> Pretrained:
        with view.status(f"Loading {source}{pretrained.download_note(source)}"):
            loaded = pretrained.load(source, dtype=config.dtype, mesh=mesh, rules=rules, int8=int8)
            jax.block_until_ready(loaded.params)
        return loaded

    target = read(config.target)
    draft_rules = sharding.REPLICATED if config.draft_sharding == "replicated" else target_rules
    if target.tokenizer is None:
        raise ValueError(f"The target {config.target} has no tokenizer: save one beside it (tokenizer.json).")

    def read_draft() -> Pretrained:
        same = config.draft == config.target and not config.draft_int8
        return target if same else read(config.draft, draft_rules, config.draft_int8)

    return target, choices.drafter_of(config, target, read_draft)


def batches(
    chosen: Sequence[Prompt], encoded: Sequence[list[int]], *, batch_size: int, max_new_tokens: int, seed: int
) -> list[Batch]:
    """Prompts in batches, in their order."""
    found = []
    for number, begin in enumerate(range(0, len(chosen), batch_size)):
        rows, tokens = list(chosen[begin : begin + batch_size]), list(encoded[begin : begin + batch_size])
        filler = batch_size - len(rows)
        found.append(
            Batch(
                number,
                rows,
                tokens + [tokens[0]] * filler,
                [max_new_tokens] * len(rows) + [0] * filler,
                [seed + row.number for row in rows] + [0] * filler,
            )
        )
    return found


def _grammar(config: Config, target: Pretrained) -> Automaton | None:
    assert target.tokenizer is not None
    if config.regex:
        return automaton.regex(config.regex, target.tokenizer, vocab_size=target.model.vocab_size)
    if config.json_schema:
        schema = pathlib.Path(config.json_schema).read_text()
        return automaton.json_schema(schema, target.tokenizer, vocab_size=target.model.vocab_size)
    return None


def _buffer(config: Config, target: Pretrained, encoded: Sequence[list[int]], num_draft_tokens: int) -> int:
    """One buffer length for both sides and all batches."""
    inputs = decoding.read_inputs(target.model, encoded)
    longest = int(np.argmax(inputs.length))
    needed = int(inputs.length[longest]) + config.max_new_tokens
    if needed > target.model.max_len:
        raise ValueError(
            f"Prompt {longest} of {config.data} has {needed - config.max_new_tokens} tokens; with "
            f"{config.max_new_tokens} new ones that makes {needed}, but the target knows {target.model.max_len} "
            "positions: lower config.max_new_tokens, or leave the prompt out."
        )
    return max(decoding.buffer_length(needed, num_draft_tokens), inputs.tokens.shape[1])


def _bench(config: Config, chosen: Sequence[Prompt], view: View) -> tuple[Bench, list[Batch]]:
    target, drafter_of = load(config, view)
    drafter = drafter_of(config.num_draft_tokens)
    assert target.tokenizer is not None
    chat = target.tokenizer.has_chat_template if config.chat == "auto" else config.chat == "true"
    encoded = api.encode(target, [prompt.text for prompt in chosen], chat=chat)
    options = {
        "verify": choices.rule(config.verify),
        **{name: config[name] for name in results.SAMPLING},
        "stop_strings": tuple(config.stop_strings),
        "grammar": _grammar(config, target),
        "fixed_shape": config.fixed_shape,
        "max_len": _buffer(config, target, encoded, drafter.num_draft_tokens),
        "step_cost": max(config.step_cost, 0.0),
    }
    sizes = {name: config[name] for name in ("batch_size", "max_new_tokens", "seed")}
    return Bench(target, drafter, options, config.repeats), batches(chosen, encoded, **sizes)


def _common(config: Config, bench: Bench, costs: metrics.Costs, device: str) -> Row:
    """The fields of `results.COMMON`."""
    from_config = ("target", "draft", "drafter", "batch_size", "max_new_tokens", "seed", "dtype", "repeats")
    return {name: config[name] for name in (*from_config, *results.SAMPLING, "fixed_shape")} | {
        "drafter": choices.name_of(config.drafter),
        "verify": bench.options["verify"].name,
        "exact": bench.options["verify"].exact,
        "num_draft_tokens": bench.drafter.num_draft_tokens,
        "max_len": bench.options["max_len"],
        "cost_ratio": costs.cost_ratio,
        "score_cost": costs.score_cost,
        "step_cost": bench.options["step_cost"],
        "device": device,
        "jax_version": jax.__version__,
    }


def rows_of(common: Row, batch: Batch, sides: dict[str, list[Decoded]], compiled: dict[str, float]) -> list[Row]:
    """The rows of a batch from all repeats of both sides (`""`: speculative, `"baseline_"`: plain)."""
    shared: Row = {}
    for side, runs in sides.items():
        shared |= {
            f"{side}batch_tokens": runs[0].generation.stats.num_tokens,
            f"{side}seconds": float(np.median([run.seconds for run in runs])),
            f"{side}seconds_of_repeats": [run.seconds for run in runs],
            f"{side}prefill_seconds": float(np.median([run.prefill_seconds for run in runs])),
            f"{side}compile_seconds": compiled[side],
        }
    ours, plain = sides[""][0], sides["baseline_"][0]
    stats = jax.tree.map(np.asarray, ours.state.stats)
    rows = []
    for i, prompt in enumerate(batch.prompts):
        own = {
            "task": prompt.task,
            "prompt": prompt.number,
            "id": prompt.id,
            "batch": batch.number,
            "num_prompts": 1,
            "num_tokens": len(ours.generation.tokens[i]),
            "num_identical": int(ours.generation.tokens[i] == plain.generation.tokens[i]),
        }
        rows.append(results.derive(own | common | shared | results.counters(stats, i)))
    return rows


def _samples(bench: Bench, batch: Batch, ours: api.Generation, plain: api.Generation) -> list[Row]:
    tokenizer = bench.target.tokenizer
    assert tokenizer is not None
    assert ours.text is not None
    assert plain.text is not None
    return [
        {
            "task": prompt.task,
            "id": prompt.id,
            "prompt": prompt.text,
            "text": ours.text[i],
            "baseline_text": plain.text[i],
            "accepted": [list(part) for part in segments(tokenizer, ours.tokens[i], ours.from_draft[i])],
            "finish_reason": ours.finish_reason[i],
        }
        for i, prompt in enumerate(batch.prompts)
    ]


def _show_text(bench: Bench, batch: Batch, view: View) -> None:
    """Decodes a batch once more, apart from what is timed, and prints it; a single row's text as it grows."""
    tokenizer = bench.target.tokenizer
    assert tokenizer is not None

    def states() -> Iterator[tuple[list[int], list[bool]]]:
        request = bench.prepare(bench.drafter, batch)
        for state in api.run_in_steps(request, steps=2):
            generation = api.finish(request, state)
            yield generation.tokens[0], generation.from_draft[0]

    if len(batch.tokens) == 1:
        view.prompt(batch.prompts[0].name, batch.prompts[0].text)
        view.stream(tokenizer, states())
        return
    generation = bench.decode(bench.drafter, batch).generation
    for i, prompt in enumerate(batch.prompts):
        view.prompt(prompt.name, prompt.text)
        view.stream(tokenizer, [(generation.tokens[i], generation.from_draft[i])])


def measure(bench: Bench, batch: Batch) -> dict[str, list[Decoded]]:
    """Decodes a batch by both sides in turn; which goes first changes from repeat to repeat."""
    sides: dict[str, list[Decoded]] = {"": [], "baseline_": []}
    order = [("baseline_", bench.plain), ("", bench.drafter)]
    for _ in range(bench.repeats):
        for side, drafter in order:
            sides[side].append(bench.decode(drafter, batch))
        order.reverse()
    return sides


def _run_batches(
    config: Config, bench: Bench, batches: Sequence[Batch], workdir: results.Workdir, device: str, view: View
) -> None:
    # A bar and a spinner cannot share a terminal, nor a bar and text.
    quiet = contextlib.nullcontext()
    compiled: set[int] = set()

    def compile_sides(batch: Batch) -> dict[str, float]:
        width = decoding.pad_prompts(batch.tokens).tokens.shape[1]
        if width in compiled:
            return {"baseline_": 0.0, "": 0.0}
        compiled.add(width)
        with view.status(f"Compiling for prompts of up to {width} tokens") if config.show_text else quiet:
            plain = bench.compile(bench.plain, batch)
            return {"baseline_": plain, "": bench.compile(bench.drafter, batch)}

    if workdir.rows:
        # A continued run goes on with the costs of its beginning: sampled text may depend on them.
        costs, step_cost = results.costs_of(workdir.rows[0]), workdir.rows[0]["step_cost"]
    else:
        with view.status("Measuring the costs of a step"):
            costs = bench.measure_costs(batches[0])
        step_cost = distributed.from_first(costs.step_cost) if config.step_cost < 0 else config.step_cost
    bench.options["step_cost"] = step_cost
    common = _common(config, bench, costs, device)
    total = sum(len(batch.prompts) for batch in batches) + len(workdir.rows)
    with quiet if config.show_text else view.progress(total, len(workdir.rows)) as bar:
        for batch in batches:
            seconds = compile_sides(batch)
            if config.show_text:
                _show_text(bench, batch, view)
            sides = measure(bench, batch)
            rows = rows_of(common, batch, sides, seconds)
            workdir.add(rows, _samples(bench, batch, sides[""][0].generation, sides["baseline_"][0].generation))
            for row in workdir.rows[-len(rows) :] if config.show_text else ():
                view.row(row)
            if bar is not None:
                bar.advance(bar.task_ids[0], len(rows))


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Runs the comparison and writes its files.

    Args:
      config: as `configs/compare.py` has it.
      workdir: where the files go; a run that was interrupted there is continued.
      overwrite: delete an earlier run in the workdir first.
      view: the screen; by default standard output.

    Raises:
      ValueError: for values that make no sense, or a workdir that holds another run.
      OSError: for files that cannot be read or written.
    """
    view = view or View()
    check(config)
    chosen = prompts.read(config.data, config.num_prompts)
    store = results.Workdir(workdir, config.to_dict(), overwrite=overwrite)
    device = device_name()
    store.check_resumable([prompt.text for prompt in chosen], device)
    if store.rows:
        view.line(f"{len(store.rows)} of {len(chosen)} prompts are finished in {store.path}.")
    if len(store.rows) < len(chosen):
        if config.show_text:
            view.legend()
        bench, batches = _bench(config, chosen, view)
        finished = {row["batch"] for row in store.rows}
        _run_batches(config, bench, [b for b in batches if b.number not in finished], store, device, view)
    view.end(store.rows)
    with view.status("Plotting"):
        images = plots.write(store.path, report.lines(store.rows))
    files.write(store.path / "summary.md", report.summary(config.to_dict(), store.rows, images))
    view.line(f"Results: {store.path}{os.sep} ({', '.join(('summary.md', 'results.json', 'samples.jsonl', *images))})")
