"""DenoiseRotator: rotations that concentrate importance in few weights, then pruning."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.chain import Chain
from halfplate.formats.parts.core import NMSparse
from halfplate.formats.parts.wrapper import InWrapper, OutWrapper
from halfplate.formats.spec import WeightSpec
from halfplate.methods.base import Method, Solution, check_inputs
from halfplate.methods.sparsegpt import swept_core
from halfplate.solvers.normalise import power_of_two
from halfplate.solvers.obs import damped_inverse
from halfplate.solvers.rotation import concentrating_rotations, rotated
from halfplate.solvers.selection import keep_largest
from halfplate.statistics import InputStatistics, Statistic

QUICK_STEPS = 15


@dataclass(frozen=True)
class DenoiseRotator(Method):
    """W = Pᵀ (P W Qᵀ) Q with orthogonal P and Q, where the rotated weight is pruned with the rotated inputs: A = Pᵀ, B = Q.

    P and Q minimise the entropy of the normalised importance of P W Qᵀ: W² / [H⁻¹]_jj for `sparsegpt`, W² H_jj for `wanda`, with the
    second moments H of the rotated inputs.

    The paper's rotations have the full size of the hidden state, are shared by the matrices of a layer and merged into them and into
    the residual stream, so that few products are left at run time. Ours are block-diagonal, separate for each matrix and side, stored
    as wrappers with exactly the bytes of ARMOR's, and learned one matrix at a time, in `steps` instead of 2,000 steps.

    pruner: the method that prunes.
    steps, learning_rate: of Adam on the Cayley parameters, from the identity.
    damping: of SparseGPT, for the importance and the pruning.

    Source: Gu et al., arXiv 2505.23049.
    """

    name = "denoiserotator"
    summary = "block-diagonal rotations that concentrate importance, then SparseGPT (or Wanda)"
    wrapped = True
    pruner: str = "sparsegpt"
    steps: int = 100
    learning_rate: float = 0.05
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.pruner not in ("sparsegpt", "wanda"):
            raise HalfplateError(f"pruner={self.pruner!r} is not one of sparsegpt, wanda")
        if self.steps < 0:
            raise HalfplateError(f"steps={self.steps} must be 0 or more; try 100")
        if not 0 < self.learning_rate < float("inf"):
            raise HalfplateError(f"learning_rate={self.learning_rate} must be a positive number; try 0.05")
        if not 0 <= self.damping < float("inf"):
            raise HalfplateError(f"damping={self.damping} must be a finite number, 0 or more; try 0.01")

    @property
    def requires(self) -> Statistic:
        return Statistic.GRAM

    def flops(self, spec: WeightSpec) -> float:
        turned = 12.0 * spec.d_out * spec.d_in * max(spec.out_block, spec.in_block, 1)
        return super().flops(spec) + self.steps * turned

    def quick(self) -> "DenoiseRotator":
        return replace(self, steps=min(self.steps, QUICK_STEPS))

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        gram = statistics.require_gram().to(weight.device, torch.float64)
        # Dead inputs must not influence the rotations.
        weight = torch.where(gram.diagonal() > 0, weight.to(torch.float32), 0.0)
        scale = power_of_two(weight)
        out_blocks, in_blocks = self._rotations(weight / scale, gram, spec)
        turned = rotated(weight, out_blocks, in_blocks)
        turned_gram = rotated(gram, in_blocks.double(), in_blocks.double())  # Q H Qᵀ
        if self.pruner == "sparsegpt":
            core = swept_core(turned, turned_gram, spec, self.damping)
        else:
            mask = keep_largest(turned.abs() * turned_gram.diagonal().clamp_min(0).sqrt().float(), spec.pattern)
            core = NMSparse.from_dense(turned, mask, spec.pattern, spec.core_dtype, spec.group)
        out_wrapper = in_wrapper = None
        if spec.out_block:
            out_wrapper = OutWrapper.from_padded(out_blocks.mT, spec.d_out, spec.out_block, spec.wrapper_dtype)
        if spec.in_block:
            in_wrapper = InWrapper.from_padded(in_blocks, spec.d_in, spec.in_block, spec.wrapper_dtype)
        return Solution(Chain.of(spec, core, out_wrapper, in_wrapper))

    def _rotations(self, weight: Tensor, gram: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
        """The blocks of P and of Q."""
        blocks, adam = (spec.out_block, spec.in_block), (self.steps, self.learning_rate)
        if self.pruner == "sparsegpt":
            return concentrating_rotations(weight, _removal_error, damped_inverse(gram, self.damping), *blocks, *adam)
        mean = gram.diagonal().mean()
        return concentrating_rotations(weight, _size_under_input, gram / mean if mean > 0 else gram, *blocks, *adam)


def _removal_error(weight: Tensor, inverse: Tensor) -> Tensor:
    """W² / [H⁻¹]_jj: the cost of removing a weight if the others compensate for it."""
    return weight.square() / inverse


def _size_under_input(weight: Tensor, moment: Tensor) -> Tensor:
    """W² H_jj: the cost of removing a weight without compensation."""
    return weight.square() * moment
