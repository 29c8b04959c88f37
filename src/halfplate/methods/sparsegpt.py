"""SparseGPT: pruning with a second-order update of the kept weights."""

from dataclasses import dataclass

from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.chain import Chain
from halfplate.formats.parts.core import NMSparse
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.spec import WeightSpec
from halfplate.methods.base import Method, Solution, check_inputs
from halfplate.solvers.obs import Swept, obs_sweep
from halfplate.statistics import InputStatistics, Statistic


@dataclass(frozen=True)
class SparseGPT(Method):
    """Prune column after column by W² / U_jj² and let the later columns compensate for the error.

    Quantised values are rounded inside the sweep if M divides the columns of a scale, otherwise afterwards.

    damping: fraction of the mean second moment that is added to the diagonal of the Gram matrix.
    column_block: columns between two updates of the whole matrix; affects only the speed.

    Source: Frantar and Alistarh, arXiv 2301.00774.
    """

    name = "sparsegpt"
    summary = "second-order pruning; kept weights compensate for the error"
    damping: float = 0.01
    column_block: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.damping < float("inf"):
            raise HalfplateError(f"damping={self.damping} must be a finite number, 0 or more; try 0.01")
        if self.column_block < 1:
            raise HalfplateError(f"column_block={self.column_block} must be at least 1; try 128")

    @property
    def requires(self) -> Statistic:
        return Statistic.GRAM

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        core = swept_core(weight, statistics.require_gram(), spec, self.damping, self.column_block)
        return Solution(Chain.of(spec, core))


def swept_core(weight: Tensor, gram: Tensor, spec: WeightSpec, damping: float, column_block: int = 128) -> NMSparse:
    """The core of the SparseGPT sweep over `weight` (d_out, d_in), in the core dtype of `spec`."""
    if spec.core_dtype not in QUANTIZERS or spec.group % spec.pattern.m:
        swept = obs_sweep(weight, gram, spec.pattern, damping, column_block)
        return NMSparse.from_dense(swept.weight, swept.mask, spec.pattern, spec.core_dtype, spec.group)
    return on_grid(obs_sweep(weight, gram, spec.pattern, damping, core_dtype=spec.core_dtype, group=spec.group), spec)


def on_grid(swept: Swept, spec: WeightSpec) -> NMSparse:
    """The quantised core of a sweep, stored without further rounding."""
    mask = None if spec.pattern.is_dense else swept.mask
    return NMSparse.from_codes(swept.integers(), swept.parameters, mask, spec.pattern, spec.core_dtype, spec.group)
