"""Both sides of a comparison on the same prompts, in one process: same buffer, same batch, in turn.

Every batch is decoded by both sides several times, and the medians count. Only decoding is timed, to the last
token; reading the prompts (prefill) and compilation are reported separately. All that experiments do with a model is
done here.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from specjax import api, decoding, drafters, metrics
from specjax.api import pretrained
from specjax.api.pretrained import Pretrained
from specjax.drafters import contract
from specjax.experiments import choices, drafting, results
from specjax.experiments.prompts import Prompt
from specjax.experiments.reports.display import View
from specjax.experiments.results import Row
from specjax.parallel import sharding
from specjax.state import DecodeState
from specjax.types import AnyDrafter, Topology


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts that are decoded together. The last batch is padded with sequences that are done at once.

    Attributes:
      number: which batch of the run it is.
      prompts: at most as many as the run's batch size.
      tokens: their token ids, padded to that size.
      max_new_tokens: the most new tokens of each sequence.
      seeds: the run's seed plus the number of each prompt, so that a text does not depend on the batching.
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
      state: the final state, with the counters of speculation.
      prefill_seconds: the time of checking, reading and prefilling the prompts.
      seconds: the time of decoding.
    """

    generation: api.Generation
    state: DecodeState
    prefill_seconds: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Workload:
    """Prompts, and what all decodings of them share.

    Attributes:
      target: the target.
      prompts: what is decoded.
      encoded: their token ids.
      max_new_tokens: the most new tokens of each text.
      repeats: how often each side decodes a batch; medians count.
      seed: prompt i uses `seed + i`.
      options: options of `api.prepare` that are the same for all drafters: `max_len`, `stop_strings` and others.
      fields: fields of result rows: the names of `target` and `dtype`.
    """

    target: Pretrained
    prompts: Sequence[Prompt]
    encoded: Sequence[list[int]]
    max_new_tokens: int
    repeats: int
    seed: int
    options: dict[str, Any]
    fields: Row

    def batches(self, batch_size: int, begin: int = 0, end: int | None = None) -> list[PromptBatch]:
        """Prompts in batches, in their order."""
        end, found = min(len(self.prompts), len(self.prompts) if end is None else end), []
        for number, first in enumerate(range(begin, end, batch_size)):
            part = slice(first, min(first + batch_size, end))
            chosen, tokens = list(self.prompts[part]), list(self.encoded[part])
            filler = batch_size - len(chosen)
            lengths = [self.max_new_tokens] * len(chosen) + [0] * filler
            seeds = [self.seed + prompt.number for prompt in chosen] + [0] * filler
            found.append(PromptBatch(number, chosen, tokens + [tokens[0]] * filler, lengths, seeds))
        return found


def workload(
    target: Pretrained,
    name: str,
    prompts: Sequence[Prompt],
    chosen: Any,
    num_read: int,
    *,
    chat: bool = False,
    one_width: bool = False,
    **options: Any,
) -> Workload:
    """Prompts in one buffer for all batches and both sides, with room for a draft.

    Args:
      target: the target.
      name: what results call it.
      prompts: what is decoded.
      chosen: settings with `max_new_tokens`, `repeats`, `seed` and `dtype`.
      num_read: the most draft tokens and probes of a step (`Topology.num_read`), of all drafters that will be used.
      chat: put each prompt into the model's chat template.
      one_width: pad all prompts to the longest, so that one program reads them.
      **options: further options of `api.prepare`.

    Raises:
      ValueError: where the target knows fewer positions than a prompt and its text need.
    """
    encoded = api.encode(target, [prompt.text for prompt in prompts], chat=chat)
    inputs = decoding.read_inputs(target.model, encoded)
    longest = int(np.argmax(inputs.length))
    length, known = int(inputs.length[longest]), target.model.max_len
    needed = length + chosen.max_new_tokens
    if needed > known:
        raise ValueError(
            f"Prompt {longest} has {length} tokens; with {chosen.max_new_tokens} new ones that makes {needed}, but the "
            f"target knows {known} positions: lower config.max_new_tokens, or leave the prompt out."
        )
    max_len = decoding.buffer_length(needed, num_read)
    if one_width:
        options["prompt_width"] = max(map(len, encoded))
    else:
        max_len = max(max_len, inputs.tokens.shape[1])
    options["max_len"], fields = max_len, {"target": name, "dtype": chosen.dtype}
    return Workload(target, prompts, encoded, chosen.max_new_tokens, chosen.repeats, chosen.seed, options, fields)


