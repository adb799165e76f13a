"""Every drafter on the same prompts, alone and merged with lookup."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax

from specjax import drafters
from specjax.api import drafts
from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.decoding.verify import Rule
from specjax.drafters import contract
from specjax.experiments import bench, choices, prompts, results, skip_search
from specjax.experiments.bench import Bench, Workload
from specjax.experiments.reports import methods as report
from specjax.experiments.reports.display import View
from specjax.experiments.results import Row
from specjax.experiments.settings import Check, Config, all_at_least, at_least, given, one_of, parse
from specjax.experiments.store import Store
from specjax.types import AnyDrafter, Skips


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `configs/methods.py`."""

    target: Annotated[str, given("SOURCE")]
    dtype: Annotated[str, one_of("float32", "bfloat16")]
    draft: str
    head: str
    medusa: str
    blockwise: str
    eagle: str
    drafters: tuple[str, ...]
    merged: bool
    data: Annotated[str, given("FILE")]
    per_category: Annotated[int, at_least(1)]
    max_prompt_tokens: Annotated[int, at_least(1)]
    chat: Annotated[str, one_of("auto", "true", "false")]
    max_new_tokens: Annotated[int, at_least(1)]
    temperatures: Annotated[tuple[float, ...], all_at_least(0)]
    seed: int
    repeats: Annotated[int, at_least(1)]
    mask_token: Annotated[int, at_least(0)]
    skips: str
    exit_share: Annotated[float, Check(lambda share: 0 < share < 1, "between 0 and 1")]

    def check(self) -> None:
        """Refuses values that do not fit each other."""
        unknown = [name for name in self.drafters if name not in METHODS]
        if unknown:
            raise ValueError(f"config.drafters={self.drafters}: choose from {', '.join(METHODS)}.")
        if not self.draft and any(METHODS[name].needs_draft for name in self.drafters):
            raise ValueError(f"config.drafters={self.drafters} needs a draft model: give --config.draft=SOURCE.")
        if not self.head and any(METHODS[name].needs_head for name in self.drafters):
            raise ValueError(f"config.drafters={self.drafters} needs a trained head: give --config.head=NAME or PATH.")
        for name in self.drafters:
            if (key := METHODS[name].needs) and not getattr(self, key):
                raise ValueError(f"config.drafters={self.drafters} needs heads: give --config.{key}=PATH.")
        if self.head:
            drafters.load_feature_head(self.head)
        if self.skips:
            skip_search.load(self.skips)


class Side(NamedTuple):
    """What drafters are made of."""

    chosen: Settings
    target: Pretrained
    draft: Pretrained | None

    @property
    def skips(self) -> Skips:
        """The sublayers that are skipped."""
        middle = self.target.model.num_layers // 2
        return skip_search.load(self.chosen.skips) if self.chosen.skips else Skips((middle, middle + 1))

    @property
    def exit_layer(self) -> int:
        """How many layers an early exit runs."""
        layers = self.target.model.num_layers
        return min(max(1, round(layers * self.chosen.exit_share)), layers - 1)


class Method(NamedTuple):
    """A drafter of the table.

    Attributes:
      make: makes it.
      weights: which share of the target's bytes each call of its draft reads; 0 without a model.
      needs_draft: whether it is a draft model.
      needs_head: whether it is a head over the target's hidden states.
      needs: the key that names its trained heads, "medusa", "blockwise" or "eagle"; empty: none.
      needs_layers: whether it skips layers of the target.
      coupled: whether sampled text is drafted with the target's noise, rather than judged by rejection.
      merges: whether it is also merged with lookup.
    """

    make: Callable[[Side], AnyDrafter]
    weights: Callable[[Side], float] = lambda side: 0.0
    needs_draft: bool = False
    needs_head: bool = False
    needs: str = ""
    needs_layers: bool = False
    coupled: bool = True
    merges: bool = True

    def reads(self, side: Side) -> float:
        """The bytes that the draft of a step reads, over the target's: its model is called once for each depth."""
        weights = self.weights(side)
        return weights * contract.check(self.make(side)).drafter.topology.depth if weights else 0.0

    def applies(self, side: Side) -> bool:
        """Whether the target and what is given allow it."""
        has_layers = side.target.model.with_skips is not None and side.target.model.num_layers > 1
        given = (side.draft is not None or not self.needs_draft) and (bool(side.chosen.head) or not self.needs_head)
        given = given and bool(not self.needs or getattr(side.chosen, self.needs))
        return given and (has_layers or not self.needs_layers)


