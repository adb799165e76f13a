"""What users' files may be: hostile and damaged ones end in one sentence, in little time and memory."""

import json
import lzma
import os
import pathlib
import string
import tracemalloc
import zlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specjax import files
from specjax.experiments import prompts, texts
from specjax.training import data

READERS = {
    "prompts": prompts.read,
    "texts": texts.read,
    "training": lambda path: data.read(str(path)),
}
LINES = [{"prompt": "a b", "text": "ä", "input": "i", "target": "t", "id": i, "category": "c"} for i in range(3)]
GOOD = "\n".join(json.dumps(line) for line in LINES).encode() + b"\n"


def text_line(value):
    return f'{{"prompt": {value}, "text": {value}}}'.encode()


HOSTILE = {
    "nested brackets": (b"[" * 200_000, "line 1, is not JSON .*nested too deeply"),
    "nested objects": (b'{"text":' * 200_000, "line 1, is not JSON .*nested too deeply"),
    "a lone surrogate": (text_line(r'"a \ud800"'), r"line 1, has \\ud800, half of a surrogate pair"),
    "a lone surrogate among keys": (b'{"text": "a", "prompt": "a", "\\udfff": 1}', r"line 1, has \\udfff"),
    "invalid UTF-8": (GOOD + b'{"text": "\xff"}', "cannot be read as UTF-8 text .*after line"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "cannot be read as UTF-8 text .*save it as UTF-8"),
    "bare zeros": (b"\0" * 4096, "line 1, is not JSON"),
    "a zero in a text": (text_line('"a\0b"'), "line 1, is not JSON"),
    "an integer of many digits": (text_line("1" * 5000), "line 1, is not JSON .*digits"),
    "truncated JSON": (GOOD[:-8], "line 3, is not JSON"),
    "nothing": (b"", "has (no texts|0 prompts)"),
    "empty lines": (b"\n \r\n\n", "has (no texts|0 prompts)"),
    "a list": (b"[1]", "line 1, has (no|neither)"),
    "a number": (b"3", "line 1, has (no|neither)"),
    "null": (b"null", "line 1, has (no|neither)"),
    "a text": (b'"prompt"', "line 1, has (no|neither)"),
    "missing keys": (b'{"a": "b"}', "line 1, has (no|neither)"),
    "numbers in the place of texts": (text_line("NaN"), "line 1, has (no|neither)"),
    "lists in the place of texts": (text_line('["a"]'), "line 1, has (no|neither)"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_lines_end_in_a_sentence(reader, name, tmp_path):
    content, message = HOSTILE[name]
    for packed in (False, True):
        path = tmp_path / ("data.jsonl.xz" if packed else "data.jsonl")
        path.write_bytes(lzma.compress(content) if packed else content)
        with pytest.raises(ValueError, match=rf"data\.jsonl.*{message}") as caught:
            READERS[reader](path)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("reader", READERS)
def test_byte_order_marks_and_surrogate_pairs_are_read(reader, tmp_path):
    content = b"\xef\xbb\xbf" + text_line(r'"\ud83d\ude42 \u0000"') + b"\r\n" + GOOD
    for name, written in (("data.jsonl", content), ("data.jsonl.xz", lzma.compress(content))):
        (tmp_path / name).write_bytes(written)
        first, *others = READERS[reader](tmp_path / name)
        assert getattr(first, "target" if reader == "training" else "text", first) == "\U0001f642 \0"
        assert len(others) == 3


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file(reader, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl does not exist: give"):
        READERS[reader](tmp_path / "nowhere.jsonl")
    with pytest.raises(IsADirectoryError, match=r" is a directory: give"):
        READERS[reader](tmp_path)
    with pytest.raises(OSError, match=r"/dev/zero is a device or a pipe: give"):
        READERS[reader](pathlib.Path("/dev/zero"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(OSError, match=r"pipe\.jsonl is a device or a pipe: give"):
        READERS[reader](tmp_path / "pipe.jsonl")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz"])
def test_a_line_of_60_megabytes(reader, suffix, tmp_path):
    path = tmp_path / f"data{suffix}"
    content = text_line('"' + "x" * 60_000_000 + '"')
    path.write_bytes(lzma.compress(content, preset=0) if suffix.endswith("xz") else content)
    del content
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"line 1, is longer than 16777216 characters: split it"):
        READERS[reader](path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * files.MAX_LINE


def test_a_prompt_that_no_model_reads(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(text_line('"' + "x" * (prompts.MAX_PROMPT + 1) + '"'))
    with pytest.raises(ValueError, match=r"line 1, has a prompt of 4194305 characters, and at most 4194304"):
        prompts.read(tmp_path / "p.jsonl")


@pytest.mark.parametrize("value", ["[1]", '{"a": 1}'])
@pytest.mark.parametrize("key", ["category", "id", "question_id"])
def test_labels_are_texts_or_numbers(key, value, tmp_path):
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "a", "{key}": {value}}}')
    with pytest.raises(ValueError, match=rf"line 1, has a (list|dict) under '{key}': write a string or a number"):
        prompts.read(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "a", "{key}": null}}')
    assert prompts.read(tmp_path / "p.jsonl")[0].name == "prompt 0"


# ---- xz


def test_packed_files_of_several_streams(tmp_path):
    streams = [lzma.compress(line + b"\n") for line in GOOD.splitlines()]
    (tmp_path / "a.jsonl.xz").write_bytes(b"\0\0\0\0".join(streams) + bytes(8))
    assert [prompt.id for prompt in prompts.read(tmp_path / "a.jsonl.xz")] == ["0", "1", "2"]
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(b"") + lzma.compress(GOOD))
    assert len(prompts.read(tmp_path / "a.jsonl.xz")) == 3


def test_truncated_packed_files(tmp_path):
    content, path = lzma.compress(GOOD), tmp_path / "a.jsonl.xz"
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"a\.jsonl\.xz cannot be read"):
            prompts.read(path)


def test_a_packed_file_that_unpacks_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_FREE", 2**20)
    path = tmp_path / "bomb.jsonl.xz"
    line = b'{"text": "' + b"x" * 10_000 + b'", "prompt": "x"}\n'
    path.write_bytes(lzma.compress(line * 1500))
    assert len(line) * 1500 > 2**20 + files.MAX_RATIO * path.stat().st_size
    for read in READERS.values():
        with pytest.raises(ValueError, match=r"bomb\.jsonl\.xz unpacks to more than 1000 times its size"):
            read(path)


def test_unpacking_takes_bounded_memory(tmp_path):
    """A header may ask for 4 GiB."""
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**20}]
    content = bytearray(lzma.compress(GOOD, filters=filters))
    place = content.index(b"\x21\x01", 12)  # the filter's id, the size of its properties, the dictionary's size
    content[place + 2] = 40  # 4 GiB - 1
    begin, end = 12, 12 + 4 * (content[12] + 1)
    content[end - 4 : end] = zlib.crc32(content[begin : end - 4]).to_bytes(4, "little")
    (tmp_path / "a.jsonl.xz").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as an \.xz file .*[Mm]emory"):
        prompts.read(tmp_path / "a.jsonl.xz")


