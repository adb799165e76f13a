"""Vicuna 7B drafted by the first published EAGLE head, on your prompts.

Command, on a TPU VM of four v5e chips or one GPU of 24 GB:

    python -m specjax.launch --config=configs/pairs/eagle_vicuna.py --config.data=prompts.jsonl --config.mesh_model=4 \\
        --workdir=runs/eagle_vicuna

This is `configs/compare.py` with values filled in: the authors' tree of 25 nodes (`drafters.topologies`, "eagle_25").
Above temperature 0 its nodes are drawn without replacement and judged by the head's own distribution, as in arXiv
2401.15077. A hub repository of a target without safetensors has to be converted first (transformers'
`save_pretrained`); the head's `pytorch_model.bin` is read as it is. Hardware: 14 GB of device memory for the weights of
both in bfloat16. Expected: the table of compare.py.

We have not run it.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from specjax.drafters import topologies


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "compare.py"))["get_config"]()
    config.name = "eagle_vicuna"
    config.target = "lmsys/vicuna-7b-v1.3"
    config.drafter = "eagle"
    config.draft = "yuhuili/EAGLE-Vicuna-7B-v1.3"
    config.topology = topologies.named("eagle_25")
    config.dtype = "bfloat16"
    return config
