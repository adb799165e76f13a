"""libtpu, which compiles for TPUs that you don't have, by the name of their topology."""

import importlib.util
import os
from typing import Any

import jax
from jax.sharding import Mesh

from specjax.planning.chips import Topology

# Without the first three, libtpu asks a metadata server what machine it is on, and complains that there is none.
# Without the last, only one process at a time may load it, which is meant for those that use a TPU.
_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def is_available() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def make_mesh(topology: Topology, data: int) -> Mesh:
    """The mesh of a topology that you don't have, `data` times `model`.

    Raises:
      ValueError: where libtpu is not installed, does not know the topology, or cannot be loaded.
    """
    from jax.experimental import topologies

    if not is_available():
        raise ValueError(
            f"Compiling for {topology.name} needs libtpu: pip install -e '.[tpu]', or --config.compile=False, which "
            "computes everything from shapes."
        )
    chip = topology.chip
    options: dict[str, Any] = {}
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # One device a chip.
    if topology.num_chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    for name, value in _MACHINE.items():
        os.environ.setdefault(name, value)
    shape = "x".join(map(str, topology.shape))
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.compiler_name}:{shape}", **options
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"topology={topology.name!r}: libtpu does not know it ({reason}). Sizes are 1, 2, 4, 8 ..."
        ) from error
    devices = topologies.make_mesh(description, (data, topology.num_devices // data), ("data", "model")).devices
    return Mesh(devices, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
