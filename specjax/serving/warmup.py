"""Before an engine is ready: every program is compiled, and the steps are timed."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from specjax.serving.device import Device, to_host
from specjax.types import Inputs

_REPEATS = 5
_FORCED = 1e-6
"""The cost of the number of draft tokens that a measurement forces; all others cost 1."""


def inputs_of(device: Device, width: int) -> Inputs:
    """A chunk of zeros, in the shapes of all chunks of that width."""
    sizes = device.programs.sizes
    one: Any = np.ones(1, np.int32)

    def zeros(*shape: int) -> Any:
        return np.zeros(shape, np.int32)

    if not sizes.max_source:
        return Inputs(zeros(1, width), one)
    return Inputs(zeros(1, width), one, zeros(1, sizes.max_source), one)


def warm(device: Device, *, score_prompts: bool, say: Callable[[str], None]) -> None:
    """Compiles every program that requests will need, and measures `Device.step_costs`.

    Args:
      device: whose programs; its batch is to be allocated anew afterwards.
      score_prompts: whether log-probabilities of prompts can be asked for.
      say: told of every part.
    """
    text = device.begin()
    for width in device.chunk_widths:
        start = time.perf_counter()
        text = device.read(device.begin(), inputs_of(device, width))
        if score_prompts:
            text = device.read_scored(device.begin(), inputs_of(device, width), np.zeros((1, width), np.int32))[0]
        jax.block_until_ready(text)
        say(f"prompts in chunks of {width}: {time.perf_counter() - start:.1f} s")
    for size in device.batch_sizes:
        start = time.perf_counter()
        device.allocate(size)
        device.insert(0, text, device._choices)
        compile_advance(device)
        measure(device)
        costs = device.step_costs[size]
        lengths = device.programs.drafter.topology.all_lengths if len(costs) > 1 else ()
        depth = device.programs.drafter.topology.depth
        drafting = "".join(f", with {k} draft tokens {costs[min(k, depth)]:.2f} times that" for k in lengths)
        say(
            f"batch of {size}: {time.perf_counter() - start:.1f} s; a plain step takes "
            f"{1000 * device.step_seconds[size]:.1f} ms{drafting}"
        )
    for old, new in itertools.permutations(device.batch_sizes, 2):
        device.allocate(old)
        device.resize([*range(min(old, new)), *[-1] * max(new - old, 0)])


def compile_advance(device: Device) -> None:
    """Runs one step of a batch whose rows are all done, which compiles the loop."""
    results = device.advance(np.zeros(device.batch_size, bool), 1, leave_early=False)
    to_host(device.programs, results, with_logprobs=True)


def measure(device: Device) -> None:
    """The time of a step by its number of draft tokens, all rows drafting, as the loop itself runs it.

    A drafter that proposes nothing in a text of zeros keeps a cost of 1: its steps are then taken to be plain ones,
    until rows have seen what drafts bring.
    """
    programs, size = device.programs, device.batch_size
    topology, sizes = programs.drafter.topology, programs.sizes
    length = min(256, max((sizes.max_len - topology.num_read - 2) // 2, 1))
    lengths = (*topology.lengths, topology.depth) if topology.num_nodes else ()
    seconds: dict[int, list[float]] = {k: [] for k in (0, *lengths)}
    drafts = dict.fromkeys(seconds, False)
    for _ in range(_REPEATS):
        for k in seconds:
            forced = np.ones(topology.depth + 1, np.float32)
            forced[k] = _FORCED
            device.set_costs(forced)
            device.rewind(length)
            before = to_host(programs, device.advance(np.zeros(size, bool), 0, leave_early=False), with_logprobs=False)
            start = time.perf_counter()
            results = device.advance(np.zeros(size, bool), 1, leave_early=False)
            after = to_host(programs, results, with_logprobs=False)
            seconds[k].append(time.perf_counter() - start)
            drafts[k] |= bool((after.numbers["draft_steps"] > before.numbers["draft_steps"]).any())
    plain = float(np.median(seconds[0]))
    costs = np.ones(topology.depth + 1, np.float32)
    for k in reversed(lengths):
        if drafts[k]:
            costs[1 : k + 1] = max(np.median(seconds[k]) / plain, 1.0)
    device.step_costs[size], device.step_seconds[size] = costs, plain
    device.allocate(size)
