"""NF4, sixteen values spaced like the quantiles of a normal distribution (Dettmers et al., arXiv 2305.14314, appendix E)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfplate.formats.quantizers.base import best_scales, shares_down_to

NEGATIVE = (-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004)
POSITIVE = (0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
TABLE = torch.tensor(NEGATIVE + POSITIVE, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class NormalFloat:
    """The values TABLE[q + 8] times a scale, q from -8 to 7 (see `halfplate.formats.quantizers.Quantizer`)."""

    name: str = "nf4"
    bits: int = 4
    range: tuple[int, int] = (-8, 7)
    stored: ClassVar[tuple[str, ...]] = ("scales",)

    def nearest(self, values: Tensor, *parameters: Tensor) -> Tensor:
        (scales,) = parameters
        ratios = torch.where(scales > 0, values / scales, 0)
        table = TABLE.to(values.device, values.dtype)
        between = (table[1:] + table[:-1]) / 2
        return (torch.bucketize(ratios.contiguous(), between) - 8).to(values.dtype)

    def decode(self, numbers: Tensor, *parameters: Tensor) -> Tensor:
        (scales,) = parameters
        return TABLE.to(scales.device, scales.dtype)[numbers.long() + 8] * scales

    def refit(
        self, values: Tensor, shares: Sequence[float] | None = None, energy: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        def rounded(scales: Tensor) -> Tensor:
            each = scales.float()[..., None]
            return self.decode(self.nearest(values, each), each)

        largest = values.abs().amax(-1)
        scales = best_scales(values, largest, shares or shares_down_to(0.6), rounded, energy)
        return self.nearest(values, scales.float()[..., None]), (scales,)


NF4 = NormalFloat()
