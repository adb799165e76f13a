"""Before an engine is ready: every program is compiled, and the steps are timed."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from specjax.serving import programs
from specjax.serving.compilations import Program, compile_all
from specjax.serving.device import Device, to_host
from specjax.serving.reader import Reader
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


def stages(device: Device, kept: Sequence[int], *, score_prompts: bool) -> Iterator[list[Program]]:
    """Every program that requests will need, with arguments as `Device` and `Reader` give them.

    The arguments of a stage come from programs of the stages before it, which are to be compiled by then.

    Args:
      device: whose programs; allocates batches.
      kept: the lengths at which prefixes are kept.
      score_prompts: whether log-probabilities of prompts can be asked for.
    """
    own, sizes = device.programs, device.batch_sizes
    yield [
        Program(programs.begin, lambda: (own,)),
        *(Program(programs.empty, functools.partial(device.empty_arguments, size)) for size in sizes),
    ]
    text = device.begin()

    def of_batch(size: int) -> list[Program]:
        def held() -> Any:
            if device.state is None or device.batch_size != size:
                device.allocate(size)
            return device.state

        number = np.int32(1)
        return [
            Program(programs.advance, lambda: (own, device.params, held(), np.zeros(size, bool), number, np.bool_(0))),
            Program(programs.insert, lambda: (own, held(), number, text, device.choices)),
            Program(programs.rewind, lambda: (own, held(), number)),
            *(
                Program(programs.resize, lambda new=new: (own, held(), np.zeros(new, np.int32)))
                for new in sizes
                if new != size
            ),
        ]

    def of_chunk(width: int) -> list[Program]:
        arguments = (own, device.params, text, inputs_of(device, width))
        following = np.zeros((1, width), np.int32)
        scored = [Program(programs.read_scored, lambda: (*arguments, following))] if score_prompts else []
        return [Program(programs.read, lambda: arguments), *scored]

    # What takes longest comes first, so that no thread is left with it at the end.
    large = [*map(of_batch, reversed(sizes)), *map(of_chunk, reversed(device.chunk_widths))]
    trims = [Program(programs.trim, lambda size=size: (own, text, size)) for size in kept]
    yield [*itertools.chain.from_iterable(large), *trims]
    yield [Program(programs.restore, lambda size=size: (own, programs.trim(own, text, size))) for size in kept]


def num_programs(device: Device, kept: Sequence[int], *, score_prompts: bool) -> int:
    """How many programs `stages` has."""
    batches, chunks = len(device.batch_sizes), len(device.chunk_widths)
    return 1 + batches * (batches + 3) + chunks * (1 + score_prompts) + 2 * len(kept)


def warm(device: Device, reader: Reader, *, score_prompts: bool, say: Callable[[str], None]) -> None:
    """Compiles every program that requests will need, runs each once, and measures `Device.step_costs`.

    Args:
      device: whose programs; its batch is to be allocated anew afterwards.
      reader: of prompts.
      score_prompts: whether log-probabilities of prompts can be asked for.
      say: told of every part.
    """
    number = num_programs(device, reader.kept, score_prompts=score_prompts)
    compile_all(stages(device, reader.kept, score_prompts=score_prompts), number, say)
    text = device.begin()
    for width in device.chunk_widths:
        text = device.read(device.begin(), inputs_of(device, width))
        if score_prompts:
            text = device.read_scored(device.begin(), inputs_of(device, width), np.zeros((1, width), np.int32))[0]
        jax.block_until_ready(text)
    reader.warm()
    for size in device.batch_sizes:
        device.allocate(size)
        device.insert(0, text, device.choices)
        _step_once(device)
        measure(device)
        costs = device.step_costs[size]
        lengths = device.programs.drafter.topology.all_lengths if len(costs) > 1 else ()
        depth = device.programs.drafter.topology.depth
        drafting = "".join(f", with {k} draft tokens {costs[min(k, depth)]:.2f} times that" for k in lengths)
        say(f"batch of {size}: a plain step takes {1000 * device.step_seconds[size]:.1f} ms{drafting}")
    for old, new in itertools.permutations(device.batch_sizes, 2):
        device.allocate(old)
        device.resize([*range(min(old, new)), *[-1] * max(new - old, 0)])


def _step_once(device: Device) -> None:
    """Runs one step of a batch whose rows are all done."""
    results = device.advance(np.zeros(device.batch_size, bool), 1, leave_early=False)
    to_host(device.programs, results, with_logprobs=True)


def measure(device: Device) -> None:
    """The time of a step by its number of draft tokens, all rows drafting, as the loop itself runs it.

    A drafter that proposes nothing in a text of zeros keeps a cost of 1: its steps are then taken to be plain ones,
    until rows have seen what drafts bring.
    """
    own, size = device.programs, device.batch_size
    topology, sizes = own.drafter.topology, own.sizes
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
            before = to_host(own, device.advance(np.zeros(size, bool), 0, leave_early=False), with_logprobs=False)
            start = time.perf_counter()
            results = device.advance(np.zeros(size, bool), 1, leave_early=False)
            after = to_host(own, results, with_logprobs=False)
            seconds[k].append(time.perf_counter() - start)
            drafts[k] |= bool((after.numbers["draft_steps"] > before.numbers["draft_steps"]).any())
    plain = float(np.median(seconds[0]))
    costs = np.ones(topology.depth + 1, np.float32)
    for k in reversed(lengths):
        if drafts[k]:
            costs[1 : k + 1] = max(np.median(seconds[k]) / plain, 1.0)
    device.step_costs[size], device.step_seconds[size] = costs, plain
    device.allocate(size)
