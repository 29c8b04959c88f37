"""Values from a table: unevenly spaced numbers times a scale."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
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
        # Numbers are whole, so where a value belongs changes only at multiples of a half; a look-up is much faster than a search.
        halves = torch.where(scales > 0, values / scales, 0).mul_(2).ceil_()
        least, most = (halves.new_tensor(2 * number) for number in (self.numbers[0], self.numbers[-1]))
        places = halves.fmax(least).fmin(most).sub_(least)  # fmax: a NaN becomes a code as any other
        codes = torch.tensor(self._codes_of_halves, dtype=values.dtype, device=values.device)
        return torch.where(scales > 0, _looked_up(codes, places), 0)

    def decode(self, numbers: Tensor, *parameters: Tensor) -> Tensor:
        (scales,) = parameters
        table = torch.tensor(self.numbers, dtype=scales.dtype, device=scales.device)
        return _looked_up(table, numbers.to(torch.int32) - self.range[0]) * scales

    @cached_property
    def _codes_of_halves(self) -> list[int]:
        """The q of each multiple of a half, from the first to the last of the numbers: a number half way belongs to the lower one."""
        middles = [(low + high) / 2 for low, high in pairwise(self.numbers)]
        halves = range(2 * self.numbers[0], 2 * self.numbers[-1] + 1)
        return [bisect_left(middles, half / 2) + self.range[0] for half in halves]

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


def _looked_up(table: Tensor, places: Tensor) -> Tensor:
    """The entries of `table` at `places`, whole numbers of any dtype, in their shape."""
    return table.index_select(0, places.to(torch.int32).reshape(-1)).reshape(places.shape)


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
# The scales of llama.cpp's IQ4_XS.
NL4S = Table("nl4s", 4, NON_LINEAR, SuperScales(bits=5))
