"""Rebuilds tokenizers of the `tokenizers` package from the metadata of GGUF files and SentencePiece models."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from specjax.text import sentencepiece_file

# The token types of GGUF files.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5

MAX_TOKEN = 2**12
"""The longest token of a SentencePiece BPE vocabulary, in characters; every split of a token is looked up."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split_regex(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Splits by a pattern, then maps bytes to the printable characters of GPT-2's alphabet."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _qwen2() -> pre_tokenizers.PreTokenizer:
    return _split_regex(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}")


def _llama3() -> pre_tokenizers.PreTokenizer:
    return _split_regex(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}")


# How each family cuts a text into words before the merges, by the GGUF entry `tokenizer.ggml.pre`.
PRE_TOKENIZERS = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "qwen2": _qwen2,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "dbrx": _llama3,
}


def _vocabulary(fields: Mapping[str, Any]) -> dict[str, int]:
    """Ids by token, without the padding at the end of the table."""
    tokens, types = fields["tokens"], fields.get("token_type")
    end = len(tokens)
    while types is not None and end and types[end - 1] == _UNUSED:
        end -= 1
    return {token: i for i, token in enumerate(tokens[:end])}


def _byte_level_bpe(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer and its descendants."""
    pre = fields.get("pre", "default")
    # A token may begin with a space only as "Ġ", so the first space from the second character on separates the two.
    merges = [(m[: (cut := m.index(" ", 1))], m[cut + 1 :]) for m in fields["merges"]]
    # Llama 3 keeps a word that is a token whole, even where the merges do not lead to it.
    whole = pre in ("llama-bpe", "llama3")
    backend = tokenizers.Tokenizer(models.BPE(vocab=_vocabulary(fields), merges=merges, ignore_merges=whole))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_merges(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece BPE model's scores imply: every way to split a token, best tokens first."""
    merges = []
    for token in sorted(vocab, key=lambda token: -scores[vocab[token]]):
        if len(token) > MAX_TOKEN:
            raise ValueError(f"it has a token of {len(token)} characters, and at most {MAX_TOKEN} are read")
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def _sentencepiece_bpe(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of Llama 2 and Mistral 7B: BPE over characters with "▁" for a space, else bytes."""
    vocab = _vocabulary(fields)
    unknown = fields["tokens"][fields.get("unknown_token_id", 0)]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_sentencepiece_merges(vocab, fields["scores"]),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = fields.get("add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


GGUF_MODELS = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
"""Functions that rebuild a tokenizer, by `tokenizer.ggml.model`."""


def check_gguf_fields(fields: Mapping[str, Any], path: str | pathlib.Path) -> None:
    """Checks that the entries that a tokenizer is rebuilt from exist and have the right type."""
    kind, pre = fields.get("model"), fields.get("pre", "default")
    needed = ["model", "tokens", *(["merges"] if kind == "gpt2" else ["scores"] if kind == "llama" else [])]
    if missing := [name for name in needed if name not in fields]:
        raise ValueError(f"{path} has no tokenizer.ggml.{missing[0]}: download it again.")
    if kind not in tuple(GGUF_MODELS):  # It may be a list.
        raise ValueError(
            f"{path}: tokenizer.ggml.model {kind!r:.80} is not supported: specjax rebuilds 'gpt2' (byte-level BPE) "
            "and 'llama' (SentencePiece BPE). Load the model from a directory with tokenizer.json instead."
        )
    if kind == "gpt2" and pre not in tuple(PRE_TOKENIZERS):
        raise ValueError(
            f"{path}: tokenizer.ggml.pre {pre!r:.80} is not supported: specjax knows {', '.join(PRE_TOKENIZERS)}. "
            "Load the model from a directory with tokenizer.json instead."
        )
    kinds = {"tokens": str, "merges": str, "scores": float, "token_type": int}
    for name, element in kinds.items():
        value = fields.get(name, [])
        if not isinstance(value, list) or not all(isinstance(x, element) for x in value):
            raise ValueError(f"tokenizer.ggml.{name} of {path} is not a list of {element.__name__}: download it again.")
        if name in ("scores", "token_type") and name in fields and len(value) != len(fields["tokens"]):
            raise ValueError(
                f"tokenizer.ggml.{name} of {path} has {len(value)} entries, but there are {len(fields['tokens'])} "
                "tokens: download it again."
            )


def extra_tokens(number: int) -> list[str]:
    """The tokens that T5 puts at its vocabulary's end, in order: `<extra_id_0>` is the last."""
    return [f"<extra_id_{i}>" for i in reversed(range(number))]


def unigram(model: sentencepiece_file.Model) -> tokenizers.Tokenizer:
    """A tokenizer that finds the most probable segmentation, with spaces written as "▁"."""
    texts = [piece.text for piece in model.pieces]
    unknown = texts.index(model.roles["unk_token"])
    scores = [(piece.text, piece.score) for piece in model.pieces]
    # The package's type stub has only the first of these arguments.
    model_of: Any = models.Unigram
    backend = tokenizers.Tokenizer(model_of(scores, unknown, model.byte_fallback))
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.strip:
        # Not `Strip`, which removes all white space, not only spaces.
        steps += [normalizers.Replace(Regex(r"\A +|[ ▁]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_prefix:
        steps.append(normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence(steps)
    # In most models no piece continues after a space; then each word can be segmented on its own, which is faster.
    words = not any("▁" in text[1:] for text in texts)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=words)
    spaces = decoders.Metaspace(prepend_scheme="always" if model.add_prefix else "never")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), spaces]) if model.byte_fallback else spaces
    return backend


def add_gguf_tokens(backend: tokenizers.Tokenizer, fields: Mapping[str, Any]) -> None:
    """Tokens that are found in a text before anything else: control tokens and those that users defined."""
    special_types = (_UNKNOWN, _CONTROL)
    for token, kind in zip(fields["tokens"], fields.get("token_type", ()), strict=False):
        if kind in special_types:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, special=False, normalized=False)])


def surround(backend: tokenizers.Tokenizer, special: Mapping[str, str], bos: bool, eos: bool) -> None:
    """Puts a begin and an end token around a text, where they are wanted and known."""
    before, after = (special.get(f"{name}_token") if on else None for name, on in (("bos", bos), ("eos", eos)))
    tokens = dict.fromkeys(token for token in (before, after) if token is not None)
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(part for part in (before, "$A", after) if part is not None),
        special_tokens=[(token, backend.token_to_id(token)) for token in tokens],
    )
