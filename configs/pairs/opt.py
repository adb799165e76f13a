"""OPT 66B, the largest published OPT except the 175B, drafted by OPT 125M, on your prompts.

Command, on a TPU VM or a machine with GPUs, one process per host:

    python -m specjax.launch --config=configs/pairs/opt.py --config.data=prompts.jsonl --config.mesh_model=8 \\
        --workdir=runs/opt [--distributed]

This is `configs/compare.py` with values filled in. The draft has 12 heads, which do not divide over eight devices, and
is small: every device has all of it. A hub repository without safetensors has to be converted first (transformers'
`save_pretrained`). Hardware: 140 GB of device memory for weights in bfloat16. To predict its speed without it:

    python -m specjax.launch --config=configs/plan.py --config.target=opt_66b --config.draft=opt_125m \\
        --config.draft_sharding=replicated --config.topology=v5p:2x2x2

We have not run it.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "compare.py"))["get_config"]()
    config.name = "opt"
    config.target = "facebook/opt-66b"
    config.drafter = "model"
    config.draft = "facebook/opt-125m"
    config.draft_sharding = "replicated"
    config.dtype = "bfloat16"
    return config
