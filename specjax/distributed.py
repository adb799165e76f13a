"""Several processes that run one program, each with some of the devices: what they have to agree on."""

import functools
import json
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_SHARED = (".json", ".jsonl")
"""Files of a workdir by which a run goes on."""


def initialize() -> None:
    """Joins the processes of this program, before anything else uses JAX.

    Cloud TPU, SLURM and Open MPI tell JAX who they are; elsewhere JAX_COORDINATOR_ADDRESS (HOST:PORT of the first
    process), JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    Raises:
      ValueError: where nothing says so.
    """
    told = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    try:
        number, place = (None if value is None else int(value) for value in told.values())
        # The address JAX reads by itself.
        jax.distributed.initialize(num_processes=number, process_id=place)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"The processes cannot be joined ({error}): set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID, or leave --distributed out."
        ) from error


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def from_first(value: Any) -> Any:
    """What the first process has in the place of `value`, which is made of JSON's types.

    Decisions that rest on a clock have to be taken so: processes that decide differently wait for each other for ever.
    """
    if jax.process_count() == 1:
        return value
    content = np.frombuffer(json.dumps(value).encode() if is_first() else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    buffer = np.zeros(size, np.uint8)
    buffer[: content.size] = content
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())


def mirror(workdir: pathlib.Path) -> pathlib.Path:
    """The workdir of this process: that of the first, or a temporary copy of what goes on from there."""
    found = sorted(workdir.glob("*")) if is_first() else []
    texts = {path.name: path.read_text(encoding="utf-8") for path in found if path.suffix in _SHARED}
    texts = from_first(texts)
    if is_first():
        return workdir
    copy = pathlib.Path(tempfile.mkdtemp(prefix="specjax"))
    for name, text in texts.items():
        (copy / name).write_text(text, encoding="utf-8")
    return copy


def to_host(x: Any) -> np.ndarray:
    """An array on the host, of which other processes may hold parts: then all of them have to ask for it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays that every process can read; as they are where there is one process."""
    if mesh is None or jax.process_count() == 1:
        return tree
    return _copier(mesh)(tree)


@functools.cache
def _copier(mesh: Mesh) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
