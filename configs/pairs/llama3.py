"""Llama 3.1 70B drafted by its 8B sibling, on your prompts.

Command, on a TPU VM or a machine with GPUs, one process per host:

    python -m specjax.launch --config=configs/pairs/llama3.py --config.data=prompts.jsonl --config.mesh_model=8 \\
        --workdir=runs/llama3 [--distributed]

This is `configs/compare.py` with values filled in; the models come from the hub, which asks for a licence (`hf auth
login`). Hardware: 160 GB of device memory for weights in bfloat16, such as two H200s or sixteen v5e. To predict its
speed without that hardware:

    python -m specjax.launch --config=configs/plan.py --config.target=llama3_70b --config.draft=llama3_8b \\
        --config.topology=v5e:4x4

We have not run it.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "compare.py"))["get_config"]()
    config.name = "llama3"
    config.target = "meta-llama/Llama-3.1-70B-Instruct"
    config.drafter = "model"
    config.draft = "meta-llama/Llama-3.1-8B-Instruct"
    config.dtype = "bfloat16"
    return config
