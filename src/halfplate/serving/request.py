"""A request for text, when its answer is over, and the texts of several as rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.generation.stopping_criteria import StopStringCriteria


def padded(texts: Sequence[Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Texts, int64 (tokens,) each, with `pad` on their left, (texts, longest), and a mask of the same shape, 0 where it is padding."""

    def filled(rows: Sequence[Tensor], value: int) -> Tensor:
        return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left")

    return filled(texts, pad), filled([torch.ones_like(text) for text in texts], 0)


@dataclass(eq=False)
class Request:
    """A request that waits or runs.

    ids: int64 (prompt,). settings: of `generate`. most: tokens of the answer at most.
    said: called with each token; done: with the tokens of the answer, or with the exception that ended it.
    """

    ids: Tensor
    settings: Any
    most: int
    tokenizer: Any
    said: Callable[[int], None]
    done: Callable[[list[int] | BaseException], object]
    tokens: list[int] = field(default_factory=list)
    ended: bool = False

    def __post_init__(self) -> None:
        ends, strings = self.settings.eos_token_id, self.settings.stop_strings
        self.ends: set[int] = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
        self._stop = StopStringCriteria(self.tokenizer, strings) if strings else None

    @property
    def text(self) -> Tensor:
        """Prompt and answer, int64 (tokens,)."""
        return torch.cat([self.ids.cpu(), torch.tensor(self.tokens, dtype=torch.int64, device="cpu")])

    def take(self, token: int) -> None:
        """Add a token to the answer and pass it on; the request may end with it."""
        self.tokens.append(token)
        try:
            self.said(token)
        # A streamer raises an exception of its own if its client has left.
        except Exception:
            self.end([])
            return
        stopped = self._stop is not None and bool(self._stop(self.text[None], None)[0])
        if token in self.ends or len(self.tokens) >= self.most or stopped:
            self.end(self.tokens)

    def end(self, found: list[int] | BaseException) -> None:
        """The answer is over, if it was not before."""
        if not self.ended:
            self.ended = True
            self.done(found)
