"""The core of a matrix that consists of its other parts alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from halfplate.formats.parts.base import Layout
from halfplate.formats.parts.core import VALUES, NMSparse, TrainableCore
from halfplate.pattern import NONE

if TYPE_CHECKING:
    from halfplate.formats.spec import WeightSpec


@dataclass(frozen=True, eq=False)
class NoCore(NMSparse):
    """Zeros (d_out, d_in), of which nothing is stored but an empty tensor; other parts are added to it.

    stored: bf16 (d_out, 0).
    width: d_in.
    """

    width: int = 0
    trained = False

    @classmethod
    def of(cls, spec: "WeightSpec", device: torch.device) -> "NoCore":
        """The zeros of a matrix of `spec`."""
        return cls(torch.empty((spec.d_out, 0), dtype=torch.bfloat16, device=device), None, NONE, None, spec.d_in)

    @classmethod
    def present(cls, spec: "WeightSpec") -> bool:
        return spec.pattern.is_none

    @classmethod
    def layout(cls, spec: "WeightSpec") -> Layout:
        # An empty tensor with the name of the original weight makes other software refuse the file.
        return {VALUES: ((0,), torch.bfloat16)}

    @classmethod
    def from_tensors(cls, spec: "WeightSpec", tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors[VALUES].reshape(spec.d_out, 0), None, NONE, None, spec.d_in)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.stored), self.width

    def tensors(self) -> dict[str, Tensor]:
        return {VALUES: self.stored.reshape(0)}

    def columns(self) -> Tensor:
        return torch.empty((len(self.stored), 0), dtype=torch.int64, device=self.stored.device)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(self.shape, dtype=dtype, device=self.stored.device)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], len(self.stored))

    @classmethod
    def columns_together(cls, spec: "WeightSpec") -> int | None:
        return 1

    def cut_columns(self, spec: "WeightSpec", start: int) -> Self:
        return replace(self, width=spec.d_in)

    def trainable(self, spec: "WeightSpec", values_too: bool) -> TrainableCore:
        return TrainableCore(self, spec, values_too=False)
