"""A method: Wanda's mask, then one scale per row that minimises the output error."""

from dataclasses import dataclass

from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats import WeightSpec
from halfplate.methods.base import Method, Solution, check_inputs, store
from halfplate.solvers.selection import keep_largest
from halfplate.statistics import InputStatistics, Statistic


@dataclass(frozen=True)
class WandaScaled(Method):
    """Keep the weights with the largest |W_ij| · ‖X_j‖₂, and scale the kept weights of each row.

    With G = XᵀX / tokens, the scale s of a row w with kept part v minimises (w - s v) G (w - s v)ᵀ. So
    s = w G vᵀ / v G vᵀ.

    limit: largest scale of a row; the smallest is 1 / limit.
    """

    name = "wanda-scaled"
    summary = "Wanda, then one scale per row that minimises the output error"
    limit: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.limit < float("inf"):
            raise HalfplateError(f"limit={self.limit} must be a finite number, 1 or more; try 2")

    @property
    def requires(self) -> Statistic:
        return Statistic.GRAM

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        mask = keep_largest(weight.abs() * statistics.require_diagonal().sqrt(), spec.pattern)
        gram = statistics.require_gram().to(weight.dtype)
        kept = weight * mask  # (d_out, d_in)
        through = kept @ gram
        # (d_out, 1); a row of zeros, or one with dead inputs, is not scaled.
        power = (through * kept).sum(1, keepdim=True)
        scale = ((through * weight).sum(1, keepdim=True) / power).nan_to_num(1.0).clamp(1 / self.limit, self.limit)
        return Solution(store(kept * scale, mask, spec))
