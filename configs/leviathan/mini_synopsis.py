"""Leviathan et al. 2022 at small scale: one-line summaries, everything trained by this run on two CPU cores.

Command:

    python -m specjax.launch --config=configs/leviathan/mini_synopsis.py --config.train=synopsis.train.jsonl.xz \\
        --config.valid=synopsis.valid.jsonl.xz --config.test=synopsis.test.jsonl.xz --workdir=runs/mini_synopsis

Like `mini_ende.py`, with its models and about half of its steps, but the inputs are descriptions and the targets their
synopses, and quality is ROUGE-2. `mini_synopsis.py:distilled` has two distilled drafts more; `mini_synopsis.py:tiny`
takes a few minutes. Hardware: two CPU cores. The paper's row, T5-XXL with T5-small on CNN/DM (TPU v4): alpha .65 and
3.1x at temperature 0, .53 and 2.3x at temperature 1.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_ENDE = runpy.run_path(str(pathlib.Path(__file__).parent / "mini_ende.py"))


def get_config(variant: str = "") -> ConfigDict:
    config = _ENDE["get_config"](variant)
    config.name = config.name.replace("ende", "synopsis")
    config.paper = "cnndm"
    config.metric = "rouge2"
    config.max_new_tokens = min(config.max_new_tokens, 32)
    config.distilling.max_new_tokens = config.max_new_tokens
    for model in config.models.values():
        model.num_steps = min(model.num_steps, 600)
    return config
