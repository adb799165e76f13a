"""Speculative decoding in JAX: exact, ragged, sharded, one jitted loop."""

from specjax import automaton, decode, drafters, metrics, sampling, sharding, theory, verify
from specjax.api import Generation, generate, stream
from specjax.beam import beam_search
from specjax.models.config import DecoderConfig, T5Config
from specjax.pretrained import Pretrained, load, save
from specjax.types import Drafter, Model, Params

__version__ = "0.1.0"

__all__ = [
    "DecoderConfig",
    "Drafter",
    "Generation",
    "Model",
    "Params",
    "Pretrained",
    "T5Config",
    "automaton",
    "beam_search",
    "decode",
    "drafters",
    "generate",
    "load",
    "metrics",
    "sampling",
    "save",
    "sharding",
    "stream",
    "theory",
    "verify",
]
