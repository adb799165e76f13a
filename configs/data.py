"""Fetches or makes the files of prompts, texts and pairs that the README and the other configs name.

Command, for files that need no network, and for one that does:

    python -m specjax.launch --config=configs/data.py --workdir=data
    python -m specjax.launch --config=configs/data.py --config.sets="('spec_bench',)" --workdir=data

The first writes data/prompts.jsonl (prompts over passages of Python's language reference), data/corpus.jsonl (its
paragraphs) and data/pairs.{train,valid,test}.jsonl (docstrings of the standard library and their first lines), from the
Python that runs it; so does `edits`, data/edits.{train,valid,test}.jsonl (sentences with slips of the keyboard, and as
they should be). spec_bench is downloaded; wmt14, cnn_dailymail, xsum and lm1b come from the Hugging Face hub (pip
install datasets). A file that exists is left as it is, and an interrupted download resumes. docs/data.md says what each
file is for, its origin and its licence.

Hardware: any. Expected: one line per file; seconds without downloads.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "data"
    config.name = "data"  # What the run is called.
    config.sets = ("prompts", "corpus", "pairs")  # Also edits, spec_bench, wmt14, cnn_dailymail, xsum, lm1b.
    config.num_prompts = 80  # How many prompts to write into prompts.jsonl.
    config.max_pairs = 100_000  # How many pairs to take of each split from the hub, from the first on.
    config.mirror = ""  # The URL of a directory to download from, instead of the origin of each file.
    config.sha256 = ""  # The checksum that a downloaded file must have; empty: any.
    return config
