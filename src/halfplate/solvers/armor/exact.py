"""Exact block coordinate descent with extrapolation (`solver: exact`)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfplate.solvers.armor.problem import Factors, Problem
from halfplate.solvers.armor.stages import Moments, Stages
from halfplate.solvers.armor.wrappers import update_in_blocks, update_out_blocks

FIRST_STEP, LEAST_STEP, LARGEST_STEP = 0.5, 0.3, 5.0
GROWTH, SHRINKAGE = 1.2, 0.5


@dataclass(eq=False)
class _Extrapolation:
    """Steps beyond the last exact update of the wrappers, longer while they pay."""

    step: float = FIRST_STEP
    last: tuple[Tensor, Tensor] | None = None

    def propose(self, out_blocks: Tensor, in_blocks: Tensor) -> tuple[Tensor, Tensor]:
        last, self.last = self.last, (out_blocks, in_blocks)
        if last is None:
            return out_blocks, in_blocks
        return torch.lerp(last[0], out_blocks, 1 + self.step), torch.lerp(last[1], in_blocks, 1 + self.step)

    def judge(self, success: bool) -> None:
        self.step = min(self.step * GROWTH, LARGEST_STEP) if success else max(self.step * SHRINKAGE, LEAST_STEP)


def solve_exact(problem: Problem, iterations: int, stages: Stages) -> tuple[Factors, list[float]]:
    """Alternate exact updates of A, of B and of every group of S from NoWag-P's start.

    Returns the factors and the loss at the start and after each iteration, relative to that of the zero matrix; it never
    rises. An iteration that cannot lower it any more ends the run early.
    """
    total = problem.zero_loss()
    factors = problem.start()
    moments = stages.output_moments(problem, factors)
    losses = [moments.loss / total if total else 0.0]
    extrapolation = _Extrapolation()
    for _ in range(iterations if moments.loss > 0 else 0):
        kept = Factors(factors.out_blocks, factors.core.clone(), factors.in_blocks)
        out_blocks = update_out_blocks(factors.out_blocks, moments, problem.out_wrapper)
        mid = Factors(out_blocks, factors.core, factors.in_blocks)
        in_moments = stages.input_moments(problem, mid)
        in_blocks = update_in_blocks(factors.in_blocks, in_moments, problem.in_wrapper)
        proposal = extrapolation.propose(out_blocks, in_blocks)
        factors, moments_after = _swept(problem, kept.core, proposal, stages)
        if proposal[0] is not out_blocks:
            extrapolation.judge(moments_after.loss < moments.loss)
        if not moments_after.loss < moments.loss and proposal[0] is not out_blocks:
            factors, moments_after = _swept(problem, kept.core, (out_blocks, in_blocks), stages)
        if not moments_after.loss < moments.loss:
            return kept, losses
        moments = moments_after
        losses.append(moments.loss / total)
    return factors, losses


def _swept(problem: Problem, core: Tensor, wrappers: tuple[Tensor, Tensor], stages: Stages) -> tuple[Factors, Moments]:
    """Sweep a copy of `core` between the given wrappers, and measure what came of it."""
    factors = Factors(wrappers[0], core.clone(), wrappers[1])
    stages.sweep(problem, factors)
    return factors, stages.output_moments(problem, factors)
