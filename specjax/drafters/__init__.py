"""Drafters: pure functions that propose tokens. One file a family."""

from specjax.drafters.model import model
from specjax.drafters.ngram import ngram
from specjax.drafters.none import none

__all__ = ["model", "ngram", "none"]
