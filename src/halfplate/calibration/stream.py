"""Tokenising a long text piece by piece, with the same tokens as for the whole text."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer takes about 120 bytes per character, so a piece takes about 30 MB. Shorter texts are tokenised in one call.
PIECE = 2**18
OVERLAP = 2**12
# Number of tokens around a cut on which three tokenisations must agree.
AGREEING = 32


def tokens_of(tokenizer: PreTrainedTokenizerBase, parts: Iterable[str], most: int | None = None) -> Tensor:
    """The first `most` tokens (None: all) of the text whose consecutive parts are given: int64 (tokens,).

    The tokens equal those of the joined text. Parts are only read as needed, and the text is tokenised in overlapping pieces. Two
    pieces are joined within their overlap, at a token where both agree with the overlap tokenised alone, which is not affected by
    the beginning or the end of a piece. If there is no such place, the piece grows.
    """
    text = _Reader(parts)
    done = array("q")
    piece, skipped = text.take(PIECE), 0
    ids = _ids(tokenizer, piece)
    while not text.ended and (most is None or len(done) < most):
        following = text.take(max(PIECE, len(piece)))
        if not following:
            break
        overlap = piece[-OVERLAP:]
        middle = _ids(tokenizer, overlap)
        after = _ids(tokenizer, overlap + following)
        cut = _cut(ids, middle, after)
        # Counted from the end, which `ids` and `middle` share; the last cut may be after this one.
        end = len(ids) - len(middle) + (0 if cut is None else cut)
        if cut is None or end < skipped:
            piece += following
            ids = _ids(tokenizer, piece)
            continue
        done.extend(ids[skipped:end])
        piece, ids, skipped = overlap + following, after, cut
    if most is None or len(done) < most:
        done.extend(ids[skipped:])
    # Copied, so that the memory of the array can be freed.
    if not done:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    return torch.frombuffer(done, dtype=torch.int64)[:most].clone()


def first_characters(parts: Iterable[str], most: int) -> tuple[Iterator[str], Callable[[], bool]]:
    """The parts of the first `most` characters, and a function that says, after they are consumed, whether that was the whole text."""
    reader = _Reader(parts)

    def taken() -> Iterator[str]:
        left = most
        while left and (piece := reader.take(min(left, PIECE))):
            left -= len(piece)
            yield piece

    return taken(), lambda: not reader.take(1)


def _cut(before: list[int], middle: list[int], after: list[int]) -> int | None:
    """The position in `middle` at which `before`, with the same end, can be continued by `after`, with the same beginning."""
    last = _common(middle, after)
    first = len(middle) - _common(middle[::-1], before[: -len(middle) - 1 : -1])
    return (first + last) // 2 if last - first >= AGREEING else None


def _common(one: list[int], other: list[int]) -> int:
    """Number of equal items at the beginning of both."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


class _Reader:
    """Reads text from its parts in pieces of a given length."""

    def __init__(self, parts: Iterable[str]) -> None:
        self._parts: Iterator[str] = iter(parts)
        self._held = ""
        self.ended = False

    def take(self, length: int) -> str:
        """The next `length` characters, fewer at the end of the text."""
        parts, held = [self._held], len(self._held)
        while held < length:
            part = next(self._parts, None)
            if part is None:
                self.ended = True
                break
            parts.append(part)
            held += len(part)
        text = "".join(parts)
        self._held = text[length:]
        return text[:length]
