"""Wanda: pruning by weights and activations."""

from dataclasses import dataclass

from torch import Tensor

from halfplate.formats.spec import WeightSpec
from halfplate.methods.base import Method, Solution, check_inputs, store
from halfplate.solvers.selection import keep_largest
from halfplate.statistics import InputStatistics, Statistic


@dataclass(frozen=True)
class Wanda(Method):
    """Keep the weights with the largest |W_ij| · ‖X_j‖₂, without changing their values.

    Source: Sun et al., arXiv 2306.11695, equation 1, with the root mean square of X_j as its norm.
    """

    name = "wanda"
    summary = "largest |W| times the norm of its input"

    @property
    def requires(self) -> Statistic:
        return Statistic.DIAGONAL

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        score = weight.abs() * statistics.require_diagonal().sqrt()
        return Solution(store(weight, keep_largest(score, spec.pattern), spec))
