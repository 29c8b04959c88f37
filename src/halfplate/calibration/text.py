"""The tokens that a model is calibrated on, whatever their source, and the record of them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfplate.calibration.documents import read_text, token_stream
from halfplate.calibration.self_text import CACHE_BYTES, TEMPERATURE, find_start, sample_text
from halfplate.errors import HalfplateError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["CalibrationTokens", "calibration_tokens", "check_seq_len", "read_text", "token_stream"]


@dataclass(frozen=True, eq=False)
class CalibrationTokens:
    """Calibration text as tokens, ids int64 (samples, seq_len), and what is needed to make it again.

    temperature, start and start_token are set for source `self` alone (see `self_text.Start`).
    """

    ids: Tensor
    source: str
    seed: int
    temperature: float | None = None
    start: str | None = None
    start_token: int | None = None

    def protocol(self) -> dict[str, Any]:
        """What a checkpoint records of its calibration; `sha256` is that of the ids as little-endian int64."""
        samples, seq_len = self.ids.shape
        content = self.ids.cpu().contiguous().numpy().astype("<i8").tobytes()
        record: dict[str, Any] = {
            "source": self.source,
            "sha256": hashlib.sha256(content).hexdigest(),
            "samples": samples,
            "seq_len": seq_len,
            "tokens": samples * seq_len,
            "seed": self.seed,
        }
        if self.source == "self":
            record |= {"temperature": self.temperature, "start": self.start, "start_token": self.start_token}
        return record


def calibration_tokens(
    source: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    samples: int,
    seq_len: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    cache_nbytes: int = CACHE_BYTES,
) -> CalibrationTokens:
    """`samples` windows of `seq_len` tokens from `source`, the same for the same seed.

    source: `self` (the model samples its own text, see `self_text.sample_text`) or what `read_text` reads. Text is
    tokenised as one stream and cut into windows that do not overlap, of which `samples` are drawn without replacement.
    progress: called with the tokens sampled so far and in all, cache_nbytes: of keys and values; both for `self` only.
    Raises HalfplateError for numbers that cannot work, and for a text with fewer windows than samples.
    """
    if samples < 1:
        raise HalfplateError(f"samples={samples} is not a number of calibration windows; try 64")
    check_seq_len(model, seq_len, least=1)
    if source == "self":
        start = find_start(model, tokenizer)
        ids = sample_text(model, start, samples, seq_len, seed, progress=progress, cache_nbytes=cache_nbytes)
        return CalibrationTokens(ids, source, seed, TEMPERATURE, start.kind, start.token)
    stream = token_stream(tokenizer, read_text(source))
    return CalibrationTokens(_draw_windows(stream, source, samples, seq_len, seed), source, seed)


def check_seq_len(model: "PreTrainedModel", seq_len: int, least: int) -> None:
    """Raise HalfplateError where `seq_len` is below `least` or beyond the positions that the model knows."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if seq_len < least:
        raise HalfplateError(f"seq_len={seq_len} is too short, expected at least {least} tokens; try 512")
    if isinstance(most, int) and seq_len > most:
        raise HalfplateError(f"seq_len={seq_len} is beyond the {most} positions that the model knows; try {most}")


def _draw_windows(stream: Tensor, source: str, samples: int, seq_len: int, seed: int) -> Tensor:
    count = len(stream) // seq_len
    if count < samples:
        cure = f"samples={count}" if count else f"a seq_len up to {len(stream)}"
        raise HalfplateError(
            f"samples={samples} windows of seq_len={seq_len} need {samples * seq_len} tokens, but calibration={source!r} "
            f"has {len(stream)} ({count} windows); pass a longer text, calibration=self, or {cure}"
        )
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed), dtype=torch.int64, device="cpu")[
        :samples
    ]
    return stream[: count * seq_len].view(count, seq_len)[chosen]
