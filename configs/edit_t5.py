"""Aggressive decoding (arXiv 2106.04970) with an encoder-decoder that corrects slips, against plain decoding.

Commands: the data, a small T5 that is trained on them, and the comparison, with n-gram lookup beside it:

    python -m specjax.launch --config=configs/data.py --config.sets="('edits',)" --workdir=data
    python -m specjax.launch --config=configs/edit_t5.py:train --workdir=runs/edit_t5
    python -m specjax.launch --config=configs/edit_t5.py --workdir=runs/edit_t5_aggressive
    python -m specjax.launch --config=configs/edit_t5.py --config.drafter=ngram --workdir=runs/edit_t5_ngram

The draft is the source, from the first token on; lookup begins where two tokens of the answer match. The second
command is `configs/train.py`, the others are `configs/compare.py`, with values filled in.

Hardware: any; two cores of a CPU train the T5 in some minutes. Expected: a validation loss near 0.61; every text
identical to plain decoding's; and some 5.8 tokens per call, with lookup about as many. A T5 of this size learns to
copy, and corrects badly: it measures the drafter, and is no use as a corrector.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_HERE = pathlib.Path(__file__).parent


def _train() -> ConfigDict:
    config = runpy.run_path(str(_HERE / "train.py"))["get_config"]()
    config.name = "edit_t5, training"
    config.data = "data/edits.train.jsonl"
    config.valid = "data/edits.valid.jsonl"
    config.vocab_size = 512
    config.size = "1.5m"
    config.target_length = 96
    config.source_length = 96
    config.num_microbatches = 4
    config.num_steps = 3000
    config.learning_rate = 3e-3
    config.warmup_steps = 150
    config.eval_every = 200
    config.save_every = 200
    return config


def get_config(part: str = "compare") -> ConfigDict:
    """The comparison, or with the argument `train` the training of its target."""
    if part == "train":
        return _train()
    config = runpy.run_path(str(_HERE / "compare.py"))["get_config"]()
    config.name = "edit_t5"
    config.target = "runs/edit_t5/model"
    config.data = "data/edits.test.jsonl"
    config.num_prompts = 12
    config.drafter = "aggressive"
    config.num_draft_tokens = 15
    config.max_new_tokens = 96
    return config
