"""Text to token ids and back, with the `tokenizers` package alone: neither torch nor transformers at import time."""

import contextlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from specjax import chat, files, limits, spiece

# Tokens that end a text or a turn. Files name one of them, often the other one than a chat ends with; a model stops at
# every one that its vocabulary has as a control token (so does llama.cpp).
END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")

# The token types of GGUF files.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5

SPIECE = "spiece.model"
"""What T5 calls its SentencePiece model."""

MAX_EXTRA_IDS = 2**16
"""The most tokens `<extra_id_0>`, ... that a file may add; T5 has 100."""

MAX_TOKEN = 2**12
"""The longest token of a SentencePiece BPE vocabulary, in characters, each of whose parts is looked up."""

_EXTRA_ID = re.compile(r"<extra_id_\d+>")

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
}


class Tokenizer:
    """A tokenizer, its chat template and the tokens that end a text."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        eos_token_ids: Iterable[int] = (),
        template_name: str = "The chat template",
    ):
        """Wraps a tokenizer of the `tokenizers` package.

        Args:
          backend: the tokenizer.
          special_tokens: by role: "bos_token", "eos_token", ...; chat templates may name them.
          chat_template: a Jinja template in the style of transformers.
          eos_token_ids: further ids that end a text, beside "eos_token" and those of `END_TOKENS` that are special.
          template_name: what errors call the chat template.

        Raises:
          ValueError: for a chat template that is no text.
        """
        if chat_template is not None and not isinstance(chat_template, str):
            raise ValueError(f"{template_name} is a {type(chat_template).__name__}, not a text: download it again.")
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.template_name = template_name
        backend.no_padding()
        backend.no_truncation()
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        named = [self.special_tokens.get("eos_token"), *(token for token in END_TOKENS if token in special)]
        found = [backend.token_to_id(token) for token in named if token is not None]
        ids = [*eos_token_ids, *(i for i in found if i is not None)]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(ids))

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text, if the family has one."""
        return self.special_tokens.get("bos_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works."""
        return self.chat_template is not None

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included. A model's logits may be wider."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def vocab(self) -> dict[str, int]:
        """Token ids by token, in the tokenizer's own spelling (byte-level alphabets show a space as "Ġ")."""
        return self.backend.get_vocab(with_added_tokens=True)

    def token_bytes(self) -> dict[int, bytes]:
        """What each token adds to a text, by id: `decode` before it reads the bytes as UTF-8.

        A character may be spread over several tokens, so a token alone need not be text. Special tokens add nothing and
        are left out. SentencePiece's tokens begin words with a space; that `decode` strips it from the first word of a
        text is not heeded here, since no token is by itself the first.

        Raises:
          ValueError: where what a token adds depends on its neighbours (WordPiece), or the decoder is not known.
        """
        special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        spell = _spelling(self.backend.decoder)
        tokens = sorted(self.vocab().items(), key=lambda item: item[1])
        return {i: spell(token) for token, i in tokens if i not in special}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
          text: the text; special tokens written out in it become those tokens.
          add_special_tokens: whether to add what the family puts around a text, such as a begin token.

        Raises:
          ValueError: for a text with half of a surrogate pair.
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise ValueError(
                f"The text has \\u{code:04x} at its character {error.start}, half of a surrogate pair, which is no "
                "character: remove it."
            ) from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids that the vocabulary lacks are left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation up to where the assistant's answer begins.

        Raises:
          OSError: where no process can be started to render it.
          ValueError: where there is no chat template, or it refuses the messages, fails, or exceeds the bounds of
            `specjax.chat`.
        """
        if self.chat_template is None:
            raise ValueError("This tokenizer has no chat template: encode a plain prompt, or load a chat model.")
        return chat.render(self.chat_template, messages, name=self.template_name, variables=self.special_tokens)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        Args:
          messages: dictionaries with "role" ("system", "user", "assistant") and "content".

        Raises:
          OSError: where no process can be started to render it.
          ValueError: where there is no chat template, or it refuses the messages, fails, or exceeds the bounds of
            `specjax.chat`.
        """
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes files that `from_directory` and transformers read."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        # Otherwise transformers, by default, would strip spaces before punctuation when it decodes.
        settings["clean_up_tokenization_spaces"] = False
        _write_json(directory / "tokenizer_config.json", settings)
        if self.eos_token_ids:
            _write_json(directory / "generation_config.json", {"eos_token_id": list(self.eos_token_ids)})
        template = directory / "chat_template.jinja"
        template.unlink(missing_ok=True)
        if self.chat_template is not None:
            template.write_text(self.chat_template, encoding="utf-8")

    @classmethod
    def from_directory(cls, directory: str | pathlib.Path) -> "Tokenizer":
        """Reads `tokenizer.json` and what lies beside it, as transformers 4 or 5 or `save` wrote it.

        What is put around a text is what tokenizer.json says: as in transformers 5, `add_bos_token` and
        `add_eos_token` of tokenizer_config.json count for nothing beside it. Where there is none, `spiece.model` is
        read, which is all that the repositories of T5 v1.1 have.

        Raises:
          FileNotFoundError: where there is neither tokenizer.json nor spiece.model.
          ValueError: where a file cannot be parsed.
        """
        directory = pathlib.Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file() and (directory / SPIECE).is_file():
            extra_ids = _read_json(directory / "tokenizer_config.json").get("extra_ids", 0)
            limits.check_size(f"{directory / 'tokenizer_config.json'}: extra_ids", extra_ids, 0, MAX_EXTRA_IDS)
            return cls.from_sentencepiece(directory / SPIECE, extra_ids=extra_ids)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: download it, or make it with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            )
        if (size := path.stat().st_size) > files.MAX_JSON:
            raise ValueError(f"{path} has {size} bytes, and at most {files.MAX_JSON} are read: download it again.")
        with _naming(f"{path} is not a tokenizer", "download it again"):
            backend = tokenizers.Tokenizer.from_file(str(path))
        config = _read_json(directory / "tokenizer_config.json")
        special = _special_tokens(_read_json(directory / "special_tokens_map.json"))
        special |= _special_tokens(config)
        _add_named_tokens(backend, special)
        return cls(
            backend,
            special_tokens=special,
            chat_template=_template(directory, config),
            eos_token_ids=_eos_ids(directory),
            template_name=f"The chat template of {directory}",
        )

    @classmethod
    def from_sentencepiece(cls, path: str | pathlib.Path, *, extra_ids: int = 0) -> "Tokenizer":
        """Rebuilds the tokenizer of a SentencePiece unigram model; as T5 does, it puts the end token behind a text.

        It gives the ids of the `sentencepiece` library, with three exceptions. Special tokens written out in a text
        become those tokens. Of two equally probable segmentations, such as those of ")))" into "))" and ")", either may
        be taken. Characters are normalised by grapheme, as transformers' fast tokenizers do, where the library takes
        the longest match: letters with several marks may differ.

        Args:
          path: a `spiece.model`.
          extra_ids: how many tokens `<extra_id_0>`, ... T5 adds, which the file need not have; the first comes last.

        Raises:
          FileNotFoundError: where there is no such file.
          ValueError: for a file that is broken, or a kind of model that is not unigram.
        """
        model = spiece.read(path)
        limits.check_size("extra_ids", extra_ids, 0, MAX_EXTRA_IDS)
        with _naming(f"{path} is no vocabulary that can be rebuilt", "copy or download it again"):
            return cls._of_pieces(model, extra_ids)

    @classmethod
    def _of_pieces(cls, model: spiece.Model, extra_ids: int) -> "Tokenizer":
        backend = _unigram(model)
        special = [piece.text for piece in model.pieces if piece.kind in (spiece.CONTROL, spiece.UNKNOWN)]
        found = [piece.text for piece in model.pieces if piece.kind == spiece.USER_DEFINED and "▁" not in piece.text]
        special += [text for text in found if _EXTRA_ID.fullmatch(text)] + extra_tokens(extra_ids)
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
        others = [AddedToken(text, special=False, normalized=False) for text in found if text not in special]
        backend.add_tokens(others)
        _surround(backend, model.roles, bos=False, eos=True)
        return cls(backend, special_tokens=model.roles)

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], *, path: str | pathlib.Path = "the GGUF file") -> "Tokenizer":
        """Rebuilds a tokenizer from the `tokenizer.*` metadata of a GGUF file.

        Args:
          fields: the metadata as plain values, e.g. `gguf.open_file(path).fields`.
          path: what errors call the file.

        Raises:
          ValueError: for a kind of tokenizer that is not known, or entries that are missing or damaged.
        """
        fields = {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in fields.items()}
        _check_gguf_fields(fields, path)
        with _naming(f"{path} has a damaged vocabulary", "download it again"):
            return cls._of_gguf_fields(fields, f"The chat template of {path}")

    @classmethod
    def _of_gguf_fields(cls, fields: Mapping[str, Any], template_name: str) -> "Tokenizer":
        kind, tokens = fields["model"], fields["tokens"]
        backend = _GGUF_MODELS[kind](fields)
        _add_gguf_tokens(backend, fields)
        roles = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        special = {
            role: tokens[fields[f"{name}_token_id"]]
            for name, role in roles.items()
            if 0 <= fields.get(f"{name}_token_id", len(tokens)) < len(tokens)
        }
        add_bos = fields.get("add_bos_token", kind == "llama" or fields.get("pre") in ("llama-bpe", "llama3"))
        _surround(backend, special, bool(add_bos), bool(fields.get("add_eos_token", False)))
        return cls(
            backend, special_tokens=special, chat_template=fields.get("chat_template"), template_name=template_name
        )


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: the bytes that print stand for themselves, the others for the letters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _steps(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A decoder's elementary steps, in order."""
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _steps(part)]


