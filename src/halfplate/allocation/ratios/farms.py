"""FARMS: layers whose spectra have heavier tails keep more, without the bias of the shapes of their matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from halfplate.allocation.ratios.base import Ratios
from halfplate.allocation.ratios.layers import kept_ratios

LARGEST = 2000  # side of a window, as in the paper
MOST = 15  # windows along a side


class Farms(Ratios):
    """The kept share falls linearly with the exponent α of the tail of the spectrum, averaged over the linears of a layer.

    Spectra are those of square windows of one size, which all matrices of a layer share: half of their smallest side, at most 2000. They
    overlap by half, with at most 15 along a side. α is the Hill estimator of the larger half of the pooled squared singular values.

    Source: FARMS, arXiv 2506.06280 (2000 of 4096, 15 × 15 windows), with the estimator and the linear map of AlphaPruning, arXiv 2410.10912.
    """

    name = "farms"
    summary = "layers whose spectra have heavier tails, in windows of one shape, keep more"

    def measured(self, weights: Sequence[Tensor], norms: Sequence[Tensor]) -> Tensor:
        side = max(1, min(LARGEST, min(min(weight.shape) for weight in weights) // 2))
        exponents = [tail_exponent(spectrum(weight, side)) for weight in weights]
        return torch.tensor(sum(exponents) / len(exponents), dtype=torch.float64, device="cpu")

    def kept(self, measured: Sequence[Tensor], sizes: Sequence[int], mean: float, spread: float) -> list[float]:
        return kept_ratios([-float(exponent) for exponent in measured], sizes, mean, spread)


def spectrum(weight: Tensor, side: int) -> Tensor:
    """The squared singular values of all windows (side, side) of a matrix, fp32, in any order."""
    found = [
        torch.linalg.svdvals(weight[row : row + side, column : column + side].float())
        for row in starts(weight.shape[0], side)
        for column in starts(weight.shape[1], side)
    ]
    return torch.cat(found).square()


def starts(length: int, side: int) -> Iterator[int]:
    """Where windows begin along a side of a matrix: evenly from its begin to its end, overlapping by about half."""
    count = min(MOST, 1 + length - side, 1 + -(-2 * (length - side) // side))
    yield from (round(number * (length - side) / max(1, count - 1)) for number in range(count))


def tail_exponent(values: Tensor) -> float:
    """The Hill estimator of α in a density λ^(−α), from those `values` that are at least their median; inf if these are all equal."""
    ordered = values.double().sort(descending=True).values
    tail = ordered[: max(1, len(ordered) // 2)]
    least = tail[-1].clamp_min(torch.finfo(torch.float64).tiny)
    total = float((tail / least).log().sum())
    return 1 + len(tail) / total if total > 0 else float("inf")


FARMS = Farms()
