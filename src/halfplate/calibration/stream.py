"""The tokens of a long text, made piece by piece and equal to those of the whole."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer takes about 120 bytes a character, so a piece takes about 30 MB. Shorter texts are tokenised in one call.
PIECE = 2**18
OVERLAP = 2**12
# Tokens on which three tokenisations must agree around a cut.
AGREEING = 32


def tokens_of(tokenizer: PreTrainedTokenizerBase, parts: Iterable[str], most: int | None = None) -> Tensor:
    """The first `most` tokens (None: all) of the text whose consecutive parts are given: int64 (tokens,).

    Equal to the tokens of the joined text. No more parts are taken than needed, and the text is tokenised in pieces that
    overlap. Two pieces are joined within their overlap, at a token where both agree with the overlap tokenised alone:
    neither the beginning nor the end of a piece reaches that far. If there is no such place, the piece grows.
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
        # Counted from the end, which `ids` and `middle` share; the last cut may lie beyond this one.
        end = len(ids) - len(middle) + (0 if cut is None else cut)
        if cut is None or end < skipped:
            piece += following
            ids = _ids(tokenizer, piece)
            continue
        done.extend(ids[skipped:end])
        piece, ids, skipped = overlap + following, after, cut
    if most is None or len(done) < most:
        done.extend(ids[skipped:])
    # Copied, for the array is freed and its memory with it.
    if not done:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    return torch.frombuffer(done, dtype=torch.int64)[:most].clone()


def first_characters(parts: Iterable[str], most: int) -> tuple[Iterator[str], Callable[[], bool]]:
    """The parts of the first `most` characters, and whether that is the whole text, to be asked when all of them are taken."""
    reader = _Reader(parts)

    def taken() -> Iterator[str]:
        left = most
        while left and (piece := reader.take(min(left, PIECE))):
            left -= len(piece)
            yield piece

    return taken(), lambda: not reader.take(1)


def _cut(before: list[int], middle: list[int], after: list[int]) -> int | None:
    """The place in `middle` at which `before`, which ends where it ends, can go over to `after`, which begins where it begins."""
    last = _common(middle, after)
    first = len(middle) - _common(middle[::-1], before[: -len(middle) - 1 : -1])
    return (first + last) // 2 if last - first >= AGREEING else None


def _common(one: list[int], other: list[int]) -> int:
    """How many items both begin with."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


class _Reader:
    """Takes text from its parts in pieces of a given length."""

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
