"""The buffers of a key-value cache: numbers in fp32, bf16 or int8, with spare capacity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CACHE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
# Heads of a cache in bf16 or int8 are whole vectors of the native step.
WHOLE = 16
SMALLEST = 1e-30  # its reciprocal is a number


def to_codes(states: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (..., width) and fp32 scales (...) of vectors (..., width): the largest magnitude of a vector has the code 127 or -127.

    The scale of a vector that is not finite is NaN. The native step rounds in the same way.
    """
    states = states.to(torch.float32)
    largest = states.abs().amax(-1)
    finite = states.isfinite().all(-1)
    factor = torch.where(finite & (largest > SMALLEST), 127 / largest, 0.0)
    codes = (torch.where(finite[..., None], states, 0.0) * factor[..., None]).round().to(torch.int8)
    return codes, torch.where(finite, largest / 127, torch.nan)


@dataclass
class Kept:
    """Keys or values of a layer: numbers (batch, heads, capacity, width), and, if they are int8, fp32 scales (batch, heads, capacity)."""

    numbers: Tensor
    scales: Tensor | None = None

    @classmethod
    def empty(cls, batch: int, heads: int, capacity: int, width: int, dtype: torch.dtype, device: torch.device) -> Kept:
        """Buffers of that size whose contents are not set."""
        with torch.inference_mode(False):  # otherwise nothing could be added outside inference mode
            numbers = torch.empty(batch, heads, capacity, width, dtype=dtype, device=device)
            scaled = dtype == torch.int8
            scales = torch.empty(batch, heads, capacity, dtype=torch.float32, device=device) if scaled else None
        return cls(numbers, scales)

    @property
    def capacity(self) -> int:
        return self.numbers.shape[2]

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def write(self, start: int, states: Tensor) -> None:
        """Set the positions from `start` on to `states` (batch, heads, new, width), of any type of floats."""
        end = start + states.shape[2]
        if self.scales is None:
            self.numbers[:, :, start:end] = states
        else:
            self.numbers[:, :, start:end], self.scales[:, :, start:end] = to_codes(states)

    def read(self, length: int, dtype: torch.dtype) -> Tensor:
        """The first `length` positions in `dtype`."""
        numbers = self.numbers[:, :, :length]
        if self.scales is None:
            return numbers.to(dtype)
        return (numbers.float() * self.scales[:, :, :length, None]).to(dtype)

    def copy(self, length: int, capacity: int, order: Tensor | None = None) -> Kept:
        """Buffers for `capacity` positions with the first `length` of these; sequence i is that which was `order[i]`."""
        batch, heads, _, width = self.numbers.shape
        count = batch if order is None else len(order)
        found = Kept.empty(count, heads, capacity, width, self.numbers.dtype, self.numbers.device)
        for to, own in ((found.numbers, self.numbers), (found.scales, self.scales)):
            if to is not None and own is not None:
                filled = own[:, :, :length]
                to[:, :, :length] = filled if order is None else filled.index_select(0, order.to(own.device))
        return found
