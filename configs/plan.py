"""Plans a target and a draft on hardware that you don't have.

Command:

    python -m specjax.launch --config=configs/plan.py --config.target=SHAPE --config.draft=SHAPE \\
        --config.topology=v5e:2x4 --workdir=runs/plan

A SHAPE is a preset (`specjax/models/presets.py`), a directory with `config.json`, or a hub id, of which only
`config.json` is read. A topology is a TPU slice (v4:2x2x4, v5e:2x4, v5p:2x2x1, v6e:2x4, v7x:2x2x1) or GPUs (A100:8,
H100:8, H200:8, B200:8). The real decode step is compiled and read: for TPUs with `pip install -e '.[tpu]'`, for GPUs
with `pip install -e '.[cuda-plan]'`, without which everything is computed from shapes.

Hardware: any CPU; nothing is run. Expected: whether it fits, and if not, what would; collectives; the time of a draft
call and of a target call at the roofline, hence c, the best K and ms/token, which are predictions and lower bounds. A
minute or two, since programs of two and of four layers are compiled; seconds with `--config.compile=False`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "plan"
    config.name = "plan"  # What the run is called.

    config.target = ""  # A SHAPE.
    config.drafter = "model"  # Or eagle, medusa, blockwise, pard, parallel_masks, mask_tokens.
    # drafter=model, pard: a SHAPE; eagle: eagle3:TOKENS (0: all) or eagle1, a head like a layer of the target, or a
    # directory or hub id with the config.json of a head; medusa: medusa:HEADS, with :own behind it where each has an
    # output matrix; blockwise: blockwise:HEADS; masks: nothing. Or several, separated by commas.
    config.draft = ""
    config.target_quantise = ""  # Plan the target in int8, int4:64 or the like. It is then another target.
    config.draft_quantise = ""  # Plan the draft in int8, int4:64 or the like. Text stays exact.
    config.dtype = "bfloat16"  # Or float32.
    config.memory_gb = 0.0  # The memory of a chip that may be used, in GB. 0: all that it has.
    config.topology = "v5e:2x4"  # A slice, as above, or several, separated by commas.
    config.data = 1  # Devices that the batch is split over; the others split the models.
    config.draft_sharding = "split"  # Or replicated: every device has all of it.

    config.num_draft_tokens = 4  # K of the step that is compiled.
    config.max_draft_tokens = 16  # The largest K for which times are predicted.
    # drafter=model, eagle: dynamic trees for which times are predicted, (width, depth, nodes) each: ((10,7,59),).
    config.trees = ()
    config.alpha = 0.7  # The acceptance rate that predictions assume.
    config.batch_size = 1  # Rows that are decoded together.
    config.prompt_tokens = 128  # Tokens of each row's prompt.
    config.max_new_tokens = 128  # New tokens of each row.
    config.verify = "rejection"  # The rule, as configs/compare.py has it.
    config.attention = "einsum"  # How decoders attend to caches: einsum, kernel, or auto by the bytes of each call.
    config.temperature = 0.0  # The temperature of the single calls that are compiled.

    config.compile = True  # False computes everything from shapes.
    config.compiler_options = ()  # Options of XLA for the compiled step, such as ("NAME=VALUE",); see docs/plans.md.
    config.layers = "few"  # Compile two and four layers, and extrapolate; or all.
    config.reference_ms = ConfigDict()  # Published ms/token by SHAPE, to print beside the predictions.
    # Published measurements (task, SHAPE of the draft, K, alpha, speedup), to print beside what the plan predicts.
    config.published = ()
    # Published tokens per step (source, drafts, tokens, ms/token, plain ms/token), to print beside the plan; drafts are
    # (K,) or one of the trees, and a time that was not published is 0.
    config.lengths = ()
    return config
