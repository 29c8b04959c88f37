"""Texts with their keys and values, so that a prompt that begins like one of them is not read again from its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.runtime.architectures import architecture_of, config_of, inner_of
from halfplate.runtime.cache import ROOM, GrowingCache
from halfplate.runtime.decoder import NativeDecoding, why_not
from halfplate.runtime.kept import CACHE_DTYPES, WHOLE, Kept
from halfplate.runtime.traits import short_length, traits_of


def why_no_prompts(model: Any) -> str | None:
    """Why keys and values of a text of `model` cannot be used for another one; None if they can."""
    if not isinstance(model, NativeDecoding):
        return why_not(model) or "it was not loaded by halfplate.load"
    reason = why_not(model)
    if reason is None and short_length(inner_of(model).rotary_emb) is not None:
        return "its rotary embedding depends on the length of the whole text (longrope)"
    return reason


def check_cache_dtype(model: Any, name: str) -> torch.dtype:
    """The type of keys and values that `name` (fp32, bf16, int8) stands for; raises HalfplateError if `model` has no native step for it."""
    if name not in CACHE_DTYPES:
        raise HalfplateError(f"cache_dtype={name!r} is not one of {', '.join(CACHE_DTYPES)}; try int8, or leave it out")
    dtype = CACHE_DTYPES[name]
    if dtype == torch.float32:
        return dtype
    reason = why_not(model) if isinstance(model, NativeDecoding) else "it does not decode natively"
    traits: Any = None if reason else traits_of(model, architecture_of(model))  # type: ignore[arg-type]
    if reason is None and traits.head_dim % WHOLE:
        reason = f"its heads have {traits.head_dim} numbers, which is no multiple of {WHOLE}"
    if reason is not None:
        raise HalfplateError(f"cache_dtype={name!r} cannot be used with this model: {reason}; leave it out")
    return dtype


def new_cache(model: Any, kept_dtype: torch.dtype | None = None) -> GrowingCache:
    """An empty cache for `model`, which decodes natively."""
    return GrowingCache(config_of(model).num_hidden_layers, kept_dtype)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text with its keys and values.

    tokens: int64 (L,).
    layers: keys and values of each, buffers of one sequence and L positions.
    dtype: in which the model reads them, fp32, bf16 or fp16.
    """

    tokens: Tensor
    layers: tuple[tuple[Kept, Kept], ...]
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, cache: GrowingCache, tokens: Tensor, sequence: int = 0, first: int = 0) -> Prompt:
        """A copy of the positions of `cache` from `first` on that hold `tokens`, int64 (L,), in one of its sequences."""
        layers: Any = cache.layers
        row, length = torch.tensor([sequence], dtype=torch.int64, device="cpu"), len(tokens)
        pairs = ((layer.kept_keys, layer.kept_values) for layer in layers)
        kept = tuple((_part(k, row, first, length), _part(v, row, first, length)) for k, v in pairs)
        return cls(tokens.clone(), kept, layers[0].dtype)

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def shared(self, ids: Tensor) -> int:
        """How many of the first tokens of `ids`, int64 (tokens,), are those of this text."""
        count = min(len(ids), len(self.tokens))
        same = self.tokens[:count] == ids[:count].to(self.tokens.device)
        return int(same.long().cumprod(0).sum())

    def cache(self, length: int) -> GrowingCache:
        """A new cache of the first `length` tokens."""
        cache = GrowingCache(len(self.layers))
        layers: Any = cache.layers
        for layer, (keys, values) in zip(layers, self.layers, strict=True):
            room = length + ROOM
            layer.hold(keys.copy(length, room), values.copy(length, room), length, self.dtype)
        return cache


def _part(kept: Kept, row: Tensor, first: int, length: int) -> Kept:
    scales = None if kept.scales is None else kept.scales[:, :, first:]
    return Kept(kept.numbers[:, :, first:], scales).copy(length, length, row)


