"""Exact block coordinate descent with momentum (`solver: exact`), for any objective."""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from halfplate.solvers.armor.problem import Factors, Problem
from halfplate.solvers.armor.stages import Moments, Stages
from halfplate.solvers.armor.wrappers import update_in_blocks, update_out_blocks

# Momentum 1 at first keeps the mask changing, and 0.3 at the end lets it settle. Reducing it only when the loss
# would rise reaches the same loss later.
FIRST, FALL = 1.0, 0.7


class Measured(Protocol):
    """Factors with their loss, and whatever the next update needs."""

    @property
    def factors(self) -> Factors: ...

    @property
    def loss(self) -> float: ...


At = TypeVar("At", bound=Measured)


class Objective(Protocol[At]):
    """The interface of an objective for `descend`."""

    def updated(self, at: At) -> Factors:
        """The minimiser over A and then over B, for a fixed core."""

    def swept(self, factors: Factors, after: At) -> At:
        """A copy of the core in which every group in turn has its best values, and the loss. after: the point with the current factors."""


class Refit(Protocol):
    """The interface of an objective for storing."""

    @property
    def tiles(self) -> Problem: ...

    def refitted_out(self, factors: Factors) -> Tensor:
        """The minimiser over A."""

    def refitted_in(self, factors: Factors) -> Tensor:
        """The minimiser over B."""


def _momentum(exact: Factors, last: Factors, factor: float, moves_core: bool) -> Factors:
    """The factors extrapolated beyond `exact` by `factor` times the step from `last`, the exact update before it.

    The core is extrapolated only where both masks keep a value, so its mask stays valid. An integer core is not extrapolated.
    """
    core = exact.core
    if moves_core:
        both = (core != 0) & (last.core != 0)
        core = torch.where(both, torch.lerp(last.core, core, 1 + factor), core)
    return Factors(
        torch.lerp(last.out_blocks, exact.out_blocks, 1 + factor),
        core,
        torch.lerp(last.in_blocks, exact.in_blocks, 1 + factor),
    )


def descend(
    objective: Objective[At],
    start: At,
    iterations: int,
    total: float,
    tolerance: float = 0.0,
    moves_core: bool = True,
) -> tuple[At, list[float]]:
    """Alternate exact updates of A, of B and of every group of S.

    Returns the final point, and the loss at the start and after each iteration, relative to `total`, the loss of the zero
    matrix. The loss never rises. The run ends early after two iterations in a row that gain less than `tolerance` of the loss.

    moves_core: whether momentum may change the values of the core; not for integer cores.
    """
    at, losses = start, [start.loss / total if total else 0.0]
    last: Factors | None = None
    slow = 0  # iterations in a row
    for iteration in range(iterations if start.loss > 0 else 0):
        exact = objective.updated(at)
        after: At | None = None
        if last is not None:
            factor = FIRST - FALL * (iteration / iterations) ** 2
            after = objective.swept(_momentum(exact, last, factor, moves_core), at)
        last = exact
        if after is None or not after.loss < at.loss:
            after = None  # two of them take much memory in a wide layer
            after = objective.swept(exact, at)
        if not after.loss < at.loss:
            break
        gain, at = at.loss - after.loss, after
        losses.append(at.loss / total)
        slow = slow + 1 if gain < tolerance * at.loss else 0
        if slow == 2:
            break
    return at, losses


@dataclass(frozen=True, eq=False)
class _Tiled:
    """A point of the diagonal objective."""

    factors: Factors
    moments: Moments

    @property
    def loss(self) -> float:
        return self.moments.loss


@dataclass(frozen=True, eq=False)
class DiagonalObjective:
    """Σ d (W − A S B)², in which all tiles are independent."""

    tiles: Problem
    stages: Stages

    def measured(self, factors: Factors) -> _Tiled:
        return _Tiled(factors, self.stages.output_moments(self.tiles, factors))

    def updated(self, at: _Tiled) -> Factors:
        out_blocks = update_out_blocks(at.factors.out_blocks, at.moments, self.tiles.out_wrapper)
        between = Factors(out_blocks, at.factors.core, at.factors.in_blocks)
        return Factors(out_blocks, at.factors.core, self.refitted_in(between))

    def swept(self, factors: Factors, after: _Tiled) -> _Tiled:
        swept = Factors(factors.out_blocks, factors.core.clone(), factors.in_blocks)
        self.stages.sweep(self.tiles, swept)
        return self.measured(swept)

    def refitted_out(self, factors: Factors) -> Tensor:
        return update_out_blocks(
            factors.out_blocks, self.stages.output_moments(self.tiles, factors), self.tiles.out_wrapper
        )

    def refitted_in(self, factors: Factors) -> Tensor:
        return update_in_blocks(
            factors.in_blocks, self.stages.input_moments(self.tiles, factors), self.tiles.in_wrapper
        )


def solve_exact(problem: Problem, iterations: int, stages: Stages) -> tuple[Factors, list[float]]:
    """Minimise the diagonal objective from the start of NoWag-P; returns the factors and the losses of `descend`."""
    objective = DiagonalObjective(problem, stages)
    at, losses = descend(objective, objective.measured(problem.start()), iterations, problem.zero_loss())
    return at.factors, losses
