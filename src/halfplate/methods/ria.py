"""RIA: relative importance and activations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.chain import Chain
from halfplate.formats.parts.permutation import Permutation
from halfplate.formats.spec import WeightSpec
from halfplate.methods.base import Method, Solution, check_inputs, store
from halfplate.solvers.permutation import channel_permutation, check_available
from halfplate.solvers.selection import keep_largest
from halfplate.statistics import InputStatistics, Statistic


@dataclass(frozen=True)
class RIA(Method):
    """Keep the weights with the largest (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) · ‖X_j‖₂^power, without changing their values.

    power: weight of the activations, 0 or more.
    permute: reorder the input channels so that N:M drops less (halfplate.solvers.permutation); each matrix stores its own order.

    Source: Zhang et al., "Plug-and-Play" (ICLR 2024), equation 4 and its channel permutation.
    """

    name = "ria"
    summary = "largest |W| relative to its row and column, times a power of the norm of its input"
    power: float = 0.5
    permute: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.power < float("inf"):
            raise HalfplateError(f"power={self.power} must be a finite number, 0 or more; try 0.5")

    @property
    def permutes(self) -> bool:
        return self.permute

    def check_spec(self, spec: WeightSpec) -> None:
        super().check_spec(spec)
        if spec.permuted:
            check_available()

    @property
    def requires(self) -> Statistic:
        return Statistic.DIAGONAL

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        score = relative_importance(weight) * statistics.require_diagonal().sqrt().pow(self.power)
        if not spec.permuted:
            return Solution(store(weight, keep_largest(score, spec.pattern), spec))
        order = channel_permutation(score, spec.pattern)
        core = store(weight[:, order], keep_largest(score[:, order], spec.pattern), spec).core
        return Solution(Chain.of(spec, core, Permutation.of(order)))


def relative_importance(weight: Tensor) -> Tensor:
    """|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|, (d_out, d_in); 0 in all-zero rows and columns."""
    size = weight.abs()
    sums = (size.sum(dim, keepdim=True, dtype=torch.float64) for dim in (0, 1))
    column, row = (torch.where(total == 0, 1, total).to(weight.dtype) for total in sums)
    return size / column + size / row
