"""Published trees, by name: how many children every node has, by the ranks of the nodes on the path to it.

`mc_sim_7b_63` and `vicuna_7b_stage2` are those of Medusa (arXiv 2401.10774, `medusa_choices.py`), whose nodes were
chosen by the accuracies of its heads; `eagle_25` is that of EAGLE (arXiv 2401.15077, `choices.py`).
"""

Path = tuple[int, ...]

_CHILDREN = {
    "mc_sim_7b_63": (
        "root:10 0:10 1:7 2:3 3:2 4:1 5:1 6:1 7:1 8:1 9:1 00:10 01:3 02:2 03:1 04:1 05:1 06:1 07:1 10:2 20:1 000:2"
    ),
    "vicuna_7b_stage2": (
        "root:10 0:10 1:5 2:2 3:2 4:1 5:1 6:1 7:1 00:9 01:4 02:2 03:1 04:1 05:1 10:3 11:1 20:1 000:4 001:1 002:1 010:1"
    ),
    "eagle_25": "root:4 0:3 1:2 2:2 3:1 00:3 01:2 02:2 10:1 000:3 0000:2",
}


def _paths(children: str) -> tuple[Path, ...]:
    numbers = (entry.split(":") for entry in children.split())
    nodes = (f"{parent.removeprefix('root')}{rank}" for parent, number in numbers for rank in range(int(number)))
    return tuple(sorted((tuple(map(int, node)) for node in nodes), key=lambda path: (len(path), path)))


TOPOLOGIES: dict[str, tuple[Path, ...]] = {name: _paths(children) for name, children in _CHILDREN.items()}
"""The nodes of each tree as paths of ranks, for `drafters.model(topology=...)`."""


def named(name: str) -> tuple[Path, ...]:
    """The nodes of a published tree.

    Raises:
      ValueError: for a name that is not known.
    """
    if name not in TOPOLOGIES:
        raise ValueError(f"topology={name!r} is not known: give one of {', '.join(TOPOLOGIES)}, or a list of paths.")
    return TOPOLOGIES[name]
