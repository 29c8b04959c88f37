"""The calibration tokens from any source, and their record."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfplate.calibration.decoding import Maker, decoding_of
from halfplate.calibration.documents import Text, read_text, token_stream
from halfplate.calibration.mixture import SAMPLED, VARIED, Part, parts_of, samples_of, spoken
from halfplate.calibration.self_text import CACHE_BYTES, TEMPERATURE, find_start, sample_text
from halfplate.calibration.starts import varied_starts
from halfplate.calibration.stream import first_characters, tokens_of
from halfplate.calibration.vocabulary import check_tokens
from halfplate.errors import HalfplateError
from halfplate.headroom import check_memory
from halfplate.models.context import positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["CalibrationTokens", "calibration_tokens", "check_seq_len", "read_text", "token_stream"]

TOKEN_NBYTES = 16  # bytes of a token and of its random number
# Windows are drawn from this much of a text. Its tokens are held in memory and take a minute to compute.
DRAWN_CHARACTERS = 8 * 2**20


@dataclass(frozen=True, eq=False)
class CalibrationTokens:
    """Calibration text as tokens, ids int64 (samples, seq_len), with the protocol to reproduce it.

    temperature, start, start_token: only for sources `self` and `self:varied` (see `self_text.Start`).
    facts: more about a text: `skipped_rows`, `messages` (see `documents.Text`), `drawn_from` if only its beginning was used, for
        generated text `decoded_by` (the path of `decoding.Decoding`), and for several sources the protocol of each, with its `share`,
        in `sources`.
    """

    ids: Tensor
    source: str
    seed: int
    temperature: float | None = None
    start: str | None = None
    start_token: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def protocol(self) -> dict[str, Any]:
        """The record of the calibration in a checkpoint; `sha256` is the hash of the ids as little-endian int64."""
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
        if self.source in SAMPLED:
            record |= {"temperature": self.temperature, "start": self.start, "start_token": self.start_token}
        return record | self.facts


def calibration_tokens(
    source: str | Sequence[str],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    samples: int,
    seq_len: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    cache_nbytes: int = CACHE_BYTES,
    maker: Maker | None = None,
) -> CalibrationTokens:
    """`samples` windows of `seq_len` tokens from `source`, the same for the same seed.

    Text is tokenised as one stream and cut into windows that do not overlap, of which `samples` are drawn without replacement. Of a
    text of more than 8 Mi characters, windows are drawn from the first 8 Mi, or from the first samples · seq_len tokens if that is
    more.

    source: `self` (the model generates its own text, see `self_text.sample_text`), `self:varied` (from varied starts), a source of
        `read_text`, or several of them with shares (see `mixture.parts_of`), whose sequences are then shuffled.
    progress: called with the tokens generated so far and all tokens; only for text that the model generates.
    cache_nbytes: of keys and values; only for such text.
    maker: of a faster decoding than the model's own forward; only for such text (see `decoding.decoding_of`).
    Raises HalfplateError for invalid numbers or too little memory, for a text with fewer windows than samples, and for tokens
    outside the vocabulary.
    """
    if samples < 1:
        raise HalfplateError(f"samples={samples} is too few, expected at least 1; try 64")
    check_seq_len(model, seq_len, least=1)
    check_tokens_fit("samples", samples, seq_len)
    parts = parts_of(source)
    found = list[CalibrationTokens]()
    for part, count in zip(parts, samples_of(parts, samples), strict=True):
        if part.sampled:
            start = find_start(model, tokenizer)
            prefixes = varied_starts(tokenizer, start.token, count, seed) if part.source == VARIED else []
            check_tokens(
                [token for prefix in prefixes for token in prefix], model, f"calibration={part.source!r}", tokenizer
            )
            with torch.no_grad():
                decoding = decoding_of(model, seq_len, maker)
            ids = sample_text(
                model, start, count, seq_len, seed, TEMPERATURE, progress, cache_nbytes, decoding, prefixes
            )
            told = {"decoded_by": decoding.path}
            found.append(CalibrationTokens(ids, part.source, seed, TEMPERATURE, start.kind, start.token, told))
        else:
            found.append(_read_tokens(part.source, model, tokenizer, count, samples, seq_len, seed))
    return found[0] if isinstance(source, str) else _mixed(source, parts, found, seed)


def text_hashes(
    source: str | Sequence[str],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    samples: int,
    seq_len: int,
    seed: int,
) -> dict[str, str]:
    """The SHA-256 of the tokens of each text of `source` as in the protocol, without those that the model generates."""
    parts = parts_of(source)
    return {
        part.source: _read_tokens(part.source, model, tokenizer, count, samples, seq_len, seed).protocol()["sha256"]
        for part, count in zip(parts, samples_of(parts, samples), strict=True)
        if not part.sampled
    }


def recorded_hashes(protocol: Mapping[str, Any]) -> dict[str, str]:
    """What `text_hashes` returned for the text of `protocol`."""
    texts: list[Mapping[str, Any]] = protocol.get("sources", [protocol])
    return {text["source"]: text["sha256"] for text in texts if text["source"] not in SAMPLED}


def _read_tokens(
    source: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    samples: int,
    whole: int,
    seq_len: int,
    seed: int,
) -> CalibrationTokens:
    """`samples` windows of a text. whole: the windows of all sources together."""
    text = Text(source)
    stream, facts = _stream(text, tokenizer, samples * seq_len)
    ids = _draw_windows(stream, text, samples, whole, seq_len, seed)
    check_tokens(ids, model, f"calibration={source!r}", tokenizer)
    return CalibrationTokens(ids, source, seed, facts=facts)


def _mixed(
    source: Sequence[str], parts: Sequence[Part], found: Sequence[CalibrationTokens], seed: int
) -> CalibrationTokens:
    """The windows of all sources, shuffled, because some of the last ones are held out."""
    ids = torch.cat([tokens.ids for tokens in found])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(ids), generator=generator, dtype=torch.int64, device="cpu")
    protocols = [tokens.protocol() | {"share": round(part.share, 6)} for part, tokens in zip(parts, found, strict=True)]
    return CalibrationTokens(ids[order], spoken(source), seed, facts={"sources": protocols})


def _stream(text: Text, tokenizer: "PreTrainedTokenizerBase", least: int) -> tuple[Tensor, dict[str, Any]]:
    """The tokens that windows are drawn from, int64 (tokens,), and the facts about the text for the protocol."""
    pieces, whole = first_characters(text.pieces(tokenizer), DRAWN_CHARACTERS)
    stream = tokens_of(tokenizer, pieces)
    if whole():
        return stream, text.facts()
    drawn_from = {"characters": DRAWN_CHARACTERS}
    if len(stream) < least:
        stream = token_stream(tokenizer, text, least)
        drawn_from = {"tokens": least}
    return stream, text.facts() | {"drawn_from": drawn_from}


def check_seq_len(model: "PreTrainedModel", seq_len: int, least: int) -> None:
    """Raise HalfplateError if `seq_len` is below `least` or exceeds the positions of the model."""
    most = positions(model)
    if seq_len < least:
        raise HalfplateError(f"seq_len={seq_len} is too short, expected at least {least} tokens; try 512")
    if most is not None and most < seq_len:
        raise HalfplateError(f"seq_len={seq_len} exceeds the {most} positions of the model; try {most}")


def check_tokens_fit(argument: str, windows: int, seq_len: int) -> None:
    """Raise HalfplateError if the tokens of this many windows would not fit into the free memory."""
    check_memory(
        f"{argument}={windows} windows of seq_len={seq_len}", TOKEN_NBYTES * windows * seq_len, argument, windows
    )


def _draw_windows(stream: Tensor, text: Text, samples: int, whole: int, seq_len: int, seed: int) -> Tensor:
    count = len(stream) // seq_len
    if count < samples < whole:
        # Rounded down, so that the share gives no more windows than there are.
        share = (
            f"a share of at most {math.floor(100 * count / whole) / 100:g}" if 100 * count >= whole else "leave it out"
        )
        raise HalfplateError(
            f"calibration={text.source!r}: its share is {samples} of samples={whole} windows of seq_len={seq_len}, but it "
            f"gives {len(stream)} tokens ({count} windows){text.spoken_facts()}; pass a longer text, or {share}"
        )
    if count < samples:
        raise HalfplateError(
            f"samples={samples} windows of seq_len={seq_len} need {samples * seq_len} tokens, but calibration={text.source!r} "
            f"has {len(stream)} ({count} windows){text.spoken_facts()}; pass a longer text, calibration=self, or "
            + shorter("samples", count, len(stream))
        )
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed), dtype=torch.int64, device="cpu")[
        :samples
    ]
    return stream[: count * seq_len].view(count, seq_len)[chosen]


def shorter(argument: str, count: int, tokens: int) -> str:
    """The smaller arguments for which a text of `tokens` tokens, with `count` windows, is long enough."""
    return (
        f"{argument}={count}" if count else f"a seq_len up to {tokens}" if tokens >= 2 else "a text that is not empty"
    )
