"""GQSA: int4 groups of inputs, of which each row keeps those that matter most."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.chain import Chain
from halfplate.formats.parts.group_sparse import GroupSparse
from halfplate.formats.parts.no_core import NoCore
from halfplate.formats.quantizers.uniform import INT4
from halfplate.formats.spec import ExtraPart, WeightSpec
from halfplate.methods.base import Solution, check_inputs
from halfplate.methods.factors import CorelessMethod, check_smaller, largest, nothing_left
from halfplate.solvers.dictionary import largest_support
from halfplate.solvers.group_sweep import group_sweep
from halfplate.solvers.whitening import Whitening
from halfplate.statistics import InputStatistics


@dataclass(frozen=True)
class GQSA(CorelessMethod):
    """Keep the groups with the largest sum of w² / [H⁻¹]_jj, as int4 with one scale a group; what is kept compensates for the rest.

    width: inputs of a group.
    kept: fraction of the groups of a row that stay; None derives it from `share`.
    share: fraction of the original bytes, at 2 bytes a weight, that codes, scales and positions take at most.
    damping: added to the Gram matrix, as a fraction of the second moment of each input.

    Source: GQSA, arXiv 2412.17560, without its training of whole layers: `--tune-block` and `halfplate recover` train the scales. Its
    saliency is recalled and not verified; rows keep equally many groups, and scales have no zero points.
    """

    name = "gqsa"
    summary = "int4 groups of inputs, of which each row keeps a share (group-sparse int4)"
    weighting = "gram"  # not an option
    width: int = 16
    kept: float | None = None
    share: float = 0.16
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 2:
            raise HalfplateError(f"width={self.width} must be an even number, 2 or more; try 16")
        if self.kept is not None and not 0 < self.kept <= 1:
            raise HalfplateError(f"kept={self.kept} must be a fraction of the groups, above 0 and at most 1; try 0.5")

    @property
    def parts(self) -> tuple[ExtraPart, ...]:
        return (ExtraPart.of("group_sparse", width=2, kept=1),)

    def sized(self, spec: WeightSpec) -> WeightSpec:
        if self.kept is None:
            return super().sized(spec)
        return self._at(spec, round(self.kept * self._groups(spec)))

    def _groups(self, spec: WeightSpec) -> int:
        return -(-spec.d_in // self.width)

    def _at(self, spec: WeightSpec, kept: int) -> WeightSpec:
        if kept < 1:
            raise HalfplateError(
                f"kept={self.kept} of the {self._groups(spec)} groups of a row of a matrix {spec.d_out}×{spec.d_in} leaves nothing; keep more, or exclude the matrix"
            )
        return replace(spec, parts=(ExtraPart.of("group_sparse", width=self.width, kept=kept),))

    def _at_share(self, spec: WeightSpec, share: float) -> WeightSpec:
        one = self._at(spec, 1)
        limit = share * spec.dense_nbytes
        kept = largest(1, self._groups(spec), lambda kept: self._at(spec, kept).nbytes <= limit)
        if kept < 1:
            raise nothing_left(share, spec, "one group a row", one.nbytes)
        return self._at(spec, kept)

    def check_spec(self, spec: WeightSpec) -> None:
        super().check_spec(spec)
        check_smaller(spec, f"kept={spec.options('group_sparse')['kept']}")

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        whitening = Whitening.of(self.weighting, statistics, weight, self.damping)
        width, kept = (int(spec.options("group_sparse")[name]) for name in ("width", "kept"))
        factor = whitening.factor
        if factor is None:  # no input was ever other than zero
            factor = torch.eye(spec.d_in, dtype=torch.float64, device=weight.device)
            whitening = replace(whitening, factor=factor)
        inverse = torch.cholesky_inverse(factor).diagonal() / whitening.scales.square()
        saliency = weight.double().square() / inverse
        padded = torch.nn.functional.pad(saliency, (0, -spec.d_in % width)).unflatten(1, (-1, width))
        chosen = largest_support(padded.sum(2), kept)
        try:
            integers, scales = group_sweep(weight.double(), chosen, width, INT4, whitening)
        except HalfplateError:
            raise HalfplateError(
                f"weights up to {float(weight.abs().max()):.3g} need scales that fp16 cannot hold; use method svd, or exclude the matrix"
            ) from None
        part = GroupSparse.of(integers, scales, chosen, width)
        return Solution(Chain.of(spec, NoCore.of(spec, weight.device), part))
