"""How many tokens to draft: K, shorter programs and the tree that pay for your models, prompts and machine.

Command:

    python -m specjax.launch --config=configs/tune.py --config.target=SOURCE --config.drafter=ngram --config.data=FILE
    python -m specjax.launch --config=configs/tune.py --config.target=SOURCE --config.drafter=model \\
        --config.draft=SOURCE --config.data=FILE

FILE has prompts, one JSON object per line, as for `configs/compare.py`; of each `category` the first `per_category`
prompts are taken that are not too long. Each is decoded once, and the drafter is asked at every position of the text;
the costs of drafting and of scoring are measured by the number of tokens. From both, every way to choose the number of
draft tokens is replayed without the models: fixed numbers, the schedule of transformers' assisted generation,
thresholds on the draft's confidence (`--config.thresholds=(0.4,0.7)`) and the moving threshold of Draft & Verify, both
for drafters that run a model, and the loop's own choice, beside an oracle. For a draft model the best tree is found as
well. A batch (`--config.batch_sizes=(1,4)`) is replayed with its rows side by side.

Later runs take what was chosen by `--config.tuned=True` (`configs/compare.py`): it is kept for each target, drafter,
draft, dtype, batch size and machine.

Hardware: what will be used afterwards, quiet. Expected: a few minutes on two cores of a CPU with the small default
target; a table of policies with their regret, and one sentence that says what pays. An interrupted run goes on where it
stopped.
"""

import dataclasses
import pathlib
import runpy

from ml_collections import ConfigDict

from specjax.experiments import choices

_MODELS = {field.name for field in dataclasses.fields(choices.AllModels)}
"""The keys of `configs/compare.py` that say what is loaded and which drafter is made of it."""


def get_config() -> ConfigDict:
    whole = runpy.run_path(str(pathlib.Path(__file__).parent / "compare.py"))["get_config"]()
    config = ConfigDict({name: value for name, value in whole.items() if name in _MODELS})
    config.experiment = "tune"

    config.num_draft_tokens = 15  # The most draft tokens to try.
    config.data = ""  # A JSONL file.
    config.per_category = 1  # How many prompts of each category.
    config.max_prompt_tokens = 1024  # Longer prompts are left out.
    config.chat = "auto"  # The tokenizer's chat template: true, false, or auto: if it has one.
    config.max_new_tokens = 128  # The most new tokens of each text.
    config.temperature = 0.0  # 0: greedy; above, drafts count as right where they are the target's own draw.
    config.seed = 0  # Prompt i uses seed + i.
    config.batch_sizes = (1,)  # A choice is made for each.
    config.thresholds = ()  # Drafters that run a model: thresholds of confidence to compare with.
    return config
