"""Whether a plan fits into the memory of its chips, and where it does not, what would."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from specjax import decoding
from specjax.planning.memory import memory
from specjax.planning.setup import SIDES, Setup

_QUANTISED = ("int8", "int4:64")
"""The ways to quantise a draft that are tried, the most accurate first."""


class Fit(NamedTuple):
    """Whether a plan fits.

    Attributes:
      needed: bytes needed on each device.
      available: bytes available on each device.
      remedies: where it does not fit, changes that would make it fit, each computed; else empty.
    """

    needed: int
    available: int
    remedies: list[str]

    @property
    def fits(self) -> bool:
        """Whether there is enough memory."""
        return self.needed <= self.available


def _larger(setup: Setup) -> Iterator[Setup]:
    """The plan on twice as many chips, four times ..., which split the models, or, where possible, the rows too.

    The smallest dimension of the topology is doubled.
    """
    shape = list(setup.topology.shape)
    while 2 * math.prod(shape) <= setup.topology.chip.most:
        # The last of the smallest dimensions.
        i = max(range(len(shape)), key=lambda i: (-shape[i], i))
        shape[i] *= 2
        topology = dataclasses.replace(setup.topology, shape=tuple(shape))
        data = setup.data
        while setup.batch_size % data == 0 and topology.num_devices % data == 0:
            yield dataclasses.replace(setup, topology=topology, data=data)
            data *= 2


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number in `low .. high` that fits, where all smaller ones fit too."""
    if high < low or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _in_bfloat16(setup: Setup) -> Setup:
    """The plan with both sides in bfloat16."""
    narrow = {side: setup.shapes(side).with_dtype(setup.side(side), "bfloat16") for side in SIDES}
    return dataclasses.replace(setup, **narrow)


class _Budget(NamedTuple):
    """The memory of each device, and how much of it is used by neither parameters nor state."""

    available: int
    overhead: int

    def needs(self, setup: Setup) -> int:
        """Bytes on each device."""
        return sum(memory(setup)) + self.overhead

    def fits(self, setup: Setup) -> bool:
        """Whether a plan fits."""
        return self.needs(setup) <= self.available

    def shown(self, setup: Setup) -> str:
        """What a plan needs, in words."""
        return f"{self.needs(setup) / 2**30:.2f} GiB"


def _narrower_or_more(setup: Setup, budget: _Budget) -> Iterator[str]:
    """Plans in bfloat16; on more chips; and, where bfloat16 alone is not enough, on more chips in bfloat16."""
    narrow, plans = _in_bfloat16(setup), [(setup, "", "")]
    if narrow != setup and budget.fits(narrow):
        yield f"bfloat16 needs {budget.shown(narrow)} a device: --config.dtype=bfloat16"
    elif narrow != setup:
        plans.append((narrow, " in bfloat16", " --config.dtype=bfloat16"))
    for plan, words, flag in plans:
        larger = next((found for found in _larger(plan) if budget.fits(found)), None)
        if larger is not None:
            split = f" --config.data={larger.data}" if larger.data != setup.data else ""
            yield (
                f"{larger.topology.num_chips} chips{words} need {budget.shown(larger)} a device: "
                f"--config.topology={larger.topology.name}{split}{flag}"
            )


def _smaller_draft(setup: Setup, budget: _Budget) -> Iterator[str]:
    """The draft in int8, or else in int4, where that is enough: the text stays the target's."""
    shapes = setup.kind.shapes
    if shapes.quantised_as(setup.draft):
        return
    for how in _QUANTISED:
        try:
            found = dataclasses.replace(setup, draft=shapes.quantised(setup.draft, how))
        except ValueError:  # The draft does not divide into the groups, or is no model.
            continue
        if budget.fits(found):
            yield f"a draft in {how} needs {budget.shown(found)} a device: --config.draft_quantise={how}"
            return


def _fewer_rows(setup: Setup, budget: _Budget) -> Iterator[str]:
    """The largest batch that fits."""

    def of(n: int) -> Setup:
        return dataclasses.replace(setup, batch_size=n * setup.data)

    rows = _largest(1, setup.batch_size // setup.data - 1, lambda n: budget.fits(of(n)))
    if rows is not None:
        size = of(rows).batch_size
        yield f"a batch of {size} needs {budget.shown(of(rows))}: --config.batch_size={size}"


def _shorter(setup: Setup, budget: _Budget) -> Iterator[str]:
    """The longest buffer that fits, and the length of the texts that it has room for."""
    read = setup.step.scored - 1
    least = decoding.buffer_length(setup.prompt_tokens + 1, read) // decoding.BUFFER_MULTIPLE

    def of(n: int) -> Setup:
        length = n * decoding.BUFFER_MULTIPLE
        room = length - setup.prompt_tokens - read - 1
        return dataclasses.replace(setup, max_len=length, max_new_tokens=min(room, setup.max_new_tokens))

    most = setup.buffer // decoding.BUFFER_MULTIPLE - 1
    multiples = _largest(least, most, lambda n: budget.fits(of(n)))
    if multiples is not None:
        found = of(multiples)
        yield (
            f"a buffer of {found.buffer} tokens needs {budget.shown(found)}: "
            f"--config.max_new_tokens={found.max_new_tokens}"
        )


def fit(setup: Setup, overhead: int = 0) -> Fit:
    """Whether a plan fits, and if not, what would.

    Args:
      setup: the plan.
      overhead: bytes on each device in addition to parameters and state: temporaries, code, padding.
    """
    budget = _Budget(setup.topology.chip.memory // setup.topology.chip.devices, overhead)
    remedies: list[str] = []
    if not budget.fits(setup):
        remedies = [
            *_narrower_or_more(setup, budget),
            *_smaller_draft(setup, budget),
            *_fewer_rows(setup, budget),
            *_shorter(setup, budget),
        ]
    return Fit(budget.needs(setup), budget.available, remedies)
