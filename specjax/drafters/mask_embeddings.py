"""Trained embeddings of masks in a file, for `mask_tokens(embeddings=...)` and `parallel_masks(embeddings=...)`."""

import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float

from specjax.drafters import store

_KIND = "masks"


def save_masks(embeddings: Any, directory: str | pathlib.Path, *, target: Any = None) -> None:
    """Writes the embeddings of masks, which `load_masks` reads.

    Args:
      embeddings: `[K, E]`.
      directory: made if it does not exist; masks that were saved there before are replaced.
      target: the `Pretrained` that they were trained for, by whose vocabulary they are recognised, or None.

    Raises:
      ValueError: for an array of another shape.
    """
    rows = np.asarray(embeddings, np.float32)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"embeddings of shape {list(rows.shape)}: one row for each mask.")
    tokenizer = getattr(target, "tokenizer", None)
    info = {"vocabulary": "" if tokenizer is None else store.fingerprint(tokenizer)}
    store.write(directory, _KIND, {"embeddings": rows}, info, None)


def load_masks(
    directory: str | pathlib.Path, *, target: Any = None, number: int | None = None
) -> Float[np.ndarray, "K E"]:
    """The embeddings of masks, as `mask_tokens` and `parallel_masks` take them.

    Args:
      directory: the workdir of `configs/masks.py`, or one that `save_masks` wrote.
      target: the `Pretrained` that is to read them, which has to be the one that they were trained for, or None.
      number: how many of them, from the first on; None: all.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for a file that is damaged or holds something else, fewer masks than `number`, or another target.
    """
    path = pathlib.Path(directory).expanduser()
    if not (path / store.FILE if path.is_dir() or not path.exists() else path).exists():
        raise FileNotFoundError(f"{path} holds no masks: configs/masks.py makes them, with --workdir={directory}.")
    arrays, info, _ = store.read(path, _KIND, ["embeddings"])
    rows = arrays["embeddings"]
    if target is not None:
        _check_target(directory, rows.shape[1], info["vocabulary"], target)
    if number is not None and number > len(rows):
        raise ValueError(
            f"{directory} holds {len(rows)} masks, and {number} are needed: draft fewer tokens, or train more with "
            "--config.num_masks."
        )
    return rows[:number]


def _check_target(directory: str | pathlib.Path, width: int, vocabulary: str, target: Any) -> None:
    if width != target.config.hidden_size:
        raise ValueError(
            f"{directory} holds masks of width {width}, but the target's embeddings have {target.config.hidden_size} "
            "entries: give the target that they were trained for."
        )
    if vocabulary and target.tokenizer is not None and store.fingerprint(target.tokenizer) != vocabulary:
        raise ValueError(f"The vocabularies do not match: {directory} was trained for a target with another tokenizer.")
