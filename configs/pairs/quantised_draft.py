"""A model drafted by its own copy in int4, within the memory of one small accelerator.

Command, to plan Llama 3.1 8B in bfloat16 with that draft within 24 GB:

    python -m specjax.launch --config=configs/pairs/quantised_draft.py

A draft in bfloat16 does not fit: `--config.draft_quantise=` says so, and what would. This is `configs/plan.py` with
values filled in, and takes the same overrides, such as `--config.memory_gb=16 --config.target_quantise=int8`. To run
such a pair, on hardware that has the memory:

    python -m specjax.launch --config=configs/compare.py --config.target=SOURCE --config.drafter=model \\
        --config.draft=SOURCE --config.draft_quantise=int4:64 --config.dtype=bfloat16 --config.data=FILE

The draft needs no training and no other checkpoint, and the text is the target's, to the last token.

Hardware: any CPU; nothing is run. Expected: it fits, with 20 of 22 GiB; c = 0.29, so that speculation pays where the
copy is nearly always accepted: 1.9 times at the acceptance rate of 0.9 that is assumed, as a lower bound of the times.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "plan.py"))["get_config"]()
    config.name = "quantised_draft"
    config.target = "llama3_8b"
    config.draft = "llama3_8b"
    config.draft_quantise = "int4:64"
    config.topology = "H100:1"
    config.memory_gb = 24.0
    config.alpha = 0.9
    config.max_new_tokens = 512
    config.prompt_tokens = 512
    return config
