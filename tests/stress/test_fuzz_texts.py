"""A few of the fuzzed texts of `tests/stress/fuzz.py`: each is read, or refused in one line, in blocks of any size alike."""

import random
from types import SimpleNamespace

import fuzz
import fuzz_texts
import pytest

from halfplate.calibration import characters


def test_texts_are_read_or_refused_in_one_line(tmp_path):
    paths, read = fuzz_texts.write_texts(tmp_path), fuzz_texts.text_reader()
    counts = fuzz.fuzz("text", paths, read, 200, random.Random(0), tmp_path / "crashes")
    assert [path.read_text()[-600:] for path in (tmp_path / "crashes").glob("*.txt")] == []
    assert counts["taken"] + counts["refused"] == 200
    assert counts["of several lines"] == 0
    assert counts["taken"] >= 30


class Forgetful:
    """Line ends made \\n block by block: one that two blocks share becomes two."""

    def __init__(self, *_, **__):
        pass

    def decode(self, text, final=False):
        return characters.unix_lines(text)


def test_a_reading_that_depends_on_blocks_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(characters, "io", SimpleNamespace(IncrementalNewlineDecoder=Forgetful))
    (tmp_path / "plain.txt").write_bytes(b"Tom!\r\n" * 40)
    with pytest.raises(AssertionError, match="at once"):
        fuzz_texts.text_reader()(tmp_path / "plain.txt")
