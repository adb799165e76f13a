"""Loads what drafts for a target: published heads, heads of specjax, and smaller models."""

import pathlib
from typing import Any

from specjax import drafters
from specjax.api.pretrained import Pretrained, load, resolve
from specjax.models.weights import eagle_files, huggingface
from specjax.models.weights import medusa as medusa_files
from specjax.parallel import sharding
from specjax.types import Draft

_MEDUSA = (medusa_files.SAFE, medusa_files.PICKLED)

_OF_LOADING = ("dtype", "rules")
"""Options that say how a draft is loaded, rather than what is drafted with it."""


def directory_of(source: str | pathlib.Path) -> pathlib.Path:
    """The local file or directory of a source, downloaded if need be; without a model's, with a head's files."""
    path = resolve(source)
    is_hub = not pathlib.Path(source).expanduser().exists()
    if is_hub and path.is_dir() and not any(path.glob("*.safetensors")):
        path = huggingface.download(str(source), (*huggingface.HUB_FILES, eagle_files.BIN, *_MEDUSA))
    return path


def load_draft(source: str | pathlib.Path, target: Pretrained, **options: Any) -> Draft:
    """Loads a draft for a target: weights, and the drafter that runs them.

    Args:
      source: one of
        an EAGLE, EAGLE-2 or EAGLE-3 head, as a hub id such as "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B" or a directory, in
        the layout of its authors, of speculators or of Model-Optimizer (`drafters.eagle`);
        Medusa's heads, as a hub id such as "FasterDecoding/medusa-vicuna-7b-v1.3" or a directory (`drafters.medusa`);
        a head that specjax has trained: its directory, or the name of one that comes with specjax
        (`drafters.feature_head`);
        a smaller model of the same vocabulary, as `load` takes it (`drafters.model`).
        A `pytorch_model.bin` or `.pt` is read without torch, and nothing in it is run (`models.weights.torch_file`).
      target: what it drafts for. A head lies on the target's mesh, in the target's dtype.
      **options: of the drafter, such as `num_draft_tokens=3`, `topology=(3, 2)` or `dynamic=drafters.Dynamic()`; for a
        model and an EAGLE head also `dtype` and `rules`, as for `load`; for an EAGLE head `taps`, the hidden states
        that it reads, where its file is wrong about them.

    Raises:
      FileNotFoundError: where a file or directory is missing.
      OSError: where a download fails.
      ValueError: for files that are broken or not supported, or a draft whose width, layers or vocabulary are not those
        that the target has, naming both.
      TypeError: for an option that the drafter does not have.
    """
    if drafters.is_feature_head(source):
        return drafters.feature_head(drafters.load_feature_head(source), target, **options)
    path = directory_of(source)
    loading = {name: options.pop(name) for name in _OF_LOADING if name in options}
    if any((path / name).is_file() for name in _MEDUSA):
        return drafters.medusa(drafters.load_medusa(path, **loading), target, **options)
    if path.is_dir() and eagle_files.is_eagle(path):
        taps = options.pop("taps", None)
        head = drafters.load_eagle(path, target, taps=taps, **loading)
        rules = {"rules": loading["rules"]} if "rules" in loading else {}
        return drafters.eagle(head, target, **rules, **options)
    loading.setdefault("dtype", target.config.dtype)
    return drafters.model(load(path, mesh=sharding.mesh_of(target.params), **loading), **options)
