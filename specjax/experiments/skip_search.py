"""Which sublayers of a target its own drafts can do without: the search of Draft & Verify (arXiv 2309.08168, §4)."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from specjax import drafters
from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.experiments import bench, choices, prompts, results
from specjax.experiments.bench import Bench, PromptBatch, Workload
from specjax.experiments.reports import skip_search as report
from specjax.experiments.reports.display import View
from specjax.experiments.settings import Check, Config, at_least, given, one_of, parse
from specjax.experiments.store import Store
from specjax.types import Batch, Skips

FILE = "skips.json"
"""What a run found: the numbers of the layers whose `attention` and `mlp` are left out."""

Sublayer = tuple[str, int]
"""`attention` or `mlp`, and the number of the layer."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `configs/skip_search.py`."""

    target: Annotated[str, given("SOURCE")]
    dtype: Annotated[str, one_of("float32", "bfloat16")]
    data: Annotated[str, given("FILE")]
    num_prompts: Annotated[int, at_least(0, ", which reads all")]
    chat: Annotated[str, one_of("auto", "true", "false")]
    max_new_tokens: Annotated[int, at_least(1)]
    temperature: Annotated[float, at_least(0)]
    seed: int
    num_draft_tokens: Annotated[int, at_least(1), choices.DRAFT_TOKENS]
    min_confidence: Annotated[float, Check(lambda p: 0 <= p <= 1, "a probability, from 0 (off) to 1")]
    num_trials: Annotated[int, at_least(1)]
    repeats: Annotated[int, at_least(1)]

    def check(self) -> None:
        """Refuses values that do not fit each other."""
        choices.check_seed(self.seed, self.num_prompts)


def load(directory: str | pathlib.Path) -> Skips:
    """The sublayers that a run found.

    Raises:
      FileNotFoundError: where there is no finished run.
      ValueError: where its file is broken.
    """
    path = pathlib.Path(directory).expanduser() / FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: configs/skip_search.py makes it, with --workdir={directory}.")
    try:
        content = json.loads(path.read_text())
        return Skips(*(tuple(int(number) for number in content[kind]) for kind in Skips._fields))
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is broken ({error!r}): run configs/skip_search.py anew.") from error


def skips_of(chosen: Sequence[Sublayer]) -> Skips:
    """The sublayers in a list."""
    return Skips(*(tuple(sorted(number for kind, number in chosen if kind == name)) for name in Skips._fields))


Text = tuple[Sequence[int], Sequence[int]]
"""The token ids of a prompt, and of the target's own answer."""


def importance(target: Pretrained, texts: Sequence[Text], view: View, store: Store) -> dict[Sublayer, float]:
    """How much each sublayer matters: the share of the answers' tokens that change where it is left out.

    Args:
      target: the target.
      texts: prompts with the target's own answers.
      view: shows the progress.
      store: keeps what is finished.
    """
    model = target.model
    assert model.with_skips is not None
    tokens = np.zeros((len(texts), max(len(prompt) + len(answer) for prompt, answer in texts)), np.int32)
    segments, judged = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    for row, (prompt, answer) in enumerate(texts):
        size = len(prompt) + len(answer)
        tokens[row, :size], segments[row, :size] = [*prompt, *answer], 1
        judged[row, len(prompt) - 1 : size - 1] = True
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    weights = segments.astype(np.float32)
    packed = [jnp.asarray(x) for x in (tokens, tokens, segments, positions, weights)]
    batch = Batch(packed[0], packed[1], packed[2], packed[3], packed[4], None, None)

    def best(skips: Skips) -> np.ndarray:
        assert model.with_skips is not None
        score = model.with_skips(skips).score
        assert score is not None
        found = jax.jit(lambda params, batch: jnp.argmax(score(params, batch), axis=-1))(target.params, batch)
        return np.asarray(found)[judged]

    whole = best(Skips())
    sublayers = [(kind, number) for number in range(model.num_layers) for kind in Skips._fields]
    found = {}
    with view.progress(len(sublayers), what="sublayers") as bar:
        for kind, number in sublayers:
            skips = skips_of([(kind, number)])
            changed = store.get(f"importance {kind} {number}", lambda skips=skips: float((best(skips) != whole).mean()))
            found[kind, number] = changed
            bar.advance(bar.task_ids[0])
    return found


