"""An order of the inputs of a matrix."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.parts.base import Forward, Layout, Outer

if TYPE_CHECKING:
    from halfplate.formats.spec import WeightSpec

NAME = "weight_permutation"


@dataclass(frozen=True, eq=False)
class Permutation(Outer):
    """y = W x = (W P)(Pᵀ x): the inputs are reordered first.

    order: int16 or int32 (d_in,), the input that each column of the inner matrix multiplies.
    """

    order: Tensor
    kinds = ("positions",)
    trained = False

    @classmethod
    def of(cls, order: Tensor) -> "Permutation":
        """Store integers in the smallest type that can index the inputs."""
        return cls(order.to(permutation_dtype(len(order))))

    @classmethod
    def present(cls, spec: "WeightSpec") -> bool:
        return spec.permuted

    @classmethod
    def layout(cls, spec: "WeightSpec") -> Layout:
        return {NAME: ((spec.d_in,), permutation_dtype(spec.d_in))}

    @classmethod
    def check(cls, spec: "WeightSpec", tensor: str, values: Tensor, name: str) -> None:
        expected = torch.arange(spec.d_in, dtype=torch.int64, device=values.device)
        if not torch.equal(values.long().sort().values, expected):
            raise HalfplateError(
                f"{name} is not a permutation of 0 to {spec.d_in - 1}; the file is damaged, write it again"
            )

    @classmethod
    def from_tensors(cls, spec: "WeightSpec", tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors[NAME])

    def tensors(self) -> dict[str, Tensor]:
        return {NAME: self.order}

    def apply(self, x: Tensor, inner: Forward) -> Tensor:
        return inner(x[..., self.order.long()])

    def around(self, matrix: Tensor) -> Tensor:
        return matrix[:, self.order.long().argsort()]

    def rows(self, spec: "WeightSpec", start: int) -> Self:
        return self


def permutation_dtype(d_in: int) -> torch.dtype:
    """The smallest type that can index the inputs 0 to d_in - 1."""
    return torch.int16 if d_in <= 1 << 15 else torch.int32
