"""Exact block coordinate descent with momentum (`solver: exact`)."""

from dataclasses import dataclass

import torch

from halfplate.solvers.armor.problem import Factors, Problem
from halfplate.solvers.armor.stages import Moments, Stages
from halfplate.solvers.armor.wrappers import update_in_blocks, update_out_blocks

# A momentum of 1 that is damped only where the loss would rise. More was seen to end higher: the mask settles too early.
LARGEST, LEAST = 1.0, 0.3
GROWTH, SHRINKAGE = 1.1, 0.8


@dataclass(eq=False)
class _Momentum:
    """Steps beyond the last exact update, as long as the loss bears them."""

    factor: float = LARGEST
    last: Factors | None = None

    def propose(self, exact: Factors) -> Factors | None:
        """The factors continued past `exact` by `factor` of the way they came, or None where they came from nowhere.

        The core is continued where both masks keep a value, so that its mask stays one.
        """
        last, self.last = self.last, exact
        if last is None:
            return None
        both = (exact.core != 0) & (last.core != 0)
        return Factors(
            torch.lerp(last.out_blocks, exact.out_blocks, 1 + self.factor),
            torch.where(both, torch.lerp(last.core, exact.core, 1 + self.factor), exact.core),
            torch.lerp(last.in_blocks, exact.in_blocks, 1 + self.factor),
        )

    def judge(self, success: bool) -> None:
        self.factor = min(self.factor * GROWTH, LARGEST) if success else max(self.factor * SHRINKAGE, LEAST)


def solve_exact(problem: Problem, iterations: int, stages: Stages) -> tuple[Factors, list[float]]:
    """Alternate exact updates of A, of B and of every group of S from NoWag-P's start.

    Returns the factors and the loss at the start and after each iteration, relative to that of the zero matrix; it never
    rises. An iteration that cannot lower it any more ends the run early.
    """
    total = problem.zero_loss()
    factors = problem.start()
    moments = stages.output_moments(problem, factors)
    losses = [moments.loss / total if total else 0.0]
    momentum = _Momentum()
    for _ in range(iterations if moments.loss > 0 else 0):
        exact = _updated_wrappers(problem, factors, moments, stages)
        proposal = momentum.propose(exact)
        after: tuple[Factors, Moments] | None = None
        if proposal is not None:
            after = _swept(problem, proposal, stages)
            momentum.judge(after[1].loss < moments.loss)
        if after is None or not after[1].loss < moments.loss:
            after = _swept(problem, exact, stages)
        if not after[1].loss < moments.loss:
            break
        factors, moments = after
        losses.append(moments.loss / total)
    return factors, losses


def _updated_wrappers(problem: Problem, factors: Factors, moments: Moments, stages: Stages) -> Factors:
    """The minimiser over A, given its moments, and then over B; the core stays."""
    out_blocks = update_out_blocks(factors.out_blocks, moments, problem.out_wrapper)
    between = Factors(out_blocks, factors.core, factors.in_blocks)
    in_moments = stages.input_moments(problem, between)
    return Factors(out_blocks, factors.core, update_in_blocks(factors.in_blocks, in_moments, problem.in_wrapper))


def _swept(problem: Problem, factors: Factors, stages: Stages) -> tuple[Factors, Moments]:
    """Sweep a copy of the core, and measure what came of it."""
    swept = Factors(factors.out_blocks, factors.core.clone(), factors.in_blocks)
    stages.sweep(problem, swept)
    return swept, stages.output_moments(problem, swept)
