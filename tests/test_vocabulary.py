"""SentencePiece vocabularies against the library that trains them."""

import builtins
import json
import pathlib
import random
import re

import pytest

from specjax.text import sentencepiece_file
from specjax.text.tokenizer import Tokenizer
from specjax.training import vocabulary

sentencepiece = pytest.importorskip("sentencepiece")

ROOT = pathlib.Path(__file__).parents[1]
ODD = [
    "",
    " ",
    "  two  spaces  ",
    "▁a ▁b▁",
    "tab\there\nand\r\nthere",
    "ﬁ ① ｱ ½ e\u0301 Å \u212b",
    "zero\u200bwidth\u00a0no-break\u3000wide",
    "日本語 🙂 👩‍👩‍👧 русский",
    "don't “quote” — … ²",
    "\x00\x07bell",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Real text: the repository's own documentation and code, without special tokens written out."""
    paths = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("specjax/*.py")]
    lines = [line for path in sorted(paths) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) > 2000
    return [line for line in lines if not re.search("</?s>|<pad>|<unk>|<extra_id_", line)]


def _noise(texts: list[str], number: int) -> list[str]:
    rng = random.Random(0)
    words = [word for text in texts[:400] for word in text.split()] + [" ", "  ", "\n", "é", "ß", "\u2009", "\uff58"]
    return ["".join(rng.choice(words) + rng.choice(["", " "]) for _ in range(rng.randint(1, 9))) for _ in range(number)]


def _is_tie(library, found: list[int], ids: list[int]) -> bool:
    """Whether two segmentations differ, but are equally probable: the same pieces in another order."""
    return found != ids and sorted(found) == sorted(ids) and library.decode(found) == library.decode(ids)


@pytest.fixture(scope="module", params=["plain", "byte fallback", "extra ids"])
def both(request, texts, tmp_path_factory):
    """A tokenizer and the library's own, of the same file."""
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    options = {"plain": {}, "byte fallback": {"byte_fallback": True}, "extra ids": {"extra_ids": 7}}[request.param]
    # Few characters are covered, so that there is something unknown.
    tokenizer = vocabulary.train(texts, path, vocab_size=700, character_coverage=0.99, **options)
    return tokenizer, sentencepiece.SentencePieceProcessor(model_file=str(path)), path, request.param


