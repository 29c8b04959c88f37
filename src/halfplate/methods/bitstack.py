"""BitStack: sign matrices with low-rank magnitudes, in an order that lets a reader choose the size."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.chain import Chain
from halfplate.formats.parts.bit_stack import MOST_LEVELS, BitStack, Level
from halfplate.formats.parts.no_core import NoCore
from halfplate.formats.quantizers.rounding import round_to_float
from halfplate.formats.spec import ExtraPart, WeightSpec
from halfplate.methods.base import Solution, check_inputs
from halfplate.methods.factors import CorelessMethod, check_smaller, largest, nothing_left
from halfplate.solvers.signs import nearest_signs, refitted_left
from halfplate.solvers.whitening import Whitening
from halfplate.statistics import InputStatistics

OVERHEAD = 8  # the signs take about this many times the bytes of the magnitudes


@dataclass(frozen=True)
class BitStackMethod(CorelessMethod):
    """W ≈ Σ signs ⊙ (L · R): each level takes the signs of what is left, and a low-rank product for its magnitudes.

    The levels of all matrices are written in the order of what they gain by byte, so that the first bytes of the file are the best
    model of that size (`load(path, fit="300MB")`).

    rank: of the magnitudes; None takes that whose bytes are about an eighth of the signs.
    share: fraction of the original bytes, at 2 bytes a weight, that the whole stack takes at most.
    weighting: `diagonal` weights each input by its second moment, as the paper does, and `none` does not; both take the sign of each
        entry. `gram` chooses signs column after column for the least output error, and fits the magnitudes to them.
    damping: added to the Gram matrix, as a fraction of the second moment of each input.

    Source: Wang et al., BitStack, arXiv 2410.23918; `gram` is our own. The paper measures a gain by the perplexity of the model, this
    method by the output error.
    """

    name = "bitstack"
    summary = "sign matrices with low-rank magnitudes, of which loading takes as many as fit a size"
    rank: int | None = None
    share: float = 0.5
    weighting: str = "gram"
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.rank < 1:
            raise HalfplateError(f"rank={self.rank} must be at least 1; try 4")

    @property
    def parts(self) -> tuple[ExtraPart, ...]:
        return (ExtraPart.of("bit_stack", levels=1, rank=1),)

    def _at_share(self, spec: WeightSpec, share: float) -> WeightSpec:
        usual = spec.d_out * spec.d_in // 8 // OVERHEAD // (2 * (spec.d_out + spec.d_in))
        rank = max(usual, 1) if self.rank is None else self.rank

        def at(levels: int) -> WeightSpec:
            return replace(spec, parts=(ExtraPart.of("bit_stack", levels=levels, rank=rank),))

        levels = largest(1, MOST_LEVELS, lambda levels: at(levels).nbytes <= share * spec.dense_nbytes)
        if levels < 1:
            raise nothing_left(share, spec, f"one level with rank {rank}", at(1).nbytes)
        return at(levels)

    def check_spec(self, spec: WeightSpec) -> None:
        super().check_spec(spec)
        check_smaller(spec, f"levels={spec.options('bit_stack')['levels']}")

    def flops(self, spec: WeightSpec) -> float:
        return 20.0 * int(spec.options("bit_stack")["levels"]) * spec.d_out * spec.d_in * min(spec.d_out, spec.d_in)

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        whitening = Whitening.of(self.weighting, statistics, weight, self.damping)
        options, left_over = spec.options("bit_stack"), weight.double()
        whole = float(whitening.into(left_over).square().sum())
        levels, losses = [], []
        for _ in range(int(options["levels"])):
            levels.append(_level(left_over, whitening, int(options["rank"]), spec.wrapper_dtype))
            left_over = left_over - levels[-1].dense(torch.float32)
            losses.append(float(whitening.into(left_over).square().sum()) / whole if whole > 0 else 0.0)
        return Solution(Chain.of(spec, NoCore.of(spec, weight.device), BitStack(tuple(levels))), (1.0, *losses))


def _level(matrix: Tensor, whitening: Whitening, rank: int, dtype: str) -> Level:
    """A level for `matrix` (d_out, d_in), fp64, which is what the levels before it leave."""
    most = matrix.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    # Magnitudes have no signs that a Gram matrix could weigh, but positive scales of the inputs do not change signs.
    scales = Whitening(whitening.scales, None)
    u, s, vh = torch.linalg.svd(scales.into(matrix.abs() / most), full_matrices=False)
    root = (s[:rank] * most).sqrt()
    left, right = u[:, :rank] * root, scales.back(root[:, None] * vh[:rank])
    stored_right = round_to_float(right.float(), dtype, "wrapper_dtype").contiguous()
    negative = nearest_signs(matrix, left @ stored_right.double(), whitening)
    if whitening.factor is not None:
        left = refitted_left(matrix / most, negative, stored_right.double(), whitening) * most
    return Level.of(negative, round_to_float(left.float(), dtype, "wrapper_dtype").contiguous(), stored_right)
