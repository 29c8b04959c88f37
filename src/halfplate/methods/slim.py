"""SLiM: a sparse core plus a low-rank part that compensates for pruning."""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfplate.formats.chain import Chain
from halfplate.formats.parts.core import NMSparse
from halfplate.formats.parts.low_rank import LowRank
from halfplate.formats.spec import WeightSpec
from halfplate.methods.base import Method, Solution, check_inputs
from halfplate.solvers.selection import keep_largest
from halfplate.statistics import InputStatistics, Statistic


@dataclass(frozen=True)
class SLiM(Method):
    """W ≈ S + L · R: Wanda's mask, and the low-rank part with the least error under the second moments of the inputs.

    L · R is the best approximation of rank r to (W − W ⊙ mask) diag(√h), with the second moments h of the inputs; the kept values are
    then taken from W − L · R. Here r is the block size of the plan, because a low-rank part takes as many bytes as two wrappers of
    that block size. Dead inputs count as the smallest live one. The core is rounded as in all methods, not by the quantiser of SLiM.

    Source: Mozaffari et al., SLiM, arXiv 2410.09615 (the mask and SLiM-LoRA).
    """

    name = "slim"
    summary = "Wanda's mask plus a low-rank part, at the bytes of wrappers of the same block size"
    low_rank = True

    @property
    def requires(self) -> Statistic:
        return Statistic.DIAGONAL

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        norms = statistics.require_diagonal().to(weight.device).sqrt()
        mask = keep_largest(weight.abs() * norms, spec.pattern)
        core = NMSparse.from_dense(weight, mask, spec.pattern, spec.core_dtype, spec.group)
        if not spec.rank:
            return Solution(Chain.of(spec, core))
        added = LowRank.rounded(*_weighted(weight - core.dense(), norms, spec.rank), spec.wrapper_dtype)
        core = NMSparse.from_dense(weight - added.dense(), mask, spec.pattern, spec.core_dtype, spec.group)
        return Solution(Chain.of(spec, core, added))


def _weighted(error: Tensor, norms: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left (d_out, rank) and right (rank, d_in) with the least |(error − left · right) diag(norms)|; zeros beyond full rank."""
    seen = norms[norms > 0]
    norms = norms.clamp_min(float(seen.min())) if len(seen) else torch.ones_like(norms)
    scaled = error * (norms / norms.mean())
    u, s, vh = torch.linalg.svd(scaled.double(), full_matrices=False)
    least = min(rank, len(s))
    root = s[:least].sqrt()
    left, right = u.new_zeros(len(error), rank), u.new_zeros(rank, error.shape[1])
    left[:, :least] = u[:, :least] * root
    right[:least] = root[:, None] * vh[:least] / (norms / norms.mean())
    return left.float(), right.float()
