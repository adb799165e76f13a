"""Plans a target and a draft on chips that are not here.

Command:

    python -m specjax.launch --config=configs/plan.py --config.target=SHAPE --config.draft=SHAPE \\
        --config.topology=v5e:2x4 --workdir=runs/plan

A SHAPE is a preset (`specjax/models/presets.py`), a directory with `config.json`, or a hub id, of which only
`config.json` is read. A topology is a TPU slice (v4:2x2x4, v5e:2x4, v5p:2x2x1, v6e:2x4, v7x:2x2x1) or GPUs (A100:8,
H100:8, H200:8, B200:8). For TPUs the real decode step is compiled (`pip install -e '.[tpu]'`) and read; for GPUs all
is computed from shapes.

Hardware: any CPU; nothing is run. Expected: whether it fits, and if not, what would; collectives; the time of a draft
call and of a target call at the roofline, hence c, the best K and ms/token, which are predictions and lower bounds. A
minute or two for a TPU, of which two layers and four are compiled; seconds for GPUs.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "plan"
    config.name = "plan"  # What the run is called.

    config.target = ""  # A SHAPE.
    config.draft = ""  # A SHAPE, or several, separated by commas.
    config.dtype = "bfloat16"  # Or float32.
    config.topology = "v5e:2x4"  # A slice, as above.
    config.data = 1  # Over how many devices rows are split; the others split the models.
    config.draft_sharding = "split"  # Or replicated: every device has all of it.

    config.num_draft_tokens = 4  # K of the step that is compiled.
    config.max_draft_tokens = 16  # Up to which K times are predicted.
    config.alpha = 0.7  # The acceptance rate that predictions assume.
    config.batch_size = 1  # Rows that are decoded together.
    config.prompt_tokens = 128  # Of each row.
    config.max_new_tokens = 128  # Of each row.
    config.verify = "rejection"  # The rule, as configs/compare.py has it.
    config.temperature = 0.0  # At which single calls sample.

    config.compile = True  # For TPUs; False computes everything from shapes.
    config.layers = "few"  # Compile two and four, and extrapolate; or all.
    config.reference_ms = ConfigDict()  # Published ms/token by SHAPE, to stand beside the predictions.
    return config