def test_ids_are_those_of_the_library(both, texts):
    tokenizer, library, _, name = both
    unknown = ties = 0
    tried = [*texts, *ODD, *_noise(texts, 500)]
    for text in tried:
        ids = library.encode(text)
        unknown += ids.count(vocabulary.UNKNOWN)
        found = tokenizer.encode(text)
        if _is_tie(library, found[:-1], ids):
            ties += 1
            continue
        assert found == [*ids, vocabulary.EOS], repr(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        if vocabulary.UNKNOWN not in ids:
            assert tokenizer.decode(ids) == library.decode(ids)
    assert (unknown > 0) == (name != "byte fallback")
    assert ties < len(tried) / 200


def test_the_layout_is_that_of_t5(both):
    tokenizer, library, _, name = both
    assert [library.id_to_piece(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]
    assert library.vocab_size() == tokenizer.vocab_size == 700
    assert {i: token for token, i in tokenizer.vocab().items()} == {i: library.id_to_piece(i) for i in range(700)}
    assert tokenizer.eos_token_ids == (vocabulary.EOS,)
    assert tokenizer.special_tokens == {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    if name == "extra ids":
        assert tokenizer.vocab()["<extra_id_0>"] == 699
        assert tokenizer.vocab()["<extra_id_6>"] == 693
        masked = tokenizer.encode("the <extra_id_0> of")
        assert 699 in masked
        assert library.encode("<extra_id_0>")[-1] == 699
        assert tokenizer.decode(masked) == "the of"
        assert 699 not in tokenizer.token_bytes()


def test_saved_and_read_again(both, texts, tmp_path):
    tokenizer, _, _, _ = both
    tokenizer.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    for text in [*texts[:200], *ODD]:
        assert again.encode(text) == tokenizer.encode(text)
    assert again.eos_token_ids == tokenizer.eos_token_ids
    assert again.decode(again.encode(texts[3])) == tokenizer.decode(tokenizer.encode(texts[3]))
    spelt = b"".join(again.token_bytes()[i] for i in again.encode("two words", add_special_tokens=False))
    assert spelt == b" two words"


def test_a_directory_may_have_only_a_sentencepiece_model(both, tmp_path):
    _, _, path, name = both
    (tmp_path / "spiece.model").write_bytes(path.read_bytes())
    extra = 0 if name == "extra ids" else 5
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": extra, "eos_token": "</s>"}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.vocab_size == 700 + extra
    assert tokenizer.vocab()["<extra_id_0>"] == 699 + extra
    assert tokenizer.encode("the <extra_id_0>")[-2:] == [699 + extra, vocabulary.EOS]
    assert vocabulary.load(tmp_path).vocab() == tokenizer.vocab()


def test_training_is_deterministic(texts, tmp_path):
    files = [tmp_path / name for name in ("a", "b")]
    for path in files:
        vocabulary.train(texts, path, vocab_size=300)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.slow
def test_other_normalisations(texts, tmp_path):
    """Options that T5 does not use, but its file format has."""
    common = {"vocab_size": 300, "model_type": "unigram", "minloglevel": 2}
    for number, options in enumerate(
        [
            {"normalization_rule_name": "identity"},
            {"add_dummy_prefix": False},
            {"remove_extra_whitespaces": False},
            {"split_by_whitespace": False},
            {"user_defined_symbols": ["<sep>"]},
        ]
    ):
        prefix = str(tmp_path / str(number))
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=iter(texts[::2]), model_prefix=prefix, **common, **options
        )
        library = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
        tokenizer = Tokenizer.from_sentencepiece(f"{prefix}.model")
        for text in [*texts[::10], "", " a  b ", "A\tb"]:
            found, ids = tokenizer.encode(text, add_special_tokens=False), library.encode(text)
            assert found == ids or _is_tie(library, found, ids), (options, text)


def test_padded():
    assert [vocabulary.padded(n) for n in (1, 128, 129, 32100)] == [128, 128, 256, 32128]


def test_errors_say_what_to_do(texts, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="vocab_size=100000 tokens"):
        vocabulary.train(texts[:50], tmp_path / "m", vocab_size=100_000)
    assert not (tmp_path / "m").exists()
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: give a spiece\.model"):
        vocabulary.load(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    vocabulary.train(texts, broken, vocab_size=300)
    whole = broken.read_bytes()
    for content in (b"", b"\xff\xff\xff", b"{}", whole[:5000], whole[:-3], bytes(4000)):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match="is not a SentencePiece model"):
            vocabulary.load(broken)
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / "bpe"),
        vocab_size=300,
        model_type="bpe",
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="is not a unigram model"):
        Tokenizer.from_sentencepiece(tmp_path / "bpe.model")
    real = builtins.__import__

    def missing(name, *arguments, **options):
        if name == "sentencepiece":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install -e '.\[train\]'"):
        vocabulary.train(texts, tmp_path / "m", vocab_size=300)


def test_the_file_is_read_as_the_library_reads_it(both):
    _, library, path, _ = both
    model = sentencepiece_file.read(path)
    for i, piece in enumerate(model.pieces):
        assert piece.text == library.id_to_piece(i)
        assert piece.score == pytest.approx(library.get_score(i), abs=1e-6)
        assert (piece.kind == sentencepiece_file.CONTROL) == library.is_control(i)
        assert (piece.kind == sentencepiece_file.BYTE) == library.is_byte(i)
    assert model.charsmap
    assert model.add_prefix
    assert model.strip
