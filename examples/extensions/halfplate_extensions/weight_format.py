"""A weight format: ternary weights, stored as int2 codes that Halfplate's kernels can read."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.errors import HalfplateError
from halfplate.formats import Chain, NMSparse, WeightSpec
from halfplate.methods.base import Method, Solution, check_inputs
from halfplate.statistics import InputStatistics, Statistic


@dataclass(frozen=True)
class Ternary(Method):
    """Every weight becomes -s, 0 or s, with one s for each row and `group` columns.

    Source: Li et al., arXiv 1605.04711, equations 5 and 6: a weight is 0 where |w| is at most threshold · mean |w|, and s is
    the mean of the other |w|.
    """

    name = "ternary"
    summary = "every weight becomes -s, 0 or s, in an int2 core"
    sparse, dense = False, True
    threshold: float = 0.7

    @property
    def requires(self) -> Statistic:
        return Statistic.NONE

    def check_spec(self, spec: WeightSpec) -> None:
        super().check_spec(spec)
        if spec.core_dtype != "int2":
            raise HalfplateError(f"core_dtype={spec.core_dtype!r} is not supported by method 'ternary'; use int2")

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        groups = -(-spec.d_in // spec.group)
        # (d_out, groups, group); the last group is padded with NaN, which nanmean ignores.
        padded = functional.pad(weight, (0, groups * spec.group - spec.d_in), value=torch.nan)
        size = padded.view(spec.d_out, groups, spec.group).abs()
        large = size > self.threshold * size.nanmean(-1, keepdim=True)
        scales = (size.nan_to_num() * large).sum(-1) / large.sum(-1).clamp(min=1)  # (d_out, groups)
        codes = weight.sign() * large.view(spec.d_out, -1)[:, : spec.d_in]
        core = NMSparse.from_codes(codes.to(torch.int8), scales.half(), None, spec.pattern, spec.core_dtype, spec.group)
        return Solution(Chain.of(spec, core))
