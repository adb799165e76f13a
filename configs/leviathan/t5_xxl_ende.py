"""Leviathan et al. 2022, Table 2, the upper half: T5 v1.1 XXL translates English to German.

Command, on a TPU VM or a GPU that holds the models (11B parameters in bfloat16 are 22 GB):

    python -m specjax.launch --config=configs/leviathan/t5_xxl_ende.py --config.models.target.source=XXL \\
        --config.models.small.source=SMALL --config.models.base.source=BASE --config.models.large.source=LARGE \\
        --config.train=train.jsonl --config.test=test.jsonl --workdir=runs/t5_xxl_ende

XXL to LARGE are T5 v1.1 models that were fine-tuned on WMT EnDe, as in the paper: Hugging Face directories with
safetensors, or hub ids. The defaults name the pre-trained ones, which have not learnt to translate: with them speed and
c are those of the experiment, text and alpha are not. Convert a repository or directory without safetensors by
transformers' `save_pretrained`, and a t5x checkpoint first by the script `convert_t5x_checkpoint_to_pytorch.py` of
transformers 4. The files have one JSON object per line with `input` (English) and `target` (German); n-gram tables are
counted from `train`.

Hardware: the paper's was one TPU v4, batch 1. Its rows, gamma / alpha / measured speedup, at temperature 0: small 7 /
.75 / 3.4x, base 7 / .80 / 2.8x, large 7 / .82 / 1.7x; at temperature 1: small 7 / .62 / 2.6x, base 5 / .68 / 2.4x,
large 3 / .71 / 1.4x. We have not run it on that hardware.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_BASE = runpy.run_path(str(pathlib.Path(__file__).parent / "experiment.py"))


def get_config() -> ConfigDict:
    config = _BASE["get_config"]("0")
    config.name = "t5_xxl_ende"
    config.paper = "ende"
    config.prefix = "translate English to German: "
    for name in ("target", "small", "base", "large"):
        config.models[name] = _BASE["model"]()
        config.models[name].source = f"google/t5-v1_1-{'xxl' if name == 'target' else name}"
    config.num_draft_tokens = (1, 3, 5, 7, 10)
    config.timed_drafts = ("small", "base", "large")
    config.max_new_tokens = 128
    config.max_prompt_tokens = 256
    config.dtype = "bfloat16"
    return config
