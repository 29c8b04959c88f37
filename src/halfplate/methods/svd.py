"""Low rank by a weighted singular value decomposition."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.chain import Chain
from halfplate.formats.parts.low_rank import LowRank
from halfplate.formats.parts.no_core import NoCore
from halfplate.formats.spec import WeightSpec
from halfplate.methods.base import Solution, check_inputs
from halfplate.methods.factors import CorelessMethod, check_smaller, largest, nothing_left
from halfplate.solvers.whitening import Whitening
from halfplate.statistics import InputStatistics


@dataclass(frozen=True)
class WeightedSVD(CorelessMethod):
    """W ≈ L · R, the best product of a rank for the output error, and no core.

    weighting: `gram` minimises the output error, by the Cholesky factor of the Gram matrix; `diagonal` weights each input by its
        second moment; `none` is the plain decomposition. FWSVD weights by the Fisher information, which needs gradients. If they do
        not depend on the inputs, the sum of a column is proportional to the second moment of the input: `diagonal`.
    rank: of the product; None derives it from `share`.
    share: fraction of the original bytes, at 2 bytes a weight, that the factors take at most.
    damping: added to the Gram matrix, as a fraction of the second moment of each input.

    Sources: Hsu et al., FWSVD, arXiv 2207.00112; Wang et al., SVD-LLM, arXiv 2403.07378 (the Cholesky factor).
    """

    name = "svd"
    summary = "two low-rank factors by a weighted singular value decomposition, without a core"
    weighting: str = "gram"
    rank: int | None = None
    share: float = 0.5
    damping: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.rank < 1:
            raise HalfplateError(f"rank={self.rank} must be at least 1; try 16")

    def sized(self, spec: WeightSpec) -> WeightSpec:
        return super().sized(spec) if self.rank is None else replace(spec, rank=self.rank)

    def _at_share(self, spec: WeightSpec, share: float) -> WeightSpec:
        one = replace(spec, rank=1)
        rank = largest(1, min(spec.d_out, spec.d_in), lambda rank: rank * one.nbytes <= share * spec.dense_nbytes)
        if rank < 1:
            raise nothing_left(share, spec, "rank 1", one.nbytes)
        return replace(spec, rank=rank)

    def check_spec(self, spec: WeightSpec) -> None:
        super().check_spec(spec)
        if not 1 <= spec.rank <= min(spec.d_out, spec.d_in):
            raise HalfplateError(
                f"rank={spec.rank} of a matrix {spec.d_out}×{spec.d_in} must be 1 to {min(spec.d_out, spec.d_in)}; choose less, or exclude the matrix"
            )
        check_smaller(spec, f"rank={spec.rank}")

    def flops(self, spec: WeightSpec) -> float:
        return 20.0 * spec.d_out * spec.d_in * min(spec.d_out, spec.d_in)

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        whitening = Whitening.of(self.weighting, statistics, weight, self.damping)
        left, right = weighted_svd(weight, whitening, spec.rank)
        factors = LowRank.rounded(left.float(), right.float(), spec.wrapper_dtype)
        return Solution(Chain.of(spec, NoCore.of(spec, weight.device), factors))


def weighted_svd(weight: Tensor, whitening: Whitening, rank: int) -> tuple[Tensor, Tensor]:
    """left (d_out, rank) and right (rank, d_in) with the least ‖(W − left · right) L‖, fp64, of equal norms."""
    largest_weight = weight.abs().max().double().clamp_min(torch.finfo(torch.float64).tiny)
    u, s, vh = torch.linalg.svd(whitening.into(weight.double() / largest_weight), full_matrices=False)
    root = s[:rank].sqrt()
    left, right = u[:, :rank] * root, whitening.back(root[:, None] * vh[:rank])
    # Each pair gets equal norms, so that both factors stay in the range of their type.
    norms = left.norm(dim=0).clamp_min(1e-150), right.norm(dim=1).clamp_min(1e-150)
    balance = (norms[1] / norms[0] * largest_weight).sqrt()
    return left * balance, right * (largest_weight / balance)[:, None]
