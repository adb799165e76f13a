"""What `configs/tune.py` has chosen, where later runs find it."""

import dataclasses
import json
import pathlib
import zlib
from typing import Any

from specjax import files
from specjax.experiments import bench


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What pays.

    Attributes:
      num_draft_tokens: K; 0 where no draft pays.
      lengths: `Topology.lengths`.
      step_costs: the time of a step with 1, 2, ... K draft tokens, over that of a plain step.
      topology: the best tree as paths of ranks, where a tree is expected to beat the chain; else empty.
      predicted_speedup: over plain decoding, of the better of both.
    """

    num_draft_tokens: int
    lengths: tuple[int, ...]
    step_costs: tuple[float, ...]
    topology: tuple[tuple[int, ...], ...]
    predicted_speedup: float

    @property
    def shape(self) -> str:
        """The chosen shape in words."""
        if self.topology:
            return f"a tree of {len(self.topology)} nodes, {max(map(len, self.topology))} deep"
        if not self.num_draft_tokens:
            return "no drafts, since none pays"
        shorter = f", with programs for {', '.join(map(str, self.lengths))} too" if self.lengths else ""
        return f"up to {self.num_draft_tokens} draft tokens{shorter}"


def path_of(chosen: Any, batch_size: int) -> pathlib.Path:
    """Where the choice for a target, a drafter and its parts, a dtype, a batch size and this machine is kept."""
    names = [chosen.target, chosen.target_quantise, chosen.drafter, chosen.draft, chosen.draft_quantise, chosen.dtype]
    names += [*chosen.skip_attention, "mlp", *chosen.skip_mlp, chosen.exit_layer, chosen.num_fallback_tokens]
    names += [batch_size, bench.device_name()]
    return files.cache_directory() / "tuned" / f"{zlib.crc32(json.dumps(names).encode()):08x}.json"


def load(chosen: Any, batch_size: int) -> Tuned:
    """What a run of `configs/tune.py` chose for these models, on this machine.

    Args:
      chosen: settings with `target`, `drafter`, `draft`, how they are quantised, and `dtype`.
      batch_size: B.

    Raises:
      FileNotFoundError: where there was none.
      ValueError: where its file is broken.
    """
    path = path_of(chosen, batch_size)
    if not path.exists():
        flags = f"--config.target={chosen.target} --config.drafter={chosen.drafter}"
        flags += f" --config.draft={chosen.draft}" if chosen.draft else ""
        raise FileNotFoundError(
            f"config.tuned=True, but nothing was tuned on this machine for batch {batch_size}: run "
            f"--config=configs/tune.py {flags} --config.dtype={chosen.dtype} --config.batch_sizes=({batch_size},)."
        )
    try:
        content = json.loads(path.read_text())["tuned"]
        paths = tuple(tuple(int(rank) for rank in ranks) for ranks in content["topology"])
        costs = tuple(float(cost) for cost in content["step_costs"])
        lengths = tuple(int(length) for length in content["lengths"])
        return Tuned(int(content["num_draft_tokens"]), lengths, costs, paths, float(content["predicted_speedup"]))
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is broken ({error!r}): run configs/tune.py anew.") from error


def save(chosen: Any, batch_size: int, tuned: Tuned) -> pathlib.Path:
    """Keeps a choice for later runs; returns where."""
    path = path_of(chosen, batch_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"target": chosen.target, "drafter": chosen.drafter, "draft": chosen.draft, "dtype": chosen.dtype}
    content |= {"batch_size": batch_size, "device": bench.device_name(), "tuned": dataclasses.asdict(tuned)}
    files.write(path, json.dumps(content, indent=1) + "\n")
    return path
