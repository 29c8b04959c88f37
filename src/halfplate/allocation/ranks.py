"""One rank for every matrix, by a common threshold on normalised singular values (WeLore)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STEPS = 60  # halvings of the interval of the threshold


def normalised(values: Tensor) -> Tensor:
    """Singular values of one matrix, scaled to 0 to 1. Source: WeLore, arXiv 2407.11239, section 3."""
    values = values.double()
    least, most = values.min(), values.max()
    return (values - least) / (most - least) if bool(most > least) else torch.ones_like(values)


def ranks_within(
    spectra: Sequence[Tensor], nbytes: Sequence[Callable[[int], int]], budget: int
) -> tuple[list[int], float]:
    """The number of normalised singular values above the smallest threshold whose matrices fit in `budget`, and that threshold.

    Every matrix keeps at least rank 1, also if `budget` is too small for that.

    nbytes: of each matrix at a rank.
    """

    def at(threshold: float) -> list[int]:
        return [max(int((spectrum > threshold).sum()), 1) for spectrum in spectra]

    low, high = -1.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        spent = sum(cost(rank) for cost, rank in zip(nbytes, at(middle), strict=True))
        low, high = (low, middle) if spent <= budget else (middle, high)
    return at(high), high