def _bytes(params: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def _kept(side: Side, skips: Skips) -> float:
    """The share of the target's bytes that is read without some sublayers."""
    layers = side.target.params.get("layers", side.target.params.get("decoder"))
    parts = {"attention": ("attention", "cross"), "mlp": ("mlp",)}
    skipped = sum(
        _bytes([layers[number][part] for part in parts[kind] if part in layers[number]])
        for kind, numbers in skips._asdict().items()
        for number in numbers
    )
    return 1.0 - skipped / _bytes(side.target.params)


def _exit_skips(side: Side) -> Skips:
    return Skips.of_layers(range(side.exit_layer, side.target.model.num_layers))


def _of_draft(side: Side) -> float:
    assert side.draft is not None
    return _bytes(side.draft.params) / _bytes(side.target.params)


def _of_head(side: Side) -> float:
    return _bytes(drafters.load_feature_head(side.chosen.head).params) / _bytes(side.target.params)


def _head(side: Side, num_draft_tokens: int | None = None, **options: Any) -> AnyDrafter:
    head = drafters.load_feature_head(side.chosen.head)
    return drafters.feature_head(head, side.target, num_draft_tokens=num_draft_tokens, **options)


def _feature_head(**options: Any) -> Method:
    return Method(
        lambda side: _head(side, **options),
        _of_head,
        needs_head=True,
        coupled=False,
    )


def _parallel(kind: str, **options: Any) -> Method:
    """Parallel heads of a kind, from the path that its key names."""

    def heads(side: Side) -> Any:
        load = drafters.load_medusa if kind == "medusa" else drafters.load_blockwise
        return load(getattr(side.chosen, kind), dtype=side.chosen.dtype)

    def make(side: Side) -> AnyDrafter:
        return getattr(drafters, kind)(heads(side), side.target, **options)

    def weights(side: Side) -> float:
        # All heads are read once in a step.
        depth = contract.check(make(side)).drafter.topology.depth
        return _bytes(heads(side).params) / _bytes(side.target.params) / depth

    return Method(make, weights, needs=kind, coupled=False)


def _eagle(**options: Any) -> Method:
    def head(side: Side) -> drafters.EagleHead:
        return drafters.load_eagle(drafts.directory_of(side.chosen.eagle), side.target)

    return Method(
        lambda side: drafters.eagle(head(side), side.target, **options),
        lambda side: _bytes(head(side).params) / _bytes(side.target.params),
        needs="eagle",
        coupled=False,
        merges=False,
    )


def _draft_model(**options: Any) -> Method:
    return Method(
        lambda side: drafters.model(side.draft, **options), _of_draft, needs_draft=True, coupled=False, merges=False
    )


def _text(make: Callable[[], AnyDrafter], merges: bool = True) -> Method:
    return Method(lambda side: make(), merges=merges)


_TREE = (2, 2, 1)
"""Two children of the text, two of each of these, one of each of those: ten nodes."""

METHODS = {
    "ngram": _text(lambda: drafters.ngram(num_draft_tokens=7), merges=False),
    "ngram tree": _text(lambda: drafters.ngram(num_draft_tokens=15, depth=7), merges=False),
    "suffix": _text(lambda: drafters.suffix(num_draft_tokens=7)),
    "suffix tree": _text(lambda: drafters.suffix(num_draft_tokens=15, depth=7), merges=False),
    "aggressive": _text(lambda: drafters.aggressive(num_draft_tokens=7)),
    "jacobi": _text(lambda: drafters.jacobi(num_draft_tokens=7)),
    "lookahead": _text(lambda: drafters.lookahead(window=5, ngram=4, guesses=4)),
    "mask_tokens": Method(
        lambda side: drafters.mask_tokens(mask_token=side.chosen.mask_token, num_draft_tokens=2), merges=False
    ),
    "parallel_masks": Method(
        lambda side: drafters.parallel_masks(side.target, mask_token=side.chosen.mask_token, num_draft_tokens=3),
        lambda side: 1.0 / 3,
        coupled=False,
        merges=False,
    ),
    "skip": Method(
        lambda side: drafters.skip(side.target, **side.skips._asdict(), num_draft_tokens=4),
        lambda side: _kept(side, side.skips),
        needs_layers=True,
        coupled=False,
    ),
    "skip, adaptive": Method(
        lambda side: drafters.skip(side.target, **side.skips._asdict(), num_draft_tokens=7, adaptive=True),
        lambda side: _kept(side, side.skips),
        needs_layers=True,
        coupled=False,
        merges=False,
    ),
    "early_exit": Method(
        lambda side: drafters.early_exit(side.target, side.exit_layer, num_draft_tokens=3),
        lambda side: _kept(side, _exit_skips(side)),
        needs_layers=True,
        coupled=False,
        merges=False,
    ),
    "early_exit tree": Method(
        lambda side: drafters.early_exit(side.target, side.exit_layer, topology=(4,)),
        lambda side: _kept(side, _exit_skips(side)),
        needs_layers=True,
        coupled=False,
        merges=False,
    ),
    "first_of": Method(
        lambda side: drafters.first_of([drafters.ngram(num_draft_tokens=7, lengths=(3,)), _head(side, 1)]),
        lambda side: _of_head(side) / 7,  # Once for all depths of the lookup.
        needs_head=True,
        coupled=False,
        merges=False,
    ),
    "feature_head": _feature_head(num_draft_tokens=2),
    "feature_head tree": _feature_head(topology=(3, 2)),
    "medusa": _parallel("medusa"),
    "medusa tree": _parallel("medusa", topology=(3, 2)),
    "blockwise": _parallel("blockwise"),
    "eagle": _eagle(num_draft_tokens=4),
    "eagle tree": _eagle(topology=_TREE),
    "eagle tree, dynamic": _eagle(dynamic=drafters.Dynamic(width=3, depth=4, num_nodes=10)),
    "model": _draft_model(num_draft_tokens=4),
    "model, 10 tokens": _draft_model(num_draft_tokens=10),
    "model tree": _draft_model(topology=_TREE),
    "model tree, with replacement": _draft_model(topology=_TREE, children=drafters.children.with_replacement),
    "model tree, most probable": _draft_model(topology=_TREE, children=drafters.children.most_probable),
    "model tree, dynamic": _draft_model(dynamic=drafters.Dynamic(width=3, depth=4, num_nodes=10)),
}
"""By name."""


def cells(side: Side) -> list[tuple[str, AnyDrafter, Method]]:
    """The drafters to measure, by name: each alone, then merged with lookup."""
    chosen = side.chosen
    names = chosen.drafters or tuple(name for name, method in METHODS.items() if method.applies(side))
    wrong = [name for name in names if not METHODS[name].applies(side)]
    if wrong:
        raise ValueError(
            f"config.drafters={names}: {', '.join(wrong)} need a target of two layers or more that are not scanned."
        )
    alone = [(name, METHODS[name].make(side), METHODS[name]) for name in names]
    if not chosen.merged:
        return alone
    lookup = METHODS["ngram"].make(side)
    return alone + [
        (f"{name} + ngram", drafters.merged([drafter, lookup]), method)
        for name, drafter, method in alone
        if method.merges
    ]


def _rule(method: Method, drafter: AnyDrafter, temperature: float) -> Rule:
    if temperature == 0:
        return verify.greedy
    states_probs = not method.coupled and contract.check(drafter).drafter.topology.depth > 0
    return verify.rejection if states_probs else verify.coupled


def measure(work: Workload, drafter: AnyDrafter, rule: Rule, temperature: float, name: str) -> Row:
    """A row of `results` for all prompts, with what the draft costs."""
    sampling = dataclasses.asdict(results.Sampling(temperature=temperature))
    side = Bench(work, drafter, sampling | {"verify": rule, "fixed_shape": False, "step_cost": 0.0})
    batches, rows = work.batches(1), []
    common = side.common(side.measure_costs(batches[0]), bench.device_name(), draft="", drafter=name, batch_size=1)
    compiled = side.compile_sides(batches[0])
    for batch in batches:
        rows += bench.rows_of(common, batch, side.measure(batch), compiled)
    return results.combine(rows, "all")


def run(config: Config, workdir: str | pathlib.Path, *, overwrite: bool = False, view: View | None = None) -> None:
    """Measures, as `EXPERIMENTS` says."""
    view, chosen = view or View(), parse(Settings, config)
    texts = prompts.read(chosen.data, 0)
    choices.check_seed(chosen.seed, len(texts))
    store = Store(workdir, config.to_dict(), overwrite=overwrite, names=("results.json", "summary.md", "methods.png"))
    store.write_config()
    target = bench.load(chosen.target, view, dtype=chosen.dtype)
    if target.tokenizer is None:
        raise ValueError(f"The target {chosen.target} has no tokenizer: save one beside it (tokenizer.json).")
    side = Side(chosen, target, bench.load(chosen.draft, view, dtype=chosen.dtype) if chosen.draft else None)
    chat = target.tokenizer.has_chat_template if chosen.chat == "auto" else chosen.chat == "true"
    listed = cells(side)
    most = max(contract.check(drafter).drafter.topology.num_read for _, drafter, _ in listed)
    picked = bench.pick(texts, chosen, target, chat)
    work = bench.workload(target, chosen.target, picked, chosen, most, chat=chat, one_width=True)
    todo = [(temperature, *cell) for temperature in chosen.temperatures for cell in listed]
    view.line(f"{len(todo)} measurements of {len(picked)} prompts; {len(store.cells)} are finished.")
    rows = []
    for temperature, name, drafter, method in todo:
        rule = _rule(method, drafter, temperature)
        row = store.get(
            f"{name}, temperature {temperature:g}",
            lambda drafter=drafter, rule=rule, temperature=temperature, name=name: measure(
                work, drafter, rule, temperature, name
            ),
        )
        rows.append(report.with_roofline(row, method.reads(side)))
        view.line(report.line(rows[-1]))
    store.write("results.json", results.to_json(rows))
    images = report.plot(store.directory, rows)
    store.write("summary.md", report.summary(config.name, rows, images))
    view.line(f"Results: {store.directory}{os.sep} (summary.md, results.json, {', '.join(images)})")
