"""The number of draft tokens, the lengths of programs and the tree that pay for a target, a drafter and a machine."""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import metrics, theory
from specjax.api import encode, prepare
from specjax.api.pretrained import Pretrained
from specjax.drafters import contract
from specjax.experiments import bench, choices, drafting, policies, prompts, results, traces, tuned
from specjax.experiments.policies import Costs, Group, Policy, Programs
from specjax.experiments.prompts import Prompt
from specjax.experiments.reports import tune as report
from specjax.experiments.reports.display import View
from specjax.experiments.results import Row
from specjax.experiments.settings import Config, all_at_least, at_least, given, one_of, parse
from specjax.experiments.store import Store
from specjax.experiments.traces import Trace
from specjax.experiments.tuned import Tuned
from specjax.parallel import sharding
from specjax.types import Batch, Model

FILE = "tuned.json"
"""What a run chose."""

RANKS, DEPTH = 8, 8
"""The siblings and the depth up to which trees are considered."""

LEAST_GAIN = 0.01
"""What a further length has to bring, since each is a program to compile."""


@dataclasses.dataclass(frozen=True)
class Settings(choices.AllModels):
    """The keys of `configs/tune.py`."""

    data: Annotated[str, given("FILE")]
    per_category: Annotated[int, at_least(1)]
    max_prompt_tokens: Annotated[int, at_least(1)]
    chat: Annotated[str, one_of("auto", "true", "false")]
    max_new_tokens: Annotated[int, at_least(2)]
    temperature: Annotated[float, at_least(0)]
    seed: int
    batch_sizes: Annotated[tuple[int, ...], all_at_least(1)]
    thresholds: tuple[float, ...]

    def check(self) -> None:
        """Refuses values that do not fit each other."""
        super().check()
        choices.check_seed(self.seed)
        if self.topology or self.depth or self.dynamic:
            raise ValueError("config.topology, depth and dynamic: this run finds the tree; leave them out.")
        if self.num_draft_tokens < 1:
            raise ValueError(f"config.num_draft_tokens={self.num_draft_tokens}: the most to try, at least 1.")
        if self.drafter in drafting.DRAFTERS and not drafting.DRAFTERS[self.drafter].lengths:
            having = ", ".join(name for name, entry in drafting.DRAFTERS.items() if entry.lengths)
            raise ValueError(f"config.drafter={self.drafter!r} has no chains of several lengths: choose from {having}.")
        if self.min_confidence:
            raise ValueError(
                f"config.min_confidence={self.min_confidence}: this run compares thresholds; give --config.thresholds="
                f"({self.min_confidence:g},)."
            )
        if self.thresholds and not self.runs_model:
            raise ValueError(f"config.thresholds={self.thresholds}: drafter={self.drafter} has no confidence; give ().")
        if not all(0 < threshold <= 1 for threshold in self.thresholds):
            raise ValueError(f"config.thresholds={self.thresholds}: probabilities above 0.")

    @property
    def runs_model(self) -> bool:
        """Whether the drafter rolls a model out, so that a threshold on its confidence may end a draft."""
        return self.drafter in drafting.DRAFTERS and drafting.DRAFTERS[self.drafter].runs_model


# Measuring.


def probe_lengths(num_draft_tokens: int) -> tuple[int, ...]:
    """The lengths below K at which costs are measured: 1, 3, 7, 15 ..., so that 2, 4, 8, 16 ... tokens are scored."""
    return tuple(n for n in (2**i - 1 for i in range(1, 10)) if n < num_draft_tokens)


def interpolated(costs: metrics.Costs) -> Costs:
    """The costs of every number of draft tokens, from those that were measured."""
    measured = [(0, 0.0, costs.plain), *costs.shorter, (costs.num_draft_tokens, costs.draft, costs.score)]
    lengths, draft, score = (np.array(column) for column in zip(*measured, strict=True))
    every = np.arange(costs.num_draft_tokens + 1)
    # More tokens are never cheaper: what is measured so is noise.
    rising = (np.maximum.accumulate(np.interp(every, lengths, x / costs.plain)) for x in (draft, score))
    return Costs(*map(jnp.asarray, rising))


@functools.cache
def _ranks(draft: Model) -> Callable[[Any, Batch], Any]:
    @jax.jit
    def of(params: Any, batch: Batch) -> Any:
        assert draft.score is not None
        logits = draft.score(params, batch)
        own = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)
        return jnp.sum(logits > own, axis=-1)

    return of


