"""Trains a drafter that fills slots behind a text in one call (SpecDec, arXiv 2203.16487), for an encoder-decoder.

Command, and a comparison that drafts with what was made:

    python -m specjax.launch --config=configs/specdec.py --config.target=SOURCE --config.data=FILE \\
        --config.valid=HELD_OUT --workdir=runs/specdec
    python -m specjax.launch --config=configs/compare.py --config.target=SOURCE --config.drafter=nonautoregressive \\
        --config.draft=runs/specdec/model --config.num_draft_tokens=8 --config.data=PROMPTS

A SOURCE is what `specjax.load` takes, such as the model/ of configs/train.py. FILE and HELD_OUT have one JSON object
per line, with `input` and `target`; `.xz` is unpacked. As published, the targets are texts that the target wrote. The
drafter begins as the target's encoder and some of its decoder layers; slots are filled behind several tokens of each
row, with glancing: of as many tokens as were wrong, a share is shown, which falls from `glance_first` to `glance_last`.
Ctrl-C saves, and the same command resumes, with the losses of an uninterrupted run.

With --config.copy_source=True a slot reads, as published, a copy of the source: its embeddings, weighted by how far
they stand from the slot. The weights are learnt, and kept with the drafter.

--config.verify=top_k:5,3 of configs/compare.py is SpecDec's own acceptance, which is not exact.

Hardware: whatever JAX runs on; 16 bytes per parameter of the drafter. As published, for translation on GPUs:
--config.num_slots=25 --config.num_steps=300000 --config.warmup_steps=10000 --config.num_points=1, and 128K tokens a
step. Expected: how often the most probable token of each slot is the text's, before and while training (train.jsonl,
acceptance.png, summary.md), and model/, of the least loss.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "specdec"
    config.name = "specdec"  # The heading of summary.md.

    config.target = ""  # A SOURCE: the encoder-decoder that will be decoded.
    config.num_layers = 1  # How many of its decoder layers the drafter keeps, spread evenly; its encoder is kept whole.
    config.mask_token = 2  # The id that all slots read, which no text may have; 2 is the unknown token of T5.
    config.num_slots = 8  # How many slots are filled together: the length of a draft.
    config.num_points = 8  # Behind how many tokens of a row slots are filled in a step.
    config.copy_source = False  # Slots read a copy of the source, weighted by distance, not the mask's embedding.
    config.glance_first = 0.5  # Of as many tokens as were wrong, the share that is shown at the beginning; 0: none.
    config.glance_last = 0.3  # The share at the end.
    config.data = ""  # A FILE to train on.
    config.valid = ""  # A held-out FILE.
    config.num_valid = 32  # How many rows of the held-out file to judge by.
    config.target_length = 128  # Tokens of a row, which several texts share; longer texts are cut.
    config.source_length = 128  # Tokens of a row's source.

    config.batch_size = 16  # Rows of a step.
    config.num_microbatches = 8  # Parts that a batch is split into, to save memory.

    config.num_steps = 4000  # Steps of the optimizer.
    config.optimizer = "adamw"  # Or adafactor.
    config.learning_rate = 5e-4  # The peak of the learning rate.
    config.warmup_steps = 200  # Steps in which the learning rate grows to its peak.
    config.schedule = "inverse_sqrt"  # Or cosine, constant.
    config.final_fraction = 0.1  # The learning rate at the end of a cosine, as a fraction of the peak.
    config.weight_decay = 0.01  # The weight decay of adamw; 0: off.
    config.beta1 = 0.9  # For adamw.
    config.beta2 = 0.999  # For adamw.
    config.clip_norm = 5.0  # The largest gradient norm; 0: off.
    config.z_loss = 0.0  # The weight of the squared log-normaliser in the loss; 0: off.
    config.dtype = "float32"  # Or bfloat16: the dtype of the products; parameters and loss stay float32.
    config.remat = False  # Compute layers again in the backward pass: less memory on accelerators, more time.
    config.dropout = 0.1  # The share of activations that a step sets to zero; 0: off.
    config.seed = 0  # For the order of the texts, for the slots, and for what is shown.

    config.eval_every = 250  # Steps between two validations.
    config.save_every = 250  # Steps between two checkpoints.
    config.log_every = 5  # Steps between two reports.
    config.keep = 2  # How many checkpoints are kept.
    config.patience = 0  # End after this many validations in a row without a better one; 0: never.
    config.tensorboard = False  # Also write the curve as TensorBoard event files, to tensorboard/ of the workdir.
    config.mesh_data = 1  # Devices to split the batch over.
    config.mesh_model = 1  # Devices to split the matrices over.
    return config
