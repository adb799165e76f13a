"""Leviathan et al. 2022 at small scale: English to German, everything trained by this run on two CPU cores.

Command:

    python -m specjax.launch --config=configs/leviathan/mini_ende.py --config.train=ende.train.jsonl.xz \\
        --config.valid=ende.valid.jsonl.xz --config.test=ende.test.jsonl.xz --workdir=runs/mini_ende

The files have one JSON object per line with `input` (English) and `target` (German). `mini_ende.py:tiny` is the same in
a few minutes, with models that have hardly learnt anything: it shows that everything works, and nothing else.
`mini_ende.py:distilled` has two more drafts, distilled from the target (DistillSpec, arXiv 2310.08461):
`base_distilled` begins as `base`, and `distilled` as four of the target's eight decoder layers.

A T5 of 7.6M parameters with a deep decoder is the target; drafts are T5s of 1.7M and 0.4M, each about four times
smaller than the one before, a bigram and a unigram table. Hardware: two CPU cores. On one core of an AMD EPYC the
target trained on 3,300 tokens per second, so its 8.4M tokens take about 42 minutes, and the draft of 1.7M on 13,000, so
about 11. The results are in docs/results/leviathan.md. The paper's row, T5-XXL with T5-small on WMT EnDe (TPU v4):
alpha .75 and 3.4x at temperature 0, .62 and 2.6x at temperature 1.
"""

import pathlib
import runpy
from typing import Any

from ml_collections import ConfigDict

_BASE = runpy.run_path(str(pathlib.Path(__file__).parent / "experiment.py"))

SHAPES = {
    "target": {
        "hidden_size": 192,
        "head_dim": 48,
        "num_heads": 4,
        "intermediate_size": 768,
        "num_encoder_layers": 3,
        "num_layers": 8,
    },
    "base": {
        "hidden_size": 128,
        "head_dim": 32,
        "num_heads": 4,
        "intermediate_size": 512,
        "num_encoder_layers": 2,
        "num_layers": 1,
    },
    "small": {
        "hidden_size": 40,
        "head_dim": 20,
        "num_heads": 2,
        "intermediate_size": 160,
        "num_encoder_layers": 1,
        "num_layers": 1,
    },
}


def distilled(config: Any) -> Any:
    """The config with two drafts that are distilled from the target."""
    is_tiny = config.models.target.model.num_layers < 4
    for name, begin, layers in (("base_distilled", "base", 0), ("distilled", "layers", 1 if is_tiny else 4)):
        config.models[name] = _BASE["model"]()
        config.models[name].distil = begin
        config.models[name].model.num_layers = layers
        config.models[name].num_steps = 4 if is_tiny else 200
    config.distilling.update(batch_size=8, num_microbatches=8, write_batch_size=16, learning_rate=1e-3, eval_every=50)
    config.distilling.update(num_prompts=1500, num_valid=64, max_new_tokens=config.max_new_tokens, patience=0)
    config.distilling.update(target_length=config.training.target_length, source_length=config.training.source_length)
    if is_tiny:
        config.distilling.update(num_prompts=8, num_valid=4, write_batch_size=4, eval_every=2, num_microbatches=1)
    return config


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny", "distilled"):
        raise ValueError(
            f"{variant!r} is not a variant: write mini_ende.py, mini_ende.py:distilled or mini_ende.py:tiny."
        )
    config = _BASE["get_config"]("0")
    config.name = "mini_ende"
    config.paper = "ende"
    for name, shape in SHAPES.items():
        config.models[name] = _BASE["model"]()
        config.models[name].model.update(shape)
        config.models[name].num_steps = 1100
    # CPUs train faster with one row at a time: its logits stay in the CPU's cache.
    config.training.update(vocab_size=8192, batch_size=16, num_microbatches=16)
    if variant == "tiny":
        config.name = "mini_ende:tiny"
        config.training.update(vocab_size=512, target_length=64, source_length=64, batch_size=8, num_microbatches=1)
        config.training.update(eval_every=20, save_every=20)
        config.training.update(warmup_steps=5, learning_rate=5e-3)
        for shape in config.models.values():
            shape.num_steps = 20
            shape.model.update(hidden_size=32, head_dim=16, num_heads=2, intermediate_size=64)
            shape.model.update(num_encoder_layers=1, num_layers=1)
        config.models.target.model.num_layers = 2
        config.num_draft_tokens = (2,)
        config.lenience = (1.0, 0.3)
        config.update(num_prompts=2, quality_prompts=4, alpha_tokens=64, quality_batch=4, repeats=1)
        config.update(max_prompt_tokens=96, max_new_tokens=16)
    if variant == "distilled":
        config.name = "mini_ende:distilled"
        return distilled(config)
    return config
