"""Leviathan et al. 2022 with the text of a small model at the cost of a larger one: one-line summaries.

Command:

    python -m specjax.launch --config=configs/leviathan/inflated_synopsis.py --config.train=synopsis.train.jsonl.xz \\
        --config.valid=synopsis.valid.jsonl.xz --config.test=synopsis.test.jsonl.xz --workdir=runs/inflated_synopsis

Like `inflated_ende.py`, with the target of `mini_synopsis.py`: the text, alpha and ROUGE-2 are those of a model of 7.6M
parameters, and the times are those of one of 141M that computes the same logits. Hardware: two CPU cores. Expected:
docs/results/inflated.md. The paper's row, T5-XXL with T5-base on CNN/DM (TPU v4): alpha .73 and 3.0x at temperature 0,
.55 and 2.2x at temperature 1.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_MINI = runpy.run_path(str(pathlib.Path(__file__).parent / "mini_synopsis.py"))
_ENDE = runpy.run_path(str(pathlib.Path(__file__).parent / "inflated_ende.py"))


def get_config(variant: str = "") -> ConfigDict:
    config = _MINI["get_config"](variant)
    if not variant:
        # Synopses are short: rows of 256 tokens would be padding for the most part.
        config.training.update(target_length=64)
        for model in config.models.values():
            model.num_steps = 500
    return _ENDE["inflated"](config)
