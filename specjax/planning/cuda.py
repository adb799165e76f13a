"""JAX's CUDA plugin, which compiles for GPUs that you don't have: it needs the plugin's wheels, but no GPU and no CUDA.

Nothing is autotuned, since nothing is run: which kernel a matrix product gets is XLA's default. Instructions, copies,
collectives and memory are those of the program that a machine with these GPUs would compile.
"""

import importlib.util
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from specjax.planning.chips import Topology

_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


class _Gpu(NamedTuple):
    """What XLA asks about a GPU.

    Attributes:
      description: as the driver calls it.
      capability: compute capability, major and minor.
      num_cores: streaming multiprocessors.
      units_per_core: float32 units of each.
      shared_memory: bytes of each, and the most that one block may ask for.
      l2_cache: bytes.
      clock: GHz.
      memory: bytes.
    """

    description: str
    capability: tuple[int, int]
    num_cores: int
    units_per_core: int
    shared_memory: tuple[int, int]
    l2_cache: int
    clock: float
    memory: int


# XLA captures loops and conditions in CUDA graphs from CUDA 12.3 on; without these it takes the driver to be older.
_VERSIONS = ("driver_version", "kernel_mode_driver_version", "runtime_version", "compile_time_toolkit_version")

_HOPPER = (233_472, 232_448)

# Figures of openxla/xla, xla/backends/gpu/target_config/specs (read on 2026-11-29).
_GPUS = {
    "A100": _Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, (167_936, 166_912), 41_943_040, 1.41, 85_100_068_864),
    "H100": _Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, _HOPPER, 52_428_800, 1.98, 84_942_979_072),
    "H200": _Gpu("NVIDIA H200 141GB HBM3e", (9, 0), 132, 128, _HOPPER, 52_428_800, 1.98, 151_397_597_184),
    "B200": _Gpu("NVIDIA B200", (10, 0), 148, 128, _HOPPER, 132_644_864, 1.965, 191_514_411_008),
}


def is_available() -> bool:
    """Whether the CUDA plugin of JAX is installed."""
    return any(importlib.util.find_spec(name) for name in _PLUGINS)


def _target_config(topology: Topology) -> str:
    """The chip as XLA's `GpuTargetConfigProto`, in text."""
    gpu = _GPUS[topology.chip.name]
    major, minor = gpu.capability
    shared, most_shared = gpu.shared_memory
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": most_shared,
        "threads_per_core_limit": 2048,
        "core_count": gpu.num_cores,
        "fpus_per_core": gpu.units_per_core,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": int(topology.chip.bandwidth),
        "l2_cache_size": gpu.l2_cache,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": gpu.memory,
    }
    numbers = " ".join(f"{name}: {value}" for name, value in fields.items())
    numbers += "".join(f' {name}: "13.0.0"' for name in _VERSIONS)
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f'gpu_device_info {{ {capability} {numbers} }} platform_name: "CUDA" '
        f'dnn_version_info {{ major: 9 minor: 8 patch: 0 }} device_description_str: "{gpu.description}"'
    )


def make_mesh(topology: Topology, data: int) -> Mesh:
    """The mesh of GPUs that you don't have, `data` times `model`.

    Raises:
      ValueError: where the plugin is not installed, or cannot be loaded.
    """
    from jax.experimental import topologies

    if not is_available():
        raise ValueError(
            f"Compiling for {topology.name} needs JAX's CUDA plugin, but no GPU: pip install -e '.[cuda-plan]', or "
            "--config.compile=False, which computes everything from shapes."
        )
    try:
        description = topologies.get_topology_desc(
            platform="cuda", target_config=_target_config(topology), topology=f"1x1x{topology.num_devices}"
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"topology={topology.name!r}: the CUDA plugin does not give it ({str(error).splitlines()[0]}). Install the "
            "plugin of the same version as jax: pip install -e '.[cuda-plan]'."
        ) from error
    devices = topologies.make_mesh(description, (data, topology.num_devices // data), ("data", "model")).devices
    return Mesh(devices, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
