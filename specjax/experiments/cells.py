"""One cell of a sweep: a drafter at one K and temperature against plain decoding, on the machinery of `compare`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from specjax import api, decoding
from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.experiments import compare, results
from specjax.experiments.prompts import Prompt
from specjax.experiments.results import Row
from specjax.types import AnyDrafter, Draft

OFF: Row = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
}
"""Sampling options that an experiment leaves out."""


class Setting(NamedTuple):
    """What all cells of a sweep share.

    Attributes:
      target: the target.
      name: what results call it.
      prompts: what is decoded.
      encoded: their token ids.
      max_new_tokens: of each text.
      max_len: the length of the text buffer.
      prompt_width: the length that prompts are padded to: one program reads them all.
      repeats: how often each side decodes a batch; medians count.
      seed: prompt i uses `seed + i`.
      dtype: of the models.
      stop_strings: strings that end a text.
    """

    target: Pretrained
    name: str
    prompts: list[Prompt]
    encoded: list[list[int]]
    max_new_tokens: int
    max_len: int
    prompt_width: int
    repeats: int
    seed: int
    dtype: str
    stop_strings: tuple[str, ...] = ()


def setting(
    target: Pretrained, prompts: Sequence[Prompt], *, max_draft_tokens: int, max_new_tokens: int, **fields: Any
) -> Setting:
    """A setting in which all prompts fit.

    Args:
      target: the target.
      prompts: what is decoded.
      max_draft_tokens: the largest K.
      max_new_tokens: of each text.
      **fields: the others of `Setting`.
    """
    encoded = api.encode(target, [prompt.text for prompt in prompts])
    inputs = decoding.read_inputs(target.model, encoded)
    return Setting(
        target=target,
        prompts=list(prompts),
        encoded=encoded,
        max_new_tokens=max_new_tokens,
        max_len=decoding.buffer_length(int(inputs.length.max()) + max_new_tokens, max_draft_tokens),
        prompt_width=max(map(len, encoded)),
        **fields,
    )


def _options(chosen: Setting, temperature: float, top_p: float, rule: verify.Rule) -> dict[str, Any]:
    return {
        "verify": rule,
        "temperature": temperature,
        **OFF,
        "top_p": top_p,
        "stop_strings": chosen.stop_strings,
        "fixed_shape": False,
        "max_len": chosen.max_len,
        "prompt_width": chosen.prompt_width,
        # As in the papers, every step drafts.
        "step_cost": 0.0,
    }


def _batches(chosen: Setting, begin: int, end: int, batch_size: int) -> list[compare.Batch]:
    return compare.batches(
        chosen.prompts[begin:end],
        chosen.encoded[begin:end],
        batch_size=batch_size,
        max_new_tokens=chosen.max_new_tokens,
        seed=chosen.seed,
    )


def _clock(rows: int, sides: dict[str, list[compare.Decoded]]) -> Row:
    """What a batch of `rows` texts took on both sides: seconds (median of its repeats), all new tokens, and steps."""
    clock: Row = {"rows": rows}
    for side, runs in sides.items():
        clock |= {
            f"{side}seconds": float(np.median([run.seconds for run in runs])),
            f"{side}tokens": runs[0].generation.stats.num_tokens,
            f"{side}steps": int(runs[0].state.rows.stats.target_calls.max()),
        }
    return clock


def timed(
    chosen: Setting,
    drafter: AnyDrafter,
    name: str,
    temperature: float,
    num_prompts: int,
    rule: verify.Rule,
    *,
    top_p: float = 1.0,
    batch_size: int = 1,
) -> Row:
    """The row of a cell: both sides decode every batch in turn.

    Args:
      chosen: what all cells share.
      drafter: the drafter.
      name: what results call its draft.
      temperature: of target and draft.
      num_prompts: how many prompts.
      rule: the acceptance rule.
      top_p: of target and draft; 1 is off.
      batch_size: prompts that are decoded together.

    Returns:
      the row of all prompts; under `clock` it has what each batch took.
    """
    bench = compare.Bench(chosen.target, drafter, _options(chosen, temperature, top_p, rule), chosen.repeats)
    batches = _batches(chosen, 0, num_prompts, batch_size)
    seconds = {"baseline_": bench.compile(bench.plain, batches[0]), "": bench.compile(drafter, batches[0])}
    costs = bench.measure_costs(batches[0])
    common = {
        **OFF,
        "temperature": temperature,
        "top_p": top_p,
        "target": chosen.name,
        "draft": name,
        "drafter": "model" if isinstance(drafter, Draft) and drafter.model is not None else "table",
        "verify": rule.name,
        "exact": rule.exact,
        "fixed_shape": False,
        "num_draft_tokens": drafter.num_draft_tokens,
        "batch_size": batch_size,
        "max_new_tokens": chosen.max_new_tokens,
        "max_len": chosen.max_len,
        "seed": chosen.seed,
        "dtype": chosen.dtype,
        "repeats": chosen.repeats,
        "cost_ratio": costs.cost_ratio,
        "score_cost": costs.score_cost,
        "step_cost": 0.0,
        "device": compare.device_name(),
        "jax_version": jax.__version__,
    }
    rows: list[Row] = []
    clock: list[Row] = []
    for batch in batches:
        sides = compare.measure(bench, batch)
        rows += compare.rows_of(common, batch, sides, seconds)
        clock.append(_clock(len(batch.prompts), sides))
    return results.combine(rows, name) | {"clock": clock}


class Texts(NamedTuple):
    """Texts of many prompts and what was counted on the way.

    Attributes:
      text: one a prompt.
      tokens: token ids, likewise.
      acceptance_rate: alpha.
      num_tokens: of all texts.
    """

    text: list[str]
    tokens: list[list[int]]
    acceptance_rate: float
    num_tokens: int


def texts(
    chosen: Setting,
    drafter: AnyDrafter,
    temperature: float,
    num_prompts: int,
    rule: verify.Rule,
    batch_size: int = 16,
    *,
    top_p: float = 1.0,
    begin: int = 0,
) -> Texts:
    """Decodes prompts in batches, untimed; with the rule `observe`, alpha is that over the whole text of the target.

    Args:
      chosen: what all cells share.
      drafter: the drafter.
      temperature: of target and draft.
      num_prompts: how many prompts.
      rule: the acceptance rule.
      batch_size: rows.
      top_p: of target and draft; 1 is off.
      begin: the first of the prompts.
    """
    bench = compare.Bench(chosen.target, drafter, _options(chosen, temperature, top_p, rule), 1)
    text: list[str] = []
    tokens: list[list[int]] = []
    overlap = judged = 0.0
    for batch in _batches(chosen, begin, begin + num_prompts, batch_size):
        decoded, rows = bench.decode(drafter, batch), len(batch.prompts)
        text += (decoded.generation.text or [])[:rows]
        tokens += decoded.generation.tokens[:rows]
        overlap += float(decoded.state.rows.stats.overlap[:rows].sum())
        judged += float(decoded.state.rows.stats.proposed[:rows].sum())
    return Texts(text, tokens, overlap / judged if judged else 0.0, sum(map(len, tokens)))