def _spelling(decoder: decoders.Decoder | None) -> Callable[[str], bytes]:
    """The function from a token, as the vocabulary spells it, to the bytes that it adds to a text."""
    # What a decoder is made of is told by its pickled state alone.
    steps = [] if decoder is None else _steps(json.loads(decoder.__getstate__()))
    replacements, kinds = [], []
    for step in steps:
        kind, pattern = step["type"], step.get("pattern", {})
        if kind == "Metaspace":
            replacements.append((step["replacement"], " "))
        elif kind == "Replace" and "String" in pattern and "Fuse" not in kinds:
            replacements.append((pattern["String"], step["content"]))
        # Once the tokens are fused, a strip concerns only how the text begins and ends.
        elif not (kind in ("ByteLevel", "ByteFallback", "Fuse") or (kind == "Strip" and "Fuse" in kinds)):
            raise ValueError(f"The bytes of a token cannot be told under the decoder {json.dumps(step)}.")
        kinds.append(kind)
    if not kinds:
        raise ValueError(
            "The bytes of a token cannot be told: this tokenizer has no decoder. Set `tokenizer.backend.decoder`, "
            "e.g. to tokenizers.decoders.ByteLevel()."
        )
    letters = _byte_of_letter() if "ByteLevel" in kinds else {}

    def spell(token: str) -> bytes:
        for old, new in replacements:
            token = token.replace(old, new)
        if "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        # A token with a letter beyond the alphabet, as users add them, stands for itself.
        if letters and all(letter in letters for letter in token):
            return bytes(letters[letter] for letter in token)
        return token.encode()

    return spell


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file."""
    return files.read_json(path) if path.is_file() else {}


@contextlib.contextmanager
def _naming(what: str, remedy: str) -> Iterator[None]:
    """Makes one sentence of whatever the tokenizers package raises, panics of its Rust code included."""
    try:
        yield
    except (FileNotFoundError, ImportError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what} ({files.shorten(error)}): {remedy}.") from error


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens by role; transformers writes them as texts or as objects with a "content"."""
    roles = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
    values = {role: config.get(role) for role in roles}
    texts = {role: value["content"] if isinstance(value, Mapping) else value for role, value in values.items()}
    return {role: text for role, text in texts.items() if isinstance(text, str)}


