"""Leviathan et al. 2022, Table 3, the first row: a language model of 97M parameters on lm1b, and a draft of 6M.

Command:

    python -m specjax.launch --config=configs/leviathan/lm1b_gpt.py --config.train=train.jsonl \\
        --config.valid=valid.jsonl --config.test=test.jsonl --workdir=runs/lm1b_gpt

The files have one JSON object per line with `input`, the first words of a sentence of lm1b, and `target`, the rest of
it. Both models are trained by this run. They are decoders with the paper's sizes (target: 12 layers of width 768, 12
heads, inner 3072; draft: 2 layers of width 256, 4 heads, inner 1024; an 8k vocabulary), with rotary positions, RMSNorm
and SwiGLU instead of GPT's, which makes them a little larger.

Hardware: a TPU VM or a GPU; training the target takes many hours on less. The paper's row: alpha .88 at temperature 0
and .89 at temperature 1 for the draft, .03 for unigrams, .05 for bigrams. We have not run it at this size.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_BASE = runpy.run_path(str(pathlib.Path(__file__).parent / "experiment.py"))

SHAPES = {
    "target": {"hidden_size": 768, "head_dim": 64, "num_heads": 12, "intermediate_size": 3072, "num_layers": 12},
    "small": {"hidden_size": 256, "head_dim": 64, "num_heads": 4, "intermediate_size": 1024, "num_layers": 2},
}


def get_config() -> ConfigDict:
    config = _BASE["get_config"]("0")
    config.name = "lm1b_gpt"
    config.paper = "lm1b"
    for name, shape in SHAPES.items():
        config.models[name] = _BASE["model"]()
        config.models[name].num_steps = 100_000
        config.models[name].model.update(shape, num_kv_heads=shape["num_heads"])
    config.training.update(kind="decoder", vocab_size=8192, batch_size=256, target_length=256, dtype="bfloat16")
    config.training.update(learning_rate=5e-4, warmup_steps=2000, eval_every=1000, save_every=1000)
    config.dtype = "bfloat16"
    return config
