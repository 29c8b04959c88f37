"""One matrix to factorise, cut into tiles of equal size, and its factors."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.formats.spec import WeightSpec
from halfplate.pattern import Pattern
from halfplate.solvers.selection import keep_largest

FREE_TILE = 16  # tile size of a side without full blocks, where any size gives the same result


class Wrapper(Enum):
    """The kinds of wrappers."""

    IDENTITY = "identity"
    DIAGONAL = "diagonal"
    BLOCKS = "blocks"

    @classmethod
    def of(cls, block: int) -> "Wrapper":
        """The kind for a block size of a specification."""
        return {0: cls.IDENTITY, 1: cls.DIAGONAL}.get(block, cls.BLOCKS)


@dataclass(frozen=True, eq=False)
class Problem:
    """Minimise Σ_ij d_j (W − A S B)²_ij over A, S and B. W is padded with zeros to whole tiles; they stay zero in every solver.

    weight: fp32 (rows, cols), a multiple of the tiles.
    moment: fp32 (cols,), d.
    row_tile, col_tile: block sizes of A and B.
    d_out, d_in: the size without padding.
    """

    weight: Tensor
    moment: Tensor
    pattern: Pattern
    row_tile: int
    col_tile: int
    out_wrapper: Wrapper
    in_wrapper: Wrapper
    d_out: int
    d_in: int

    @classmethod
    def from_weight(cls, weight: Tensor, moment: Tensor, spec: WeightSpec) -> "Problem":
        """Pad `weight` (d_out, d_in) and the second moments `moment` (d_in,) to the tiles of `spec`."""
        multiple_of_m = -(-FREE_TILE // spec.pattern.m) * spec.pattern.m
        row_tile = min(spec.out_block, spec.d_out) if spec.out_block > 1 else FREE_TILE
        col_tile = min(spec.in_block, spec.d_in) if spec.in_block > 1 else multiple_of_m
        rows, cols = -spec.d_out % row_tile, -spec.d_in % col_tile
        return cls(
            weight=functional.pad(weight.to(torch.float32), (0, cols, 0, rows)).contiguous(),
            moment=functional.pad(moment.to(torch.float32), (0, cols)).contiguous(),
            pattern=spec.pattern,
            row_tile=row_tile,
            col_tile=col_tile,
            out_wrapper=Wrapper.of(spec.out_block),
            in_wrapper=Wrapper.of(spec.in_block),
            d_out=spec.d_out,
            d_in=spec.d_in,
        )

    @property
    def row_tiles(self) -> int:
        return self.weight.shape[0] // self.row_tile

    @property
    def col_tiles(self) -> int:
        return self.weight.shape[1] // self.col_tile

    def zero_loss(self) -> float:
        """The loss of the zero matrix, in fp64."""
        return float((self.weight.double().square().sum(0) * self.moment.double()).sum())

    def start(self) -> "Factors":
        """Identity wrappers around the core of NoWag-P (section 3.2 of the paper)."""
        like: dict[str, Any] = {"dtype": torch.float32, "device": self.weight.device}
        mask = keep_largest(self.weight.square() * self.moment, self.pattern)
        return Factors(
            torch.eye(self.row_tile, **like).repeat(self.row_tiles, 1, 1),
            self.weight * mask,
            torch.eye(self.col_tile, **like).repeat(self.col_tiles, 1, 1),
        )


@dataclass(eq=False)
class Factors:
    """A, S and B of a problem, all fp32.

    out_blocks: A, (row_tiles, row_tile, row_tile).
    core: S with its zeros, (rows, cols).
    in_blocks: B, (col_tiles, col_tile, col_tile).
    """

    out_blocks: Tensor
    core: Tensor
    in_blocks: Tensor

    def product(self) -> Tensor:
        """A · S · B, (rows, cols)."""
        row_tile, col_tile = self.out_blocks.shape[1], self.in_blocks.shape[1]
        rows, cols = self.core.shape
        right = self.core.reshape(rows, -1, col_tile).transpose(0, 1) @ self.in_blocks  # (col_tiles, rows, col_tile)
        right = right.transpose(0, 1).reshape(-1, row_tile, cols)
        return (self.out_blocks @ right).reshape(rows, cols)
