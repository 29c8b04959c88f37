"""A · S · B: a core between optional block-diagonal wrappers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halfplate.formats.block_diagonal import BlockDiagonal
from halfplate.formats.nm_sparse import NMSparse
from halfplate.formats.spec import WeightSpec
from halfplate.pattern import DENSE


@dataclass(frozen=True, eq=False)
class Chain:
    """The matrix `out · core · in`, applied from the right; a missing wrapper is the identity.

    spec: how it is stored.
    """

    spec: WeightSpec
    core: NMSparse
    out_wrapper: BlockDiagonal | None = None
    in_wrapper: BlockDiagonal | None = None

    @classmethod
    def from_tensors(cls, spec: WeightSpec, tensors: Mapping[str, Tensor]) -> "Chain":
        """Put the stored tensors of a matrix, named as in `spec.layout()`, back together."""
        wrappers = {
            side: BlockDiagonal(*(tensors.get(f"weight_{side}_{part}") for part in ("blocks", "tail", "scales")))
            if block
            else None
            for side, block in (("out", spec.out_block), ("in", spec.in_block))
        }
        return cls(spec, NMSparse.from_tensors(spec, tensors), wrappers["out"], wrappers["in"])

    @classmethod
    def of_dense(cls, weight: Tensor, core_dtype: str) -> "Chain":
        """A dense `weight` (d_out, d_in) in the type `core_dtype`; HalfplateError where that cannot hold a value."""
        spec = WeightSpec(weight.shape[0], weight.shape[1], DENSE, core_dtype)
        return cls(spec, NMSparse.from_dense(weight, None, DENSE, core_dtype))

    @property
    def shape(self) -> tuple[int, int]:
        return self.core.shape

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.core, self.out_wrapper, self.in_wrapper) if part is not None)

    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by their name below the module."""
        tensors = self.core.tensors()
        for side, wrapper in (("out", self.out_wrapper), ("in", self.in_wrapper)):
            if wrapper is not None:
                tensors |= wrapper.tensors(side)
        return tensors

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix it stands for: (d_out, d_in)."""
        product = self.core.dense(dtype)
        if self.out_wrapper is not None:
            product = self.out_wrapper.forward(product.T).T
        if self.in_wrapper is not None:
            # forward multiplies rows by the transpose; that of the transpose gives rows times the wrapper itself.
            product = self.in_wrapper.transposed(dtype).forward(product)
        return product.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) to x (A S B)ᵀ (..., d_out), in the dtype of `x`."""
        if self.in_wrapper is not None:
            x = self.in_wrapper.forward(x)
        x = self.core.forward(x)
        return x if self.out_wrapper is None else self.out_wrapper.forward(x)
