"""The experiment of Leviathan et al. 2022 (arXiv 2211.17192) with any target and drafts, on any task.

Command, with a target and drafts that exist:

    python -m specjax.launch --config=configs/leviathan/experiment.py:2 --config.models.target.source=SOURCE \\
        --config.models.draft1.source=SOURCE --config.models.draft2.source=SOURCE --config.train=FILE \\
        --config.test=FILE --workdir=runs/mine

The number after the colon is the number of drafts. A SOURCE is what `specjax.load` takes; a model without one is
trained by this run, with the keys of `configs/train.py` under `training` and its own `size`, `model` and `num_steps`; a
draft with `distil` is distilled from the target, with the keys of `configs/distill.py` under `distilling`. A FILE has
one JSON object per line with `input` and `target`; `.xz` is unpacked. The other files in this directory are this one
with values filled in.

Hardware: whatever JAX runs on. Expected: summary.md with the paper's Tables 2, 3 and 5, its numbers beside the measured
ones, and plots of speedup against K with the curve of Theorem 3.8. Text has the target's distribution on both sides, so
its quality is equal within noise. Ctrl-C keeps what is finished, and the same command resumes.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_CONFIGS = pathlib.Path(__file__).parent.parent
_TRAIN, _DISTIL = _CONFIGS / "train.py", _CONFIGS / "distill.py"


def model() -> ConfigDict:
    config = ConfigDict()
    config.source = ""  # A SOURCE; empty: trained by this run.
    config.size = "6m"  # As in configs/train.py.
    # Empty: trained on the texts. Else a draft that is distilled from the target: it begins as model.num_layers of the
    # target's layers (layers), or as another model of this experiment (its name).
    config.distil = ""
    config.num_steps = 2000  # Training steps.
    config.model = runpy.run_path(str(_TRAIN))["get_config"]().model
    return config


def get_config(num_drafts: str = "1") -> ConfigDict:
    config = ConfigDict()
    config.experiment = "leviathan"
    config.name = "leviathan"  # The heading of summary.md.
    config.paper = ""  # ende, cnndm or lm1b: which of the paper's experiments to print beside ours.

    config.train = ""  # A FILE to train on, and to count n-grams in.
    config.valid = ""  # A held-out FILE to validate on in training.
    config.test = ""  # A FILE whose inputs are decoded.
    config.prefix = ""  # Text to put before each input.
    # Language models: the first words of each `input` are a prompt, and the rest of it is learnt and written; 0: pairs.
    config.prompt_words = 0
    config.metric = "bleu"  # Or rouge2.

    config.models = ConfigDict({"target": model()})
    for i in range(int(num_drafts)):
        config.models[f"draft{i + 1}"] = model()
    config.tables = (1, 2)  # Orders of the n-gram tables that draft too: unigrams, bigrams.
    config.max_entries = 2_000_000  # The most entries of a table.
    config.training = runpy.run_path(str(_TRAIN))["get_config"]()

    config.distilling = runpy.run_path(str(_DISTIL))["get_config"]()
    config.distilling.num_prompts = 400  # Prompts of config.train that texts are written for, to distil on.
    config.distilling.max_new_tokens = 96  # The most tokens of such a text.

    # Times are measured with a larger target that computes the same logits (specjax/models/inflate.py); 0 keeps a size.
    config.inflate = ConfigDict()
    config.inflate.hidden_size = 0  # Its width.
    config.inflate.head_dim = 0  # The width of its heads.
    config.inflate.num_heads = 0  # Its heads.
    config.inflate.intermediate_size = 0  # The width within its MLPs.
    config.inflate.num_layers = 0  # The layers of its decoder.
    config.inflate.num_encoder_layers = 0  # The layers of its encoder.

    config.temperatures = (0.0, 1.0)  # The temperatures to measure.
    config.num_draft_tokens = (1, 2, 3, 5, 7)  # Every K that is timed, the paper's gamma.
    config.timed_drafts = ()  # Drafts whose speed is measured; none: all.
    config.num_prompts = 24  # Prompts that are timed, at batch 1.
    config.quality_prompts = 200  # Prompts for the metric, the lenience and alpha.
    config.alpha_tokens = 10_000  # The fewest tokens to measure alpha on; more prompts are used where needed.
    config.alpha_top_k = ()  # Every k of a top-k that alpha is also measured with, at temperature 1. LaMDA: (40,).
    config.quality_batch = 16  # Rows of a batch of prompts that are not timed.
    config.max_prompt_tokens = 192  # Longer inputs are left out.
    config.max_new_tokens = 96  # The most new tokens of each text.
    config.lenience = (1.0, 0.5, 0.3, 0.1)  # The lenience values of Table 5; none: the table is left out.
    config.lenience_draft_tokens = 3  # K of Table 5.
    config.repeats = 3  # How often each side decodes each prompt; medians count.
    config.seed = 0  # Text i uses seed + i.
    config.dtype = "float32"  # Or bfloat16.
    return config
