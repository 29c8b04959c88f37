"""Values from a table: unevenly spaced numbers times a scale."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfplate.formats.quantizers.base import best_scales, shares_down_to
from halfplate.formats.quantizers.storage import HALVES, Storage, SuperScales

LEAST_SHARE = 0.6  # of the scale that clips nothing, down to which `refit` looks for a better one
# The sixteen numbers of llama.cpp's IQ4_NL: dense around 0, where most weights are. Whole numbers of eight bits, so kernels for int8 run them.
NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Table:
    """The values `numbers[q + 2^(bits − 1)]` · scale, the numbers in rising order."""

    name: str
    bits: int
    numbers: tuple[int, ...]
    storage: Storage = HALVES
    stored: ClassVar[tuple[str, ...]] = ("scales",)

    @property
    def range(self) -> tuple[int, int]:
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1

    def nearest(self, values: Tensor, *parameters: Tensor) -> Tensor:
        (scales,) = parameters
        table = self._table(values)
        ratios = torch.where(scales > 0, values / scales, 0)
        found = torch.bucketize(ratios.contiguous(), (table[1:] + table[:-1]) / 2) + self.range[0]
        return torch.where(scales > 0, found.to(values.dtype), 0)

    def decode(self, numbers: Tensor, *parameters: Tensor) -> Tensor:
        (scales,) = parameters
        return self._table(scales)[numbers.long() - self.range[0]] * scales

    def refit(
        self, values: Tensor, shares: Sequence[float] | None = None, energy: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        # The ends are not equally far from 0; the scale that clips nothing is that of the nearer end for its side.
        least, most = self.numbers[0], self.numbers[-1]
        unclipped = torch.maximum(values.amax(-1) / most, values.amin(-1) / least)
        shares = shares_down_to(LEAST_SHARE) if shares is None else shares

        def rounded(scales: Tensor) -> Tensor:
            each = scales.float()[..., None]
            return self.decode(self.nearest(values, each), each)

        scales = best_scales(values, unclipped, shares, rounded, energy)
        return self.nearest(values, scales.float()[..., None]), (scales,)

    def _table(self, like: Tensor) -> Tensor:
        return torch.tensor(self.numbers, dtype=like.dtype, device=like.device)


# The other two are fitted to groups of 64 normally distributed numbers (Lloyd's algorithm with a scale for each group), and rounded.
EIGHT = (-127, -78, -45, -18, 8, 36, 70, 119)
THIRTY_TWO = (
    *(-127, -108, -94, -84, -75, -67, -60, -54, -48, -41, -35, -29, -24, -18, -12, -6),
    *(0, 6, 12, 18, 24, 30, 36, 42, 48, 55, 61, 69, 78, 89, 102, 122),
)

NL5 = Table("nl5", 5, THIRTY_TWO)
NL4 = Table("nl4", 4, NON_LINEAR)
NL3 = Table("nl3", 3, EIGHT)
NL5K = Table("nl5k", 5, THIRTY_TWO, SuperScales())
NL4K = Table("nl4k", 4, NON_LINEAR, SuperScales())
NL3K = Table("nl3k", 3, EIGHT, SuperScales())
