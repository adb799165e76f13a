"""What the notebooks in `colab/` share: the hardware they find, the sizes that fit it, and the configs they run."""

import importlib.util
import os
import pathlib
import platform
import runpy
import shlex
import sys
import warnings
from typing import Any, NamedTuple, TypeVar

import jax
from rich.console import Console

import specjax
from specjax import api, experiments
from specjax.experiments import keys
from specjax.experiments.reports.display import View

Size = TypeVar("Size")

SMALL = "SMALL"
"""The environment variable that, where it is not empty or 0, asks for the smallest sizes, to test a notebook."""

CLONE = "specjax-repository"
"""The directory into which the first cell of a notebook clones the repository."""


class Runtime(NamedTuple):
    """The hardware that a notebook runs on.

    Attributes:
      kind: "cpu", "gpu" or "tpu".
      device: the name of a device.
      num_devices: how many there are.
      is_small: whether the smallest sizes are asked for, to test the notebook.
    """

    kind: str
    device: str
    num_devices: int
    is_small: bool

    def pick(self, *, small: Size, cpu: Size, accelerator: Size) -> Size:
        """The size that fits this hardware."""
        return small if self.is_small else cpu if self.kind == "cpu" else accelerator

    def __str__(self) -> str:
        """A sentence."""
        sizes = "the smallest sizes, for a test" if self.is_small else f"sizes for a {self.kind.upper()}"
        plural = "" if self.num_devices == 1 else "s"
        return (
            f"specjax {specjax.__version__} with jax {jax.__version__} on {self.num_devices} {self.kind.upper()} "
            f"device{plural} ({self.device}); {sizes}."
        )


def runtime() -> Runtime:
    """Finds the hardware, and keeps compiled programs on disk, so that a notebook that is run again starts sooner."""
    # Warnings name the files of libraries, which say nothing to a reader.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"jax|absl|transformers")
    if importlib.util.find_spec("libtpu") and not _has_chips():
        # libtpu, installed to compile for TPUs that one doesn't have, complains of their absence.
        jax.config.update("jax_platforms", "cpu")
    api.keep_programs()
    devices = jax.devices()
    kind = devices[0].platform.replace("cuda", "gpu")
    name = f"{os.cpu_count()} threads, {platform.machine()}" if kind == "cpu" else devices[0].device_kind
    return Runtime(kind, name, len(devices), os.environ.get(SMALL, "0") not in ("", "0"))


def _has_chips() -> bool:
    devices = pathlib.Path("/dev")
    return any(any(devices.glob(name)) for name in ("accel*", "vfio/*", "nvidia*", "kfd"))


def config(name: str) -> str:
    """The path of a file in `configs/`, for `--config`: a wheel of specjax has none, a clone of the repository has.

    Args:
      name: the file below `configs/`, such as "methods.py"; a variant may follow a colon.

    Raises:
      FileNotFoundError: where there is no clone.
    """
    file = name.partition(":")[0]
    for root in (pathlib.Path(specjax.__file__).parents[1], pathlib.Path(CLONE)):
        if (root / "configs" / file).is_file():
            return str(root / "configs" / name)
    raise FileNotFoundError(
        f"configs/{file} is neither beside the package nor in {CLONE}/: clone the repository of specjax into {CLONE}/."
    )


def _quoted(flag: str) -> str:
    """A flag as a shell reads it; tuples of strings in double quotes, since they have single ones."""
    return f'"{flag}"' if "'" in flag else shlex.quote(flag)


def run(name: str, workdir: str, **values: Any) -> pathlib.Path:
    """Runs a config as `python -m specjax.launch` does, in this process, and prints that command.

    Args:
      name: the file below `configs/`, as for `config`.
      workdir: the directory of its results, below the current one; an earlier run there is deleted.
      **values: of the config's keys; a dot in a key is written as two underscores.

    Returns:
      the directory.

    Raises:
      AttributeError, KeyError, TypeError: for a key that does not exist, or a value of another type.
    """
    path, _, variant = config(name).partition(":")
    chosen = runpy.run_path(path)["get_config"](*([variant] if variant else []))
    chosen.lock()
    flags = {key.replace("__", "."): value for key, value in values.items()}
    before = keys.flatten(chosen)
    chosen.update_from_flattened_dict(flags)
    changed = [_quoted(f"--config.{key}={value}") for key, value in flags.items() if value != before[key]]
    print("$", " ".join(["python -m specjax.launch", f"--config=configs/{name}", *changed, f"--workdir={workdir}"]))
    print()
    # On standard output: Rich would make a cell's output of each line.
    view = View(Console(file=sys.stdout, force_jupyter=False, force_terminal=False, highlight=False))
    experiments.get(chosen.experiment)(chosen, workdir, overwrite=True, view=view)
    return pathlib.Path(workdir)
