"""Leviathan et al. 2022 with the text of a small model at the cost of a larger one: English to German.

Command:

    python -m specjax.launch --config=configs/leviathan/inflated_ende.py --config.train=ende.train.jsonl.xz \\
        --config.valid=ende.valid.jsonl.xz --config.test=ende.test.jsonl.xz --workdir=runs/inflated_ende

The paper's target is so large that a call which scores K + 1 tokens takes as long as one that scores a single token,
and that a draft's call costs a few per cent of it. Targets that two CPU cores can train are not. So this run trains the
target of `mini_ende.py` (7.6M parameters), and measures all times with an inflated one, of the widths and depth of the
decoder of T5-base (141M parameters), which computes the same logits: the text, alpha and BLEU are those of the small
model, and the times are those of a model 18 times larger. The results say so.

Two drafts are trained on the texts, as in `mini_ende.py`; `base_distilled` is distilled from the target beginning with
`base`, and `distilled` beginning with four of the target's eight decoder layers. Models that exist are used instead
with --config.models.NAME.source=SOURCE. `inflated_ende.py:tiny` takes minutes and shows that everything works.

Training is short, about a fifth of the tokens of `mini_ende.py`. Hardware: two CPU cores. The target is in float32,
where scoring 8 tokens takes about 1.3 times as long as scoring one; a call in bfloat16 is faster, but scoring 8 tokens
takes nearly twice as long as scoring one there. Expected: docs/results/inflated.md. The paper's row, T5-XXL with
T5-base on WMT EnDe (TPU v4): alpha .80 and 2.8x at temperature 0, .68 and 2.4x at temperature 1.
"""

import pathlib
import runpy
from typing import Any

from ml_collections import ConfigDict

_MINI = runpy.run_path(str(pathlib.Path(__file__).parent / "mini_ende.py"))

# The decoder of T5-base (arXiv 1910.10683); the encoder, which runs once per text, keeps its three layers.
LARGE = {"hidden_size": 768, "head_dim": 64, "num_heads": 12, "intermediate_size": 3072, "num_layers": 12}


def inflated(config: Any) -> Any:
    """A config of mini models with distilled drafts and an inflated target."""
    is_tiny = config.name.endswith(":tiny")
    config.name = config.name.replace("mini", "inflated")
    config.inflate.update({"hidden_size": 64, "num_layers": 3} if is_tiny else LARGE)
    _MINI["distilled"](config)
    config.timed_drafts = ("base", "distilled")
    config.num_draft_tokens = (2, 4, 6)
    config.lenience = ()
    if is_tiny:
        config.num_draft_tokens = (2,)
        return config
    config.training.update(batch_size=8, num_microbatches=8, warmup_steps=100, eval_every=250, save_every=100)
    # One prompt takes seconds on either side.
    config.update(num_prompts=6, repeats=2)
    return config


def get_config(variant: str = "") -> ConfigDict:
    config = _MINI["get_config"](variant)
    if not variant:
        config.training.update(target_length=128, source_length=128)
        for model in config.models.values():
            model.num_steps = 750
    return inflated(config)
