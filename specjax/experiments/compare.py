"""Speculative against plain decoding of the same prompts (`bench`): a row for each prompt, and one for all."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

from specjax import api
from specjax.api.pretrained import Pretrained
from specjax.drafters import contract
from specjax.experiments import bench, choices, prompts, results, tuned
from specjax.experiments.bench import Bench, PromptBatch
from specjax.experiments.prompts import Prompt
from specjax.experiments.reports import compare as report
from specjax.experiments.reports import plots
from specjax.experiments.reports.accepted_text import segments
from specjax.experiments.reports.display import View
from specjax.experiments.results import Row
from specjax.experiments.settings import FINITE, Config, at_least, at_most, given, one_of, parse
from specjax.experiments.store import RowStore
from specjax.models.config import ATTENTIONS
from specjax.parallel import distributed
from specjax.sampling import automaton
from specjax.types import Automaton


@dataclasses.dataclass(frozen=True)
class Settings(choices.AllModels):
    """The keys of `configs/compare.py`."""

    data: Annotated[str, given("FILE")]
    verify: str
    num_prompts: Annotated[int, at_least(0, ", which reads all")]
    chat: Annotated[str, one_of("auto", "true", "false")]
    max_new_tokens: Annotated[int, at_least(1)]
    sampling: results.Sampling
    stop_strings: tuple[str, ...]
    regex: str
    json_schema: str
    seed: int
    batch_size: Annotated[int, at_least(1), at_most(65_536)]
    fixed_shape: bool
    attention: Annotated[str, one_of(*ATTENTIONS)]
    compiler_options: tuple[str, ...]
    repeats: Annotated[int, at_least(1)]
    step_cost: Annotated[float, FINITE]
    tuned: bool
    show_text: bool

    def check(self) -> None:
        """Refuses values that do not fit each other."""
        super().check()
        choices.check_seed(self.seed, self.num_prompts)
        choices.check_sampling(dataclasses.asdict(self.sampling))
        choices.check_rule(self.verify, self.sampling.temperature)
        if self.regex and self.json_schema:
            raise ValueError("config.regex and config.json_schema are both given: choose one.")
        if self.json_schema and not pathlib.Path(self.json_schema).is_file():
            raise FileNotFoundError(
                f"config.json_schema={self.json_schema!r} is not a file: give one with a JSON schema."
            )
        choices.compiler_options(self.compiler_options)
        if self.tuned:
            tuned.load(self, self.batch_size)
        if self.batch_size % self.mesh_data:
            raise ValueError(f"config.batch_size={self.batch_size} is not a multiple of mesh_data={self.mesh_data}.")


def check(config: Config) -> Settings:
    """The settings that a config has; `settings.parse` says what is refused."""
    return parse(Settings, config)


def _grammar(chosen: Settings, target: Pretrained) -> Automaton | None:
    assert target.tokenizer is not None
    if chosen.regex:
        return automaton.regex(chosen.regex, target.tokenizer, vocab_size=target.model.vocab_size)
    if chosen.json_schema:
        schema = pathlib.Path(chosen.json_schema).read_text()
        return automaton.json_schema(schema, target.tokenizer, vocab_size=target.model.vocab_size)
    return None


def _tuned(chosen: Settings, view: View) -> Settings:
    """The settings with the shape of the drafts that `configs/tune.py` chose."""
    found = tuned.load(chosen, chosen.batch_size)
    view.line(f"As tuned: {found.shape}, which was expected to give {found.predicted_speedup:.2f}x.")
    if found.topology:
        return dataclasses.replace(chosen, topology=found.topology, lengths=())
    return dataclasses.replace(chosen, num_draft_tokens=found.num_draft_tokens, lengths=found.lengths)


def _bench(chosen: Settings, texts: Sequence[Prompt], view: View) -> Bench:
    chosen = _tuned(chosen, view) if chosen.tuned else chosen
    target, drafter_of = bench.load_both(chosen, view, attention=chosen.attention)
    drafter = drafter_of(chosen.num_draft_tokens)
    assert target.tokenizer is not None
    chat = target.tokenizer.has_chat_template if chosen.chat == "auto" else chosen.chat == "true"
    work = bench.workload(
        target,
        chosen.target_name,
        texts,
        chosen,
        contract.check(drafter).drafter.topology.num_read,
        chat=chat,
        stop_strings=tuple(chosen.stop_strings),
        grammar=_grammar(chosen, target),
    )
    own: dict[str, Any] = {"verify": choices.rule(chosen.verify), "fixed_shape": chosen.fixed_shape}
    own["compiler_options"] = choices.compiler_options(chosen.compiler_options)
    return Bench(work, drafter, own | dataclasses.asdict(chosen.sampling) | {"step_cost": max(chosen.step_cost, 0.0)})


def _samples(side: Bench, batch: PromptBatch, ours: api.Generation, plain: api.Generation) -> list[Row]:
    tokenizer = side.work.target.tokenizer
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


def _show_text(side: Bench, batch: PromptBatch, view: View) -> None:
    """Decodes a batch once more, untimed, and prints it; the text of a single prompt is printed as it grows."""
    tokenizer = side.work.target.tokenizer
    assert tokenizer is not None
    if len(batch.tokens) == 1:
        view.prompt(batch.prompts[0].name, batch.prompts[0].text)
        view.stream(tokenizer, ((part.tokens[0], part.from_draft[0]) for part in side.grow(batch)))
        return
    whole = side.decode(side.drafter, batch).generation
    for i, prompt in enumerate(batch.prompts):
        view.prompt(prompt.name, prompt.text)
        view.stream(tokenizer, [(whole.tokens[i], whole.from_draft[i])])


def _with_costs(chosen: Settings, side: Bench, first: PromptBatch, store: RowStore, view: View) -> tuple[Bench, Row]:
    """The bench with the cost of a step, and the fields that all rows share."""
    if store.rows:
        # A resumed run keeps the costs that it measured first: sampled text may depend on them.
        costs, step_cost = results.costs_of(store.rows[0]), store.rows[0]["step_cost"]
    else:
        with view.status("Measuring the costs of a step"):
            costs = side.measure_costs(first)
        step_cost = distributed.from_first(list(costs.step_costs)) if chosen.step_cost < 0 else chosen.step_cost
    side = dataclasses.replace(side, options=side.options | {"step_cost": step_cost})
    names = {"draft": chosen.draft_name, "drafter": choices.name_of(chosen.drafter), "batch_size": chosen.batch_size}
    return side, side.common(costs, bench.device_name(), **names)


def _decode(chosen: Settings, side: Bench, store: RowStore, view: View) -> None:
    """Decodes the batches that are not finished."""
    finished, batches = {row["batch"] for row in store.rows}, side.work.batches(chosen.batch_size)
    side, common = _with_costs(chosen, side, batches[0], store, view)
    # A bar and a spinner cannot share a terminal, nor a bar and text.
    quiet = contextlib.nullcontext()
    compiled: set[int] = set()
    with quiet if chosen.show_text else view.progress(len(side.work.prompts), len(store.rows)) as bar:
        for batch in (batch for batch in batches if batch.number not in finished):
            width, seconds = bench.prompt_width(batch), {"baseline_": 0.0, "": 0.0}
            if width not in compiled:
                compiled.add(width)
                with view.status(f"Compiling for prompts of up to {width} tokens") if chosen.show_text else quiet:
                    seconds = side.compile_sides(batch)
            if chosen.show_text:
                _show_text(side, batch, view)
            sides = side.measure(batch)
            rows = bench.rows_of(common, batch, sides, seconds)
            store.add(rows, _samples(side, batch, sides[""][0].generation, sides["baseline_"][0].generation))
            for row in store.rows[-len(rows) :] if chosen.show_text else ():
                view.row(row)
            if bar is not None:
                bar.advance(bar.task_ids[0], len(rows))


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Runs the comparison, as `EXPERIMENTS` says."""
    view, chosen = view or View(), check(config)
    texts = prompts.read(chosen.data, chosen.num_prompts)
    store = RowStore(workdir, config.to_dict(), overwrite=overwrite)
    store.check_resumable([prompt.text for prompt in texts], bench.device_name())
    if store.rows:
        view.line(f"{len(store.rows)} of {len(texts)} prompts are finished in {store.directory}.")
    if len(store.rows) < len(texts):
        if chosen.show_text:
            view.legend()
        _decode(chosen, _bench(chosen, texts, view), store, view)
    view.end(store.rows)
    with view.status("Plotting"):
        images = plots.write(store.directory, report.lines(store.rows))
    store.write("summary.md", report.summary(config.to_dict(), store.rows, images))
    names = ", ".join(("summary.md", "results.json", "samples.jsonl", *images))
    view.line(f"Results: {store.directory}{os.sep} ({names})")
