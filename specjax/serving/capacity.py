"""What an engine has room for: its static sizes, whether they fit the memory, and whether a request fits them."""

import pathlib
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from specjax.api.pretrained import Pretrained
from specjax.api.request import check_vocabularies, with_taps
from specjax.decoding import round_up, verify
from specjax.decoding.buffers import BUFFER_MULTIPLE
from specjax.decoding.prefill import spread_seeds
from specjax.drafters import contract
from specjax.drafters.none import none
from specjax.limits import check_number, check_size
from specjax.parallel import sharding
from specjax.serving.choices import choices_of, sampling_of
from specjax.serving.device import state_bytes
from specjax.serving.grammars import GrammarTable
from specjax.serving.programs import Choices, Programs, Sizes
from specjax.serving.requests import Options
from specjax.text.tokenizer import Tokenizer
from specjax.types import Params, SamplingOptions

MAX_LEN = 2048
"""The longest sequence of an engine, where nothing else is asked for."""
CHUNK_WIDTHS = (16, 64, 128, 256)
"""The widths of the chunks of prompts, where nothing else is asked for."""
MAX_SOURCE = 512
"""The longest prompt of an encoder-decoder, where nothing else is asked for."""
NUM_STOP_TOKENS, NUM_BIASES, MAX_STEPS, MAX_SEQUENCES = 32, 304, 16, 128
"""The most of each that a request may have; of steps, those of one call."""


class Setting(NamedTuple):
    """What an engine has been set up for.

    Attributes:
      programs: what is compiled.
      params: the parameters of both sides.
      mesh: the mesh that they lie on, or None.
      batch_sizes: the sizes of the batch, in increasing order.
      chunk_widths: the widths of the chunks of prompts, in increasing order.
      choices: those of an ordinary request, for their shapes.
      grammars: the table of grammars.
      tokenizer: of the target, or None.
      max_len: the longest sequence, in tokens.
      encodes: whether the target is an encoder-decoder, whose prompt is no part of the text.
    """

    programs: Programs
    params: Params
    mesh: Mesh | None
    batch_sizes: tuple[int, ...]
    chunk_widths: tuple[int, ...]
    choices: Choices
    grammars: GrammarTable
    tokenizer: Tokenizer | None
    max_len: int
    encodes: bool


def settle(
    target: Pretrained,
    drafter: Any,
    rule: Any,
    *,
    num_slots: int,
    max_len: int | None,
    batch_sizes: Sequence[int] | None,
    chunk_widths: Sequence[int] | None,
    max_source: int,
    num_top: int,
    grammar: tuple[int, int],
) -> Setting:
    """Checks the sizes of an engine, whose documentation explains the arguments.

    Raises:
      ValueError: naming the value and the remedy.
    """
    check_size("num_slots", num_slots, 1, 4096)
    draft = contract.check(drafter if drafter is not None else none())
    check_vocabularies(target, draft)
    model, encodes = with_taps(target, draft.drafter), target.model.start_token is not None
    chosen = verify.parse(rule)
    verify.check(chosen, draft.drafter.topology)
    if not chosen.exact:
        warnings.warn(f"verify={chosen.name} is not exact: texts are not distributed as the target's.", stacklevel=3)
    longest = min(model.max_len, draft.max_len or model.max_len)
    if max_len is None:
        max_len = min(longest, MAX_LEN)
    check_size("max_len", max_len, 2, longest)
    widths = (1,) if encodes else _chunk_widths(max_len, chunk_widths)
    behind = max(draft.drafter.topology.num_read + 1, widths[-1])
    sizes = Sizes(
        max_len=round_up(max_len + behind, BUFFER_MULTIPLE),
        max_source=max_source or (MAX_SOURCE if encodes else 0),
        num_stop_tokens=NUM_STOP_TOKENS,
        num_biases=NUM_BIASES,
        num_top=min(num_top, model.vocab_size),
        max_steps=MAX_STEPS,
        grammar_states=grammar[0],
        grammar_classes=grammar[1],
    )
    mesh = sharding.mesh_of(target.params)
    params = Params(target.params, draft.params)
    if mesh is not None:
        params = params._replace(draft=sharding.replicate_rest(params.draft, mesh))
    options = Options()
    sampling = sampling_of(options, sizes, model.vocab_size)
    setting = Setting(
        programs=Programs(model, draft.drafter, chosen, sizes),
        params=params,
        mesh=mesh,
        batch_sizes=_batch_sizes(num_slots, batch_sizes),
        chunk_widths=widths,
        choices=choices_of(options, sizes, sampling, (), limit=1),
        grammars=GrammarTable(model.vocab_size, *grammar),
        tokenizer=target.tokenizer,
        max_len=max_len,
        encodes=encodes,
    )
    check_memory(setting)
    return setting


