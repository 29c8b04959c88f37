"""OWL: layers with more outliers keep more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfplate.allocation.ratios.base import Ratios
from halfplate.allocation.ratios.layers import kept_ratios

OUTLIER = 5.0  # multiple of the mean above which a score is an outlier


class Owl(Ratios):
    """The kept share is linear in the share of outliers: weights with |W| · ‖X‖ above 5 times the mean of the layer.

    Source: OWL, Yin et al. (ICML 2024).
    """

    name = "owl"
    summary = "layers with more outliers among weights times inputs keep more"
    reads_inputs = True

    def measured(self, weights: Sequence[Tensor], norms: Sequence[Tensor]) -> Tensor:
        scores = [weight.abs() * norm for weight, norm in zip(weights, norms, strict=True)]
        return torch.tensor(outlier_share(scores), dtype=torch.float64, device="cpu")

    def kept(self, measured: Sequence[Tensor], sizes: Sequence[int], mean: float, spread: float) -> list[float]:
        return kept_ratios([float(share) for share in measured], sizes, mean, spread)


def outlier_share(scores: Sequence[Tensor]) -> float:
    """Share of the entries of `scores`, those of all linears of one layer, that exceed 5 times their common mean.

    It is 0 if all scores are 0. Source: OWL, equation 2, with M = 5.

    scores: |W_ij| · ‖X_j‖, (d_out, d_in) each.
    """
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.double().sum()) for score in scores) / count
    above = sum(int((score > OUTLIER * mean).sum()) for score in scores)
    return above / count


OWL = Owl()
