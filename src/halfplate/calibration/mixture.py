"""Calibration text from several sources, each with a share of the sequences."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import normpath

from halfplate.errors import HalfplateError

# What the model generates itself: from its start token, or from varied starts (`calibration.starts`).
SELF, VARIED = "self", "self:varied"
SAMPLED = (SELF, VARIED)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
TOLERANCE = 0.0101  # of the sum of shares: three thirds with two decimals add up to 0.99


@dataclass(frozen=True)
class Part:
    """A source of calibration text and its share of the sequences, above 0 and up to 1."""

    source: str
    share: float

    @property
    def sampled(self) -> bool:
        """Whether the model generates this text."""
        return self.source in SAMPLED


def parts_of(calibration: str | Sequence[str]) -> tuple[Part, ...]:
    """The sources of a recipe with their shares, which add up to 1; one source is a text, several are a list of `SOURCE:SHARE`.

    Without shares, all are equal. Raises HalfplateError for shares that do not add up, and for a source that is named twice.
    """
    if isinstance(calibration, str):
        source, _, number = calibration.rpartition(":")
        if NUMBER.fullmatch(number) and (source in SAMPLED or source.lower().endswith((".txt", ".txt.gz"))):
            raise HalfplateError(
                f"calibration={calibration!r}: a share is for several sources (text.txt:0.5 self:0.5); try {source}"
            )
        return (Part(calibration, 1.0),)
    whole = f"calibration={spoken(calibration)!r}"
    if not calibration:
        raise HalfplateError("calibration=[] names no source; leave it out for the default")
    split = [_split(entry, whole) for entry in calibration]
    known = [share for _, share in split if share is not None]
    if known and len(known) < len(split):
        without = next(source for source, share in split if share is None)
        raise HalfplateError(f"{whole}: {without!r} has no share; write {without}:0.5, or leave out all shares")
    shares = known or [1 / len(split)] * len(split)
    if abs((total := math.fsum(shares)) - 1) > TOLERANCE:
        raise HalfplateError(f"{whole}: the shares add up to {total:g}, expected 1")
    places: dict[str, str] = {}
    for source, _ in split:
        if (place := normpath(source)) in places:
            raise HalfplateError(f"{whole} names {source!r} twice; name each source once")
        places[place] = source
    return tuple(Part(source, share / total) for (source, _), share in zip(split, shares, strict=True))


def _split(entry: str, whole: str) -> tuple[str, float | None]:
    """The source and the share of `SOURCE:SHARE`; names may contain colons."""
    source, colon, number = entry.rpartition(":")
    if not (colon and NUMBER.fullmatch(number)):
        source, share = entry, None
    else:
        share = float(number)
        if not 0 < share <= 1:
            raise HalfplateError(f"{whole}: the share {number} of {source!r} must be above 0 and up to 1; try 0.5")
    if not source.strip():
        raise HalfplateError(f"{whole}: {entry!r} names no source; write SOURCE:SHARE, e.g. self:0.5")
    return source, share


def spoken(calibration: str | Sequence[str]) -> str:
    """The sources as on the command line."""
    return calibration if isinstance(calibration, str) else " ".join(calibration)


def samples_of(parts: Sequence[Part], samples: int) -> tuple[int, ...]:
    """How many of `samples` sequences each part gives: its share, rounded so that each gives at least one.

    Raises HalfplateError for fewer samples than parts.
    """
    if samples < len(parts):
        raise HalfplateError(f"samples={samples} is fewer than the {len(parts)} sources of calibration; try 64")
    # One for each, and the others by the largest remainders.
    wanted = [max(part.share * samples - 1, 0.0) for part in parts]
    left = samples - len(parts)
    scale = left / total if (total := math.fsum(wanted)) > 0 else 0.0
    given = [math.floor(number * scale + 1e-9) for number in wanted]
    order = sorted(range(len(parts)), key=lambda place: (given[place] - wanted[place] * scale, place))
    for place in order[: left - sum(given)]:
        given[place] += 1
    return tuple(1 + number for number in given)


def sampled_samples(calibration: str | Sequence[str], samples: int) -> int:
    """How many of `samples` sequences the model generates."""
    parts = parts_of(calibration)
    return sum(count for part, count in zip(parts, samples_of(parts, samples), strict=True) if part.sampled)
