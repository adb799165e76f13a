"""Medusa's heads (Cai et al. 2024, arXiv 2401.10774), and those of blockwise parallel decoding (Stern et al. 2018)."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from specjax import files
from specjax.drafters import parallel_heads, store
from specjax.drafters.children import Children, without_replacement
from specjax.drafters.parallel_heads import Heads
from specjax.models.parallel_heads import ParallelHeadsConfig, abstract, cast
from specjax.models.weights import huggingface
from specjax.models.weights import medusa as published
from specjax.types import Draft

_KIND = "blockwise"
"""The kind of the files of blockwise heads (`store.write`)."""

_VOCABULARY = "specjax_vocabulary"
"""The key of `config.json` that has the fingerprint of the target's tokenizer."""


def _check_kind(heads: Any, kind: str) -> None:
    if not isinstance(heads, Heads):
        raise TypeError(f"heads is {type(heads).__name__}: give what drafters.load_{kind}(...) returns.")
    if heads.config.kind != kind:
        raise ValueError(f"These heads are of kind {heads.config.kind!r}: give them to drafters.{heads.config.kind}.")


def medusa(
    heads: Any,
    target: Any,
    *,
    num_draft_tokens: int | None = None,
    min_confidence: float = 0.0,
    lengths: tuple[int, ...] = (),
    topology: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
    children: Children = without_replacement,
) -> Draft:
    """Drafts with Medusa's heads: K tokens in parallel from the target's last hidden state (arXiv 2401.10774).

    A step costs K small matrices, and K rows of the product with the output matrix, or K matrices of the heads' own.
    The hidden state is that of the token before the last committed one, which is the newest there is, since the last
    one is read together with the drafts: the target's own head has made the last token of it, and head k drafts the
    k-th token after that (`drafters.parallel_heads` counts it out).

    The text is the target's under every exact rule that fits. Medusa accepts by `verify.typical`, which is not exact.
    Heads that were trained jointly with their target (Medusa-2) draft for that target, which is another one than the
    original.

    Args:
      heads: from `load_medusa`, or from training (`training.parallel_heads`).
      target: the `Pretrained` that they were trained for, decoder-only or an encoder-decoder.
      num_draft_tokens: K, for a chain, at most as many as there are heads, which is the default.
      min_confidence: a row's draft ends after the first token whose head's most probable token is less probable than
        that; 0: never.
      lengths: of a chain, as for `drafters.model`.
      topology: the shape of a tree no deeper than there are heads, as for `drafters.model`: children by depth, paths,
        or the name of a published tree, such as "mc_sim_7b_63"; `theory.best_tree` finds one for measured accuracies.
        None: a chain.
      children: how the children of a node of a tree are found above temperature 0: `without_replacement` and
        `with_replacement` draw them once for all nodes of a depth, exact under `rejection` and `coupled`;
        `most_probable` chooses them, and has no use for the heads' probabilities.

    Raises:
      TypeError: for heads that are not loaded.
      ValueError: for heads of another kind, a target of another width or vocabulary, more draft tokens or a deeper tree
        than there are heads, or a topology together with what chains have.
    """
    _check_kind(heads, "medusa")
    return parallel_heads.draft(heads, target, num_draft_tokens, min_confidence, lengths, topology, children)


def blockwise(
    heads: Any,
    target: Any,
    *,
    num_draft_tokens: int | None = None,
    min_confidence: float = 0.0,
    lengths: tuple[int, ...] = (),
    topology: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
    children: Children = without_replacement,
) -> Draft:
    """Blockwise parallel decoding (Stern et al. 2018, arXiv 1811.03115): predict, verify and accept in one call.

    The paper's k heads are the target's own and the K = k - 1 of these, whose feed-forward layer reads the target's
    last hidden state and whose states go through the target's own output matrix. The call that verifies a block also
    makes the next one (section 4), from the hidden state at the last token that it accepts: a text of m tokens takes
    m / k + 1 calls at least. `verify.greedy`, and every exact rule at temperature 0, accept as in section 3;
    `verify.top_k` and `verify.distance` are sections 5.1 and 5.2, not exact. The paper's minimum block size (5.3),
    which accepts tokens without a test, is not implemented.

    Args:
      heads: from `load_blockwise`, or from training (`training.parallel_heads`).
      target: as for `medusa`.
      num_draft_tokens: as for `medusa`.
      min_confidence: as for `medusa`.
      lengths: as for `medusa`.
      topology: as for `medusa`.
      children: as for `medusa`.

    Raises:
      TypeError, ValueError: as `medusa` does.
    """
    _check_kind(heads, "blockwise")
    return parallel_heads.draft(heads, target, num_draft_tokens, min_confidence, lengths, topology, children)


