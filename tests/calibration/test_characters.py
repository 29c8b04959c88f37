"""Encodings, line ends and damage of text files; whatever holds a text, its tokens are the same."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfplate.calibration import characters as module
from halfplate.calibration.characters import characters
from halfplate.calibration.documents import read_text
from halfplate.errors import HalfplateError
from halfplate.evaluation import evaluate, token_windows

STORY = "".join(f"On day {day} Tom saw {day * day} birds.\nCafé 中 🙂 near the house.\n\n" for day in range(20))
ENCODINGS = {
    "utf-8": "utf-8",
    "utf-8 with a mark": "utf-8-sig",
    "utf-16 little": "utf-16-le",
    "utf-16 big": "utf-16-be",
    "utf-32 little": "utf-32-le",
    "utf-32 big": "utf-32-be",
}
CONTAINERS = ("a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz")


def encoded(text: str, encoding: str) -> bytes:
    mark = "\ufeff" if encoding.startswith(("utf-16", "utf-32")) else ""
    return (mark + text).encode(encoding)


def write(path: Path, content: bytes) -> str:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def held(text: str, name: str, line_end: str) -> str:
    """`text` as a file of this name holds it."""
    if "jsonl" in name:
        return json.dumps({"text": text}, ensure_ascii=False) + line_end
    if "json" in name:
        return line_end.join(("[", json.dumps({"text": text}, ensure_ascii=False), "]"))
    return text.replace("\n", line_end)


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_every_encoding_and_line_end_gives_the_same_text(
    tmp_path: Path, name: str, encoding: str, line_end: str
) -> None:
    content = encoded(held(STORY, name, line_end), ENCODINGS[encoding])
    assert read_text(write(tmp_path / name, content)) == [STORY]


def test_line_ends_within_json_strings_count_too(tmp_path: Path) -> None:
    rows = json.dumps({"text": "one\r\ntwo\rthree"})
    assert read_text(write(tmp_path / "a.jsonl", rows.encode())) == ["one\ntwo\nthree"]


def test_perplexity_does_not_depend_on_mark_and_line_ends(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=len(tiny_tokenizer))
    plain = write(tmp_path / "plain.txt", STORY.encode())
    windows_text = write(tmp_path / "windows.txt", encoded(STORY.replace("\n", "\r\n"), "utf-8-sig"))
    results = [
        evaluate(model, token_windows(tiny_tokenizer, read_text(source), 64, 4)) for source in (plain, windows_text)
    ]
    assert results[0] == results[1]


def test_perplexity_of_stories260k_is_that_of_the_plain_text(tmp_path: Path, stories260k: Path) -> None:
    from halfplate.evaluation.judge import evaluate as judge

    story = "Once upon a time there was a little girl.\nShe had a red ball and a dog.\n\nThey played all day.\n" * 30
    plain = write(tmp_path / "plain.txt", story.encode())
    others = [
        write(tmp_path / "crlf.txt", story.replace("\n", "\r\n").encode()),
        write(tmp_path / "mark.txt", story.encode("utf-8-sig")),
        write(tmp_path / "wide.txt.gz", story.replace("\n", "\r\n").encode("utf-16")),
    ]
    expected = judge(str(stories260k), plain, seq_len=128, windows=2)
    assert all(judge(str(stories260k), other, seq_len=128, windows=2) == expected for other in others)


@given(st.text(alphabet="ab\r\n é中🙂", max_size=200), st.integers(1, 9), st.sampled_from(sorted(ENCODINGS.values())))
def test_blocks_of_any_size_equal_reading_at_once(text: str, block: int, encoding: str) -> None:
    expected = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8", newline=None).read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_BYTES", max(block, 4))  # a mark has four bytes at most
        path = Path("unused.txt")
        patch.setattr(Path, "open", lambda *_: io.BytesIO(encoded(text, encoding)))
        assert "".join(characters(path, "text", 2**20)) == expected


@pytest.mark.parametrize("block", [4, 7, 2**18])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"fine\r\ncaf\xe9 and more", "line 2: byte 0xe9 at offset 9 is not UTF-8"),
        (b"\xef\xbb\xbffine\ncaf\xe9\n", "line 2: byte 0xe9 at offset 11 is not UTF-8"),
        (b"cut short \xe4\xb8", "line 1: byte 0xe4 at offset 10 is not UTF-8"),
        (b"\xff\xfea\0\n\0\x00\xdcb\0", "line 2: byte 0x00 at offset 6 is not UTF-16-LE"),
        (b"\xfe\xff\0a\0", "line 1: byte 0x00 at offset 4 is not UTF-16-BE"),
        ("no mark\n".encode("utf-16-le"), r"line 1: character U\+0000 is not text"),
    ],
)
def test_damage_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, expected: str, block: int
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    with pytest.raises(HalfplateError, match=expected) as caught:
        read_text(write(tmp_path / "a.txt", content))
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_an_empty_text(tmp_path: Path) -> None:
    for content in (b"", b"\xef\xbb\xbf", b"\xff\xfe"):
        assert read_text(write(tmp_path / "a.txt", content)) == [""]
        assert read_text(write(tmp_path / "a.jsonl", content)) == []
        assert read_text(write(tmp_path / "a.json", content)) == []
