"""Long texts: tokenised in pieces with the tokens of the whole, and read no further than they are needed."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from halfplate.calibration import calibration_tokens, characters, stream, text
from halfplate.calibration.documents import Text, token_stream
from halfplate.evaluation import token_windows
from halfplate.evaluation.speed import PeakMemory
from halfplate.headroom import memory

LINE = "Tom and Mia saw 7 birds near the big house; café 中.\n"
LARGE = 60 * 10**6  # bytes
# What a window or two takes: one piece to tokenise, the next one, and the blocks that these end in.
FEW = 2 * stream.PIECE * 2 + 4 * characters.BLOCK_BYTES


def test_pieces_have_the_tokens_of_the_whole(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PIECE", 300)
    monkeypatch.setattr(stream, "OVERLAP", 200)
    # What has no place to cut, and what has one everywhere.
    content = LINE * 20 + "a" * 1500 + LINE * 3 + " " * 700 + "\n\n中" * 200 + LINE * 20
    whole = tiny_tokenizer(content, verbose=False)["input_ids"]
    for most in (None, 1, 150, len(whole) - 1, len(whole), len(whole) + 5):
        parts = [content[at : at + 77] for at in range(0, len(content), 77)]
        assert stream.tokens_of(tiny_tokenizer, parts, most).tolist() == whole[:most]
    assert stream.tokens_of(tiny_tokenizer, [], None).tolist() == tiny_tokenizer("")["input_ids"]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the blocks that are read; reading on and on ends the test at once."""
    sizes: list[int] = []
    blocks = characters._blocks

    def counting(*arguments: Any) -> Iterator[bytes]:
        for block in blocks(*arguments):
            sizes.append(len(block))
            assert sum(sizes) < LARGE / 4, "a large part of the file is read"
            yield block

    monkeypatch.setattr(characters, "_blocks", counting)
    return sizes


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A text of LARGE bytes, unpacked, in a file of that name."""
    folder = tmp_path_factory.mktemp("large")

    def make(name: str) -> str:
        path, row = folder / name, json.dumps({"text": LINE * 20}, ensure_ascii=False)
        unit = {"txt": LINE * 20, "jsonl": f"{row}\n", "json": f"{row},\n"}[name.removesuffix(".gz").rpartition(".")[2]]
        content = ("[" if "json," in f"{name}," else "").encode() + unit.encode() * (LARGE // len(unit.encode()))
        path.write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
        return str(path)

    return make


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz"])
def test_a_few_windows_take_the_beginning_of_a_large_file(
    large: Callable[[str], str], counted: list[int], tiny_tokenizer: Any, name: str
) -> None:
    source = large(name)
    windows = token_windows(tiny_tokenizer, Text(source, "text"), 32, 4)
    assert windows.shape == (4, 32)
    assert sum(counted) <= FEW
    Path(source).unlink()


def test_calibration_is_drawn_from_the_beginning_of_a_large_file(
    large: Callable[[str], str],
    counted: list[int],
    tiny_model: Any,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text, "DRAWN_CHARACTERS", 2**17)
    model, source = tiny_model("llama", vocab_size=len(tiny_tokenizer)), large("a.txt")
    watch = PeakMemory()
    watch.start()
    before = memory("VmRSS")
    tokens = calibration_tokens(source, model, tiny_tokenizer, samples=8, seq_len=32, seed=0)
    # The whole would take 120 bytes a character, 7 GB. Not every system tells.
    peak = watch.take()
    assert peak is None or peak - (before or 0) < 2**28
    assert sum(counted) <= 2 * 2**17 + FEW
    assert tokens.facts == {"drawn_from": {"characters": 2**17}}
    # More than these hold: as far as the windows reach.
    monkeypatch.setattr(text, "DRAWN_CHARACTERS", 2**8)
    tokens = calibration_tokens(source, model, tiny_tokenizer, samples=50, seq_len=64, seed=0)
    assert tokens.facts == {"drawn_from": {"tokens": 3200}}
    expected = token_stream(tiny_tokenizer, [LINE * 400])[:3200].view(50, 64)
    assert sorted(tokens.ids.tolist()) == sorted(expected.tolist())
