"""Evenly spaced values from a minimum on: a code times a scale, plus a minimum."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfplate.formats.quantizers.base import shares_down_to
from halfplate.formats.quantizers.storage import HALVES, Storage, SuperScales


@dataclass(frozen=True)
class Affine:
    """The values (q + 2^(bits − 1)) · scale + minimum, q from −2^(bits − 1) to 2^(bits − 1) − 1.

    least_share: smallest fraction of the distance from the least value to the greatest that `refit` tries to cover.
    """

    name: str
    bits: int
    least_share: float = 0.6
    storage: Storage = HALVES
    stored: ClassVar[tuple[str, ...]] = ("scales", "minima")

    @property
    def range(self) -> tuple[int, int]:
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1

    def nearest(self, values: Tensor, *parameters: Tensor) -> Tensor:
        scales, minima = parameters
        least, greatest = self.range
        return torch.where(scales > 0, (values - minima) / scales + least, 0).round_().clamp_(least, greatest)

    def decode(self, numbers: Tensor, *parameters: Tensor) -> Tensor:
        scales, minima = parameters
        return (numbers - self.range[0]) * scales + minima

    def refit(
        self, values: Tensor, shares: Sequence[float] | None = None, energy: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As in `Quantizer`. For each share of the range of a group, values are rounded, and both parameters are the least squares of their codes."""
        weights = torch.ones_like(values) if energy is None else energy.expand_as(values)
        # A range without 0 is covered from 0 on: a minimum of one sign can be stored under a super-scale.
        low, high = values.amin(-1).clamp_max(0), values.amax(-1).clamp_min(0)
        best = self._halves((high - low) / ((1 << self.bits) - 1), low)
        best_error = self._error(values, weights, best)
        for share in shares_down_to(self.least_share) if shares is None else shares:
            cut = (1 - share) / 2 * (high - low)
            scales = share * (high - low) / ((1 << self.bits) - 1)
            codes = self.nearest(values, scales[..., None], (low + cut)[..., None]).sub_(self.range[0])
            found = self._halves(*_least_squares(values, codes, weights, scales, low + cut))
            error = self._error(values, weights, found)
            better = error < best_error
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
            best_error = torch.where(better, error, best_error)
        return self.nearest(values, *(part.float()[..., None] for part in best)), best

    def _error(self, values: Tensor, weights: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        each = [part.float()[..., None] for part in parameters]
        error = (self.decode(self.nearest(values, *each), *each) - values).square_().mul_(weights).sum(-1)
        return torch.where(error.isfinite(), error, torch.inf)

    @staticmethod
    def _halves(*parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.to(torch.float16) for part in parameters)


def _least_squares(
    values: Tensor, codes: Tensor, weights: Tensor, scales: Tensor, minima: Tensor
) -> tuple[Tensor, Tensor]:
    """The scale and the minimum, 0 or less, with the least error for these codes; those given where the codes leave one undetermined."""
    total = weights.sum(-1)
    mean, middle = (weights * codes).sum(-1) / total, (weights * values).sum(-1) / total
    apart = codes - mean[..., None]
    spread = (weights * apart.square()).sum(-1)
    slope = (weights * apart * values).sum(-1) / spread
    offset = middle - slope * mean
    through_zero = (weights * codes * values).sum(-1) / (weights * codes.square()).sum(-1)
    slope = torch.where(offset > 0, through_zero, slope)
    usable = slope.isfinite() & (slope > 0) & offset.isfinite()
    return torch.where(usable, slope, scales), torch.where(usable, offset.clamp_max(0), minima)


AFFINE5 = Affine("affine5", 5)
AFFINE4 = Affine("affine4", 4)
AFFINE3 = Affine("affine3", 3)
AFFINE2 = Affine("affine2", 2, least_share=0.4)
# The scales and minima of llama.cpp's Q5_K, Q4_K and, with four bits, Q2_K.
AFFINE5K = Affine("affine5k", 5, storage=SuperScales())
AFFINE4K = Affine("affine4k", 4, storage=SuperScales())
AFFINE3K = Affine("affine3k", 3, storage=SuperScales())
AFFINE2K = Affine("affine2k", 2, least_share=0.4, storage=SuperScales(bits=4))