def save_medusa(heads: Heads, directory: str | pathlib.Path, *, base_model: str = "") -> None:
    """Writes Medusa's heads in their published layout, `medusa_lm_head.safetensors` and `config.json`.

    Args:
      heads: the heads, written in the dtype that they have.
      directory: made if it does not exist.
      base_model: the target's name, for `config.json`.

    Raises:
      ValueError: for heads of another kind.
    """
    info = {"base_model_name_or_path": base_model, _VOCABULARY: heads.vocabulary}
    published.write(heads.config, heads.params, pathlib.Path(directory), info)


def load_medusa(source: str | pathlib.Path, *, dtype: str = "float32") -> Heads:
    """Reads published heads of Medusa: `medusa_lm_head.safetensors` or `.pt`, with output matrices of their own or not.

    A `.pt` file is read without running the code that it names. Counts in `config.json` are not trusted.

    Args:
      source: a directory, one of these files, or a hub id such as "FasterDecoding/medusa-vicuna-7b-v1.3".
      dtype: "float32" or "bfloat16", that of the parameters until they are cast to the target's.

    Raises:
      FileNotFoundError: where there is no such file.
      OSError: where a download fails.
      ValueError: for a file that is broken, or holds something else.
    """
    path = pathlib.Path(source).expanduser()
    if not path.exists():
        if isinstance(source, pathlib.Path) or source.count("/") != 1 or source.startswith((".", "/", "~")):
            raise FileNotFoundError(f"{source} does not exist: give the directory of Medusa heads, or a hub id.")
        path = huggingface.download(source, (published.CONFIG, published.SAFE, published.PICKLED))
    config, params = published.read(path, dtype)
    beside = (path if path.is_dir() else path.parent) / published.CONFIG
    known = files.read_json(beside).get(_VOCABULARY) if beside.is_file() else None
    return Heads(config, params, known if isinstance(known, str) else None)


def save_blockwise(heads: Heads, directory: str | pathlib.Path) -> None:
    """Writes heads of blockwise parallel decoding in the dtype that they have.

    Raises:
      ValueError: for heads of another kind.
    """
    _check_kind(heads, "blockwise")
    info = {"config": dataclasses.asdict(heads.config), "vocabulary": heads.vocabulary}
    flat = traverse_util.flatten_dict(heads.params)
    arrays = {name: np.asarray(flat[place]) for name, place in _names(heads.config).items()}
    store.write(directory, _KIND, arrays, info, None)


def _names(config: ParallelHeadsConfig) -> dict[str, tuple[Any, ...]]:
    """The place of each parameter in the tree, by the name that it has in a file."""
    return {".".join(map(str, place)): place for place in traverse_util.flatten_dict(abstract(config))}


def load_blockwise(source: str | pathlib.Path, *, dtype: str = "float32") -> Heads:
    """Reads heads that `save_blockwise` wrote.

    Args:
      source: the directory.
      dtype: "float32" or "bfloat16", that of the parameters until they are cast to the target's.

    Raises:
      FileNotFoundError: where there is none.
      ValueError: for a file that is damaged, or holds something else.
    """
    path = pathlib.Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{source} does not exist: configs/heads.py makes such heads.")
    arrays, info, _ = store.read(path, _KIND, None)
    try:
        config = ParallelHeadsConfig(**info["config"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} does not describe its heads ({error}): copy or make it again.") from error
    names: Any = _names(config)
    wanted: Any = traverse_util.flatten_dict(abstract(config))
    if {name: x.shape for name, x in arrays.items()} != {name: wanted[place].shape for name, place in names.items()}:
        raise ValueError(f"{path} does not have the arrays of its {config.num_heads} heads: copy or make it again.")
    params = traverse_util.unflatten_dict({names[name]: jnp.asarray(x) for name, x in arrays.items()})
    return Heads(*cast(config, params, dtype), info["vocabulary"])
