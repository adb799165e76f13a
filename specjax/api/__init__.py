"""The public API: prompts in, generated text out."""

from specjax.api.beam import beam_search
from specjax.api.drafts import load_draft
from specjax.api.generate import Generation, finish, generate, readable, run, run_in_steps, stream
from specjax.api.pretrained import Pretrained, load, load_tokenizer, save
from specjax.api.request import Request, check_vocabularies, encode, place, prepare
from specjax.api.warm import Shape, keep_programs, warm

__all__ = [
    "Generation",
    "Pretrained",
    "Request",
    "Shape",
    "beam_search",
    "check_vocabularies",
    "encode",
    "finish",
    "generate",
    "keep_programs",
    "load",
    "load_draft",
    "load_tokenizer",
    "place",
    "prepare",
    "readable",
    "run",
    "run_in_steps",
    "save",
    "stream",
    "warm",
]
