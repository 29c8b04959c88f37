"""N:M sparse matrices: kept values and their positions."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.formats.packing import pack_positions, unpack_positions
from halfplate.pattern import Pattern


@dataclass(frozen=True, eq=False)
class NMSparse:
    """A matrix (d_out, d_in) that keeps N of every M consecutive inputs of a row.

    values: (d_out, d_in · N / M), fp32, bf16 or fp16. index: uint8, packed positions (halfplate.formats.packing).
    """

    values: Tensor
    index: Tensor
    pattern: Pattern

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor, pattern: Pattern, dtype: torch.dtype) -> "NMSparse":
        """Keep `weight` (d_out, d_in) where the boolean `mask` has exactly N true entries in each group."""
        d_out = weight.shape[0]
        # Sorting "not kept" stably moves the kept columns of each group to its front, in rising order.
        groups = (~mask).reshape(d_out, -1, pattern.m).to(torch.uint8)
        positions = groups.argsort(dim=-1, stable=True)[:, :, : pattern.n].contiguous()
        values = weight.reshape(d_out, -1, pattern.m).gather(-1, positions)
        return cls(values.reshape(d_out, -1).to(dtype), pack_positions(positions.reshape(d_out, -1), pattern), pattern)

    @property
    def shape(self) -> tuple[int, int]:
        d_out, kept = self.values.shape
        return d_out, kept // self.pattern.n * self.pattern.m

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.index.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by their name below the module."""
        return {"weight": self.values, "weight_index": self.index}

    def columns(self) -> Tensor:
        """The input that each kept value multiplies: int64 (d_out, kept)."""
        kept = self.values.shape[1]
        starts = torch.arange(kept, device=self.values.device) // self.pattern.n * self.pattern.m
        return starts + unpack_positions(self.index, kept, self.pattern)

    def mask(self) -> Tensor:
        """True where a value is kept: bool (d_out, d_in)."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.values.device)
        return mask.scatter_(1, self.columns(), True)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix with its zeros: (d_out, d_in)."""
        zeros = torch.zeros(self.shape, dtype=dtype, device=self.values.device)
        return zeros.scatter(1, self.columns(), self.values.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) to x Sᵀ (..., d_out), in the dtype of `x`."""
        return functional.linear(x, self.dense(x.dtype))
