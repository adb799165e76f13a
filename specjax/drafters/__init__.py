"""Drafters: pure functions that propose tokens. One file per family."""

from specjax.drafters import children, topologies
from specjax.drafters.aggressive import aggressive
from specjax.drafters.eagle import EagleHead, eagle, load_eagle, save_eagle
from specjax.drafters.feature_head import feature_head, is_feature_head, load_feature_head, save_feature_head
from specjax.drafters.first_of import first_of
from specjax.drafters.jacobi import jacobi
from specjax.drafters.lookahead import lookahead
from specjax.drafters.mask_embeddings import load_masks, save_masks
from specjax.drafters.mask_tokens import mask_tokens
from specjax.drafters.medusa import blockwise, load_blockwise, load_medusa, medusa, save_blockwise, save_medusa
from specjax.drafters.merged import merged
from specjax.drafters.model import model
from specjax.drafters.model_dynamic import Dynamic
from specjax.drafters.ngram import ngram
from specjax.drafters.nonautoregressive import nonautoregressive
from specjax.drafters.none import none
from specjax.drafters.parallel_masks import parallel_masks
from specjax.drafters.pard import pard
from specjax.drafters.retrieval import Datastore, index_corpus, load_datastore, retrieval, save_datastore
from specjax.drafters.skip import early_exit, skip
from specjax.drafters.suffix import suffix
from specjax.drafters.table import Table, count_ngrams, load_table, save_table, table

__all__ = [
    "Datastore",
    "Dynamic",
    "EagleHead",
    "Table",
    "aggressive",
    "blockwise",
    "children",
    "count_ngrams",
    "eagle",
    "early_exit",
    "feature_head",
    "first_of",
    "index_corpus",
    "is_feature_head",
    "jacobi",
    "load_blockwise",
    "load_datastore",
    "load_eagle",
    "load_feature_head",
    "load_masks",
    "load_medusa",
    "load_table",
    "lookahead",
    "mask_tokens",
    "medusa",
    "merged",
    "model",
    "ngram",
    "nonautoregressive",
    "none",
    "parallel_masks",
    "pard",
    "retrieval",
    "save_blockwise",
    "save_datastore",
    "save_eagle",
    "save_feature_head",
    "save_masks",
    "save_medusa",
    "save_table",
    "skip",
    "suffix",
    "table",
    "topologies",
]
