"""The decoding loop over pytrees, for code that shards, serves or measures."""

from specjax.decoding.buffers import (
    BUFFER_MULTIPLE,
    buffer_length,
    pad_prompts,
    read_inputs,
    round_up,
    text_limits,
)
from specjax.decoding.loop import CompilerOptions, advance, as_options, check, compiled_with, generate, stream
from specjax.decoding.prefill import DEFAULT_STEP_COST, prefill, repeat, row_keys, spread_seeds
from specjax.decoding.step import apply_rule, context_of, decode_step, history_of, propose, step_keys

__all__ = [
    "BUFFER_MULTIPLE",
    "DEFAULT_STEP_COST",
    "CompilerOptions",
    "advance",
    "apply_rule",
    "as_options",
    "buffer_length",
    "check",
    "compiled_with",
    "context_of",
    "decode_step",
    "generate",
    "history_of",
    "pad_prompts",
    "prefill",
    "propose",
    "read_inputs",
    "repeat",
    "round_up",
    "row_keys",
    "spread_seeds",
    "step_keys",
    "stream",
    "text_limits",
]
