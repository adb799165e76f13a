"""The specifications of accelerators, from their makers' data sheets: one table, each figure with its source.

Rates are peaks that no program quite reaches; a time computed from them is a lower bound. Megabytes and the like are
decimal where the maker writes GB, binary where it writes GiB.
"""

import dataclasses
import math

_GB, _GIB = 10**9, 2**30
_TPU = "https://docs.cloud.google.com/tpu/docs"
_NVIDIA = "https://www.nvidia.com/en-us/data-center"
_NCCL = "NCCL src/graph/tuning.cc (baseLat and hwLat of Ring LL over NVLink)"
_SCALING = "How to Scale Your Model, part 3 (about 1 us a hop), https://jax-ml.github.io/scaling-book/sharding"


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator.

    Attributes:
      name: its name in a topology, such as "v5e" in "v5e:2x4" or "H100" in "H100:8".
      flops: bfloat16 multiplications and additions a second, dense.
      memory: bytes of its main memory.
      bandwidth: bytes per second between that memory and the chip.
      interconnect: bytes per second to and from other chips, both directions added up.
      source: the source of those figures.
      base_latency: seconds that a collective takes before its first hop.
      hop_latency: seconds that a collective takes for each chip that data passes.
      latency_source: the source of those two figures, the least certain of all.
      tpu: whether it is a TPU, not a GPU.
      devices: how many JAX devices a chip is.
      dimensions: the number of dimensions of a TPU network; 1 for GPUs, which are all connected to each other.
      wraps_at: the dimensions of a slice close to rings where all of them are multiples of this; 0: never.
      most: the most chips that reach each other directly: a TPU pod, or GPUs by NVLink.
      compiler_name: its name in libtpu.
    """

    name: str
    flops: float
    memory: int
    bandwidth: float
    interconnect: float
    source: str
    base_latency: float
    hop_latency: float
    latency_source: str
    tpu: bool = True
    devices: int = 1
    dimensions: int = 1
    wraps_at: int = 0
    most: int = 8
    compiler_name: str = ""


def _tpu(name: str, teraflops: float, memory: int, bandwidth: float, interconnect: float, **rest) -> Chip:
    values = {"source": f"{_TPU}/{name}", "compiler_name": name, "dimensions": 3, "wraps_at": 4, "most": 4096} | rest
    return Chip(
        name, teraflops * 1e12, memory, bandwidth * _GB, interconnect * _GB,
        base_latency=0.0, hop_latency=1e-6, latency_source=_SCALING, **values,
    )  # fmt: skip


def _gpu(name: str, teraflops: float, memory: int, bandwidth: float, interconnect: float, source: str) -> Chip:
    return Chip(
        name, teraflops * 1e12, memory, bandwidth * _GB, interconnect * _GB, source,
        base_latency=3.6e-6, hop_latency=0.47e-6, latency_source=_NCCL, tpu=False,
    )  # fmt: skip


_FLAT = {"dimensions": 2, "wraps_at": 16, "most": 256}

CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 275, 32 * _GIB, 1200, 600, source=f"{_TPU}/v4; interconnect: arXiv 2304.01433, 6 links of 50 GB/s"),
        _tpu("v5e", 197, 16 * _GB, 819, 400, **_FLAT),
        _tpu("v5p", 459, 95 * _GIB, 2765, 1200, source=f"{_TPU}/tpu7x, which has all three"),
        _tpu("v6e", 918, 32 * _GIB, 1638, 800, source=f"{_TPU}/tpu7x, which has all three", **_FLAT),
        _tpu("v7x", 2307, 192 * _GIB, 7380, 1200, source=f"{_TPU}/tpu7x", compiler_name="tpu7x", devices=2),
        _gpu("A100", 312, 80 * _GB, 2039, 600, f"{_NVIDIA}/a100 (80 GB SXM)"),
        _gpu("H100", 989, 80 * _GB, 3350, 900, f"{_NVIDIA}/h100 (SXM; half of the sparse rate)"),
        _gpu("H200", 989, 141 * _GB, 4800, 900, f"{_NVIDIA}/h200 (SXM; half of the sparse rate)"),
        _gpu("B200", 2250, 180 * _GB, 8000, 1800, f"{_NVIDIA}/dgx-b200 (an eighth; half of the sparse rate)"),
    )
}
"""The chips by name."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some chips that reach each other directly.

    Attributes:
      chip: the kind of chip.
      shape: the number of chips in each dimension.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        """The number of chips."""
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        """The number of JAX devices."""
        return self.num_chips * self.chip.devices


def _example(chip: Chip) -> str:
    return f"{chip.name}:{'x'.join(['2'] * chip.dimensions) if chip.tpu else 8}"


def parse(name: str) -> Topology:
    """The chips of a name such as "v4:2x2x4", "v5e:2x4" or "H100:8".

    Raises:
      ValueError: for an unknown name; it lists the known ones.
    """
    kind, _, sizes = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None:
        raise ValueError(
            f"topology={name!r}: no chip {kind!r}; write one of {', '.join(map(_example, CHIPS.values()))}."
        )
    shape = tuple(int(size) if size.isdecimal() else 0 for size in sizes.split("x"))
    if len(shape) != chip.dimensions or not all(shape):
        words = f"{chip.dimensions} sizes" if chip.tpu else "number of GPUs"
        raise ValueError(f"topology={name!r}: {kind} takes the {words}, such as {_example(chip)}.")
    topology = Topology(chip, shape)
    if topology.num_chips > chip.most:
        raise ValueError(f"topology={name!r}: at most {chip.most} reach each other directly, such as {_example(chip)}.")
    return topology


def all_reduce_seconds(topology: Topology, devices: int, size_in_bytes: float) -> float:
    """The least time of an all-reduce, in seconds: the latency there and back, and the bytes.

    Data goes to the farthest device and back (a reduce-scatter, then an all-gather), along a ring of GPUs or in every
    dimension of a TPU slice; where the dimensions close to rings, the distance is half as long. Every device sends
    `2 (n - 1) / n` of the array, and receives as much.

    Args:
      topology: the chips.
      devices: n, how many neighbouring devices take part.
      size_in_bytes: the size of the array, which each device has whole.
    """
    chip = topology.chip
    if devices == 1:
        return 0.0
    # The last dimensions first, as meshes are laid out; the devices of one chip are a hop apart.
    rings = chip.wraps_at > 0 and all(size % chip.wraps_at == 0 for size in topology.shape)
    hops, left = 0, devices
    for size in (chip.devices, *reversed(topology.shape)):
        used = min(size, left)
        hops += used // 2 if rings and used == size else used - 1
        left = -(-left // used)
    latency = chip.base_latency + 2 * hops * chip.hop_latency
    sent = 2 * (devices - 1) / devices * size_in_bytes
    return latency + sent / (chip.interconnect / chip.devices / 2)
