"""GPTQ: rounding with a second-order update of the weights not yet rounded."""

from dataclasses import dataclass

from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.chain import Chain
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.spec import WeightSpec
from halfplate.methods.base import Method, Solution, check_inputs
from halfplate.methods.sparsegpt import on_grid
from halfplate.solvers.obs import obs_sweep
from halfplate.statistics import InputStatistics, Statistic


@dataclass(frozen=True)
class GPTQ(Method):
    """Keep every weight, rounded column after column, and let the later columns compensate for the error.

    Each row has a symmetric scale per 128 (or 64, or 32) columns, chosen when the sweep reaches them. Columns are processed in order.

    damping: fraction of the mean second moment that is added to the diagonal of the Gram matrix.

    Source: Frantar et al., arXiv 2210.17323.
    """

    name = "gptq"
    summary = "every weight rounded to a few bits (int8 to int2); later columns compensate for the error"
    sparse, dense = False, True
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.damping < float("inf"):
            raise HalfplateError(f"damping={self.damping} must be a finite number, 0 or more; try 0.01")

    def check_spec(self, spec: WeightSpec) -> None:
        super().check_spec(spec)
        if spec.core_dtype not in QUANTIZERS:
            raise HalfplateError(
                f"core_dtype={spec.core_dtype!r} is not a quantised type, and method 'gptq' only quantises; use {' or '.join(QUANTIZERS)}"
            )

    @property
    def requires(self) -> Statistic:
        return Statistic.GRAM

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        gram = statistics.require_gram()
        swept = obs_sweep(weight, gram, spec.pattern, self.damping, core_dtype=spec.core_dtype, group=spec.group)
        return Solution(Chain.of(spec, on_grid(swept, spec)))
