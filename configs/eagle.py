"""Trains an EAGLE head in the published form and by the published recipe, on texts that the target writes.

Command, for SmolLM2-135M, and for a larger target on a machine with an accelerator:

    python -m specjax.launch --config=configs/eagle.py --workdir=runs/eagle
    python -m specjax.launch --config=configs/eagle.py --config.target=meta-llama/Llama-3.1-8B-Instruct \\
        --config.taps="(2,16,29,32)" --config.vocab_size=32000 --config.num_batches=10000 --config.rows=2 \\
        --config.steps=800000 --config.eval_every=5000 --workdir=runs/eagle_llama
    python -m specjax.launch --config=configs/compare.py --config.drafter=eagle --config.draft=runs/eagle \\
        --config.data=FILE

This is `configs/head.py` with values filled in (arXiv 2503.01840, section 3.2, and the authors' code): the inputs of
layers 2, L / 2 and L - 3 are read, seven tokens are drafted in a row, token k has the loss weight 0.8^k, and the loss
is on answers alone, where the target's most probable token is one of the head's. The learning rate is ten times the
published one, for runs that are shorter by a factor of hundreds. The head is written in the authors' layout.

--config.version=1 trains the head of EAGLE and EAGLE-2 (arXiv 2401.15077, section 4.2): from the last hidden state
alone, one draft token, by the smooth L1 distance to the target's next hidden state and 0.1 times the cross-entropy of
all of its tokens, with noise on what is read; `depth` and `vocab_size` are then not read. It may share the texts of an
EAGLE-3 run: copy its texts/.

Hardware: any. The run for SmolLM2 takes hours on two cores, most of them for the texts; the other has not been run.
Expected: the acceptance rates on held-out texts, by draft position, at temperature 0 and 1, before and while training
(results.json).
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).parent / "head.py"))["get_config"]()
    config.name = "eagle"
    config.kind = "eagle"
    config.taps = (2, 15, 27, 30)
    config.steps = 2000
    config.depth = 7
    config.learning_rate = 5e-4
    config.prompt_weight = 0.0
    config.clip = 0.5
    config.only_known = True
    config.eval_every = 100
    return config
