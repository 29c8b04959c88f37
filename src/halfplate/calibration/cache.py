"""A cache of keys and values whose room is taken once; imports transformers, so it is imported where it is used."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values (sequences, heads, tokens so far, head_dim) as views of room for `length` tokens.

    DynamicLayer copies all of them for each new token, and StaticLayer has attention read the room not yet used.
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

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.filled + key_states.shape[-2]
        self.key_room[:, :, self.filled : end] = key_states
        self.value_room[:, :, self.filled : end] = value_states
        self.filled = end
        self.keys, self.values = self.key_room[:, :, :end], self.value_room[:, :, :end]
        return self.keys, self.values


def preallocated_cache(config: PretrainedConfig, length: int) -> DynamicCache:
    """A cache for sequences of `length` tokens; layers of local attention, which hold a short window, stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
