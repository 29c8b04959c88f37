"""Monarch: the projection of a matrix onto products of two block-diagonal matrices."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.chain import Chain
from halfplate.formats.parts.monarch import Monarch
from halfplate.formats.parts.no_core import NoCore
from halfplate.formats.quantizers.rounding import round_to_float
from halfplate.formats.spec import ExtraPart, WeightSpec
from halfplate.methods.base import Solution, check_inputs
from halfplate.methods.factors import CorelessMethod, check_smaller, largest, nothing_left
from halfplate.solvers.whitening import Whitening
from halfplate.statistics import InputStatistics

RIDGE = 1e-8  # of the mean of the diagonal of normal equations


@dataclass(frozen=True)
class MonarchMethod(CorelessMethod):
    """W ≈ block-diagonal · permutation · block-diagonal: a low-rank matrix for each pair of a block of inputs and a block of outputs.

    blocks: on each side; it divides both sides of every matrix.
    share: fraction of the original bytes, at 2 bytes a weight, that the factors take at most; it decides the rank.
    weighting: `none` is the projection of the paper; `diagonal` weights each input by its second moment, which keeps the closed form;
        `gram` starts from there, and then fits the left factor to the output error.
    damping: added to the Gram matrix, as a fraction of the second moment of each input.

    Source: Dao et al., Monarch, arXiv 2204.00595, section 3.3; ranks above 1 and weights are our own.
    """

    name = "monarch"
    summary = "two block-diagonal factors with a permutation between them, without a core"
    blocks: int = 4
    share: float = 0.5
    weighting: str = "gram"
    damping: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks < 2:
            raise HalfplateError(f"blocks={self.blocks} must be at least 2; try 4, or method svd for 1")

    @property
    def parts(self) -> tuple[ExtraPart, ...]:
        return (ExtraPart.of("monarch", blocks=1, rank=1),)

    def _at_share(self, spec: WeightSpec, share: float) -> WeightSpec:
        def at(rank: int) -> WeightSpec:
            return replace(spec, parts=(ExtraPart.of("monarch", blocks=self.blocks, rank=rank),))

        one = at(1)  # refuses blocks that do not fit
        most = min(spec.d_out, spec.d_in) // self.blocks
        rank = largest(1, most, lambda rank: rank * one.nbytes <= share * spec.dense_nbytes)
        if rank < 1:
            raise nothing_left(share, spec, f"rank 1 with {self.blocks} blocks", one.nbytes)
        return at(rank)

    def check_spec(self, spec: WeightSpec) -> None:
        super().check_spec(spec)
        check_smaller(spec, f"rank={spec.options('monarch')['rank']}")

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        whitening = Whitening.of(self.weighting, statistics, weight, self.damping)
        blocks, rank = (int(spec.options("monarch")[name]) for name in ("blocks", "rank"))
        most = weight.abs().max().double().clamp_min(torch.finfo(torch.float64).tiny)
        scaled = weight.double() / most
        tiles = (scaled * whitening.scales).reshape(-1, blocks, blocks, spec.d_in // blocks).permute(2, 1, 0, 3)
        u, s, vh = torch.linalg.svd(tiles, full_matrices=False)  # (k, j, l, r), (k, j, r), (k, j, r, i)
        root = (s[..., :rank] * most).sqrt()
        right = root[..., None] * vh[..., :rank, :] / whitening.scales.reshape(blocks, 1, 1, -1)
        stored = round_to_float(right.flatten(1, 2).float(), spec.wrapper_dtype, "wrapper_dtype").contiguous()
        left = (u[..., :rank] * root[..., None, :]).permute(1, 2, 0, 3).flatten(2)
        if whitening.factor is not None:
            left = _refitted(scaled, stored.double().unflatten(1, (blocks, rank)), whitening) * most
        rounded = round_to_float(left.float(), spec.wrapper_dtype, "wrapper_dtype").contiguous()
        return Solution(Chain.of(spec, NoCore.of(spec, weight.device), Monarch(rounded, stored)))


def _refitted(weight: Tensor, right: Tensor, whitening: Whitening) -> Tensor:
    """The left factor (j, l, k · b) with the least output error for the right factor (k, j, b, i)."""
    blocks, rank = right.shape[0], right.shape[2]
    found = []
    for block in range(blocks):
        spread = torch.block_diag(*right[:, block])  # (k · b, d_in)
        features = whitening.into(spread)
        wanted = whitening.into(weight[block::blocks])
        sizes = features.norm(dim=1, keepdim=True).clamp_min(1e-150)
        features = features / sizes
        normal = features @ features.T
        normal.diagonal().add_(RIDGE)
        found.append(torch.linalg.solve(normal, features @ wanted.T).T / sizes.T)
    assert found[0].shape[1] == blocks * rank
    return torch.stack(found)
