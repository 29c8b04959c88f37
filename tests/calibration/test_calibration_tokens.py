"""Drawing calibration windows, and the record of them."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from halfplate.calibration import calibration_tokens
from halfplate.calibration.documents import read_text, token_stream
from halfplate.errors import HalfplateError


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"On day {day} Tom saw {day * day} birds near the house. " for day in range(60)))
    return str(path)


@pytest.fixture
def model(tiny_model: Any, tiny_tokenizer: Any) -> Any:
    return tiny_model("llama", vocab_size=len(tiny_tokenizer))


def test_windows_are_distinct_pieces_of_the_text_drawn_by_seed(model: Any, tiny_tokenizer: Any, text_file: str) -> None:
    stream = token_stream(tiny_tokenizer, read_text(text_file))
    pieces = [tuple(piece.tolist()) for piece in stream.split(16)]
    tokens = calibration_tokens(text_file, model, tiny_tokenizer, 20, 16, seed=3)
    drawn = [tuple(row) for row in tokens.ids.tolist()]
    assert tokens.ids.dtype == torch.int64
    assert len(set(drawn)) == 20
    assert set(drawn) <= set(pieces)
    assert drawn != pieces[:20]
    assert torch.equal(tokens.ids, calibration_tokens(text_file, model, tiny_tokenizer, 20, 16, seed=3).ids)
    assert not torch.equal(tokens.ids, calibration_tokens(text_file, model, tiny_tokenizer, 20, 16, seed=4).ids)


def test_a_text_of_exactly_the_size_is_enough(model: Any, tiny_tokenizer: Any, text_file: str) -> None:
    stream = token_stream(tiny_tokenizer, read_text(text_file))
    count = len(stream) // 16
    tokens = calibration_tokens(text_file, model, tiny_tokenizer, count, 16, seed=0)
    assert sorted(tokens.ids.tolist()) == sorted(stream[: count * 16].view(count, 16).tolist())


def test_a_text_that_is_too_short_says_how_much_there_is(model: Any, tiny_tokenizer: Any, text_file: str) -> None:
    length = len(token_stream(tiny_tokenizer, read_text(text_file)))
    windows = length // 16
    expected = rf"need 16000 tokens, but .* has {length} \({windows} windows\); .* or samples={windows}$"
    with pytest.raises(HalfplateError, match=expected):
        calibration_tokens(text_file, model, tiny_tokenizer, 1000, 16, seed=0)
    short = Path(text_file).with_name("short.txt")
    short.write_text("Tom and Mia")
    with pytest.raises(HalfplateError, match=r"\(0 windows\); .* or a seq_len up to \d+$"):
        calibration_tokens(str(short), model, tiny_tokenizer, 1, 100, seed=0)


@pytest.mark.parametrize("source", ["self", "file"])
def test_numbers_that_cannot_work_are_refused(model: Any, tiny_tokenizer: Any, text_file: str, source: str) -> None:
    source = text_file if source == "file" else source
    for samples, seq_len, expected in [
        (0, 16, "samples=0"),
        (2, 0, "seq_len=0"),
        (2, 129, "seq_len=129 exceeds the 128 positions"),
    ]:
        with pytest.raises(HalfplateError, match=expected):
            calibration_tokens(source, model, tiny_tokenizer, samples, seq_len, seed=0)


def test_the_protocol_of_a_file(model: Any, tiny_tokenizer: Any, text_file: str) -> None:
    tokens = calibration_tokens(text_file, model, tiny_tokenizer, 4, 16, seed=5)
    content = b"".join(int(token).to_bytes(8, "little") for token in tokens.ids.flatten())
    assert tokens.protocol() == {
        "source": text_file,
        "sha256": hashlib.sha256(content).hexdigest(),
        "samples": 4,
        "seq_len": 16,
        "tokens": 64,
        "seed": 5,
    }


def test_the_protocol_of_self_text_names_temperature_and_start(model: Any, tiny_tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    tokens = calibration_tokens("self", model, tiny_tokenizer, 3, 8, 1, lambda done, total: seen.append((done, total)))
    protocol = tokens.protocol()
    assert tokens.ids.shape == (3, 8)
    assert (protocol["temperature"], protocol["start"], protocol["start_token"]) == (1.0, "bos", 1)
    assert seen[-1] == (24, 24)
    assert seen == sorted(seen)
