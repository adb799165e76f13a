"""SentencePiece vocabularies in T5's layout (Raffel et al. 2019, arXiv 1910.10683, section 2.2.1)."""

import io
import pathlib
from collections.abc import Iterable
from typing import Any

from specjax import files
from specjax.text import sentencepiece_file
from specjax.text.rebuild import extra_tokens
from specjax.text.tokenizer import Tokenizer

PAD, EOS, UNKNOWN = 0, 1, 2
"""The ids that every vocabulary in this layout begins with."""

MULTIPLE = 128
"""T5 pads the width of its logits to a multiple of this: 32100 tokens, 32128 logits. Meshes then divide it."""

_LONGEST = 1 << 16
"""Bytes of the longest text; the library skips longer ones."""
_THREADS = 8
"""Fixed, since rounding depends on how sums are split among threads."""


def padded(size: int) -> int:
    """The width of the logits of a model with a vocabulary of that size."""
    return -(-size // MULTIPLE) * MULTIPLE


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError(
            "Training a vocabulary needs the sentencepiece package: pip install -e '.[train]', or give the "
            "spiece.model of another one."
        ) from error
    return sentencepiece


def train(
    texts: Iterable[str],
    path: str | pathlib.Path,
    *,
    vocab_size: int,
    extra_ids: int = 0,
    byte_fallback: bool = False,
    character_coverage: float = 0.9995,
) -> Tokenizer:
    """Trains a unigram vocabulary (Kudo 2018, arXiv 1804.10959) and writes it as `spiece.model`.

    Padding is 0, the end token 1, the unknown token 2; equal texts in equal order give an equal vocabulary.

    Args:
      texts: what it is trained on, both inputs and targets.
      path: the file to write.
      vocab_size: the number of all tokens.
      extra_ids: how many of these are T5's `<extra_id_0>`, ...; they are the last ones, the first at the very end.
      byte_fallback: whether characters without a token are spelt in bytes, which takes 256 tokens.
      character_coverage: the share of the characters that get a token of their own.

    Returns:
      The tokenizer.

    Raises:
      ImportError: without the `sentencepiece` package.
      ValueError: where the texts do not suffice for a vocabulary of that size.
    """
    written, sentencepiece = io.BytesIO(), _sentencepiece()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=written,
            model_type="unigram",
            vocab_size=vocab_size - extra_ids,
            character_coverage=character_coverage,
            byte_fallback=byte_fallback,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNKNOWN,
            bos_id=-1,
            max_sentence_length=_LONGEST,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"These texts do not give a vocabulary of vocab_size={vocab_size} tokens ({reason}): choose another size, "
            "or give more text."
        ) from error
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as partial:
        partial.write_bytes(sentencepiece_file.append(written.getvalue(), extra_tokens(extra_ids)))
    return Tokenizer.from_sentencepiece(path)


def load(path: str | pathlib.Path) -> Tokenizer:
    """Reads a vocabulary.

    Args:
      path: a `spiece.model`, or a directory with `tokenizer.json` or `spiece.model`, such as a saved model.

    Raises:
      FileNotFoundError: where there is none.
      ValueError: for a file that is broken.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"The vocabulary {path} does not exist: give a spiece.model or a directory with tokenizer.json, or leave "
            "it empty to train one."
        )
    return Tokenizer.from_directory(path) if path.is_dir() else Tokenizer.from_sentencepiece(path)
