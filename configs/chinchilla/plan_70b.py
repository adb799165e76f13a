"""Plans the setting of Chen et al. 2023 (arXiv 2302.01318): Chinchilla 70B and its 4B draft on 16 TPU v4.

Command:

    python -m specjax.launch --config=configs/chinchilla/plan_70b.py

The target has 80 layers, 8192 wide, 64 heads; the draft 8 layers, 6144 wide, 48 heads: wide and shallow. A draft of 7B
with 32 layers, 4096 wide, is planned for comparison. Batch 1, K = 4. This is `configs/plan.py` with values filled in,
and takes the same overrides. The paper measured 14.1 ms/token for the target and 1.8 for the draft (its section 5.1 and
table 1).

Hardware: any CPU, with libtpu (`pip install -e '.[tpu]'`); a few minutes, nothing is run. Expected: it fits; two
all-reduces per layer; no cache is copied, and the state is written in place; predictions of 60 % of the paper's time
for the target and a third of that for the draft, since they are lower bounds; the narrow draft takes twice as long as
the wide one, half of it latency.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "plan.py"))["get_config"]()
    config.name = "plan_70b"
    config.target = "chinchilla_70b"
    config.draft = "chinchilla_draft_4b,gopher_7b"
    config.topology = "v4:2x2x4"
    config.max_new_tokens = 512
    config.prompt_tokens = 512
    config.reference_ms = ConfigDict({"chinchilla_70b": 14.1, "chinchilla_draft_4b": 1.8})
    return config
