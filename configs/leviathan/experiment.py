"""The experiment of Leviathan et al. 2022 (arXiv 2211.17192) with any target and drafts, on any task.

Command, with a target and drafts that exist:

    python -m specjax.launch --config=configs/leviathan/experiment.py:2 --config.models.target.source=SOURCE \\
        --config.models.draft1.source=SOURCE --config.models.draft2.source=SOURCE --config.train=FILE \\
        --config.test=FILE --workdir=runs/mine

The number after the colon says how many drafts there are. A SOURCE is what `specjax.load` takes; a model without one is
trained here, by the keys of `configs/train.py` under `training` and its own `size`, `model` and `num_steps`. A FILE has
one JSON object a line with `input` and `target`; `.xz` is unpacked. The other files in this directory are this one with
values filled in.

Hardware: whatever JAX runs on. Expected: summary.md with the paper's Tables 2, 3 and 5, its figures beside the measured
ones, and plots of speedup against K over the curve of Theorem 3.8. Text has the target's distribution on both sides, so
its quality is equal within noise. Ctrl-C keeps what is finished, and the same command goes on.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_TRAIN = pathlib.Path(__file__).parent.parent / "train.py"


def model() -> ConfigDict:
    config = ConfigDict()
    config.source = ""  # A SOURCE; empty: trained here.
    config.size = "6m"  # As in configs/train.py.
    config.num_steps = 2000  # Of its training.
    config.model = runpy.run_path(str(_TRAIN))["get_config"]().model
    return config


def get_config(num_drafts: str = "1") -> ConfigDict:
    config = ConfigDict()
    config.experiment = "leviathan"
    config.name = "leviathan"  # The heading of summary.md.
    config.paper = ""  # ende, cnndm or lm1b: which of the paper's experiments stands beside it.

    config.train = ""  # A FILE to train on, and to count n-grams of.
    config.valid = ""  # A FILE held out in training.
    config.test = ""  # A FILE whose inputs are decoded.
    config.prefix = ""  # What stands before each input.
    config.metric = "bleu"  # Or rouge2.

    config.models = ConfigDict({"target": model()})
    for i in range(int(num_drafts)):
        config.models[f"draft{i + 1}"] = model()
    config.tables = (1, 2)  # Orders of the n-gram tables that draft too: unigrams, bigrams.
    config.max_entries = 2_000_000  # Of a table.
    config.training = runpy.run_path(str(_TRAIN))["get_config"]()

    config.temperatures = (0.0, 1.0)  # Each is measured.
    config.num_draft_tokens = (1, 2, 3, 5, 7)  # Every K that is timed, the paper's gamma.
    config.timed_drafts = ()  # Drafts whose speed is measured; none: all.
    config.num_prompts = 24  # Timed, at batch 1.
    config.quality_prompts = 200  # For the metric, the lenience and alpha ...
    config.alpha_tokens = 10_000  # ... of which more are taken, where these have fewer tokens.
    config.quality_batch = 16  # Rows of a batch of those.
    config.max_prompt_tokens = 192  # Longer inputs are left out.
    config.max_new_tokens = 96  # Of each text.
    config.lenience = (1.0, 0.5, 0.3, 0.1)  # Table 5; none: left out.
    config.lenience_draft_tokens = 3  # K of Table 5.
    config.repeats = 3  # Each side decodes each prompt so often; medians count.
    config.seed = 0  # Text i uses seed + i.
    config.dtype = "float32"  # Or bfloat16.
    return config
