"""Reading the prompts of a batch, except what recent requests have read before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfplate.models.arguments import cache_argument
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.prompts import (
    Prompt,
    Prompts,
    Sequenced,
    check_cache_dtype,
    new_cache,
    side_by_side,
    why_no_prompts,
)
from halfplate.serving.metrics import Metrics
from halfplate.serving.settings import ServeSettings

# Prompts are read one by one if so much of them was read before; else together, with padding.
LEAST_SHARED = 0.25


class Reading:
    """The keys and values of recent requests of one model; only one batch at a time."""

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        self._metrics, self._cache_dtype = metrics, settings.cache_dtype
        self._prompts = Prompts(settings.prompt_cache)

    def reads(self, model: Any, settings: Any) -> bool:
        """Whether keys and values of one text of `model` can be used in another, and `generate` with `settings` would use them."""
        ways = max(settings.num_beams or 1, settings.num_return_sequences or 1)
        return ways == 1 and settings.use_cache is not False and why_no_prompts(model) is None

    def begin(self, model: Any, settings: Any, prompts: Sequence[Tensor]) -> GrowingCache | None:
        """A cache for `generate` of these prompts, int64 (tokens,), with padding on the left; None if `generate` makes its own.

        It is empty, or holds all tokens but the last.
        settings: of `generate`.
        Raises HalfplateError if the model cannot decode with the type of cache that the server was started with.
        """
        dtype = check_cache_dtype(model, self._cache_dtype)
        if not self.reads(model, settings):
            return None
        self._prompts.kept_dtype = dtype
        shared = sum(self._prompts.shared(ids) for ids in prompts)
        if min(map(len, prompts)) < 2 or shared < LEAST_SHARED * sum(map(len, prompts)):
            return new_cache(model, dtype)
        read = [self._read(model, ids) for ids in prompts]
        return side_by_side(model, [Sequenced(cache) for cache in read], max(map(len, prompts)) - 1)

    def keep(self, sequence: Sequenced, text: Tensor) -> None:
        """Remember a text, int64 (tokens,), that `sequence` has read, perhaps but for its last token."""
        length = min(len(text) - 1, sequence.length)
        if self._prompts.most > 0 and length > 0:
            self._prompts.keep(Prompt.of(sequence.cache, text[:length], sequence.row, sequence.first))

    def _read(self, model: Any, ids: Tensor) -> GrowingCache:
        """A cache of all tokens of a prompt but the last."""
        cache = self._prompts.cache(model, ids)
        length = cache.get_seq_length()
        self._metrics.reused(length)
        if length < len(ids) - 1:
            with torch.no_grad():
                model(
                    input_ids=ids[None, length:-1],
                    use_cache=True,
                    logits_to_keep=1,
                    **{cache_argument(model.forward): cache},
                )
            self._prompts.keep(Prompt.of(cache, ids[:-1]))  # the next prompt of the batch may begin like this one
        return cache
