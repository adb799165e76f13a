"""Plans Llama 3.1 8B with its published EAGLE-3 head on four v5e and on one H100: chains, and trees of 8 to 64 nodes.

Command:

    python -m specjax.launch --config=configs/plan_eagle.py --workdir=runs/plan_eagle

The head is that of `yuhuili/EAGLE3-LLaMA3.1-Instruct-8B`: one layer of the target's sizes over the hidden states of
three of its layers, with 32000 tokens. This is `configs/plan.py` with values filled in, and takes the same overrides.
The step with K = 4 is compiled; chains of K = 1 to 8 and dynamic trees are predicted, and stand beside what others
measured with this head at the same number of tokens per step: vLLM (its issue 20780: MT-bench, batch 1), SGLang (its
pull requests 5318, one prompt, and 4247, MT-bench, whose trees are taken to have the 64 tokens of its examples), and
the head's authors (arXiv 2503.01840, MT-bench).

Hardware: any CPU, with the compilers (`pip install -e '.[tpu,cuda-plan]'`); some minutes, nothing is run. Expected:
no cache is copied; a draft token takes some hundredths of a target call; predicted times below the measured ones, since
they are lower bounds.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

# Width, depth and nodes. A tree of N nodes is scored with the last committed token, as N + 1 tokens.
_TREES = ((4, 5, 7), (4, 6, 15), (8, 6, 31), (10, 7, 59), (8, 5, 63), (8, 8, 63))

# Tokens per step and ms/token by K; plain decoding took 7.07 ms.
_VLLM = {2: (2.36, 4.32), 3: (2.79, 4.09), 4: (3.08, 4.05), 5: (3.32, 4.13), 6: (3.46, 4.20), 7: (3.54, 4.29)}

# Tokens per step, and tokens per second with drafts and without.
_SGLANG = (
    ("SGLang, pull 5318", (3,), 2.12, 214.14, 148.66),
    ("SGLang, pull 5318", (4, 5, 7), 2.56, 204.46, 148.66),
    ("SGLang, pull 4247", (8, 5, 63), 4.68, 361.70, 158.34),
    ("SGLang, pull 4247", (8, 8, 63), 5.39, 378.57, 158.34),
)


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).parent / "plan.py"))["get_config"]()
    config.name = "plan_eagle"
    config.target = "llama3_8b"
    config.drafter = "eagle"
    config.draft = "eagle3:32000"
    config.topology = "v5e:2x2,H100:1"
    config.max_draft_tokens = 8
    config.trees = _TREES
    config.lengths = (
        *(("vLLM, issue 20780", (k,), tokens, ms, 7.07) for k, (tokens, ms) in _VLLM.items()),
        *((source, drafts, tokens, 1e3 / fast, 1e3 / plain) for source, drafts, tokens, fast, plain in _SGLANG),
        ("EAGLE-3, MT-bench", (10, 7, 59), 6.13, 0.0, 0.0),
    )
    config.prompt_tokens = 512
    config.max_new_tokens = 512
    return config
