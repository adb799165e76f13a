"""The experiments that configs run: `config.experiment` names an entry of `EXPERIMENTS`."""

import importlib
from collections.abc import Callable
from typing import Any

EXPERIMENTS = {
    "chinchilla": "specjax.experiments.chinchilla:run",
    "compare": "specjax.experiments.compare:run",
    "compress": "specjax.experiments.compress:run",
    "count": "specjax.experiments.count:run",
    "data": "specjax.experiments.data:run",
    "distill": "specjax.experiments.distill:run",
    "head": "specjax.experiments.head:run",
    "heads": "specjax.experiments.heads:run",
    "exit_norm": "specjax.experiments.exit_norm:run",
    "leviathan": "specjax.experiments.leviathan:run",
    "masks": "specjax.experiments.masks:run",
    "methods": "specjax.experiments.methods:run",
    "pard": "specjax.experiments.pard:run",
    "plan": "specjax.experiments.plan:run",
    "prune": "specjax.experiments.prune:run",
    "skip_search": "specjax.experiments.skip_search:run",
    "specdec": "specjax.experiments.specdec:run",
    "tune": "specjax.experiments.tune:run",
    "train": "specjax.experiments.train:run",
}
"""`module:function` by name, imported when asked for.

The function takes `(config, workdir, *, overwrite=False, view=None)`: the config as in the experiment's file in
`configs`, the directory for its files, whether to delete an earlier run there, and the screen (by default standard
output). An interrupted run there is continued. It raises ValueError for invalid values, before anything is loaded, and
for a directory that holds another run or a broken one; OSError for files that cannot be read or written;
KeyboardInterrupt, which says what is finished.
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
