"""Continuing a text greedily, natively if the model is installed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from halfplate.defaults import plain_defaults
from halfplate.errors import HalfplateError
from halfplate.models.arguments import cache_argument
from halfplate.runtime.architectures import config_of
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.decoder import NativeDecoding, why_not
from halfplate.runtime.lookup import Drafts

Said = Callable[[int], None]


class _Told(BaseStreamer):
    """Passes on the tokens that `generate` emits, except the prompt, which it emits first."""

    def __init__(self, on_token: Said) -> None:
        self._on_token, self._prompt = on_token, True

    def put(self, value: Tensor) -> None:
        for token in [] if self._prompt else value.flatten().tolist():
            self._on_token(token)
        self._prompt = False

    def end(self) -> None:
        pass


@plain_defaults()
@torch.no_grad()
def greedy(
    model: Any,
    ids: Tensor,
    new_tokens: int,
    stop_ids: Collection[int] = (),
    on_token: Said | None = None,
    cache: GrowingCache | None = None,
    lookup: int = 0,
) -> Tensor:
    """Continue `ids`, int64 (1, L), greedily: (1, at most L + new_tokens), fewer if one of `stop_ids` occurs.

    It runs natively if the model is installed, otherwise by transformers' `generate`.

    on_token: called with each new token immediately.
    cache: of the first tokens of `ids`, fewer than L; afterwards of all tokens but the last. Only the native path uses it.
    lookup: most tokens of a draft from the text so far, which one step checks together (`Drafts`); only the native path uses it.
    Raises HalfplateError for a batch.
    """
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise HalfplateError(f"ids has shape {tuple(ids.shape)}, expected one sequence of at least one token: (1, L)")
    if new_tokens < 1:
        return ids
    if not isinstance(model, NativeDecoding) or why_not(model) is not None:
        if lookup > 0:
            reason = why_not(model) or "it was not loaded by halfplate.load"
            raise HalfplateError(f"lookup={lookup} cannot be used with this model: {reason}; leave it out")
        return _by_transformers(model, ids, new_tokens, stop_ids, on_token)
    if cache is None:
        cache = GrowingCache(config_of(model).num_hidden_layers)
    run = _Run(model, ids, new_tokens, stop_ids, on_token, cache, Drafts(lookup) if lookup > 0 else None)
    try:
        run.run()
    finally:
        # A draft may be cut off, or `on_token` may raise.
        cache.crop(-max(0, cache.get_seq_length() - ids.shape[1] - len(run.tokens) + 1))
    return run.text()


def _by_transformers(
    model: Any, ids: Tensor, new_tokens: int, stop_ids: Collection[int], on_token: Said | None
) -> Tensor:
    # The end token is an ordinary token unless it is in `stop_ids`.
    settings: dict[str, Any] = {
        "do_sample": False,
        "repetition_penalty": 1.0,
        "eos_token_id": sorted(stop_ids) or None,
    }
    settings |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    if on_token is not None:
        settings["streamer"] = _Told(on_token)
    continued: Tensor = model.generate(ids, max_new_tokens=new_tokens, **settings)
    return continued


class _Run:
    """One continuation by the native step. tokens: those that are new."""

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        new_tokens: int,
        stop_ids: Collection[int],
        on_token: Said | None,
        cache: GrowingCache,
        drafts: Drafts | None,
    ) -> None:
        self._model, self._ids, self._new_tokens, self._stop_ids = model, ids, new_tokens, stop_ids
        self._on_token, self._cache, self._drafts = on_token, cache, drafts
        self.tokens: list[int] = []
        self._dtype = model.dtype  # of logits
        if drafts is not None:
            drafts.extend(ids[0].tolist())

    def text(self) -> Tensor:
        """All tokens, int64 (1, tokens)."""
        new = torch.tensor([self.tokens], dtype=self._ids.dtype, device=self._ids.device)
        return torch.cat([self._ids, new], dim=1)

    def run(self) -> None:
        """Generate until the end."""
        found = [self._read()]
        while not any(self._take(token) for token in found):
            found = self._next()

    def _take(self, token: int) -> bool:
        """Add a token to the text; returns whether it was the last."""
        self.tokens.append(token)
        if self._drafts is not None:
            self._drafts.extend([token])
        if self._on_token is not None:
            self._on_token(token)
        return len(self.tokens) == self._new_tokens or token in self._stop_ids

    def _read(self) -> int:
        """The token after the text, from the positions that are not in the cache."""
        settings = {cache_argument(self._model.forward): self._cache, "use_cache": True, "logits_to_keep": 1}
        logits = self._model(input_ids=self.text()[:, self._cache.get_seq_length() :], **settings).logits[0, -1]
        self._dtype = logits.dtype
        return int(logits.argmax())

    def _next(self) -> list[int]:
        """The next tokens: one, or as many as a draft has right and the one after them."""
        cache, decoder, dtype = self._cache, self._model.native_decoder, self._dtype
        length = cache.get_seq_length()
        if length == decoder.short_length:
            # From here on, all keys have other angles: they are computed again, as in `generate`.
            cache.crop(-length)
            return [self._read()]
        draft = [] if self._drafts is None else self._drafts.propose(self._room(length, decoder.short_length))
        if not draft:
            return [int(decoder.step(self.tokens[-1], cache).to(dtype).argmax())]
        rows = torch.tensor([[self.tokens[-1], *draft]], dtype=torch.int64, device="cpu")
        found: list[int] = decoder.step_rows(rows, cache, exact=True)[0].to(dtype).argmax(-1).tolist()
        right = next((place for place, token in enumerate(draft) if token != found[place]), len(draft))
        cache.crop(right - len(draft))
        return found[: right + 1]

    def _room(self, length: int, short_length: int | None) -> int:
        """The largest useful number of tokens of a draft. A step must not reach positions with other angles."""
        room = self._new_tokens - len(self.tokens) - 1
        return room if short_length is None or length > short_length else min(room, short_length - 1 - length)
