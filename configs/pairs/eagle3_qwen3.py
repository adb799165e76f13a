"""Qwen3 8B drafted by an EAGLE-3 head in the layout of speculators, on your prompts.

Command, on a TPU VM of four v5e chips or one GPU of 40 GB:

    python -m specjax.launch --config=configs/pairs/eagle3_qwen3.py --config.data=prompts.jsonl \\
        --config.mesh_model=4 --workdir=runs/eagle3_qwen3

This is `configs/compare.py` with values filled in. The head was trained by speculators for vLLM, and its layer's shape
is nested in its `config.json`. Hardware: 18 GB of device memory for the weights of both in bfloat16. Expected: the
table of compare.py, with the acceptance rate by position.

We have not run it.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "compare.py"))["get_config"]()
    config.name = "eagle3_qwen3"
    config.target = "Qwen/Qwen3-8B"
    config.drafter = "eagle"
    config.draft = "RedHatAI/Qwen3-8B-speculator.eagle3"
    config.num_draft_tokens = 3
    config.dtype = "bfloat16"
    return config
