"""A preallocated key-value cache. This module imports transformers, so import it only when it is needed."""

from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from halfplate.models.arguments import cache_argument
from halfplate.models.auto import auto_class
from halfplate.models.without_values import run_without_values


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values (sequences, heads, tokens so far, head_dim) as views of buffers for `length` tokens.

    DynamicLayer copies all of them for each new token, and StaticLayer makes attention read the unused part of the buffer.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        sequences, heads, _, head_dim = key_states.shape
        self.key_room = key_states.new_empty(sequences, heads, self.length, head_dim)
        self.value_room = value_states.new_empty(sequences, heads, self.length, value_states.shape[-1])
        self.is_initialized = True

    def _enlarge(self, length: int) -> None:
        """Make room for `length` tokens: some models put tokens of their own before the text."""
        self.key_room, self.value_room = (
            torch.cat([room, room.new_empty(*room.shape[:2], length - room.shape[2], room.shape[3])], 2)
            for room in (self.key_room, self.value_room)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.filled + key_states.shape[-2]
        if end > self.key_room.shape[-2]:
            self._enlarge(end + self.length)
        self.key_room[:, :, self.filled : end] = key_states
        self.value_room[:, :, self.filled : end] = value_states
        self.filled = end
        self.keys, self.values = self.key_room[:, :, :end], self.value_room[:, :, :end]
        return self.keys, self.values


def preallocated_cache(config: PretrainedConfig, length: int) -> DynamicCache:
    """A cache for sequences of `length` tokens. Layers of local attention are not changed, because their window is short."""
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@dataclass(frozen=True)
class _Described:
    """A configuration that compares equal to another with the same entries."""

    entries: str
    config: PretrainedConfig = field(compare=False)


def cache_nbytes(config: PretrainedConfig, length: int) -> int:
    """Bytes in the cache of one sequence of `length` tokens in fp32, measured with a model on the meta device, whose exceptions are passed on."""
    return _measured(_Described(config.to_json_string(use_diff=False), config), length)


# A plan and its run make the same call, which takes seconds for a model with many layers.
@lru_cache(maxsize=8)
def _measured(described: _Described, length: int) -> int:
    config = described.config
    with torch.device("meta"):
        model: Any = auto_class(config).from_config(deepcopy(config), dtype=torch.float32)
    argument = cache_argument(model.forward)
    with run_without_values(model), torch.no_grad():
        ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
        output = model.eval()(input_ids=ids, use_cache=True, **{argument: DynamicCache(config=config)})
        return _held(getattr(output, argument), set())


def _held(found: Any, seen: set[int]) -> int:
    """Bytes of the distinct tensors inside a cache of any class."""
    if id(found) in seen:
        return 0
    seen.add(id(found))
    if isinstance(found, Tensor):
        return found.numel() * found.itemsize
    if isinstance(found, dict):
        return sum(_held(part, seen) for part in found.values())
    if isinstance(found, list | tuple):
        return sum(_held(part, seen) for part in found)
    return _held(vars(found), seen) if hasattr(found, "__dict__") else 0
