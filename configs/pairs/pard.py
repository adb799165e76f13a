"""Llama 3.1 8B drafted by AMD's PARD draft, a model of 1B parameters that predicts all tokens of a draft in one call.

Command, on a TPU VM or a machine with GPUs, one process per host:

    python -m specjax.launch --config=configs/pairs/pard.py --config.data=prompts.jsonl --config.mesh_model=4 \\
        --config.draft_sharding=replicated --workdir=runs/pard_pair [--distributed]

This is `configs/compare.py` with values filled in; the models come from the hub, which asks for a licence (`hf auth
login`). The draft's config.json names its mask (`pard_token`). For Qwen2.5 instead:
--config.target=Qwen/Qwen2.5-7B-Instruct --config.draft=amd/PARD-Qwen2.5-0.5B. Hardware: 20 GB of device memory for
weights in bfloat16, such as one H200 (--config.mesh_model=1) or four v5e. Its authors report 4.08 times the speed of
plain decoding (arXiv 2504.18583).

We have not run it.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "compare.py"))["get_config"]()
    config.name = "pard"
    config.target = "meta-llama/Llama-3.1-8B-Instruct"
    config.drafter = "pard"
    config.draft = "amd/PARD-Llama-3.2-1B"
    config.num_draft_tokens = 12
    config.dtype = "bfloat16"
    return config
