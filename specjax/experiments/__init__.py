"""Experiments, which configs run: `config.experiment` names an entry of `EXPERIMENTS`."""

import importlib
from collections.abc import Callable
from typing import Any

EXPERIMENTS = {
    "chinchilla": "specjax.experiments.chinchilla:run",
    "compare": "specjax.experiments.compare:run",
    "count": "specjax.experiments.count:run",
    "data": "specjax.experiments.data:run",
    "leviathan": "specjax.experiments.leviathan:run",
    "plan": "specjax.experiments.plan:run",
    "train": "specjax.experiments.train:run",
}
"""`module:function` by name, imported when asked for.

The function takes `(config, workdir, *, overwrite=False, view=None)`: the config as the experiment's file in `configs`
has it, the directory for its files, whether an earlier run there is deleted, and the screen (by default standard
output). A run that was interrupted there is continued. It raises ValueError for values that make no sense, before
anything is loaded, and for a directory that holds another run or a broken one; OSError for files that cannot be read or
written; KeyboardInterrupt with what is finished.
"""


def get(name: str) -> Callable[..., Any]:
    """The function that runs an experiment.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"config.experiment={name!r} is unknown: choose one of {', '.join(sorted(EXPERIMENTS))}.")
    module, function = EXPERIMENTS[name].split(":")
    return getattr(importlib.import_module(module), function)
