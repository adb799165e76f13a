"""New virtual environments in which notebooks are executed, and the record of how long each took there."""

import contextlib
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

NAME = "specjax-clean"
"""Of the kernel, while it exists."""

BEGIN, END = "<!-- times: python colab/build.py --clean -->", "<!-- end of times -->"
"""Around the table in README.md."""

FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")
"""What a clean environment does not inherit."""


class Kernel(NamedTuple):
    """What executes a notebook.

    Attributes:
      name: of the kernel, as Jupyter knows it.
      environment: of its process.
    """

    name: str
    environment: dict[str, str]


@contextlib.contextmanager
def kernel(clone: pathlib.Path, repository: str) -> Iterator[Kernel]:
    """A kernel in a new virtual environment that has ipykernel and nothing else, with an empty cache of programs.

    The first cell of a notebook clones the repository and installs it; git is told to take the committed state of this
    clone in place of GitHub's. Model weights are taken from the user's cache, where they are there.

    Args:
      clone: the clone of the repository.
      repository: its name on GitHub, OWNER/NAME.
    """
    with tempfile.TemporaryDirectory() as place:
        root = pathlib.Path(place)
        python = root / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", str(root / "venv")], check=True)
        quiet = ["--quiet", "--disable-pip-version-check"]
        inherited = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        subprocess.run([str(python), "-m", "pip", "install", *quiet, "ipykernel>=6.29"], check=True, env=inherited)
        spec = root / "share" / "kernels" / NAME
        spec.mkdir(parents=True)
        argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": NAME, "language": "python"}))
        # Jupyter looks for kernels here.
        before, os.environ["JUPYTER_PATH"] = os.environ.get("JUPYTER_PATH"), str(root / "share")
        environment = inherited | {
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
            "JAX_COMPILATION_CACHE_DIR": str(root / "programs"),
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{clone.resolve().as_uri()}.insteadOf",
            "GIT_CONFIG_VALUE_0": f"https://github.com/{repository}",
        }
        try:
            yield Kernel(NAME, environment)
        finally:
            if before is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = before


def machine() -> str:
    """The processor, in words."""
    found = pathlib.Path("/proc/cpuinfo")
    lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} hardware threads, {model}"


class Record:
    """How long each notebook took in a clean environment: times.json, and the table in README.md.

    Attributes:
      times: by notebook: `install_seconds`, `seconds` of all other cells, `date`, `machine` and `commit`.
    """

    def __init__(self, directory: pathlib.Path):
        """Opens the record of a directory, which need not have one."""
        self.directory, self.path = directory, directory / "times.json"
        self.times = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def _commit(self) -> str:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, cwd=self.directory, capture_output=True, text=True, check=True).stdout.strip()

    def has(self, name: str) -> bool:
        """Whether the commit that is checked out has executed a notebook."""
        return name in self.times and self.times[name]["commit"] == self._commit()

    def add(self, name: str, install_seconds: float, seconds: float) -> None:
        """Writes the times of a notebook."""
        self.times[name] = {
            "install_seconds": round(install_seconds),
            "seconds": round(seconds),
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "commit": self._commit(),
        }
        self.path.write_text(json.dumps(self.times, indent=2) + "\n", encoding="utf-8")

    def table(self, names: Sequence[str]) -> str:
        """The times in Markdown, in the order of the names."""
        lines = ["| notebook | installing, s | running, s | on | date |", "|---|---:|---:|---|---|"]
        for name in names:
            if name in self.times:
                one = self.times[name]
                shown = (one["install_seconds"], one["seconds"], one["machine"], one["date"])
            else:
                shown = ("-", "-", "not executed there yet", "-")
            lines.append(f"| {name} | {' | '.join(map(str, shown))} |")
        return "\n".join(lines)

    def write_table(self, names: Sequence[str]) -> None:
        """Puts the table into README.md."""
        path = self.directory / "README.md"
        before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        path.write_text(f"{before}{BEGIN}\n\n{self.table(names)}\n\n{END}{after}", encoding="utf-8")