def pick(texts: Sequence[Prompt], chosen: Any, target: Pretrained, chat: bool) -> list[Prompt]:
    """The first prompts of each category that are not too long; `chosen` has `per_category` and `max_prompt_tokens`."""
    found: dict[str, list[Prompt]] = {}
    for prompt, tokens in zip(texts, api.encode(target, [prompt.text for prompt in texts], chat=chat), strict=True):
        group = found.setdefault(prompt.task, [])
        if len(group) < chosen.per_category and len(tokens) <= chosen.max_prompt_tokens:
            group.append(prompt)
    picked = [prompt for group in found.values() for prompt in group]
    if not picked:
        raise ValueError(f"config.max_prompt_tokens={chosen.max_prompt_tokens}: every prompt of the file is longer.")
    return picked


def prompt_width(batch: PromptBatch) -> int:
    """The length that a batch's prompts are padded to; each length is compiled to its own program."""
    return decoding.pad_prompts(batch.tokens).tokens.shape[1]


@dataclasses.dataclass(frozen=True)
class Bench:
    """A drafter against plain decoding.

    Attributes:
      work: what is decoded.
      drafter: the drafter of the speculative side.
      options: options of `api.prepare` in addition to the workload's: the rule, the sampling and `step_cost`.
    """

    work: Workload
    drafter: AnyDrafter
    options: dict[str, Any]

    @property
    def plain(self) -> AnyDrafter:
        """Plain decoding; with `fixed_shape`, in target calls of the drafter's shape."""
        k = self.topology.num_read if self.options["fixed_shape"] else 0
        return drafters.none(num_draft_tokens=k)

    @property
    def topology(self) -> Topology:
        """The shape of what the drafter proposes."""
        return contract.check(self.drafter).drafter.topology

    def prepare(self, drafter: AnyDrafter, batch: PromptBatch) -> api.Request:
        """Reads a batch's prompts into the caches of one side."""
        # Costs are those of the drafter; plain decoding has nothing to choose.
        options: dict[str, Any] = self.options if drafter is self.drafter else self.options | {"step_cost": 0.0}
        request = api.prepare(
            self.work.target,
            batch.tokens,
            drafter=drafter,
            max_new_tokens=batch.max_new_tokens,
            seed=batch.seeds,
            **self.work.options,
            **options,
        )
        return request._replace(state=jax.block_until_ready(request.state))

    def decode(self, drafter: AnyDrafter, batch: PromptBatch) -> Decoded:
        """Decodes a batch and times it."""
        begin = time.perf_counter()
        request = self.prepare(drafter, batch)
        prefilled = time.perf_counter()
        state = api.run(request)
        seconds = time.perf_counter() - prefilled
        return Decoded(api.finish(request, state), state, prefilled - begin, seconds)

    def grow(self, batch: PromptBatch) -> Iterator[api.Generation]:
        """Decodes a batch on the speculative side, and yields the texts so far every two steps."""
        request = self.prepare(self.drafter, batch)
        for state in api.run_in_steps(request, steps=2):
            yield api.finish(request, state)

    def compile(self, drafter: AnyDrafter, batch: PromptBatch) -> float:
        """Compiles what one side needs for a batch; returns the seconds until its first step was done.

        The batch is then decoded to its end: a program's branches, for steps that draft and steps that do not, take
        longer when they are first run.
        """
        begin = time.perf_counter()
        request = self.prepare(drafter, batch)
        with sharding.on_mesh(request.mesh):
            # The number of steps is an argument of the program that `generate` runs.
            first = (request.target.model, request.drafter, request.rule, request.params, request.state)
            state = decoding.compiled_with(request.compiler_options)(*first, np.int32(1), request.fixed_shape)
        state = jax.block_until_ready(api.readable(request, state))
        seconds = time.perf_counter() - begin
        api.run(request._replace(state=state))
        return seconds

    def compile_sides(self, batch: PromptBatch) -> dict[str, float]:
        """The seconds that compiling took, by side."""
        return {"baseline_": self.compile(self.plain, batch), "": self.compile(self.drafter, batch)}

    def measure_costs(self, batch: PromptBatch) -> metrics.Costs:
        """Times the parts of a step at this batch."""
        request = self.prepare(self.drafter, batch)
        with sharding.on_mesh(request.mesh):
            return metrics.measure_costs(request.target.model, request.drafter, request.params, request.state)

    def measure(self, batch: PromptBatch) -> dict[str, list[Decoded]]:
        """Decodes a batch on both sides in turn; the side that goes first alternates between repeats."""
        sides: dict[str, list[Decoded]] = {"": [], "baseline_": []}
        order = [("baseline_", self.plain), ("", self.drafter)]
        for _ in range(self.work.repeats):
            for side, drafter in order:
                sides[side].append(self.decode(drafter, batch))
            order.reverse()
        return sides

    def common(self, costs: metrics.Costs, device: str, **fields: Any) -> Row:
        """The fields of `results.COMMON`; those that the bench does not know are passed as `fields`."""
        options, rule = self.work.options | self.options, self.options["verify"]
        own = {
            "verify": rule.name,
            "exact": rule.exact,
            "num_draft_tokens": self.topology.depth,
            "max_new_tokens": self.work.max_new_tokens,
            "seed": self.work.seed,
            "repeats": self.work.repeats,
            "cost_ratio": costs.cost_ratio,
            "score_cost": costs.score_cost,
            "shorter_costs": [[n, draft / costs.plain, score / costs.plain] for n, draft, score in costs.shorter],
            "device": device,
            "jax_version": jax.__version__,
        }
        return {name: options[name] for name in results.COMMON if name in options} | self.work.fields | own | fields


