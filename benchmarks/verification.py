"""The cost of sampling and verification relative to a target step, at a large vocabulary.

    python benchmarks/verification.py --vocab_size=151936 --num_draft_tokens=4 --target=SOURCE

Times, in turn, one call of the target that scores K + 1 tokens, and each rule with the probabilities that it needs, on
random logits of the same shape, and prints medians and the ratio of each to the target's step. Without a target, the
step is assumed to read `--weight_bytes` at the machine's memory bandwidth, which is measured.
"""

import datetime
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import specjax
from specjax import decoding, sampling
from specjax.decoding import verify
from specjax.types import Block, History, Proposal

_TARGET = flags.DEFINE_string("target", None, "Source of a model whose step is the reference.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Precision of the target.")
_WEIGHT_BYTES = flags.DEFINE_float("weight_bytes", 3.1e9, "Without a target: bytes that its step reads.")
_VOCAB = flags.DEFINE_integer("vocab_size", 151936, "V, without a target.")
_K = flags.DEFINE_integer("num_draft_tokens", 4, "K.")
_BATCH = flags.DEFINE_integer("batch_size", 1, "Rows.")
_REPEATS = flags.DEFINE_integer("repeats", 15, "Timed calls of each; the median counts.")


def timed(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each call, all measured in turn."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_REPEATS.value):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - begin)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def target_step(rows: int, width: int) -> tuple[dict[str, Callable[[], Any]], float, int, str]:
    """The call to time, how many calls make up a target step, the vocabulary's size, and a description of the step."""
    if _TARGET.value:
        target = specjax.load(_TARGET.value, dtype=_DTYPE.value)
        model, tokens = target.model, jnp.ones((rows, width), jnp.int32)
        cache = model.init_cache(rows, 256)
        step = jax.jit(lambda params, cache: model.apply(params, Block(tokens), cache)[0].logits)
        return {"target": lambda: step(target.params, cache)}, 1.0, model.vocab_size, _TARGET.value
    size = 1e9
    weights, total = jnp.ones(int(size) // 4, jnp.float32), jax.jit(jnp.sum)
    label = f"reading {_WEIGHT_BYTES.value / 1e9:.1f} GB of weights"
    return {"target": lambda: total(weights)}, _WEIGHT_BYTES.value / size, _VOCAB.value, label


def main(argv: list[str]) -> None:
    """Prints a Markdown table."""
    del argv
    rows, k = _BATCH.value, _K.value
    calls, steps, vocab_size, label = target_step(rows, k + 1)
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.standard_normal((rows, k + 1, vocab_size)), jnp.float32)
    draft_logits = jnp.asarray(logits[:, :k] + 0.5 * rng.standard_normal((rows, k, vocab_size)), jnp.float32)
    history = History(
        jnp.zeros((rows, 256), jnp.int32),
        jnp.full(rows, 100),
        jnp.full(rows, 10),
        jnp.full(8, -1),
        None,
        jnp.zeros((rows, k + 1), jnp.int32),
    )

    def rule_call(rule: verify.Rule, soft: bool, **options: Any) -> Callable[[], Any]:
        chosen = sampling.options(rows, **options)
        probs = sampling.warp.warp(draft_logits, chosen)
        tokens = jnp.argmax(probs, axis=-1).astype(jnp.int32)
        proposal = Proposal(tokens, jnp.full(rows, k), probs if soft else None)

        @jax.jit
        def judge(logits: Any, seed: Any, length: Any, proposal: Proposal) -> Any:
            _, keys = decoding.step_keys(seed, length, k)
            return decoding.apply_rule(rule, chosen, proposal, keys, logits, history)[0]

        seed = decoding.row_keys(jnp.arange(rows, dtype=jnp.uint32))
        return lambda: judge(logits, seed, history.length, proposal)

    for rule in (verify.rejection, verify.block, verify.coupled):
        calls[f"{rule.name}, draft model, temperature 1"] = rule_call(rule, True, temperature=1.0)
        calls[f"{rule.name}, one-hot drafts, temperature 1"] = rule_call(rule, False, temperature=1.0)
    calls["rejection, draft model, temperature .7, top-k 50, top-p .95"] = rule_call(
        verify.rejection, True, temperature=0.7, top_k=50, top_p=0.95
    )
    calls["rejection, repetition penalty 1.2"] = rule_call(
        verify.rejection, True, temperature=1.0, repetition_penalty=1.2
    )
    calls["greedy"] = rule_call(verify.greedy, False)
    seconds = timed(calls)
    seconds["target"] *= steps
    print(f"V = {vocab_size}, K = {k}, batch {rows}; step: {label}; {jax.default_backend()}, {datetime.date.today()}\n")
    print("| probabilities and rule | ms | of a target step |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {1e3 * value:.2f} | {value / seconds['target']:.1%} |")


if __name__ == "__main__":
    app.run(main)
