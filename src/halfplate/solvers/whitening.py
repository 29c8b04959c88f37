"""Weighting the errors of a matrix by the statistics of its inputs, so that its least squares become plain ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.statistics import InputStatistics, Statistic

# Names of weightings, with the statistics that they need.
WEIGHTINGS = {"none": Statistic.NONE, "diagonal": Statistic.DIAGONAL, "gram": Statistic.GRAM}
TRIES = 12  # each adds ten times as much to the diagonal of a Gram matrix that cannot be factorised


@dataclass(frozen=True, eq=False)
class Whitening:
    """A matrix L with L Lᵀ = H, so that ‖(W − Ŵ) L‖² is the output error of Ŵ for inputs with the second moments H, up to a factor.

    scales: fp64 (d_in,), positive.
    factor: lower triangular, fp64 (d_in, d_in); None for a diagonal H. L = diag(scales) · factor.
    """

    scales: Tensor
    factor: Tensor | None

    @classmethod
    def of(cls, weighting: str, statistics: InputStatistics, weight: Tensor, damping: float) -> Whitening:
        """The whitening of one of WEIGHTINGS, scaled so that the mean second moment is 1.

        weight: (d_out, d_in), for the number of inputs and the device.
        damping: added to the diagonal, as a fraction of the second moment of each input. Inputs that are always zero count as the smallest.
        """
        if weighting == "none":
            return cls(torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device), None)
        gram = statistics.require_gram().to(weight.device, torch.float64) if weighting == "gram" else None
        moments = (statistics.require_diagonal() if gram is None else gram.diagonal()).to(weight.device, torch.float64)
        alive = moments > 0
        if not bool(alive.any()):
            return cls(torch.ones_like(moments), None)
        scales = torch.where(alive, moments, moments[alive].min()).sqrt()
        unit = scales / scales.square().mean().sqrt()
        return cls(unit, None if gram is None else _factor(gram / scales[:, None] / scales, alive, damping))

    def into(self, weight: Tensor) -> Tensor:
        """W L: fp64 (rows, d_in)."""
        scaled = weight.double() * self.scales
        return scaled if self.factor is None else scaled @ self.factor

    def back(self, rows: Tensor) -> Tensor:
        """R L⁻¹ for R (rows, d_in): fp64."""
        if self.factor is not None:
            rows = torch.linalg.solve_triangular(self.factor, rows.double(), upper=False, left=False)
        return rows / self.scales


def _factor(correlation: Tensor, alive: Tensor, damping: float) -> Tensor:
    """The Cholesky factor of a Gram matrix of inputs with unit second moments."""
    for attempt in range(TRIES):
        added = damping if not attempt else max(damping, 1e-8) * 10.0**attempt
        damped = correlation.clone()
        damped.diagonal().add_(torch.where(alive, added, 1.0))
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return factor
    raise HalfplateError("gram is not positive semidefinite, expected a second moment; collect the statistics again")


def check_weighting(weighting: str, damping: float) -> None:
    """Raise HalfplateError unless these are a weighting and a damping."""
    if weighting not in WEIGHTINGS:
        raise HalfplateError(f"weighting={weighting!r} must be one of {', '.join(WEIGHTINGS)}; try gram")
    if not 0 <= damping < float("inf"):
        raise HalfplateError(f"damping={damping} must be a finite number, 0 or more; try 0.01")
