"""Drafters: pure functions that propose tokens. One file per family."""

from specjax.drafters.aggressive import aggressive
from specjax.drafters.merged import merged
from specjax.drafters.model import model
from specjax.drafters.ngram import ngram
from specjax.drafters.none import none
from specjax.drafters.retrieval import Datastore, index_corpus, load_datastore, retrieval, save_datastore
from specjax.drafters.suffix import suffix
from specjax.drafters.table import Table, count_ngrams, load_table, save_table, table

__all__ = [
    "Datastore",
    "Table",
    "aggressive",
    "count_ngrams",
    "index_corpus",
    "load_datastore",
    "load_table",
    "merged",
    "model",
    "ngram",
    "none",
    "retrieval",
    "save_datastore",
    "save_table",
    "suffix",
    "table",
]
