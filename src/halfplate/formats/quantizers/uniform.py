"""Evenly spaced values around 0: q times a scale."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfplate.formats.quantizers.base import best_scales, shares_down_to
from halfplate.formats.quantizers.storage import HALVES, Storage, SuperScales


@dataclass(frozen=True)
class Uniform:
    """The values q · scale, q from −2^(bits − 1) to 2^(bits − 1) − 1. With eight bits, -128 is excluded.

    least_share: smallest fraction of the scale without clipping that `refit` tries.
    """

    name: str
    bits: int
    least_share: float = 0.6
    storage: Storage = HALVES
    stored: ClassVar[tuple[str, ...]] = ("scales",)

    @property
    def range(self) -> tuple[int, int]:
        return (-127 if self.bits == 8 else -(1 << self.bits - 1)), (1 << self.bits - 1) - 1

    def nearest(self, values: Tensor, *parameters: Tensor) -> Tensor:
        (scales,) = parameters
        return torch.where(scales > 0, values / scales, 0).round_().clamp_(*self.range)

    def decode(self, numbers: Tensor, *parameters: Tensor) -> Tensor:
        (scales,) = parameters
        return numbers * scales

    def refit(
        self, values: Tensor, shares: Sequence[float] | None = None, energy: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        unclipped = values.abs().amax(-1) / self.range[1]
        shares = shares_down_to(self.least_share) if shares is None else shares

        def rounded(scales: Tensor) -> Tensor:
            return self._numbers(values, scales).mul_(scales.float()[..., None])

        scales = best_scales(values, unclipped, shares, rounded, energy)
        return self._numbers(values, scales), (scales,)

    def _numbers(self, values: Tensor, scales: Tensor) -> Tensor:
        """`nearest` for whole groups (..., width), with one division per group instead of one per value."""
        inverse = torch.where(scales > 0, scales.float().reciprocal(), 0.0)
        return (values * inverse[..., None]).round_().clamp_(*self.range)


INT8 = Uniform("int8", 8)
INT6 = Uniform("int6", 6)
INT5 = Uniform("int5", 5)
INT4 = Uniform("int4", 4)
INT3 = Uniform("int3", 3)
# With only four values, the best scale clips the whole tail of a group.
INT2 = Uniform("int2", 2, least_share=0.25)
# The scales of llama.cpp's Q6_K and, with five bits, Q3_K.
INT6K = Uniform("int6k", 6, storage=SuperScales())
INT3K = Uniform("int3k", 3, storage=SuperScales(bits=5))
