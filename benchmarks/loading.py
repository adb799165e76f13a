"""The host memory that loading takes: one process with the whole model, and several that share it.

    python benchmarks/loading.py --num_layers=16

writes a random Llama in bfloat16 to a temporary directory, and loads it in separate processes: one with one device,
then two and four that split it over `model`. It reports the peak memory of each process above what it had before,
sampled every millisecond, and the seconds. Mapped pages of the files do not count: the system reclaims them when it
needs them. On a CPU the devices' memory is the host's, so a process cannot stay below its part of the parameters; what
it takes beyond that is what loading itself needs. Linux only.
"""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time

from absl import app, flags

from specjax.models.config import DecoderConfig
from specjax.models.weights import mapping

_LAYERS = flags.DEFINE_integer("num_layers", 16, "Layers of 100 MB.", lower_bound=1)
_PROCESSES = flags.DEFINE_list("processes", ["1", "2", "4"], "Numbers of processes to load it in.")

CONFIG = DecoderConfig(
    vocab_size=32768,
    hidden_size=2048,
    intermediate_size=6144,
    num_layers=1,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    max_position=2048,
    dtype="bfloat16",
)


def write(directory: pathlib.Path, config: DecoderConfig) -> int:
    """Writes the model, a file per layer, and returns its size in bytes."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in mapping.tensor_shapes(config).items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    rng, total = np.random.default_rng(0), 0
    for file, shapes in files.items():
        tensors = {n: rng.standard_normal(s, np.float32).astype(ml_dtypes.bfloat16) for n, s in shapes.items()}
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, directory / file)
    weight_map = {name: file for file, shapes in files.items() for name in shapes}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    raw = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_position,
    }
    (directory / "config.json").write_text(json.dumps(raw))
    return total


class Peak(threading.Thread):
    """Watches the memory of this process, without mapped files."""

    def __init__(self):
        """Starts to watch."""
        super().__init__(daemon=True)
        self.most = self.before = self.now()
        self.done = threading.Event()
        self.start()

    def now(self) -> int:
        """Bytes."""
        status = pathlib.Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024

    def run(self) -> None:
        """The body of the thread."""
        while not self.done.wait(0.001):
            self.most = max(self.most, self.now())

    def stop(self) -> int:
        """The most bytes above those at the start."""
        self.done.set()
        self.join()
        return max(self.most, self.now()) - self.before


def load(directory: str, processes: int, index: int, port: str) -> None:
    """The program of each process, which prints its figures."""
    import jax

    from specjax.api import pretrained
    from specjax.parallel import sharding

    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", num_processes=processes, process_id=index)
    mesh = sharding.make_mesh(model=processes) if processes > 1 else None
    peak, begin = Peak(), time.perf_counter()
    params = jax.block_until_ready(pretrained.load(directory, dtype=CONFIG.dtype, mesh=mesh).params)
    held = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
    print(json.dumps({"seconds": time.perf_counter() - begin, "peak": peak.stop(), "held": held}))


def measure(directory: pathlib.Path, processes: int) -> list[dict[str, float]]:
    """The figures of each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--load", str(directory), str(processes)]
    running = [
        subprocess.Popen([*command, str(i), port], env=env, stdout=subprocess.PIPE, text=True) for i in range(processes)
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    config = dataclasses.replace(CONFIG, num_layers=_LAYERS.value)
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        size = write(directory, config)
        print(f"A model of {size / 2**20:.0f} MiB in bfloat16.\n")
        print("| processes | parameters in each, MiB | peak above the start, MiB | beyond the parameters, MiB | s |")
        print("|---|---|---|---|---|")
        for processes in map(int, _PROCESSES.value):
            figures = measure(directory, processes)
            held, most = (max(f[key] for f in figures) / 2**20 for key in ("held", "peak"))
            seconds = max(f["seconds"] for f in figures)
            print(f"| {processes} | {held:.0f} | {most:.0f} | {most - held:.0f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        app.run(main)