def ranks(draft: Model, params: Any, text: np.ndarray, begin: int) -> np.ndarray:
    """`[T]` the rank of each token from `begin` on among what the draft expects after the tokens before it."""
    size = -(-len(text) // 128) * 128
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : len(text)] = text
    following = np.roll(tokens, -1, axis=1)
    real = (np.arange(size) < len(text)).astype(np.int32)[None]
    positions = np.arange(size, dtype=np.int32)[None]
    tokens, following, real, positions = map(jnp.asarray, (tokens, following, real, positions))
    batch = Batch(tokens, following, real, positions, real.astype(jnp.float32), None, None)
    return np.asarray(_ranks(draft)(params, batch))[0, begin - 1 : len(text) - 1]


def acceptance_by_rank(found: Sequence[np.ndarray], num_ranks: int = RANKS, depth: int = DEPTH) -> list[list[float]]:
    """The chance that a child of each rank is the text's next token, by depth, given that its parent was.

    Args:
      found: `[T]` for each text, the rank of each of its tokens (`ranks`).
      num_ranks: the ranks that a tree may have.
      depth: how deep it may be.
    """
    chances = []
    for level in range(depth):
        at = [x[level:][_reached(x, level, num_ranks)] for x in found if len(x) > level]
        judged = np.concatenate(at) if at else np.zeros(0, int)
        if len(judged) < 20:
            break
        chances.append([float(np.mean(judged == rank)) for rank in range(num_ranks)])
    return chances


def _reached(rank: np.ndarray, level: int, num_ranks: int) -> np.ndarray:
    """For each position at depth `level` of a draft, whether all tokens above it were among the ranks of a tree."""
    size = len(rank) - level
    found = np.ones(size, bool)
    for i in range(level):
        found &= rank[i : size + i] < num_ranks
    return found


# Choosing.


def _time(policy: Policy, batches: Sequence[Group], programs: Programs) -> tuple[float, float]:
    """The speedup of a policy, a geometric mean over batches, and the draft tokens of a row in a step."""
    replays = [policies.replay(policy, texts, programs) for texts in batches]
    speedup = float(np.exp(np.mean([np.log(replay.speedup) for replay in replays])))
    drafted, steps = (np.concatenate(x).sum() for x in zip(*((x.drafted, x.steps) for x in replays), strict=True))
    return speedup, float(drafted / steps)


def candidates(num_draft_tokens: int) -> list[tuple[int, tuple[int, ...]]]:
    """Numbers of draft tokens with at most two shorter lengths, the simplest first."""
    ends = (*probe_lengths(num_draft_tokens), num_draft_tokens)
    pairs = [
        (most, lengths)
        for most in ends
        for size in range(3)
        for lengths in itertools.combinations([n for n in ends if n < most], size)
    ]
    return sorted(pairs, key=lambda pair: len(pair[1]))


def best_chain(batches: Sequence[Group], costs: Costs) -> tuple[int, tuple[int, ...], float]:
    """K, the shorter lengths and the speedup of the chain that pays most, with the loop's own choice in each step.

    A further length has to bring `LEAST_GAIN`; K is 0 where nothing does.
    """
    best: tuple[int, tuple[int, ...], float] = (0, (), 1.0)
    for most, lengths in candidates(len(costs.draft) - 1):
        speedup, _ = _time(policies.expected_value(), batches, policies.in_lengths(costs, lengths, most))
        least = 1 + LEAST_GAIN * (len(lengths) + 1 - (len(best[1]) + bool(best[0])))
        if speedup > best[2] * max(least, 1.0):
            best = most, lengths, speedup
    return best


def _named(depth: int, thresholds: Sequence[float], has_confidence: bool) -> list[tuple[str, Policy]]:
    """The policies that are compared, at most `depth` draft tokens each."""
    always, own = policies.fixed(depth), policies.expected_value()
    named = [(f"always {k}", policies.fixed(k)) for k in (*probe_lengths(depth), depth)]
    named += [("+2 / -1", policies.plus_two_minus_one())]
    named += [(f"always {depth}, confidence {x:g}", policies.confident(always, x)) for x in thresholds]
    if has_confidence:
        named += [(f"always {depth}, confidence of Draft & Verify", policies.draft_and_verify(depth))]
    named += [(f"expected value, confidence {x:g}", policies.confident(own, x)) for x in thresholds]
    return [*named, ("expected value", own)]


