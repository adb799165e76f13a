"""Llama 3.1 8B drafted by the published EAGLE-3 head, on your prompts.

Command, on a TPU VM of four v5e chips or one GPU of 40 GB:

    python -m specjax.launch --config=configs/pairs/eagle3_llama3.py --config.data=prompts.jsonl \\
        --config.mesh_model=4 --workdir=runs/eagle3_llama3
    python -m specjax.launch --config=configs/pairs/eagle3_llama3.py --config.data=prompts.jsonl \\
        --config.dynamic="(10,7,59)" --workdir=runs/eagle3_llama3_tree

This is `configs/compare.py` with values filled in: a chain of three tokens, and the authors' dynamic tree. The head
(`yuhuili/EAGLE3-LLaMA3.1-Instruct-8B`, arXiv 2503.01840) is a `pytorch_model.bin`, read without torch; the target comes
from the hub, which asks for a licence (`hf auth login`). Hardware: 17 GB of device memory for the weights of both in
bfloat16. Expected: the table of compare.py, with the acceptance rates of both shapes.

We have not run it.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "compare.py"))["get_config"]()
    config.name = "eagle3_llama3"
    config.target = "meta-llama/Llama-3.1-8B-Instruct"
    config.drafter = "eagle"
    config.draft = "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B"
    config.num_draft_tokens = 3
    config.dtype = "bfloat16"
    return config
