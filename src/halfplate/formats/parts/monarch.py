"""A Monarch matrix: two block-diagonal matrices with a fixed permutation between them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from halfplate.dtypes import STORED
from halfplate.errors import HalfplateError
from halfplate.formats.parts.base import Forward, Layout, Outer
from halfplate.formats.parts.options import whole_numbers

if TYPE_CHECKING:
    from halfplate.formats.spec import WeightSpec

NAME = "monarch"
LEFT, RIGHT = "weight_monarch_left", "weight_monarch_right"


@dataclass(frozen=True, eq=False)
class Monarch(Outer):
    """W = inner + M: the inputs in blocks of consecutive ones, the outputs dealt out to as many blocks, and a rank for each pair of blocks.

    Options: `blocks` and `rank`. Output o belongs to the block o mod blocks.

    left: (blocks of outputs, d_out / blocks, blocks of inputs · rank). right: (blocks of inputs, blocks of outputs · rank, d_in / blocks).
    Source: Dao et al., Monarch, arXiv 2204.00595.
    """

    left: Tensor
    right: Tensor
    kinds = ("Monarch factors",)

    @classmethod
    def check_spec(cls, spec: "WeightSpec") -> None:
        most = min(spec.d_out, spec.d_in)
        blocks, rank = whole_numbers(spec, NAME, blocks=most, rank=most)
        if spec.d_out % blocks or spec.d_in % blocks:
            fitting = [number for number in range(2, 65) if not (spec.d_out % number or spec.d_in % number)]
            raise HalfplateError(
                f"blocks={blocks} must divide both sides of a matrix {spec.d_out}×{spec.d_in}; use {' or '.join(map(str, fitting)) or '1'}, or exclude the matrix"
            )
        if rank > most // blocks:
            raise HalfplateError(
                f"rank={rank} of blocks {spec.d_out // blocks}×{spec.d_in // blocks} must be at most {most // blocks}; choose less"
            )
        if spec.wrapper_dtype not in STORED:
            raise HalfplateError(
                f"wrapper_dtype={spec.wrapper_dtype!r} is not a type for Monarch factors; use {', '.join(STORED)}"
            )

    @classmethod
    def layout(cls, spec: "WeightSpec") -> Layout:
        blocks, rank = (int(spec.options(NAME)[name]) for name in ("blocks", "rank"))
        dtype = STORED[spec.wrapper_dtype]
        return {
            LEFT: ((blocks, spec.d_out // blocks, blocks * rank), dtype),
            RIGHT: ((blocks, blocks * rank, spec.d_in // blocks), dtype),
        }

    @classmethod
    def rows_together(cls, spec: "WeightSpec") -> int:
        return int(spec.options(NAME)["blocks"])

    @classmethod
    def from_tensors(cls, spec: "WeightSpec", tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors[LEFT], tensors[RIGHT])

    def tensors(self) -> dict[str, Tensor]:
        return {LEFT: self.left, RIGHT: self.right}

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """left (j, l, k, b) and right (k, j, b, i) of input blocks k of size i, output blocks j of size l, and rank b."""
        blocks = len(self.left)
        left = self.left.to(dtype).unflatten(2, (blocks, -1))
        return left, self.right.to(dtype).unflatten(1, (blocks, -1))

    def around(self, matrix: Tensor) -> Tensor:
        left, right = self._factors(matrix.dtype)
        return matrix + torch.einsum("jlkb,kjbi->ljki", left, right).reshape(matrix.shape)

    def apply(self, x: Tensor, inner: Forward) -> Tensor:
        left, right = self._factors(x.dtype)
        mixed = torch.einsum("...ki,kjbi->...jkb", x.unflatten(-1, (len(left), -1)), right)
        return inner(x) + torch.einsum("...jkb,jlkb->...lj", mixed, left).flatten(-2)

    def rows(self, spec: "WeightSpec", start: int) -> Self:
        first, count = start // len(self.left), spec.d_out // len(self.left)
        return type(self)(self.left[:, first : first + count].contiguous(), self.right)