def _chunk_widths(max_len: int, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        given = [width for width in CHUNK_WIDTHS if width <= max_len] or [max_len]
    for width in given:
        check_size("chunk_widths", width, 1, max_len)
    return tuple(sorted(set(given)))


def _batch_sizes(num_slots: int, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        factor, sizes = (2 if jax.default_backend() == "cpu" else 8), [num_slots]
        size = 1
        while size < num_slots:
            sizes.append(size)
            size *= factor
        # Where accelerators hardly notice the rows of a small batch, a size of its own for one row does not pay.
        given = sizes if factor == 2 else [size for size in sizes if size == num_slots or size >= 8]
    sizes = sorted({*given, num_slots})
    if sizes[0] < 1 or sizes[-1] != num_slots:
        raise ValueError(f"batch_sizes={list(given)}: from 1 to num_slots={num_slots}, which is the largest.")
    return tuple(sizes)


def check_memory(setting: Setting) -> None:
    """Compares what the state will take with what is free, before anything is allocated.

    Raises:
      ValueError: where it does not fit.
    """
    programs, largest = setting.programs, setting.batch_sizes[-1]
    table = setting.grammars.table()
    whole = state_bytes(programs, largest, setting.choices, table)
    row = state_bytes(programs, 1, setting.choices, table)
    below = setting.batch_sizes[-2] if len(setting.batch_sizes) > 1 else 0
    # While the batch grows, the old one is still there; one prompt is read, and one waits for a slot.
    needed = whole + (state_bytes(programs, below, setting.choices, table) if below else 0) + 2 * row
    devices = 1 if setting.mesh is None else setting.mesh.size
    free = free_bytes()
    if free is not None and needed > free * devices:
        raise ValueError(
            f"num_slots={largest} sequences of max_len={setting.max_len} tokens need {needed / 2**30:.1f} GiB, but "
            f"{free * devices / 2**30:.1f} GiB are free: lower one of them."
        )


def free_bytes() -> int | None:
    """Free memory of a device, or of the machine where the CPU is the device; None where that is not known."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def check(
    setting: Setting, prompt: Sequence[int], options: Options, *, score_prompts: bool
) -> tuple[SamplingOptions, tuple[int, ...]]:
    """Checks that a request makes sense and fits.

    Args:
      setting: of the engine.
      prompt: its token ids.
      options: what it has chosen.
      score_prompts: whether the engine can score prompts.

    Returns:
      its sampling options and stop tokens.

    Raises:
      ValueError: naming the value and the remedy.
    """
    sizes = setting.programs.sizes
    check_size("n", options.n, 1, MAX_SEQUENCES)
    check_size("max_new_tokens", options.max_new_tokens, 0, 2**30)
    length = options.max_new_tokens + (1 if setting.encodes else len(prompt))
    if length > setting.max_len:
        raise ValueError(
            f"A prompt of {len(prompt)} tokens and max_new_tokens={options.max_new_tokens} make {length} tokens, but "
            f"sequences have at most {setting.max_len}: shorten one of them."
        )
    if setting.encodes and len(prompt) > sizes.max_source:
        raise ValueError(f"A prompt of {len(prompt)} tokens is longer than the {sizes.max_source} that are encoded.")
    spread_seeds(options.seed, options.n)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(options, name) is not None:
            check_size(name, getattr(options, name), 0, sizes.num_top)
    if options.prompt_logprobs is not None and (setting.encodes or not score_prompts):
        raise ValueError("prompt_logprobs: this engine does not score prompts.")
    if len(options.prediction or ()) > (0 if setting.encodes else sizes.max_source):
        raise ValueError(
            f"The prediction has {len(options.prediction or ())} tokens, and this engine takes at most "
            f"{0 if setting.encodes else sizes.max_source}: shorten it, or give the engine a larger max_prediction."
        )
    if options.grammar is not None:
        setting.grammars.check(options.grammar)
    if options.stop_strings and setting.tokenizer is None:
        raise ValueError(f"stop_strings={list(options.stop_strings)} need a tokenizer, which the target lacks.")
    if any(not string for string in options.stop_strings):
        raise ValueError("stop_strings holds an empty string: leave it out.")
    stops = options.stop_tokens
    if stops is None:
        stops = setting.tokenizer.eos_token_ids if setting.tokenizer is not None else ()
    if len(stops) > sizes.num_stop_tokens:
        raise ValueError(f"{len(stops)} stop_tokens: at most {sizes.num_stop_tokens}.")
    sampling = sampling_of(options, sizes, setting.programs.target.vocab_size)
    if setting.programs.rule.name == "greedy" and np.any(sampling.temperature > 0):
        raise ValueError(f"verify=greedy decodes at temperature 0, not {options.temperature}.")
    return sampling, tuple(int(token) for token in stops)


def check_timeout(timeout: float | None) -> None:
    """Checks a request's timeout.

    Raises:
      ValueError: for one that is not a number above 0.
    """
    if timeout is not None:
        check_number("timeout", timeout)
