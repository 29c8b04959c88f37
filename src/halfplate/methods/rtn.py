"""Round to nearest, without pruning."""

from dataclasses import dataclass

from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.chain import Chain
from halfplate.formats.parts.core import NMSparse
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.spec import WeightSpec
from halfplate.methods.base import Method, Solution, check_inputs
from halfplate.statistics import InputStatistics, Statistic


@dataclass(frozen=True)
class RoundToNearest(Method):
    """Keep every weight, rounded to nearest with one scale per row and 128 (or 64, or 32) columns, as a baseline."""

    name = "rtn"
    summary = "every weight rounded to a few bits (int8 to int2), none dropped; needs no calibration"
    sparse, dense = False, True

    def check_spec(self, spec: WeightSpec) -> None:
        super().check_spec(spec)
        if spec.core_dtype not in QUANTIZERS:
            raise HalfplateError(
                f"core_dtype={spec.core_dtype!r} is not a quantised type, and method 'rtn' only quantises; use {' or '.join(QUANTIZERS)}"
            )

    @property
    def requires(self) -> Statistic:
        return Statistic.NONE

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        return Solution(Chain.of(spec, NMSparse.from_dense(weight, None, spec.pattern, spec.core_dtype, spec.group)))