def compared(
    batches: Sequence[Group],
    costs: Costs,
    best: tuple[int, tuple[int, ...], float],
    thresholds: Sequence[float] = (),
    has_confidence: bool = False,
) -> list[Row]:
    """Every policy on the same texts: speedup, tokens drafted in a step, and regret against the oracle.

    Each has a program for every measured length, except where it says so.

    Args:
      batches: the texts.
      costs: of a step.
      best: from `best_chain`.
      thresholds: on the confidence of the draft.
      has_confidence: whether the traces have one, which Draft & Verify's moving threshold reads.
    """
    depth = len(costs.draft) - 1
    free = policies.in_lengths(costs, probe_lengths(depth), depth)
    bounds = [np.log(max(map(len, (x.text for x in texts))) / policies.oracle(texts, free)) for texts in batches]
    most = float(np.exp(np.mean(bounds)))
    rows: list[Row] = []

    def add(name: str, policy: Policy, programs: Programs) -> None:
        speedup, drafted = _time(policy, batches, programs)
        rows.append({"policy": name, "speedup": speedup, "drafted": drafted, "regret": most / speedup - 1})

    for name, policy in _named(depth, thresholds, has_confidence):
        add(name, policy, free)
    if best[0]:
        name = f"expected value, lengths {', '.join(map(str, (*best[1], best[0])))}"
        add(name, policies.expected_value(), policies.in_lengths(costs, best[1], best[0]))
    return [*rows, {"policy": "oracle", "speedup": most, "drafted": None, "regret": 0.0}]


def _by_category(texts: Sequence[Prompt], some: Sequence[Trace], programs: Programs, batch_size: int) -> list[Row]:
    """What the loop would do with each category of prompts, in batches of their own."""
    rows: list[Row] = []
    for task in dict.fromkeys(text.task for text in texts):
        own = [trace for text, trace in zip(texts, some, strict=True) if text.task == task]
        speedup, drafted = _time(policies.expected_value(), policies.groups(own, batch_size), programs)
        matched = float(np.mean(np.concatenate([trace.matched for trace in own])))
        rows.append({"task": task, "texts": len(own), "matched": matched, "drafted": drafted, "speedup": speedup})
    return rows


