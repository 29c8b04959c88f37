"""Exact block coordinate descent with momentum (`solver: exact`), whatever the objective."""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from halfplate.solvers.armor.problem import Factors, Problem
from halfplate.solvers.armor.stages import Moments, Stages
from halfplate.solvers.armor.wrappers import update_in_blocks, update_out_blocks

# Momentum of 1 at first lets the mask go on moving, and of 0.3 at the end lets it settle. Damping it only where the loss
# would rise ends as low, but later.
FIRST, FALL = 1.0, 0.7


class Measured(Protocol):
    """Factors at a known loss, with whatever the next update needs."""

    @property
    def factors(self) -> Factors: ...

    @property
    def loss(self) -> float: ...


At = TypeVar("At", bound=Measured)


class Objective(Protocol[At]):
    """What `descend` asks of an objective."""

    def updated(self, at: At) -> Factors:
        """The minimiser over A and then over B; the core stays."""

    def swept(self, factors: Factors, after: At) -> At:
        """Every group of a copy of the core in turn at its best, and the loss of that. after: where the factors come from."""


class Refit(Protocol):
    """What storing asks of an objective."""

    @property
    def tiles(self) -> Problem: ...

    def refitted_out(self, factors: Factors) -> Tensor:
        """The minimiser over A."""

    def refitted_in(self, factors: Factors) -> Tensor:
        """The minimiser over B."""


def _momentum(exact: Factors, last: Factors, factor: float, moves_core: bool) -> Factors:
    """The factors continued past `exact` by `factor` of the way they came from `last`, the exact update before it.

    The core is continued where both masks keep a value, so that its mask stays one; on a grid it stays.
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
    objective: Objective[At], start: At, iterations: int, total: float, moves_core: bool = True
) -> tuple[At, list[float]]:
    """Alternate exact updates of A, of B and of every group of S.

    Returns where it ends and the loss at the start and after each iteration, relative to `total`, that of the zero matrix;
    it never rises. An iteration that cannot lower it any more ends the run early. moves_core: whether momentum may move the
    values of the core, which a grid does not let it.
    """
    at, losses = start, [start.loss / total if total else 0.0]
    last: Factors | None = None
    for iteration in range(iterations if start.loss > 0 else 0):
        exact = objective.updated(at)
        after: At | None = None
        if last is not None:
            factor = FIRST - FALL * (iteration / iterations) ** 2
            after = objective.swept(_momentum(exact, last, factor, moves_core), at)
        last = exact
        if after is None or not after.loss < at.loss:
            after = None  # of a wide layer two of them are much
            after = objective.swept(exact, at)
        if not after.loss < at.loss:
            break
        at = after
        losses.append(at.loss / total)
    return at, losses


@dataclass(frozen=True, eq=False)
class _Tiled:
    """A place under the diagonal objective."""

    factors: Factors
    moments: Moments

    @property
    def loss(self) -> float:
        return self.moments.loss


@dataclass(frozen=True, eq=False)
class DiagonalObjective:
    """Σ d (W − A S B)², in which all tiles are apart."""

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
    """Minimise the diagonal objective from NoWag-P's start; returns the factors and the losses of `descend`."""
    objective = DiagonalObjective(problem, stages)
    at, losses = descend(objective, objective.measured(problem.start()), iterations, problem.zero_loss())
    return at.factors, losses
