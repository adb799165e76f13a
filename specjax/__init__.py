"""Speculative decoding in JAX: exact, ragged, sharded, one jitted loop."""

from specjax import decoding as decode
from specjax import drafters, metrics, sampling, theory
from specjax.api import Generation, Pretrained, beam_search, generate, load, load_draft, save, stream, warm
from specjax.decoding import verify
from specjax.models.config import DecoderConfig, T5Config
from specjax.parallel import sharding
from specjax.sampling import automaton
from specjax.serving.engine import Engine
from specjax.types import Drafter, Model, Params

__version__ = "0.1.0"

__all__ = [
    "DecoderConfig",
    "Drafter",
    "Engine",
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
    "load_draft",
    "metrics",
    "sampling",
    "save",
    "sharding",
    "stream",
    "theory",
    "verify",
    "warm",
]
