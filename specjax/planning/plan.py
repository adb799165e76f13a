"""What a decode step takes on chips that you don't have, computed from shapes alone: memory, cost, time and fit.

Each is in a file of its own in this folder; this module collects them. `aot` compiles the same step and reads what
XLA made of it.
"""

from specjax.planning.cost import Cost, call_cost, costs, with_collectives
from specjax.planning.fit import Fit, fit
from specjax.planning.memory import Memory, memory
from specjax.planning.roofline import Forecast, StepTimes, Times, forecast, step_times, times
from specjax.planning.setup import (
    SIDES,
    Setup,
    Sharded,
    abstract_mesh,
    attention,
    local_bytes,
    num_params,
    placed_config,
    replicated,
    rules_of,
    shard,
    unrolled,
    with_attention,
    with_layers,
)

__all__ = [
    "SIDES",
    "Cost",
    "Fit",
    "Forecast",
    "Memory",
    "Setup",
    "Sharded",
    "StepTimes",
    "Times",
    "abstract_mesh",
    "attention",
    "call_cost",
    "costs",
    "fit",
    "forecast",
    "local_bytes",
    "memory",
    "num_params",
    "placed_config",
    "replicated",
    "rules_of",
    "shard",
    "step_times",
    "times",
    "unrolled",
    "with_attention",
    "with_collectives",
    "with_layers",
]
