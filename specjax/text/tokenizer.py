"""Text to token ids and back, with the `tokenizers` package alone: neither torch nor transformers is imported."""

import contextlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders

from specjax import files, limits
from specjax.text import chat, rebuild, sentencepiece_file

# Tokens that end a text or a turn. Files name one of them, often not the one that a chat ends with; a model stops at
# every one that its vocabulary has as a control token (as llama.cpp does).
END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")

SPIECE = "spiece.model"
"""What T5 calls its SentencePiece model."""

MAX_EXTRA_IDS = 2**16
"""The most tokens `<extra_id_0>`, ... that a file may add; T5 has 100."""

_EXTRA_ID = re.compile(r"<extra_id_\d+>")


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
          eos_token_ids: further ids that end a text, besides "eos_token" and those of `END_TOKENS` that are special.
          template_name: what errors call the chat template.
        """
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
        """The bytes that each token adds to a text, by id: `decode` before it reads the bytes as UTF-8.

        A character may be spread over several tokens, so a single token need not be valid UTF-8. Special tokens add
        nothing and are left out. SentencePiece's tokens begin words with a space; `decode` strips it from the first
        word of a text, which is ignored here, since any token may come first.

        Raises:
          ValueError: where the bytes of a token depend on its neighbours (WordPiece), or the decoder is unknown.
        """
        special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        spell = _spelling(self.backend.decoder)
        tokens = sorted(self.vocab().items(), key=lambda item: item[1])
        return {i: spell(token) for token, i in tokens if i not in special}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
          text: the text; special tokens written out in it become those tokens.
          add_special_tokens: whether to add the family's special tokens around a text, such as a begin token.

        Raises:
          ValueError: for a text with half of a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text has \\u{ord(text[error.start]):04x} at its character {error.start}, half of a surrogate "
                "pair, which is not a character: remove it."
            ) from error
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids that the vocabulary lacks are left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    @property
    def has_tools(self) -> bool:
        """Whether the chat template tells the model of tools."""
        return self.chat_template is not None and "tools" in self.chat_template

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        continue_final: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation up to where the assistant's answer begins.

        Args:
          messages: dictionaries with "role" ("system", "user", "assistant") and "content".
          tools: what the assistant may call, in OpenAI's form.
          variables: further JSON values that the template may name, such as "enable_thinking".
          continue_final: whether the answer continues the last message.
          add_generation_prompt: whether the text ends with the beginning of an answer.

        Raises:
          OSError: where no process can be started to render it.
          ValueError: where there is no chat template, or it refuses the messages, fails, or exceeds the bounds of
            `specjax.chat`.
        """
        if self.chat_template is None:
            raise ValueError("This tokenizer has no chat template: encode a plain prompt, or load a chat model.")
        return chat.render(
            self.chat_template,
            messages,
            name=self.template_name,
            variables={**self.special_tokens, **(variables or {})},
            tools=tools,
            continue_final=continue_final,
            add_generation_prompt=add_generation_prompt,
        )

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        Args:
          messages: dictionaries with "role" ("system", "user", "assistant") and "content".
          **options: those of `render_chat`.

        Raises:
          OSError: where no process can be started to render it.
          ValueError: where there is no chat template, or it refuses the messages, fails, or exceeds the bounds of
            `specjax.chat`.
        """
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

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
        """Reads `tokenizer.json` and the files next to it, as transformers 4 or 5 or `save` wrote them.

        The special tokens around a text are those of tokenizer.json: as in transformers 5, `add_bos_token` and
        `add_eos_token` of tokenizer_config.json are ignored. Without a tokenizer.json, `spiece.model` is read, which is
        all that the repositories of T5 v1.1 have.

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
            chat_template=_text(_template(directory, config), f"The chat template of {directory}"),
            eos_token_ids=_eos_ids(directory),
            template_name=f"The chat template of {directory}",
        )

    @classmethod
    def from_sentencepiece(cls, path: str | pathlib.Path, *, extra_ids: int = 0) -> "Tokenizer":
        """Rebuilds the tokenizer of a SentencePiece unigram model; as T5 does, it appends the end token to a text.

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
        model = sentencepiece_file.read(path)
        limits.check_size("extra_ids", extra_ids, 0, MAX_EXTRA_IDS)
        with _naming(f"{path} is not a vocabulary that can be rebuilt", "copy or download it again"):
            return cls._of_pieces(model, extra_ids)

    @classmethod
    def _of_pieces(cls, model: sentencepiece_file.Model, extra_ids: int) -> "Tokenizer":
        backend = rebuild.unigram(model)
        special = [
            piece.text
            for piece in model.pieces
            if piece.kind in (sentencepiece_file.CONTROL, sentencepiece_file.UNKNOWN)
        ]
        found = [
            piece.text
            for piece in model.pieces
            if piece.kind == sentencepiece_file.USER_DEFINED and "▁" not in piece.text
        ]
        special += [text for text in found if _EXTRA_ID.fullmatch(text)] + rebuild.extra_tokens(extra_ids)
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
        others = [AddedToken(text, special=False, normalized=False) for text in found if text not in special]
        backend.add_tokens(others)
        rebuild.surround(backend, model.roles, bos=False, eos=True)
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
        rebuild.check_gguf_fields(fields, path)
        with _naming(f"{path} has a damaged vocabulary", "download it again"):
            return cls._of_gguf_fields(fields, f"The chat template of {path}")

    @classmethod
    def _of_gguf_fields(cls, fields: Mapping[str, Any], template_name: str) -> "Tokenizer":
        kind, tokens = fields["model"], fields["tokens"]
        backend = rebuild.GGUF_MODELS[kind](fields)
        rebuild.add_gguf_tokens(backend, fields)
        roles = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        special = {
            role: tokens[fields[f"{name}_token_id"]]
            for name, role in roles.items()
            if 0 <= fields.get(f"{name}_token_id", len(tokens)) < len(tokens)
        }
        add_bos = fields.get("add_bos_token", kind == "llama" or fields.get("pre") in ("llama-bpe", "llama3"))
        rebuild.surround(backend, special, bool(add_bos), bool(fields.get("add_eos_token", False)))
        return cls(
            backend,
            special_tokens=special,
            chat_template=_text(fields.get("chat_template"), template_name),
            template_name=template_name,
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
    # Only a decoder's pickled state tells what it consists of.
    steps = [] if decoder is None else _steps(json.loads(decoder.__getstate__()))
    replacements, kinds = [], []
    for step in steps:
        kind, pattern = step["type"], step.get("pattern", {})
        if kind == "Metaspace":
            replacements.append((step["replacement"], " "))
        elif kind == "Replace" and "String" in pattern and "Fuse" not in kinds:
            replacements.append((pattern["String"], step["content"]))
        # Once the tokens are fused, a strip affects only the beginning and the end of the text.
        elif not (kind in ("ByteLevel", "ByteFallback", "Fuse") or (kind == "Strip" and "Fuse" in kinds)):
            raise ValueError(f"The bytes of a token cannot be determined with the decoder {json.dumps(step)}.")
        kinds.append(kind)
    if not kinds:
        raise ValueError(
            "The bytes of a token cannot be determined: this tokenizer has no decoder. Set "
            "`tokenizer.backend.decoder`, e.g. to tokenizers.decoders.ByteLevel()."
        )
    letters = _byte_of_letter() if "ByteLevel" in kinds else {}

    def spell(token: str) -> bytes:
        for old, new in replacements:
            token = token.replace(old, new)
        if "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        # A token with a letter outside the alphabet, such as those that users add, stands for itself.
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
    """Turns whatever the tokenizers package raises into one sentence, panics of its Rust code included."""
    try:
        yield
    except (FileNotFoundError, ImportError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what} ({files.shorten(error)}): {remedy}.") from error


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens by role; transformers writes them as strings or as objects with a "content"."""
    roles = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
    values = {role: config.get(role) for role in roles}
    texts = {role: value.get("content") if isinstance(value, Mapping) else value for role, value in values.items()}
    return {role: text for role, text in texts.items() if isinstance(text, str)}


def _add_named_tokens(backend: tokenizers.Tokenizer, special: Mapping[str, str]) -> None:
    """Makes the tokens with a role special where tokenizer.json does not, as transformers does."""
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = [t for t in special.values() if t not in known and backend.token_to_id(t) is not None]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])


def _template(directory: pathlib.Path, config: Mapping[str, Any]) -> Any:
    """The chat template: one string, or several with names, of which "default" is for chats."""
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


def _text(value: Any, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}, not a string: download it again.")
    return value


def _eos_ids(directory: pathlib.Path) -> list[int]:
    """The end-of-sequence ids of generation_config.json, or else of config.json: one or several."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(directory / name).get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            for i in ids:
                limits.check_size(f"{directory / name}: eos_token_id", i, low=0)
            return ids
    return []
