"""Texts that a target writes, with its hidden states, for training a draft on them.

The texts come from the library's own batched loop. A drafter that drafts nothing, but taps the target, keeps the
features that the loop computes anyway, so that no second pass over the texts is needed.
"""

import functools
import json
import pathlib
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors import numpy as safetensors

from specjax import files
from specjax.api.generate import generate, run
from specjax.api.pretrained import Pretrained
from specjax.api.request import prepare
from specjax.drafters.none import none
from specjax.types import Drafter, Feedback, Params, Topology


class Texts(NamedTuple):
    """Texts with the target's hidden states.

    Attributes:
      tokens: `[B, L]` prompts and what the target wrote, right-padded.
      prompt_length: `[B]`.
      length: `[B]` of prompt and text.
      features: `[B, L, F, E]` bfloat16, the tapped hidden states at each token that the target read; it has not read
        the last token of a text.
    """

    tokens: Int[np.ndarray, "B L"]
    prompt_length: Int[np.ndarray, " B"]
    length: Int[np.ndarray, " B"]
    features: Any


@functools.cache
def recorder(taps: tuple[int, ...], width: int) -> Drafter:
    """A drafter that drafts nothing, and whose state is the features of the text so far, `[B, L, F, E]` bfloat16.

    Args:
      taps: the hidden states to keep (`types.Model.with_taps`).
      width: E.
    """

    def init(batch_size: int, max_len: int, max_source: int = 0) -> Float[Array, "B L F E"]:
        del max_source
        return jnp.zeros((batch_size, max_len, len(taps), width), jnp.bfloat16)

    def update(params: Params, state: Float[Array, "B L F E"], feedback: Feedback) -> Float[Array, "B L F E"]:
        del params
        # A prompt's features are those of its own tokens; a step read the last token before it, then what it kept.
        begin = feedback.length - feedback.num_tokens - (feedback.context is not None)
        new = feedback.features.astype(state.dtype)
        return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at, 0, 0)))(state, new, begin)

    return Drafter(init, none().propose, update, Topology.chain(0), taps)


def write_texts(
    target: Pretrained,
    prompts: Sequence[Sequence[int]],
    taps: tuple[int, ...],
    *,
    max_new_tokens: int,
    temperature: Sequence[float],
    seed: int,
    prompt_width: int,
) -> Texts:
    """One batch of texts with their features.

    Args:
      target: the model that writes.
      prompts: the token ids of each prompt.
      taps: the hidden states to keep.
      max_new_tokens: the most tokens to write for each.
      temperature: of each row.
      seed: of the batch.
      prompt_width: what prompts are padded to, so that all batches share one program.
    """
    request = prepare(
        target,
        prompts,
        drafter=recorder(taps, target.config.hidden_size),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        prompt_width=prompt_width,
        max_len=prompt_width + max_new_tokens + 8,
    )
    rows = run(request).rows
    tokens, prompt_length, length = (np.asarray(x) for x in (rows.tokens, rows.prompt_length, rows.length))
    return Texts(tokens, prompt_length, length, np.asarray(rows.drafter))


def own_instructions(target: Pretrained, number: int, *, max_new_tokens: int, seed: int) -> list[str]:
    """Instructions that a chat model writes itself, from the opening of a user's turn (Magpie, arXiv 2406.08464).

    Raises:
      ValueError: for a target without a chat template.
    """
    assert target.tokenizer is not None
    opening = target.tokenizer.render_chat([{"role": "user", "content": "CONTENT"}]).split("CONTENT")[0]
    ids = target.tokenizer.encode(opening, add_special_tokens=False)
    written = generate(
        target, [ids], max_new_tokens=max_new_tokens, temperature=1.0, seed=seed, num_return_sequences=number
    )
    return [text.strip() or "Hello!" for text in written.text or ()]


def _batch_prompts(
    target: Pretrained, prompts: Sequence[str], number: int, rows: int, own: float, width: int, seed: int
) -> list[list[int]]:
    """The prompts of a batch: the next of the file, and some of the target's own."""
    assert target.tokenizer is not None
    num_own = round(rows * own)
    first = number * (rows - num_own)
    chosen = [prompts[i % len(prompts)] for i in range(first, first + rows - num_own)]
    if num_own:
        chosen += own_instructions(target, num_own, max_new_tokens=64, seed=seed)
    random.Random(seed).shuffle(chosen)
    encoded = [target.tokenizer.chat([{"role": "user", "content": text}]) for text in chosen]
    # A prompt that is too long loses its middle.
    half = width // 2
    return [ids if len(ids) <= width else ids[:half] + ids[len(ids) - (width - half) :] for ids in encoded]


def harvest(
    target: Pretrained,
    prompts: Sequence[str],
    directory: pathlib.Path,
    taps: tuple[int, ...],
    *,
    num_batches: int,
    batch_size: int = 32,
    prompt_width: int = 128,
    max_new_tokens: int = 160,
    own: float = 0.5,
    seed: int = 0,
) -> Iterator[pathlib.Path]:
    """Writes batches of texts, each into a file; those that exist are left as they are.

    Half of the rows are written greedily, the others at temperature 1, so that the draft fits both.

    Args:
      target: the model that writes.
      prompts: instructions.
      directory: where `00000.safetensors` and so on are written, and `00000.jsonl`, in which a person can read them.
      taps: the hidden states to keep.
      num_batches: how many batches.
      batch_size: texts per batch.
      prompt_width: tokens of a prompt; a longer one loses its middle.
      max_new_tokens: the most tokens of a text.
      own: the share of the instructions that the target writes itself (`own_instructions`).
      seed: of the sampling.

    Yields:
      the path of each file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(num_batches):
        path = directory / f"{number:05}.safetensors"
        if not path.exists():
            batch_seed = seed + number * batch_size
            ids = _batch_prompts(target, prompts, number, batch_size, own, prompt_width, batch_seed)
            temperature = [float(i % 2) for i in range(batch_size)]
            texts = write_texts(
                target,
                ids,
                taps,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=batch_seed,
                prompt_width=prompt_width,
            )
            save_texts(target, texts, path)
        yield path


def save_texts(target: Pretrained, texts: Texts, path: pathlib.Path) -> None:
    """Writes a batch: arrays, and beside them lines that a person can read."""
    assert target.tokenizer is not None
    lines = [
        {"prompt": target.tokenizer.decode(row[:begin]), "text": target.tokenizer.decode(row[begin:end])}
        for row, begin, end in zip(texts.tokens, texts.prompt_length.tolist(), texts.length.tolist(), strict=True)
    ]
    files.write(path.with_suffix(".jsonl"), "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
    with files.replacing(path) as unfinished:
        safetensors.save_file({name: np.ascontiguousarray(x) for name, x in texts._asdict().items()}, unfinished)


def read_texts(path: pathlib.Path) -> Texts:
    """Reads a batch back."""
    return Texts(**safetensors.load_file(path))