def begin(model: Any, prompt: Prompt | None, ids: Tensor, kept_dtype: torch.dtype | None = None) -> GrowingCache:
    """A new cache of the first tokens of `ids`, int64 (tokens,), that `prompt` has, too; never of all of them.

    kept_dtype: of a cache without any, as in `GrowingCache`.
    """
    shared = 0 if prompt is None else min(prompt.shared(ids), len(ids) - 1)
    return new_cache(model, kept_dtype) if prompt is None or shared == 0 else prompt.cache(shared)


class Prompts:
    """Recent texts of a model, the last one used last, of `most` bytes together at most.

    kept_dtype: of the caches of texts that begin like none of them, as in `GrowingCache`.
    """

    def __init__(self, most: int, kept_dtype: torch.dtype | None = None) -> None:
        self.most, self.kept_dtype = most, kept_dtype
        self.kept: list[Prompt] = []

    @property
    def nbytes(self) -> int:
        return sum(prompt.nbytes for prompt in self.kept)

    def cache(self, model: Any, ids: Tensor) -> GrowingCache:
        """A new cache of as many of the first tokens of `ids`, int64 (tokens,), as one of the texts has; never of all of them."""
        best = self._best(ids)
        if best is not None:
            self.kept.remove(best)
            self.kept.append(best)
        return begin(model, best, ids, self.kept_dtype)

    def shared(self, ids: Tensor) -> int:
        """How many tokens `cache` would hold."""
        best = self._best(ids)
        return 0 if best is None else min(best.shared(ids), len(ids) - 1)

    def _best(self, ids: Tensor) -> Prompt | None:
        return max(self.kept, key=lambda prompt: prompt.shared(ids), default=None)

    def keep(self, prompt: Prompt) -> None:
        """Add a text. It takes the place of those that it begins with; the oldest ones leave if there is no room."""
        if len(prompt.tokens) == 0 or prompt.nbytes > self.most or self._has(prompt.tokens):
            return
        self.kept = [other for other in self.kept if prompt.shared(other.tokens) < len(other.tokens)]
        self.kept.append(prompt)
        while self.nbytes > self.most:
            self.kept.pop(0)

    def _has(self, tokens: Tensor) -> bool:
        return any(other.shared(tokens) == len(tokens) for other in self.kept)


@dataclass(frozen=True, eq=False)
class Sequenced:
    """One sequence of a cache: its row, and the first position that is not padding."""

    cache: GrowingCache
    row: int = 0
    first: int = 0

    @property
    def length(self) -> int:
        """Its positions without padding."""
        return self.cache.get_seq_length() - self.first


def side_by_side(model: Any, sequences: Sequence[Sequenced], length: int, room: int = 0) -> GrowingCache:
    """One new cache of all sequences, with padding on the left up to `length` positions. Keys and values of padding are 0.

    room: for further positions. At least one sequence must have positions.
    """
    filled = next(sequence.cache for sequence in sequences if sequence.cache.get_seq_length())
    found: GrowingCache = new_cache(model, filled.kept_dtype)
    pairs: Any = zip(found.layers, filled.layers, strict=True)
    for number, (layer, like) in enumerate(pairs):
        own: list[Any] = [sequence.cache.layers[number] for sequence in sequences]
        keys, values = (
            _joined(
                [getattr(each, name) for each in own], sequences, getattr(like, name).numbers, length, length + room
            )
            for name in ("kept_keys", "kept_values")
        )
        layer.hold(keys, values, length, like.dtype)
    return found


def _joined(
    parts: Sequence[Kept | None], sequences: Sequence[Sequenced], like: Tensor, length: int, capacity: int
) -> Kept:
    _, heads, _, width = like.shape
    joined = Kept.empty(len(parts), heads, capacity, width, like.dtype, like.device)
    for row, (part, sequence) in enumerate(zip(parts, sequences, strict=True)):
        start, end = length - sequence.length, sequence.first + sequence.length
        numbers, scales = (None, None) if part is None else (part.numbers, part.scales)
        for to, own in ((joined.numbers, numbers), (joined.scales, scales)):
            if to is not None:
                to[row, :, :start] = 0
            if to is not None and own is not None:
                to[row, :, start:length] = own[sequence.row, :, sequence.first : end]
    return joined
