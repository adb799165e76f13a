"""Editing tasks: the input is the draft (aggressive decoding, arXiv 2106.04970), against plain decoding.

Commands, with the drafter that keeps its place in the input, and with n-gram lookup for comparison:

    python -m specjax.launch --config=configs/edit.py --workdir=runs/edit
    python -m specjax.launch --config=configs/edit.py --config.drafter=ngram --workdir=runs/edit_ngram

Eight prompts ask for a corrected copy of a short text. This is `configs/compare.py` with values filled in, and takes
the same overrides, such as `--config.data=FILE` or `--config.num_draft_tokens=31`.

Hardware: any; a laptop's CPU is enough. Expected: every text identical to plain decoding's, and several tokens per call
wherever the model copies, as its answer to a request for a correction mostly does.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_HERE = pathlib.Path(__file__).parent


def get_config() -> ConfigDict:
    config = runpy.run_path(str(_HERE / "compare.py"))["get_config"]()
    config.name = "edit"
    config.data = str(_HERE / "edit_prompts.jsonl")
    config.drafter = "aggressive"
    config.num_draft_tokens = 15
    config.max_new_tokens = 128
    config.repeats = 2
    return config
