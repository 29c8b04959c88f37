"""Sequences that decode together, which others may join or leave between two tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfplate.models.arguments import cache_argument
from halfplate.runtime.cache import ROOM, GrowingCache
from halfplate.runtime.prompts import Sequenced, new_cache, side_by_side
from halfplate.serving.choosing import chooser, is_known
from halfplate.serving.reading import Reading
from halfplate.serving.request import Request, padded


@dataclass(frozen=True, eq=False)
class _Row:
    """A request that runs. padding: positions before its first token. choose: its next token."""

    request: Request
    padding: int
    choose: Callable[[Tensor, Tensor], int]


class Running:
    """The requests of one model that run. Each has a row of one cache, with padding on the left, and its own settings."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._rows: list[_Row] = []
        self._cache: GrowingCache | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def takes(self, model: Any, settings: Any) -> bool:
        """Whether a request with these settings can run here, beside any others."""
        return self._reading.reads(model, settings) and is_known(settings)

    @torch.no_grad()
    def join(self, model: Any, requests: Sequence[Request]) -> None:
        """Read the prompts of `requests`, except their last tokens, and let them run with the others."""
        choose = [chooser(request.settings) for request in requests]
        before = [] if self._cache is None else _sequences(self._cache, self._rows)
        sequences = [*before, *self._read(model, requests)]
        length = max(sequence.length for sequence in sequences)
        # Without a position, there is nothing to put side by side.
        self._cache = side_by_side(model, sequences, length, ROOM) if length else new_cache(model)
        entries = [*((row.request, row.choose) for row in self._rows), *zip(requests, choose, strict=True)]
        self._rows = [
            _Row(request, length - sequence.length, each)
            for (request, each), sequence in zip(entries, sequences, strict=True)
        ]

    def _read(self, model: Any, requests: Sequence[Request]) -> list[Sequenced]:
        """The keys and values of each prompt, without those of its last token."""
        longer = [request for request in requests if len(request.ids) > 1]
        found = {request: Sequenced(new_cache(model)) for request in requests}
        if longer:
            prompts = [request.ids.cpu() for request in longer]
            cache = self._reading.begin(model, longer[0].settings, prompts)
            assert cache is not None
            if cache.get_seq_length() == 0:
                _read(model, cache, prompts)
            longest = max(map(len, prompts))
            for place, request in enumerate(longer):
                found[request] = Sequenced(cache, place, longest - len(request.ids))
        return [found[request] for request in requests]

    @torch.no_grad()
    def step(self, model: Any) -> None:
        """Give each request its next token; those that are over leave."""
        assert self._cache is not None
        length = self._cache.get_seq_length()
        padding = torch.tensor([row.padding for row in self._rows], dtype=torch.int64, device="cpu")
        places = torch.arange(length + 1, dtype=torch.int64, device="cpu")
        # The last token of each text has not been read.
        texts = [row.request.text[None] for row in self._rows]
        logits = model(
            input_ids=torch.cat([text[:, -1:] for text in texts]),
            attention_mask=(places >= padding[:, None]).long(),
            position_ids=(length - padding)[:, None],
            use_cache=True,
            **{cache_argument(model.forward): self._cache},
        ).logits[:, -1:]
        for row, text, own in zip(self._rows, texts, logits, strict=True):
            row.request.take(row.choose(text, own.to(copy=True, dtype=torch.float32)))
        self._leave()

    def end(self, error: BaseException) -> None:
        """End all requests with `error`."""
        for row in self._rows:
            row.request.end(error)
        self._rows, self._cache = [], None

    def _leave(self) -> None:
        """Let the requests that are over leave, and remember their texts."""
        cache = self._cache
        assert cache is not None
        for sequence, row in zip(_sequences(cache, self._rows), self._rows, strict=True):
            if row.request.ended:
                self._reading.keep(sequence, row.request.text)
        left = [place for place, row in enumerate(self._rows) if not row.request.ended]
        if not left:
            self._cache = None
        elif len(left) < len(self._rows):
            layers: Any = cache.layers
            for layer in layers:
                layer.reorder_cache(torch.tensor(left, dtype=torch.int64, device="cpu"))
        self._rows = [self._rows[place] for place in left]


def _sequences(cache: GrowingCache, rows: Sequence[_Row]) -> list[Sequenced]:
    return [Sequenced(cache, place, row.padding) for place, row in enumerate(rows)]


def _read(model: Any, cache: GrowingCache, prompts: Sequence[Tensor]) -> None:
    """Read all tokens of the prompts, int64 (tokens,) each, but their last ones into the empty `cache`."""
    ids, mask = padded([prompt[:-1] for prompt in prompts])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **{cache_argument(model.forward): cache},
    )