def _best_tree(chances: list[list[float]], costs: Costs) -> theory.BestTree:
    """The best tree, with a call of the draft for each depth; costs beyond what was measured are extrapolated."""
    score = np.asarray(costs.score)
    last = len(score) - 1
    slope = (score[-1] - score[-2]) if last else 0.0

    def score_cost(tokens: int) -> float:
        return float(np.interp(tokens - 1, np.arange(last + 1), score) + max(0, tokens - 1 - last) * slope)

    return theory.best_tree(chances, float(costs.draft[1]), score_cost, max_nodes=last)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a run measures with.

    Attributes:
      chosen: the settings.
      target: the target.
      load_draft: loads the draft model.
      drafter_of: the drafter of the settings, as a function of K.
      texts: the prompts, and `encoded` their token ids.
      store: keeps what is finished.
      view: the screen.
    """

    chosen: Settings
    target: Pretrained
    load_draft: drafting.Load
    drafter_of: drafting.OfK
    texts: list[Prompt]
    encoded: list[list[int]]
    store: Store
    view: View

    def costs(self, batch_size: int) -> Costs:
        """The costs of every number of draft tokens at a batch size."""
        some = list(itertools.islice(itertools.cycle(self.encoded), batch_size))
        drafter = self.drafter_of(self.chosen.num_draft_tokens)
        request = prepare(self.target, some, drafter=drafter, max_new_tokens=self.chosen.max_new_tokens)
        with sharding.on_mesh(request.mesh):
            measured = metrics.measure_costs(request.target.model, request.drafter, request.params, request.state)
        return interpolated(measured)

    def traces(self) -> list[Trace]:
        """The traces of all texts, with the confidence of drafters that run a model."""
        drafter_of = self.drafter_of
        if self.chosen.runs_model:
            chosen = dataclasses.replace(self.chosen, min_confidence=traces.LEAST_CONFIDENCE)
            drafter_of = drafting.drafter_of(chosen, self.target, self.load_draft)
        found = []
        with self.view.progress(len(self.texts), what="texts") as bar:
            for number, tokens in enumerate(self.encoded):
                key = f"trace of text {number}"
                found.append(self.store.get(key, lambda n=number, t=tokens: self._trace(drafter_of, n, t)))
                bar.advance(bar.task_ids[0])
        return [Trace(*map(np.array, parts)) for parts in found]

    def _trace(self, drafter_of: drafting.OfK, number: int, tokens: list[int]) -> list[list[Any]]:
        drafter = drafter_of(self.chosen.num_draft_tokens)
        width = max(map(len, self.encoded))
        options: dict[str, Any] = {"max_new_tokens": self.chosen.max_new_tokens, "prompt_width": width}
        options |= {"temperature": self.chosen.temperature, "seed": self.chosen.seed + number}
        [trace] = traces.record(self.target, [tokens], drafter, **options)
        return [part.tolist() for part in trace]


def _trees(run: _Run, drafted: Sequence[Trace]) -> list[list[float]]:
    """The acceptance by rank and depth, where the draft is a model that scores texts; else nothing."""
    draft = contract.check(run.drafter_of(run.chosen.num_draft_tokens))
    model = draft.model
    if run.chosen.drafter != "model" or model is None or model.score is None or model.start_token is not None:
        return []
    found = [
        ranks(model, draft.params, np.concatenate([tokens, trace.text]), len(tokens))
        for tokens, trace in zip(run.encoded, drafted, strict=True)
    ]
    return acceptance_by_rank(found)


def _choose(run: _Run, batch_size: int, costs: Costs, drafted: Sequence[Trace], chances: list[list[float]]) -> Row:
    """What pays at a batch size, with all that it was chosen from; kept for later runs."""
    batches = policies.groups(drafted, batch_size)
    k, lengths, speedup = best_chain(batches, costs)
    used = policies.in_lengths(costs, lengths, k or 1)
    tree = _best_tree(chances, costs) if chances else theory.BestTree((), 1.0, 1.0)
    gains = 1 / tree.time_per_token > speedup * (1 + LEAST_GAIN) and len(tree.paths) > max(map(len, tree.paths))
    found = Tuned(
        k,
        lengths,
        tuple(np.asarray(used.costs.step)[1 : k + 1].tolist()),
        tree.paths if gains else (),
        max(speedup, 1 / tree.time_per_token if gains else 1.0),
    )
    tuned.save(run.chosen, batch_size, found)
    return {
        "batch_size": batch_size,
        "tuned": dataclasses.asdict(found),
        "draft_costs": np.asarray(costs.draft).tolist(),
        "score_costs": np.asarray(costs.score).tolist(),
        "policies": compared(batches, costs, (k, lengths, speedup), run.chosen.thresholds, run.chosen.runs_model),
        "categories": _by_category(run.texts, drafted, used, batch_size),
        "acceptance_by_rank": chances,
        "tree_speedup": 1 / tree.time_per_token,
    }


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Measures and chooses, as `EXPERIMENTS` says."""
    view, chosen = view or View(), parse(Settings, config)
    store = Store(
        workdir, config.to_dict(), overwrite=overwrite, names=(FILE, "results.json", "summary.md", "tune.png")
    )
    store.write_config()
    lengths = probe_lengths(chosen.num_draft_tokens)
    target, load_draft = bench.load_target(chosen, view)
    assert target.tokenizer is not None
    drafter_of = drafting.drafter_of(dataclasses.replace(chosen, lengths=lengths), target, load_draft)
    chat = target.tokenizer.has_chat_template if chosen.chat == "auto" else chosen.chat == "true"
    texts = bench.pick(prompts.read(chosen.data, 0), chosen, target, chat)
    encoded = encode(target, [text.text for text in texts], chat=chat)
    this = _Run(chosen, target, load_draft, drafter_of, texts, encoded, store, view)
    view.line(f"{len(texts)} texts, up to {chosen.num_draft_tokens} draft tokens.")
    drafted = this.traces()
    chances = store.get("acceptance by rank", lambda: _trees(this, drafted))
    measured = []
    for batch_size in chosen.batch_sizes:
        with view.status(f"Measuring the costs of a step at batch {batch_size}"):
            parts = store.get(f"costs at batch {batch_size}", lambda b=batch_size: [x.tolist() for x in this.costs(b)])
        costs = Costs(*map(jnp.asarray, parts))
        measured.append(_choose(this, batch_size, costs, drafted, chances))
    store.write("results.json", results.to_json(measured))
    store.write(FILE, results.to_json([row["tuned"] for row in measured]))
    images = report.plot(store.directory, measured)
    store.write("summary.md", report.summary(chosen, bench.device_name(), measured, images))
    for row in measured:
        view.line(report.line(chosen, row), "bold")
    view.line(f"Results: {store.directory}{os.sep} (summary.md, results.json, {FILE}, {', '.join(images)})")