def _add_named_tokens(backend: tokenizers.Tokenizer, special: Mapping[str, str]) -> None:
    """Makes the tokens with a role special where tokenizer.json does not, as transformers does."""
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = [t for t in special.values() if t not in known and backend.token_to_id(t) is not None]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])


def _template(directory: pathlib.Path, config: Mapping[str, Any]) -> Any:
    """The chat template: one text, or several with names of which "default" is for chats."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > 4 * chat.MAX_TEMPLATE:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, more than any chat template: download it again.")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason}): download it again.") from error
    value = config.get("chat_template")
    if not isinstance(value, list):
        return value
    named = [entry for entry in value if isinstance(entry, dict) and entry.get("name") == "default"]
    return named[-1].get("template") if named else None


def _eos_ids(directory: pathlib.Path) -> list[int]:
    """What generation_config.json, or else config.json, says ends a text: one id or several."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(directory / name).get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            for i in ids:
                limits.check_size(f"{directory / name}: eos_token_id", i, low=0)
            return ids
    return []


def _vocabulary(fields: Mapping[str, Any]) -> dict[str, int]:
    """Ids by token, without the padding that fills a table up at its end."""
    tokens, types = fields["tokens"], fields.get("token_type")
    end = len(tokens)
    while types is not None and end and types[end - 1] == _UNUSED:
        end -= 1
    return {token: i for i, token in enumerate(tokens[:end])}