# ---- any bytes


def assert_read_or_refused(read, path):
    said = None
    try:
        read(path)
    except ValueError as error:
        said = error
    assert said is None or (type(said) is ValueError and str(path) in str(said))


@st.composite
def mutated(draw, content):
    """A file with a few of its bytes changed, cut out or put in."""
    out = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(out)))
        out[begin : begin + draw(st.integers(0, 8))] = draw(
            st.one_of(st.binary(max_size=8), st.sampled_from([b"[", b"{", b'"', b"\\ud800", b"\n", b"1e999", b"\xff"]))
        )
    return bytes(out)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(mutated(GOOD), st.text(string.printable).map(str.encode), st.binary(max_size=64)))
@example(b"\xef\xbb\xbf")
def test_any_file_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(content)
    for read in READERS.values():
        assert_read_or_refused(read, path)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(mutated(lzma.compress(GOOD)))
def test_any_packed_file_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl.xz"
    path.write_bytes(content)
    assert_read_or_refused(prompts.read, path)


# ---- JSON objects


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[" * 200_000, "is not JSON .*nested too deeply"),
        (b"[1]", "holds a list, not a JSON object"),
        (b"null", "holds a NoneType, not"),
        (b"\xff\xff", "is not JSON"),
        (b'{"a": "\\udc00"}', "half of a surrogate pair"),
        (b"", "is not JSON"),
    ],
)
def test_json_objects(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json.* {message}"):
        files.read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(tmp_path / "config.json") == {"a": 1}
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(files.MAX_JSON + 1)
    with pytest.raises(ValueError, match="has 268435457 bytes, and at most 268435456 are read"):
        files.read_json(tmp_path / "config.json")