def rows_of(common: Row, batch: PromptBatch, sides: dict[str, list[Decoded]], compiled: dict[str, float]) -> list[Row]:
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
    stats = jax.tree.map(np.asarray, ours.state.rows.stats)
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


def device_name() -> str:
    """The devices of this process in words."""
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    if jax.default_backend() == "cpu":
        return f"cpu ({os.cpu_count()} cores)" if count == 1 else f"cpu ({os.cpu_count()} cores, {count} devices)"
    return kind if count == 1 else f"{count} x {kind}"


def load(source: str, view: View, **options: Any) -> Pretrained:
    """Loads a model by `pretrained.load`."""
    with view.status(f"Loading {source}{pretrained.download_note(source)}"):
        loaded = pretrained.load(source, **options)
        jax.block_until_ready(loaded.params)
    return loaded


def load_target(chosen: choices.Models, view: View, attention: str = "einsum") -> tuple[Pretrained, drafting.Load]:
    """The target, and what loads its draft model; `attention` is that of `pretrained.load`.

    Raises:
      ValueError: where the target has no tokenizer, or what is loaded does not fit.
      OSError: for files that cannot be read.
    """
    mesh = None
    if chosen.mesh_data * chosen.mesh_model > 1:
        mesh = sharding.make_mesh(data=chosen.mesh_data, model=chosen.mesh_model)
    split = sharding.with_whole(chosen.mesh_whole)
    options: dict[str, Any] = {"dtype": chosen.dtype, "mesh": mesh, "attention": attention}
    target = load(chosen.target, view, **options, rules=split, quantise=chosen.target_quantise)
    if target.tokenizer is None:
        raise ValueError(f"The target {chosen.target} has no tokenizer: save one beside it (tokenizer.json).")

    @functools.cache
    def load_draft() -> Pretrained:
        if (chosen.draft, chosen.draft_quantise) == (chosen.target, chosen.target_quantise):
            return target
        rules = sharding.REPLICATED if chosen.draft_sharding == "replicated" else split
        return load(chosen.draft, view, **options, rules=rules, quantise=chosen.draft_quantise)

    return target, load_draft


def load_both(
    chosen: choices.Models, view: View, attention: str = "einsum"
) -> tuple[Pretrained, Callable[[int], AnyDrafter]]:
    """The target, and its drafter as a function of K; raises what `load_target` does."""
    target, load_draft = load_target(chosen, view, attention)
    return target, drafting.drafter_of(chosen, target, load_draft)
