"""Vicuna 7B drafted by its published Medusa heads, as a tree of 63 nodes, on your prompts.

Command, on a TPU VM or a machine with a GPU:

    python -m specjax.launch --config=configs/pairs/medusa_vicuna.py --config.data=prompts.jsonl --workdir=runs/medusa

On four chips, such as v5e:2x2, --config.mesh_model=4. This is `configs/compare.py` with values filled in. The target
and the heads come from the hub; specjax reads safetensors, so a target that the hub has as pytorch_model.bin alone is
first saved by `transformers` (`save_pretrained`), and --config.target names that directory. The heads are read from
`medusa_lm_head.pt`, whose code is not run. They have output matrices of their own, and were trained with the target
frozen (Medusa-1), so the text is Vicuna's. --config.verify=typical:0.09,0.3 is the paper's own rule, which is not
exact.

Hardware: 16 GB of device memory for weights in bfloat16. Expected: by the paper (arXiv 2401.10774, A100, batch 1, with
that rule), 2.18 times plain decoding; by Spec-Bench, at temperature 0 on an A100, 2.3 tokens per call. We have not run
it.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from specjax.drafters import topologies


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "compare.py"))["get_config"]()
    config.name = "medusa_vicuna"
    config.target = "lmsys/vicuna-7b-v1.3"
    config.drafter = "medusa"
    config.draft = "FasterDecoding/medusa-vicuna-7b-v1.3"
    config.topology = topologies.named("vicuna_7b_stage2")
    config.dtype = "bfloat16"
    return config
