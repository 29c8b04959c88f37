"""Reading text from files and (without a network) from Hub data sets."""

import gzip
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halfplate.calibration import documents
from halfplate.calibration.documents import read_text, token_stream
from halfplate.errors import HalfplateError


def write(path: Path, content: bytes) -> str:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT"])
def test_a_txt_file_is_one_document(tmp_path: Path, name: str) -> None:
    text = "First line\n\n\u2028é\n"
    assert read_text(write(tmp_path / name, text.encode())) == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_jsonl_file_has_a_document_a_line_and_keeps_empty_ones(tmp_path: Path, name: str) -> None:
    texts = ["one\ntwo", "", "\u2028 \x85 é"]
    # Not escaped, so that characters which Python counts as line ends stand in the file; and a blank line.
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in texts]
    assert read_text(write(tmp_path / name, "\n".join([*lines, "", ""]).encode())) == texts


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{not json", "line 2 is not valid JSON"),
        (b"[" * 100_000, "line 2 is not valid JSON"),
        (b"\xff", "line 2: byte 0xff at offset 17 is not UTF-8"),
        (b'["text"]', "line 2 holds a list"),
        (b'{"body": "x"}', r"line 2 has no string in field 'text' \(fields: 'body'\); name the field .*a.jsonl:body'"),
        (b'{"text": 7}', "line 2 has no string in field 'text'"),
        (b'{"messages": "hello"}', "line 2 has no string in field 'text'"),
        (b'{"messages": [{"role": 1}]}', "line 2 has a message that is not an object with texts"),
        (b'{"text": "\\ud800"}', "line 2 holds .* not valid Unicode"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: bytes, expected: str) -> None:
    source = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(HalfplateError, match=expected) as caught:
        read_text(source)
    assert "\n" not in str(caught.value)


def test_a_damaged_gz_file_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress(b"some text " * 1000)
    for content in (packed[:-20], b"no gzip at all", packed[:40] + b"\0\0\0\0" + packed[44:]):
        path = tmp_path / "a.txt.gz"
        path.write_bytes(content)
        with pytest.raises(HalfplateError, match="cut short or not gzip"):
            read_text(str(path))


def test_a_file_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_FILE_BYTES", 100)
    assert read_text(write(tmp_path / "a.txt.gz", b"x" * 100)) == ["x" * 100]
    with pytest.raises(HalfplateError, match="more than"):
        read_text(write(tmp_path / "b.txt.gz", b"x" * 101))


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(HalfplateError, match="line 2: byte 0xe9 at offset 8 is not UTF-8"):
        read_text(write(tmp_path / "a.txt", b"fine\ncaf\xe9\n"))


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    for source, expected in [
        (tmp_path / "missing.txt", "does not exist"),
        (tmp_path / "folder.txt", "is a folder"),
        (tmp_path, "is not a text file"),
        (Path(write(tmp_path / "a.parquet", b"")), "is not a text file"),
        (tmp_path / "missing" / "data.parquet", "does not exist"),
    ]:
        with pytest.raises(HalfplateError, match=f"^text='.*' {expected}"):
            read_text(str(source), argument="text")


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: Any) -> list[tuple[Any, ...]]:
    """A package `datasets` whose load_dataset notes its arguments and gives (or raises) `rows`."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        calls.append((*args, kwargs))
        if isinstance(rows, Exception):
            raise rows
        return rows

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_hub_data_set_is_streamed_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> Iterator[dict[str, str]]:
        while True:
            yield {"text": "x" * 10}

    calls = fake_datasets(monkeypatch, endless())
    monkeypatch.setattr(documents, "MAX_HUB_CHARACTERS", 25)
    assert read_text("Salesforce/wikitext:wikitext-2-raw-v1") == ["x" * 10] * 3
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "train", "streaming": True})]


def test_a_hub_data_set_without_text_names_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, [{"question": "a", "answer": "b"}])
    with pytest.raises(HalfplateError, match=r"columns: question, answer"):
        read_text("org/name")


def test_a_hub_data_set_that_cannot_be_read_says_why_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, RuntimeError("Config name is missing.\nPick one of: ['a', 'b']"))
    with pytest.raises(HalfplateError, match=r"Config name is missing\. Pick one of: \['a', 'b'\]"):
        read_text("wikitext")


def test_a_hub_data_set_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(HalfplateError, match=r"pip install 'halfplate\[hub\]'"):
        read_text("org/name")


def test_documents_are_joined_by_blank_lines_and_tokenised_once(tiny_tokenizer: Any) -> None:
    joined = token_stream(tiny_tokenizer, ["Tom and Mia", "", "the ball"])
    assert joined.tolist() == tiny_tokenizer("Tom and Mia\n\n\n\nthe ball")["input_ids"]
    assert (joined == tiny_tokenizer.bos_token_id).sum() == 1
