"""A · S · B + L · R: a core between optional block-diagonal wrappers, what may be added to it, and the order of its inputs."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halfplate.formats.block_diagonal import BlockDiagonal
from halfplate.formats.low_rank import LowRank
from halfplate.formats.nm_sparse import NMSparse
from halfplate.formats.spec import WeightSpec


@dataclass(frozen=True, eq=False)
class Chain:
    """The matrix `out · core · in + added`, applied from the right; a missing wrapper is the identity.

    spec: how it is stored; where it shares the input wrapper of another matrix, that is not a stored tensor of this one.
    permutation: int16 or int32 (d_in,), the input that each column of that matrix multiplies; None where they are in order.
    y = W x = (W P)(Pᵀ x): inputs are put in that order before anything else.
    """

    spec: WeightSpec
    core: NMSparse
    out_wrapper: BlockDiagonal | None = None
    in_wrapper: BlockDiagonal | None = None
    added: LowRank | None = None
    permutation: Tensor | None = None

    @classmethod
    def from_tensors(cls, spec: WeightSpec, tensors: Mapping[str, Tensor]) -> "Chain":
        """Put the tensors of a matrix, named as in `spec.alone.layout()`, back together."""
        wrappers = {
            side: BlockDiagonal(*(tensors.get(f"weight_{side}_{part}") for part in ("blocks", "tail", "scales")))
            if block
            else None
            for side, block in (("out", spec.out_block), ("in", spec.in_block))
        }
        added = LowRank(tensors["weight_left"], tensors["weight_right"]) if spec.rank else None
        permutation = tensors["weight_permutation"] if spec.permuted else None
        return cls(spec, NMSparse.from_tensors(spec, tensors), wrappers["out"], wrappers["in"], added, permutation)

    @property
    def shape(self) -> tuple[int, int]:
        return self.core.shape

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by their name below the module."""
        tensors = self.core.tensors()
        for side, wrapper in (("out", self.out_wrapper), ("in", self.in_wrapper)):
            if wrapper is not None and not (side == "in" and self.spec.in_shared):
                tensors |= wrapper.tensors(side)
        if self.added is not None:
            tensors |= self.added.tensors()
        return tensors if self.permutation is None else tensors | {"weight_permutation": self.permutation}

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix it stands for: (d_out, d_in)."""
        product = self.core.dense(dtype)
        if self.out_wrapper is not None:
            product = self.out_wrapper.forward(product.T).T
        if self.in_wrapper is not None:
            # forward multiplies rows by the transpose; that of the transpose gives rows times the wrapper itself.
            product = self.in_wrapper.transposed(dtype).forward(product)
        if self.added is not None:
            product = product + self.added.dense(dtype)
        return product.contiguous() if self.permutation is None else unpermuted(product, self.permutation)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) to x (A S B + L R)ᵀ (..., d_out), in the dtype of `x`."""
        if self.permutation is not None:
            x = x[..., self.permutation.long()]
        y = self.core.forward(x if self.in_wrapper is None else self.in_wrapper.forward(x))
        if self.out_wrapper is not None:
            y = self.out_wrapper.forward(y)
        return y if self.added is None else y + self.added.forward(x)


def unpermuted(matrix: Tensor, permutation: Tensor) -> Tensor:
    """The columns of `matrix` (d_out, d_in) back in the order of the inputs that they multiply."""
    return matrix[:, permutation.long().argsort()]
