"""Leviathan et al. 2022, Table 3, the decoder-only rows at small scale, trained by this run on two CPU cores.

Command:

    python -m specjax.launch --config=configs/leviathan/mini_gpt.py --config.train=synopsis.train.jsonl.xz \\
        --config.valid=synopsis.valid.jsonl.xz --config.test=synopsis.test.jsonl.xz --workdir=runs/mini_gpt

The files have one JSON object per line, whose `input` is a text: its first eight words are the prompt, and the models
learn and write the rest. Target and draft have the shapes of the paper's GPT-like pair on lm1b (`lm1b_gpt.py`) with
every width divided by four: 12 layers of width 192 and 12 heads, 8.7M parameters with a vocabulary of 8192 tokens,
against 2 layers of width 64 and 4 heads, .7M. Alpha is measured at temperature 0, at 1, and at 1 with the 40 likeliest
tokens alone on both sides, as the paper has it for LaMDA.

Hardware: two CPU cores. Expected: docs/results/inflated.md. The paper's rows: on lm1b, alpha .88 at temperature 0 and
.89 at temperature 1 for the draft, .03 for unigrams, .05 for bigrams; LaMDA 137B with top-40 and a draft of 8B, .75 at
temperature 0 and .74 at temperature 1.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_LM1B = runpy.run_path(str(pathlib.Path(__file__).parent / "lm1b_gpt.py"))


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"{variant!r} is not a variant: write mini_gpt.py, or mini_gpt.py:tiny.")
    config = _LM1B["get_config"]()
    config.name = "mini_gpt"
    config.prompt_words = 8
    config.metric = "rouge2"
    for name, shape in _LM1B["SHAPES"].items():
        for size in ("hidden_size", "intermediate_size", "head_dim"):
            config.models[name].model[size] = shape[size] // 4
        config.models[name].num_steps = 600
    config.training.update(batch_size=8, num_microbatches=8, target_length=128, dtype="float32")
    config.training.update(learning_rate=2e-3, warmup_steps=100, eval_every=100, save_every=100)
    config.alpha_top_k = (40,)
    # The table is about alpha: a few cells are timed.
    config.timed_drafts = ("small",)
    config.num_draft_tokens = (2, 4)
    config.lenience = ()
    config.update(num_prompts=8, max_prompt_tokens=64, max_new_tokens=64, dtype="float32")
    if variant == "tiny":
        config.name = "mini_gpt:tiny"
        config.training.update(vocab_size=64, target_length=64, num_microbatches=1, eval_every=20, save_every=20)
        for model in config.models.values():
            model.num_steps = 4
            model.model.update(hidden_size=32, head_dim=16, num_heads=2, num_kv_heads=2, intermediate_size=64)
            model.model.num_layers = min(model.model.num_layers, 2)
        config.update(num_prompts=2, quality_prompts=4, alpha_tokens=64, quality_batch=4, repeats=1, max_new_tokens=16)
        config.num_draft_tokens = (2,)
        config.prompt_words = 3
    return config