def first_guesses(importance: dict[Sublayer, float], number: int) -> list[list[Sublayer]]:
    """Sets of the sublayers that matter least, from few to three quarters of all."""
    ordered = sorted(importance, key=lambda sublayer: importance[sublayer])
    sizes = np.unique(np.linspace(1, max(1, len(ordered) * 3 // 4), max(number, 1)).round().astype(int))
    return [ordered[:size] for size in sizes]


@dataclasses.dataclass(frozen=True)
class Search:
    """The prompts of a run, and how they are decoded."""

    chosen: Settings
    work: Workload
    batches: list[PromptBatch]

    def bench(self, skips: Skips) -> Bench:
        """A draft without these sublayers against plain decoding."""
        c = self.chosen
        drafter = drafters.skip(
            self.work.target, **skips._asdict(), num_draft_tokens=c.num_draft_tokens, min_confidence=c.min_confidence
        )
        rule = verify.greedy if c.temperature == 0 else verify.rejection
        options = {"verify": rule, "temperature": c.temperature, "fixed_shape": False, "step_cost": 0.0}
        return Bench(self.work, drafter, options)

    def measure(self, skips: Skips) -> results.Row:
        """What a set of sublayers brings: the times of both sides per token, and the counters."""
        side = self.bench(skips)
        seconds, tokens, plain_tokens = {"": 0.0, "baseline_": 0.0}, 0, 0
        accepted = proposed = calls = 0
        widths: set[int] = set()
        for batch in self.batches:
            if (width := bench.prompt_width(batch)) not in widths:
                widths.add(width)
                side.compile_sides(batch)
            sides = side.measure(batch)
            for name, runs in sides.items():
                seconds[name] += float(np.median([run.seconds for run in runs]))
            stats = jax.tree.map(np.asarray, sides[""][0].state.rows.stats)
            tokens += sides[""][0].generation.stats.num_tokens
            plain_tokens += sides["baseline_"][0].generation.stats.num_tokens
            accepted, proposed = accepted + int(stats.accepted.sum()), proposed + int(stats.proposed.sum())
            calls += int(stats.target_calls.sum())
        per_token, plain = seconds[""] / tokens, seconds["baseline_"] / plain_tokens
        return skips._asdict() | {
            "seconds_per_token": per_token,
            "baseline_seconds_per_token": plain,
            "measured_speedup": plain / per_token,
            "acceptance_rate": accepted / max(proposed, 1),
            "block_efficiency": tokens / max(calls, 1),
        }


def _search(search: Search, importance: dict[Sublayer, float], store: Store, view: View) -> list[results.Row]:
    """All trials: first the sublayers that matter least, then what optuna's estimator proposes."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    chosen, sublayers = search.chosen, list(importance)
    names = {sublayer: f"{sublayer[0]} {sublayer[1]}" for sublayer in sublayers}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=chosen.seed, n_startup_trials=0))
    for guess in first_guesses(importance, max(1, chosen.num_trials // 3)):
        study.enqueue_trial({names[sublayer]: sublayer in guess for sublayer in sublayers})
    rows = []
    with view.progress(chosen.num_trials, what="trials") as bar:
        for number in range(chosen.num_trials):
            # What is finished is told again in the same order, so that the search goes on as it would have.
            trial = study.ask()
            skips = skips_of([s for s in sublayers if trial.suggest_categorical(names[s], [False, True])])
            if any(skips):
                row = store.get(f"trial {number}", lambda skips=skips: search.measure(skips))
                study.tell(trial, 1 / row["measured_speedup"])
                rows.append({"trial": number, **row})
                view.line(report.line(rows[-1], len(sublayers)))
            else:
                study.tell(trial, 1.0)
            bar.advance(bar.task_ids[0])
    return rows


def _texts(search: Search, store: Store, view: View) -> list[Text]:
    """The prompts with the target's own answers."""
    found = []
    side = Bench(search.work, drafters.none(), search.bench(Skips(mlp=(0,))).options)
    with view.progress(len(search.batches), what="answers") as bar:
        for batch in search.batches:
            answer = store.get(
                f"answer {batch.number}", lambda batch=batch: side.decode(side.drafter, batch).generation.tokens[0]
            )
            found.append((batch.tokens[0], answer))
            bar.advance(bar.task_ids[0])
    return found


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Searches, as `EXPERIMENTS` says; ValueError also where optuna is not installed."""
    view, chosen = view or View(), parse(Settings, config)
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ValueError("The search needs optuna: pip install 'specjax[search]'.") from error
    texts = prompts.read(chosen.data, chosen.num_prompts)
    store = Store(workdir, config.to_dict(), overwrite=overwrite, names=(FILE, "results.json", "summary.md"))
    store.write_config()
    target = bench.load(chosen.target, view, dtype=chosen.dtype)
    if target.model.with_skips is None or target.model.start_token is not None:
        raise ValueError(f"config.target={chosen.target!r}: the search needs a decoder-only model with layers.")
    if target.tokenizer is None:
        raise ValueError(f"The target {chosen.target} has no tokenizer: save one beside it (tokenizer.json).")
    chat = target.tokenizer.has_chat_template if chosen.chat == "auto" else chosen.chat == "true"
    work = bench.workload(target, chosen.target, texts, chosen, chosen.num_draft_tokens, chat=chat)
    search = Search(chosen, work, work.batches(1))
    if store.cells:
        trials = sum(key.startswith("trial ") for key in store.cells)
        view.line(f"{trials} of {chosen.num_trials} trials are finished in {store.directory}.")
    matters = importance(target, _texts(search, store, view), view, store)
    rows = _search(search, matters, store, view)
    best = max(rows, key=lambda row: row["measured_speedup"])
    common = {"target": chosen.target, "dtype": chosen.dtype, "device": bench.device_name()}
    store.write("results.json", results.to_json([common | row for row in rows]))
    store.write(FILE, results.to_json({kind: best[kind] for kind in Skips._fields}))
    images = report.plot(store.directory, rows, matters)
    store.write("summary.md", report.summary(config.name, rows, best, matters, images))
    view.line(report.finding(best, 2 * target.model.num_layers), "bold")
    view.line(
        f"Results: {store.directory}{os.sep}; configs/compare.py drafts so with --config.drafter=skip "
        f"--config.draft={store.directory}."
    )
