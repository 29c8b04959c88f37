"""Drafting the next tokens from the text itself: what followed the last tokens where they occurred before.

Prompt lookup decoding: Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

GRAMS = (3, 2)  # tokens that must occur again, most first
# Lengths of matches that are counted apart, and the share of right guesses that is assumed of each at first.
FIRST_SHARES = {2: 0.3, 3: 0.5, 4: 0.7, 8: 0.9}
MEMORY = 1 / 16  # weight of the newest guess in such a share
DRAFTS = (3, 7, 11)  # steps of 4, 8 or 12 tokens, because products take 4 at a time
# A step of several tokens takes COST_OF_STEP + COST_OF_TOKEN * tokens steps of one (measured on SmolLM2-135M with 4 bits).
COST_OF_STEP, COST_OF_TOKEN = 0.3, 0.36
LEAST_GAIN = 1.1


@dataclass
class Drafts:
    """The tokens of a text, and guesses how it goes on.

    Every token tells whether the guess for it was right, whether it was used or not. So drafts are only proposed where guesses have been right
    often enough to pay.

    most: largest number of tokens of a draft.
    """

    most: int
    tokens: list[int] = field(default_factory=list)
    _after: dict[tuple[int, ...], int] = field(default_factory=dict)  # the place behind the last occurrence
    _source: int | None = None  # place of the guess for the next token
    _length: int = 0  # of the match before it
    _shares: dict[int, float] = field(default_factory=lambda: dict(FIRST_SHARES))

    def extend(self, tokens: Iterable[int]) -> None:
        """Add the next tokens of the text."""
        for token in tokens:
            self._add(token)

    def propose(self, room: int) -> list[int]:
        """A draft of at most `room` of the next tokens; empty if none is likely to pay."""
        if self._source is None:
            return []
        share = self._shares[self._kind()]
        best, gain = 0, LEAST_GAIN
        for count in DRAFTS:
            count = min(count, self.most, room)
            # Tokens of a step: one, and each token of the draft if all before it are right.
            tokens = sum(share**place for place in range(count + 1))
            cost = COST_OF_STEP + COST_OF_TOKEN * (count + 1)
            if count > 0 and tokens / cost > gain:
                best, gain = count, tokens / cost
        draft: list[int] = []
        for place in range(self._source, self._source + best):
            # A match may reach into the draft, if the text repeats itself.
            draft.append(self.tokens[place] if place < len(self.tokens) else draft[place - len(self.tokens)])
        return draft

    def _kind(self) -> int:
        return max(length for length in FIRST_SHARES if length <= self._length)

    def _add(self, token: int) -> None:
        if self._source is not None:
            right, kind = self.tokens[self._source] == token, self._kind()
            self._shares[kind] += MEMORY * (right - self._shares[kind])
            self._source, self._length = (self._source + 1, self._length + 1) if right else (None, 0)
        self.tokens.append(token)
        end = len(self.tokens)
        for length in GRAMS:
            if end < length:
                continue
            gram = tuple(self.tokens[-length:])
            if self._source is None and gram in self._after:
                self._source, self._length = self._after[gram], length
            self._after[gram] = end
