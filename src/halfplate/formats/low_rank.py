"""A matrix of low rank that is added to another."""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfplate.formats.rounding import round_to_float


@dataclass(frozen=True, eq=False)
class LowRank:
    """left · right, (d_out, rank) times (rank, d_in), both in one floating-point type."""

    left: Tensor
    right: Tensor

    @classmethod
    def rounded(cls, left: Tensor, right: Tensor, dtype: str) -> "LowRank":
        """Round both to the type called `dtype`; raises HalfplateError where a value is too large for it."""
        parts = (round_to_float(part, dtype, "wrapper_dtype").contiguous() for part in (left, right))
        return cls(*parts)

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by their name below the module."""
        return {"weight_left": self.left, "weight_right": self.right}

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix it stands for: (d_out, d_in)."""
        return self.left.to(dtype) @ self.right.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) to x (L R)ᵀ (..., d_out), in the dtype of `x`."""
        return x @ self.right.to(x.dtype).T @ self.left.to(x.dtype).T
