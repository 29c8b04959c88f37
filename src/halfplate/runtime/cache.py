"""A key-value cache with spare capacity, so that adding a token neither copies nor allocates."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 256  # initial capacity in positions; it doubles when it is full


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are the filled part of larger buffers (batch, heads, capacity, head_dim).

    The buffers are at least fp32, whatever the type of the model; values that are read have the type of the model.
    """

    def __init__(self, **options: Any) -> None:
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None
        self.length = 0
        self.moves = 0  # number of reallocations of the buffers
        super().__init__(**options)

    @property
    def capacity(self) -> int:
        return 0 if self.key_buffer is None else self.key_buffer.shape[2]

    @property
    def keys(self) -> Tensor | None:
        return None if self.key_buffer is None else self.key_buffer[:, :, : self.length].to(self.dtype)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self.length = 0 if keys is None else keys.shape[2]
        self.key_buffer = self._with_room(keys, max(self.capacity, self.length))

    @property
    def values(self) -> Tensor | None:
        return None if self.value_buffer is None else self.value_buffer[:, :, : self.length].to(self.dtype)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self.value_buffer = self._with_room(values, self.capacity)

    def _with_room(self, filled: Tensor | None, capacity: int) -> Tensor | None:
        self.moves += 1
        if filled is None:
            return None
        batch, heads, length, width = filled.shape
        dtype = torch.promote_types(filled.dtype, torch.float32)
        with torch.inference_mode(False):  # otherwise nothing could be added outside inference mode
            buffer = torch.empty(batch, heads, capacity, width, dtype=dtype, device=filled.device)
        buffer[:, :, :length] = filled
        return buffer

    def reserve(self, length: int) -> None:
        """Ensure capacity for `length` positions in total; the layer must already hold values."""
        if length > self.capacity:
            assert self.key_buffer is not None
            assert self.value_buffer is not None
            capacity = max(ROOM, 2 * self.capacity, length)
            self.key_buffer = self._with_room(self.key_buffer[:, :, : self.length], capacity)
            self.value_buffer = self._with_room(self.value_buffer[:, :, : self.length], capacity)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_buffer, self.value_buffer = key_states[:, :, :0], value_states[:, :, :0]
        self.length = 0
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (batch, heads, new, head_dim); returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        self.reserve(end)
        assert self.key_buffer is not None
        assert self.value_buffer is not None
        self.key_buffer[:, :, start:end] = key_states
        self.value_buffer[:, :, start:end] = value_states
        self.length = end
        return self.key_buffer[:, :, :end].to(self.dtype), self.value_buffer[:, :, :end].to(self.dtype)

    def make_room(self, sequences: int, heads: int, length: int, width: int, dtype: torch.dtype) -> None:
        """Empty buffers for `length` positions on the CPU; they do not grow in a type narrower than fp32."""
        like = torch.empty(sequences, heads, length, width, dtype=dtype, device="cpu")
        self.lazy_initialization(like, like)
        self.key_buffer, self.value_buffer = like, torch.empty_like(like)
        self.moves += 1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence `beam_idx[i]` was; beams often keep their places."""
        if self.key_buffer is None or self.value_buffer is None:
            return
        order = beam_idx.to(self.key_buffer.device)
        if torch.equal(order, torch.arange(self.key_buffer.shape[0], dtype=order.dtype, device=order.device)):
            return
        self.key_buffer, self.value_buffer = (
            self._with_room(buffer[:, :, : self.length].index_select(0, order), self.capacity)
            for buffer in (self.key_buffer, self.value_buffer)
        )

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
    """A cache with one `GrowingLayer` per decoder layer."""

    def __init__(self, blocks: int) -> None:
        super().__init__(layers=[GrowingLayer() for _ in range(blocks)])

    @classmethod
    def with_room(
        cls, blocks: int, sequences: int, heads: int, length: int, width: int, dtype: torch.dtype = torch.float32
    ) -> "GrowingCache":
        """An empty cache whose buffers (sequences, heads, length, width) already exist."""
        cache = cls(blocks)
        layers: list[Any] = cache.layers
        for layer in layers:
            layer.make_room(sequences, heads, length, width, dtype)
        return cache

    @property
    def sequences(self) -> int:
        """How many sequences every layer holds in fp32 or bf16 on the CPU, all of equal length; 0 if the layers differ or hold something else."""
        layers: list[Any] = self.layers
        first = layers[0].key_buffer
        same = first is not None and all(
            layer.length == layers[0].length
            and layer.key_buffer is not None
            and layer.key_buffer.shape[0] == first.shape[0]
            and layer.key_buffer.dtype == first.dtype
            and layer.key_buffer.dtype in (torch.float32, torch.bfloat16)
            and layer.key_buffer.device.type == "cpu"
            for layer in layers
        )
        return int(first.shape[0]) if same else 0

    @property
    def fits_one_sequence_in_floats(self) -> bool:
        """Whether every layer holds one sequence in fp32 on the CPU, all of equal length."""
        layers: list[Any] = self.layers
        return self.sequences == 1 and layers[0].key_buffer.dtype == torch.float32
