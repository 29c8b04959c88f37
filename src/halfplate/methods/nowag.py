"""NoWag-P: pruning by the normalised weight."""

from dataclasses import dataclass

from torch import Tensor

from halfplate.formats.spec import WeightSpec
from halfplate.methods.base import Method, Solution, check_inputs, store
from halfplate.solvers.normalise import normalise
from halfplate.solvers.selection import keep_largest
from halfplate.statistics import InputStatistics, Statistic


@dataclass(frozen=True)
class NoWag(Method):
    """Keep the weights with the largest Wn_ij² · mean(X_j²), where Wn is the weight normalised by rows and columns, without changing their values.

    Source: NoWag-P, which is also the start of ARMOR (arXiv 2510.05528).
    """

    name = "nowag"
    summary = "largest row and column normalised weight times the norm of its input (NoWag-P)"

    @property
    def requires(self) -> Statistic:
        return Statistic.DIAGONAL

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        score = importance(normalise(weight).weight, statistics.require_diagonal())
        return Solution(store(weight, keep_largest(score, spec.pattern), spec))


def importance(normalised: Tensor, diagonal: Tensor) -> Tensor:
    """|Wn| · √d, (d_out, d_in), which has the same order as NoWag's Wn² · d and cannot overflow."""
    return normalised.abs() * diagonal.sqrt()
