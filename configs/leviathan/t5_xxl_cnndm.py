"""Leviathan et al. 2022, Table 2, the lower half: T5 v1.1 XXL summarises news (CNN/DM).

Command, on a TPU VM or a GPU that holds the models (11B parameters in bfloat16 are 22 GB):

    python -m specjax.launch --config=configs/leviathan/t5_xxl_cnndm.py --config.models.target.source=XXL \\
        --config.models.small.source=SMALL --config.models.base.source=BASE --config.models.large.source=LARGE \\
        --config.train=train.jsonl --config.test=test.jsonl --workdir=runs/t5_xxl_cnndm

Like `t5_xxl_ende.py`, with models that were fine-tuned on CNN/DM; a line's `input` is the article, its `target` the
highlights. Hardware: the paper's was one TPU v4, batch 1. Its rows, gamma / alpha / measured speedup, at temperature 0:
small 5 / .65 / 3.1x, base 5 / .73 / 3.0x, large 3 / .74 / 2.2x; at temperature 1: small 5 / .53 / 2.3x, base 3 / .55 /
2.2x, large 3 / .56 / 1.7x. We have not run it on that hardware.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_ENDE = runpy.run_path(str(pathlib.Path(__file__).parent / "t5_xxl_ende.py"))


def get_config() -> ConfigDict:
    config = _ENDE["get_config"]()
    config.name = "t5_xxl_cnndm"
    config.paper = "cnndm"
    config.prefix = "summarize: "
    config.metric = "rouge2"
    config.max_prompt_tokens = 1024
    return config
