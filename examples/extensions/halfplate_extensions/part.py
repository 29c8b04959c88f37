"""A part of a matrix: a diagonal in bf16 that is added to the matrix inside."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.errors import HalfplateError
from halfplate.formats import Outer, WeightSpec
from halfplate.formats.parts.base import Forward, Layout

NAME = "weight_diagonal"


@dataclass(frozen=True, eq=False)
class Diagonal(Outer):
    """W = inner + D, with D (d_out, d_in) zero off its main diagonal. numbers: (min(d_out, d_in),)."""

    numbers: Tensor
    kinds = ("diagonals",)

    @classmethod
    def check_spec(cls, spec: WeightSpec) -> None:
        if spec.in_shared:
            raise HalfplateError(
                "share_wrappers=True stacks matrices, and only the first one would have a diagonal; leave it out"
            )

    @classmethod
    def layout(cls, spec: WeightSpec) -> Layout:
        return {NAME: ((min(spec.d_out, spec.d_in),), torch.bfloat16)}

    @classmethod
    def from_tensors(cls, spec: WeightSpec, tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors[NAME])

    def tensors(self) -> dict[str, Tensor]:
        return {NAME: self.numbers}

    def apply(self, x: Tensor, inner: Forward) -> Tensor:
        y, count = inner(x), len(self.numbers)
        product = x[..., :count] * self.numbers.to(x.dtype)
        return y + functional.pad(product, (0, y.shape[-1] - count))

    def around(self, matrix: Tensor) -> Tensor:
        added = matrix.clone()
        added.diagonal().add_(self.numbers.to(matrix.dtype))
        return added

    def rows(self, spec: WeightSpec, start: int) -> Self:
        return type(self)(self.numbers[: spec.d_out])
