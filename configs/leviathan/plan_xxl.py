"""Plans Table 2 of Leviathan et al. 2022 (arXiv 2211.17192): T5 v1.1 XXL with its three drafts, on one chip.

Command:

    python -m specjax.launch --config=configs/leviathan/plan_xxl.py

The paper's chip is one TPU v4; the same is planned for the smallest slice of v5e that holds the models, and for one
H100. The step with K = 7 is compiled, batch 1; c, the times of the calls, and the speedup at the paper's acceptance
rates are predicted and printed beside what the paper measured. This is `configs/plan.py` with values filled in, and
takes the same overrides.

Hardware: any CPU, with the compilers (`pip install -e '.[tpu,cuda-plan]'`); some minutes, nothing is run. Expected:
c near .01 to .07, below the paper's .02 to .11, since times are lower bounds; predicted speedups above the paper's
Theorem 3.8 for the same reason, most of all for the large draft, whose 24 layers wait for each other.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_DRAFTS = ("small", "base", "large")

# Table 2: K, alpha and measured speedup of the three drafts.
_TABLE = {
    "EnDe, T = 0": ((7, 0.75, 3.4), (7, 0.80, 2.8), (7, 0.82, 1.7)),
    "EnDe, T = 1": ((7, 0.62, 2.6), (5, 0.68, 2.4), (3, 0.71, 1.4)),
    "CNN/DM, T = 0": ((5, 0.65, 3.1), (5, 0.73, 3.0), (3, 0.74, 2.2)),
    "CNN/DM, T = 1": ((5, 0.53, 2.3), (3, 0.55, 2.2), (3, 0.56, 1.7)),
}


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "plan.py"))["get_config"]()
    config.name = "plan_xxl"
    config.target = "t5_v1_1_xxl"
    config.draft = ",".join(f"t5_v1_1_{size}" for size in _DRAFTS)
    config.topology = "v4:1x1x1,v5e:2x2,H100:1"
    config.num_draft_tokens = 7
    config.prompt_tokens = 256
    config.published = tuple(
        (task, f"t5_v1_1_{size}", *cell)
        for task, cells in _TABLE.items()
        for size, cell in zip(_DRAFTS, cells, strict=True)
    )
    return config
