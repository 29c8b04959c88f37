"""Magnitude pruning."""

from dataclasses import dataclass

from torch import Tensor

from halfplate.formats.spec import WeightSpec
from halfplate.methods.base import Method, Solution, check_inputs, store
from halfplate.solvers.selection import keep_largest
from halfplate.statistics import InputStatistics, Statistic


@dataclass(frozen=True)
class Magnitude(Method):
    """Keep the weights with the largest |W|, without changing their values."""

    name = "magnitude"
    summary = "largest |W| of each group; needs no calibration"

    @property
    def requires(self) -> Statistic:
        return Statistic.NONE

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        return Solution(store(weight, keep_largest(weight.abs(), spec.pattern), spec))
