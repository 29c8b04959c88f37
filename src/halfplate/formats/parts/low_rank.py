"""A low-rank matrix that is added to another."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from halfplate.dtypes import STORED
from halfplate.errors import HalfplateError
from halfplate.formats.parts.base import Forward, Layout, Outer
from halfplate.formats.quantizers.rounding import round_to_float

if TYPE_CHECKING:
    from halfplate.formats.spec import WeightSpec


@dataclass(frozen=True, eq=False)
class LowRank(Outer):
    """left · right, (d_out, rank) times (rank, d_in), both in the same floating-point type."""

    left: Tensor
    right: Tensor
    kinds = ("low-rank parts",)

    @classmethod
    def rounded(cls, left: Tensor, right: Tensor, dtype: str) -> "LowRank":
        """Round both factors to the type `dtype`; raises HalfplateError if a value is too large for it."""
        parts = (round_to_float(part, dtype, "wrapper_dtype").contiguous() for part in (left, right))
        return cls(*parts)

    @classmethod
    def present(cls, spec: "WeightSpec") -> bool:
        return spec.rank > 0

    @classmethod
    def check_spec(cls, spec: "WeightSpec") -> None:
        if spec.wrapper_dtype not in STORED:
            raise HalfplateError(
                f"wrapper_dtype={spec.wrapper_dtype!r} is not a type for a low-rank part (rank={spec.rank}); use {', '.join(STORED)}"
            )

    @classmethod
    def layout(cls, spec: "WeightSpec") -> Layout:
        dtype = STORED[spec.wrapper_dtype]
        return {"weight_left": ((spec.d_out, spec.rank), dtype), "weight_right": ((spec.rank, spec.d_in), dtype)}

    @classmethod
    def from_tensors(cls, spec: "WeightSpec", tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["weight_left"], tensors["weight_right"])

    def tensors(self) -> dict[str, Tensor]:
        return {"weight_left": self.left, "weight_right": self.right}

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The full matrix: (d_out, d_in)."""
        return self.left.to(dtype) @ self.right.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) to x (L R)ᵀ (..., d_out), in the dtype of `x`."""
        return x @ self.right.to(x.dtype).T @ self.left.to(x.dtype).T

    def apply(self, x: Tensor, inner: Forward) -> Tensor:
        return inner(x) + self.forward(x)

    def around(self, matrix: Tensor) -> Tensor:
        return matrix + self.dense(matrix.dtype)

    def rows(self, spec: "WeightSpec", start: int) -> Self:
        return type(self)(self.left[start : start + spec.d_out].contiguous(), self.right)

    @classmethod
    def columns_together(cls, spec: "WeightSpec") -> int | None:
        return 1

    def cut_columns(self, spec: "WeightSpec", start: int) -> Self:
        return type(self)(self.left, self.right[:, start : start + spec.d_in].contiguous())
