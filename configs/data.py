"""Fetches or makes the files of prompts, texts and pairs that the README and the other configs name.

Command, for files that need no network, and for one that does:

    python -m specjax.launch --config=configs/data.py --workdir=data
    python -m specjax.launch --config=configs/data.py --config.sets="('spec_bench',)" --workdir=data

The first writes data/prompts.jsonl (prompts over passages of Python's language reference), data/corpus.jsonl (its
paragraphs) and data/pairs.{train,valid,test}.jsonl (docstrings of the standard library and their first lines), from the
Python that runs it. spec_bench is downloaded; wmt14, cnn_dailymail, xsum and lm1b come from the Hugging Face hub (pip
install datasets). A file that is there is left as it is, and a download that was cut off goes on. docs/data.md says
what each file is for, its origin and its licence.

Hardware: any. Expected: a line for each file; seconds without downloads.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "data"
    config.name = "data"  # What the run is called.
    config.sets = ("prompts", "corpus", "pairs")  # Also spec_bench, wmt14, cnn_dailymail, xsum, lm1b.
    config.num_prompts = 80  # Of prompts.jsonl.
    config.max_pairs = 100_000  # Of each file from the hub, the first so many.
    config.mirror = ""  # Where files are downloaded from in the place of their origin: a URL of a directory.
    config.sha256 = ""  # The checksum that a downloaded file must have; empty: any.
    return config