def _byte_level_bpe(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer and its descendants."""
    pre = fields.get("pre", "default")
    # A token may begin with a space only as "Ġ", so the first space from the second character on parts the two.
    merges = [(m[: (cut := m.index(" ", 1))], m[cut + 1 :]) for m in fields["merges"]]
    # Llama 3 takes a word that is a token as it stands, even where the merges do not lead to it.
    whole = pre in ("llama-bpe", "llama3")
    backend = tokenizers.Tokenizer(models.BPE(vocab=_vocabulary(fields), merges=merges, ignore_merges=whole))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_merges(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece BPE model's scores stand for: every way to part a token, best tokens first."""
    merges = []
    for token in sorted(vocab, key=lambda token: -scores[vocab[token]]):
        if len(token) > MAX_TOKEN:
            raise ValueError(f"it has a token of {len(token)} characters, and at most {MAX_TOKEN} are read")
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def _sentencepiece_bpe(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of Llama 2 and Mistral 7B: BPE over characters with "▁" for a space, bytes for what is unknown."""
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


_GGUF_MODELS = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
"""By `tokenizer.ggml.model`."""


def _check_gguf_fields(fields: Mapping[str, Any], path: str | pathlib.Path) -> None:
    """Checks that what a tokenizer is rebuilt from is there, and of its kind."""
    kind, pre = fields.get("model"), fields.get("pre", "default")
    needed = ["model", "tokens", *(["merges"] if kind == "gpt2" else ["scores"] if kind == "llama" else [])]
    if missing := [name for name in needed if name not in fields]:
        raise ValueError(f"{path} has no tokenizer.ggml.{missing[0]}: download it again.")
    if kind not in _GGUF_MODELS:
        raise ValueError(
            f"{path}: tokenizer.ggml.model {kind!r:.80} is not supported: specjax rebuilds 'gpt2' (byte-level BPE) "
            "and 'llama' (SentencePiece BPE). Load the model from a directory with tokenizer.json instead."
        )
    if kind == "gpt2" and pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"{path}: tokenizer.ggml.pre {pre!r:.80} is not supported: specjax knows {', '.join(PRE_TOKENIZERS)}. "
            "Load the model from a directory with tokenizer.json instead."
        )
    kinds = {"tokens": str, "merges": str, "scores": float, "token_type": int}
    for name, element in kinds.items():
        value = fields.get(name, [])
        if not isinstance(value, list) or not all(isinstance(x, element) for x in value):
            raise ValueError(f"tokenizer.ggml.{name} of {path} is no list of {element.__name__}: download it again.")
        if name in ("scores", "token_type") and name in fields and len(value) != len(fields["tokens"]):
            raise ValueError(
                f"tokenizer.ggml.{name} of {path} has {len(value)} entries, but there are {len(fields['tokens'])} "
                "tokens: download it again."
            )


def extra_tokens(number: int) -> list[str]:
    """The tokens that T5 puts at its vocabulary's end, in order: `<extra_id_0>` is the last."""
    return [f"<extra_id_{i}>" for i in reversed(range(number))]


def _unigram(model: spiece.Model) -> tokenizers.Tokenizer:
    """The segmentation of greatest probability, spaces written as "▁"."""
    texts = [piece.text for piece in model.pieces]
    unknown = texts.index(model.roles["unk_token"])
    scores = [(piece.text, piece.score) for piece in model.pieces]
    # The package's own stub knows the first of these arguments alone.
    unigram: Any = models.Unigram
    backend = tokenizers.Tokenizer(unigram(scores, unknown, model.byte_fallback))
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.strip:
        # Not `Strip`, which takes all white space for a space.
        steps += [normalizers.Replace(Regex(r"\A +|[ ▁]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_prefix:
        steps.append(normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence(steps)
    # No piece of most models goes on after a space; then each word can be parted on its own, which is faster.
    words = not any("▁" in text[1:] for text in texts)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=words)
    spaces = decoders.Metaspace(prepend_scheme="always" if model.add_prefix else "never")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), spaces]) if model.byte_fallback else spaces
    return backend


def _add_gguf_tokens(backend: tokenizers.Tokenizer, fields: Mapping[str, Any]) -> None:
    """Tokens that are found in a text before anything else: control tokens and those that users defined."""
    special_types = (_UNKNOWN, _CONTROL)
    for token, kind in zip(fields["tokens"], fields.get("token_type", ()), strict=False):
        if kind in special_types:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, special=False, normalized=False)])


def _surround(backend: tokenizers.Tokenizer, special: Mapping[str, str], bos: bool, eos: bool) -> None:
    """Puts a begin and an end token around a text, where wanted and known."""
    before, after = (special.get(f"{name}_token") if on else None for name, on in (("bos", bos), ("eos", eos)))
    tokens = dict.fromkeys(token for token in (before, after) if token is not None)
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(part for part in (before, "$A", after) if part is not None),
        special_tokens=[(token, backend.token_to_id(token)) for token in tokens],
    )
