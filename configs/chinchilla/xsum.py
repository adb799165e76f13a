"""Chen et al. 2023, Table 1, the upper rows: one-shot summaries, nucleus sampling and greedy.

Command, here with one-line summaries of any FILE of pairs, and on a TPU VM or a GPU with models from the hub:

    python -m specjax.launch --config=configs/chinchilla/xsum.py --config.data=FILE --workdir=runs/xsum
    python -m specjax.launch --config=configs/chinchilla/xsum.py --config.data=xsum.test.jsonl \\
        --config.target=Qwen/Qwen2.5-32B --config.drafter=model --config.draft=Qwen/Qwen2.5-0.5B \\
        --config.dtype=bfloat16 --config.mesh_model=8 --config.num_timed=200 --config.num_problems=0 \\
        --workdir=runs/xsum_32b

FILE has one JSON object per line with `input` (for XSum, the article) and `target`. `xsum.py:tiny` is the same in a few
minutes. Hardware: two CPU cores for the first, a device that holds the models for the second, which we have not run.
The paper, 70B with a draft of 4B on 16 TPU v4 (K = 4, 11,305 texts): nucleus ROUGE-2 .112 -> .114, 14.1 -> 7.52 ms a
token, 1.92x; greedy .157 -> .156, 14.1 -> 7.00, 2.01x.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_BASE = runpy.run_path(str(pathlib.Path(__file__).parent / "experiment.py"))


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"{variant!r} is not a variant: write xsum.py, or xsum.py:tiny.")
    config = _BASE["get_config"]()
    config.name = "xsum"
    config.paper = "xsum"
    return _BASE["tiny"](config) if variant else config
