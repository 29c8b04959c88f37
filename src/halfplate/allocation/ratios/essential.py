"""Essential sparsity: one threshold of magnitude for all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfplate.allocation.ratios.base import Ratios

# Bins of |W| for each doubling, from the power LEAST of 2 to MOST; smaller values, and zeros, fall into the first.
FINE, LEAST, MOST = 128, -32, 16


class Essential(Ratios):
    """Each layer keeps as many weights as are above one threshold for the whole model.

    Which weights stay inside a layer is up to the method; with `magnitude` it is those. Source: Essential Sparsity, arXiv 2306.03805.
    """

    name = "essential"
    summary = "each layer keeps as many weights as exceed one magnitude in the whole model"
    spreads = False

    def measured(self, weights: Sequence[Tensor], norms: Sequence[Tensor]) -> Tensor:
        return sum((histogram(weight) for weight in weights), torch.zeros(bins(), dtype=torch.int64, device="cpu"))

    def kept(self, measured: Sequence[Tensor], sizes: Sequence[int], mean: float, spread: float) -> list[float]:
        everything = torch.stack(list(measured)).double()
        number, part = threshold(everything.sum(0), mean)
        return ((everything[:, number + 1 :].sum(1) + part * everything[:, number]) / everything.sum(1)).tolist()

    def score(self, measured: Tensor, kept: float) -> float:
        return kept


def bins() -> int:
    return FINE * (MOST - LEAST)


def histogram(weight: Tensor) -> Tensor:
    """How many weights have a magnitude in each bin, int64 (bins,)."""
    places = ((weight.abs().double().log2() - LEAST) * FINE).clamp(0, bins() - 1).long()
    return torch.bincount(places.flatten(), minlength=bins()).cpu()


def threshold(counts: Tensor, share: float) -> tuple[int, float]:
    """The bin in which the largest `share` of all values ends, and the part of this bin that belongs to them."""
    above = counts.double().flip(0).cumsum(0).flip(0)
    wanted = share * float(above[0])
    number = int((above >= wanted).nonzero()[-1])
    inside = float(counts[number])
    beyond = float(above[number]) - inside
    return number, (wanted - beyond) / inside if inside else 0.0


def magnitude(counts: Tensor, share: float) -> float:
    """The magnitude that about the largest `share` of all values reach: the lower end of a bin."""
    number, _ = threshold(counts, share)
    return float(2 ** (number / FINE + LEAST))


ESSENTIAL = Essential()
