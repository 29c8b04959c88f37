"""A key-value cache with spare capacity, so that adding a token neither copies nor allocates."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from halfplate.runtime.kept import CACHE_DTYPES, Kept

ROOM = 256  # initial capacity in positions; it doubles when it is full


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are the filled part of larger buffers.

    Values that are read have the type of the model.

    kept_dtype: of the buffers; None means that of the model, but at least fp32.
    """

    def __init__(self, kept_dtype: torch.dtype | None = None, **options: Any) -> None:
        self.kept_dtype = kept_dtype
        self.kept_keys: Kept | None = None
        self.kept_values: Kept | None = None
        self.length = 0
        self.moves = 0  # number of reallocations of the buffers
        super().__init__(**options)

    @property
    def capacity(self) -> int:
        return 0 if self.kept_keys is None else self.kept_keys.capacity

    @property
    def keys(self) -> Tensor | None:
        return None if self.kept_keys is None else self.kept_keys.read(self.length, self.dtype)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self.length = 0 if keys is None else keys.shape[2]
        self.kept_keys = self._filled(keys, max(self.capacity, self.length))

    @property
    def values(self) -> Tensor | None:
        return None if self.kept_values is None else self.kept_values.read(self.length, self.dtype)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self.kept_values = self._filled(values, self.capacity)

    def _filled(self, states: Tensor | None, capacity: int) -> Kept | None:
        self.moves += 1
        if states is None:
            return None
        batch, heads, _, width = states.shape
        dtype = self.kept_dtype or torch.promote_types(states.dtype, torch.float32)
        kept = Kept.empty(batch, heads, capacity, width, dtype, states.device)
        kept.write(0, states)
        return kept

    def _copy(self, capacity: int, order: Tensor | None = None) -> None:
        assert self.kept_keys is not None
        assert self.kept_values is not None
        self.moves += 1
        self.kept_keys = self.kept_keys.copy(self.length, capacity, order)
        self.kept_values = self.kept_values.copy(self.length, capacity, order)

    def reserve(self, length: int) -> None:
        """Ensure capacity for `length` positions in total; the layer must already have buffers."""
        if length > self.capacity:
            self._copy(max(ROOM, 2 * self.capacity, length))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (batch, heads, new, head_dim); returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        self.reserve(end)
        assert self.kept_keys is not None
        assert self.kept_values is not None
        self.kept_keys.write(start, key_states)
        self.kept_values.write(start, value_states)
        self.length = end
        return self.kept_keys.read(end, self.dtype), self.kept_values.read(end, self.dtype)

    def hold(self, keys: Kept, values: Kept, length: int, dtype: torch.dtype = torch.float32) -> None:
        """Take over buffers with `length` filled positions. dtype: of keys and values that are read."""
        self.dtype, self.device, self.is_initialized = dtype, keys.numbers.device, True
        self.kept_dtype = keys.numbers.dtype
        self.kept_keys, self.kept_values, self.length = keys, values, length
        self.moves += 1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence `beam_idx[i]` was; beams often keep their places."""
        if self.kept_keys is None:
            return
        numbers = self.kept_keys.numbers
        order = beam_idx.to(numbers.device)
        if not torch.equal(order, torch.arange(numbers.shape[0], dtype=order.dtype, device=order.device)):
            self._copy(self.capacity, order)

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last positions; the number is negative, as in `DynamicLayer.crop`.

        For a positive number, old versions of transformers keep that many positions, and later ones raise ValueError.
        """
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)
            self.length = min(self.length, tokens_to_remove)
        else:
            self.length -= min(self.length, -tokens_to_remove)

    def reset(self) -> None:
        self.length = 0
        super().reset()


class GrowingCache(Cache):
    """A cache with one `GrowingLayer` per decoder layer.

    kept_dtype: of keys and values, fp32, bf16 or int8 with a scale for each vector; None means that of the model, but at least fp32.
    """

    def __init__(self, blocks: int, kept_dtype: torch.dtype | None = None) -> None:
        super().__init__(layers=[GrowingLayer(kept_dtype) for _ in range(blocks)])

    @classmethod
    def with_room(
        cls, blocks: int, sequences: int, heads: int, length: int, width: int, dtype: torch.dtype = torch.float32
    ) -> "GrowingCache":
        """An empty cache on the CPU whose buffers (sequences, heads, length, width) already exist."""
        cache, device = cls(blocks, dtype), torch.device("cpu")
        layers: Any = cache.layers
        for layer in layers:
            keys, values = (Kept.empty(sequences, heads, length, width, dtype, device) for _ in range(2))
            layer.hold(keys, values, 0)
        return cache

    @property
    def kept_dtype(self) -> torch.dtype | None:
        """The type of the buffers; None if there are none, or several types."""
        layers: Any = self.layers
        kinds = {None if layer.kept_keys is None else layer.kept_keys.numbers.dtype for layer in layers}
        return kinds.pop() if len(kinds) == 1 else None

    @property
    def sequences(self) -> int:
        """How many sequences every layer holds on the CPU, in one type that the native step reads and all of equal length; else 0."""
        layers: Any = self.layers
        first, dtype = layers[0].kept_keys, self.kept_dtype
        same = dtype in CACHE_DTYPES.values() and all(
            layer.length == layers[0].length
            and layer.kept_keys.numbers.shape[0] == first.numbers.shape[0]
            and layer.kept_keys.numbers.device.type == "cpu"
            for layer in layers
        )
        return int(first.numbers.shape[0]) if same else 0
