"""Trains a T5 or a language model from scratch on a file of texts: a target, or a draft with its vocabulary.

Command, for a target and a draft for it:

    python -m specjax.launch --config=configs/train.py --config.data=FILE --config.valid=FILE \\
        --config.size=6m --workdir=runs/target
    python -m specjax.launch --config=configs/train.py --config.data=FILE --config.valid=FILE \\
        --config.size=1.5m --config.vocabulary=runs/target/spiece.model --workdir=runs/draft
    python -m specjax.launch --config=configs/compare.py --config.target=runs/target/model \\
        --config.drafter=model --config.draft=runs/draft/model --config.data=FILE

A FILE has one JSON object per line, with `input` and `target`, or, for a language model, `text`; `.xz` is unpacked.
hub:NAME or hub:NAME:SPLIT is a hub data set (pip install datasets). Training a vocabulary needs the extra `train` (pip
install -e '.[train]'). Ctrl-C saves, and the same command resumes, with the losses of an uninterrupted run.

Hardware: whatever JAX runs on; parameters, gradient and moments take 16 bytes per parameter. Several devices:
--config.mesh_data and --config.mesh_model. Expected: a loss curve (train.jsonl, loss.png), summary.md, and model/,
which `specjax.load` reads: the parameters of least validation loss.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "train"
    config.name = "train"  # The heading of summary.md.

    config.data = ""  # A FILE to train on.
    config.valid = ""  # A held-out FILE, or nothing.
    config.vocabulary = ""  # A spiece.model or a model's directory; empty: trained on the data, as spiece.model.
    config.vocab_size = 8192  # The number of tokens of a trained vocabulary.
    config.extra_ids = 0  # How many of its tokens are T5's <extra_id_0>, ...
    config.byte_fallback = False  # Whether it spells unknown characters in bytes.

    config.kind = "t5"  # Or decoder.
    config.size = "6m"  # 0.4m, 1.5m, 6m; for t5 also small, base, large, the shapes of T5 v1.1.
    config.model = ConfigDict()  # Numbers that replace those of the size; 0 replaces nothing.
    config.model.hidden_size = 0  # Width of the residual stream.
    config.model.intermediate_size = 0  # Width within an MLP.
    config.model.head_dim = 0  # Width of a head.
    config.model.num_heads = 0  # Query heads.
    config.model.num_layers = 0  # Layers of the decoder.
    config.model.num_encoder_layers = 0  # kind=t5: layers of the encoder.
    config.model.num_kv_heads = 0  # kind=decoder: key/value heads; num_heads has to be a multiple.
    config.model.max_position = 0  # kind=decoder: the longest sequence.

    config.target_length = 256  # Tokens of a row, which several texts share; longer texts are cut.
    config.source_length = 256  # kind=t5: tokens of a row's source.
    config.batch_size = 16  # Rows of a step.
    # Parts that a batch is split into, to save memory. CPUs are fastest with one or two rows per part, accelerators
    # with a single part.
    config.num_microbatches = 8

    config.num_steps = 4000  # Steps of the optimizer.
    config.optimizer = "adamw"  # Or adafactor.
    config.learning_rate = 2e-3  # The peak of the learning rate.
    config.warmup_steps = 200  # Steps in which the learning rate grows to its peak.
    config.schedule = "cosine"  # Or inverse_sqrt, constant.
    config.final_fraction = 0.1  # The learning rate at the end of a cosine, as a fraction of the peak.
    config.weight_decay = 0.0  # The weight decay of adamw; 0: off.
    config.beta1 = 0.9  # For adamw.
    config.beta2 = 0.98  # For adamw.
    config.clip_norm = 1.0  # The largest gradient norm; 0: off.
    config.z_loss = 0.0  # The weight of the squared log-normaliser in the loss; 0: off.
    config.dtype = "float32"  # Or bfloat16: the dtype of the matrix products; parameters and loss stay float32.
    config.remat = False  # Compute layers again in the backward pass: less memory on accelerators, more time.
    config.dropout = 0.0  # The share of activations that a step sets to zero; 0: off.
    config.seed = 0  # For the initialisation and the order of the texts.

    config.eval_every = 250  # Steps between two validations.
    config.save_every = 250  # Steps between two checkpoints.
    config.log_every = 10  # Steps between two reports.
    config.keep = 2  # How many checkpoints are kept.
    config.patience = 0  # End after this many validations in a row without a better one; 0: never.
    config.tensorboard = False  # Also write the curve as TensorBoard event files, to tensorboard/ of the workdir.
    config.mesh_data = 1  # Devices to split the batch over.
    config.mesh_model = 1  # Devices to split the matrices over.
    return config
