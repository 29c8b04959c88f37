"""ARMOR: a sparse core between block-diagonal wrappers."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfplate.effort import WORK, Effort
from halfplate.errors import HalfplateError
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.spec import WeightSpec
from halfplate.methods.base import Method, Solution, check_inputs
from halfplate.solvers.armor.exact import DiagonalObjective, solve_exact
from halfplate.solvers.armor.finish import balanced, finish
from halfplate.solvers.armor.full_gram import GramSchedule, solve_gram
from halfplate.solvers.armor.paper import PaperSchedule, solve_paper
from halfplate.solvers.armor.problem import Problem
from halfplate.solvers.armor.restarts import ROUNDS, restarts
from halfplate.solvers.armor.stages import stages_for
from halfplate.solvers.normalise import normalise, power_of_two
from halfplate.statistics import InputStatistics, Statistic

DIAGONAL_ITERATIONS = 60
QUICK_ITERATIONS = 4  # so few iterations rank the candidates of a matrix like the full number
LARGEST_N = 16


@dataclass(frozen=True)
class Armor(Method):
    """W ≈ A · core · B: an N:M core, or an unpruned quantised one, between two block-diagonal wrappers that repair the error.

    objective: `gram` minimises the true output error; `diag`, as in the paper, weights the error of each input by its second moment.
        None is diag for solver `paper`, else gram.
    solver: `exact` minimises over A, B and every group of S in turn; `paper` is the published Adam with sampled groups, for `diag`.
    iterations: None is 20 for gram (after as many of diag, up to 20), 60 for diag, and the published 20,000 for paper.
    grid_iterations: further iterations of gram with a quantised core; None is 16.
    damping: added to the Gram matrix, as a fraction of the second moment of each input.
    learning_rate, patience, seed: only for `paper`.

    Source: arXiv 2510.05528; the exact updates are our own (docs/armor.md).
    """

    name = "armor"
    summary = "core between block-diagonal wrappers that repair the error"
    wrapped = True
    dense = True
    version = 3
    objective: str | None = None
    solver: str = "exact"
    iterations: int | None = None
    grid_iterations: int | None = None
    damping: float = GramSchedule.damping
    learning_rate: float = 1e-4
    patience: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.solver not in ("exact", "paper"):
            raise HalfplateError(f"solver={self.solver!r} is not one of exact, paper")
        if self.objective is None:
            object.__setattr__(self, "objective", "diag" if self.solver == "paper" else "gram")
        if self.objective not in ("gram", "diag"):
            raise HalfplateError(f"objective={self.objective!r} is not one of gram, diag")
        if self.solver == "paper" and self.objective != "diag":
            raise HalfplateError(
                f"solver='paper' does not minimise objective={self.objective!r}; add --objective diag, or use solver exact"
            )
        for name in ("iterations", "grid_iterations"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise HalfplateError(f"{name}={value} must be 0 or more; try {GramSchedule.gram}")
        if not 0 <= self.damping < float("inf"):
            raise HalfplateError(f"damping={self.damping} must be a finite number, 0 or more; try 0.01")
        if not 0 < self.learning_rate < float("inf"):
            raise HalfplateError(f"learning_rate={self.learning_rate} must be a positive number; try 1e-4")
        if self.patience < 1:
            raise HalfplateError(f"patience={self.patience} must be at least 1; try 100")

    def check_spec(self, spec: WeightSpec) -> None:
        super().check_spec(spec)
        if spec.pattern.n > LARGEST_N:
            raise HalfplateError(
                f"pattern={spec.pattern} keeps more than {LARGEST_N} of a group, the limit of method 'armor'; try 2:4 or 16:32"
            )
        if spec.pattern.is_dense and (self.objective != "gram" or spec.core_dtype not in QUANTIZERS):
            raise HalfplateError(
                f"pattern='dense' with objective={self.objective!r} and core_dtype={spec.core_dtype!r} leaves method 'armor' nothing "
                f"to solve; use objective gram and a core_dtype of {', '.join(QUANTIZERS)}"
            )

    @property
    def requires(self) -> Statistic:
        return Statistic.GRAM if self.objective == "gram" else Statistic.DIAGONAL

    def flops(self, spec: WeightSpec) -> float:
        weights, tile = spec.d_out * spec.d_in, max(spec.out_block, spec.in_block, spec.pattern.m)
        diagonal = 16.0 * weights * tile  # an iteration of diag: the moments of each tile
        if self.objective != "gram":
            return diagonal * (self._schedule().iterations if self.solver == "paper" else self._diagonal_iterations)
        schedule = self._gram_schedule()
        if restarts(spec):
            # Rounding in order costs less than one iteration.
            return 2.0 * weights * spec.d_in * 3 * (schedule.grid + ROUNDS) + spec.d_in**3
        iterations = schedule.gram + (schedule.grid if spec.core_dtype in QUANTIZERS else 0)
        # Each computes S C, TᵀT and a sweep whose groups affect all later ones.
        return diagonal * schedule.diagonal + 2.0 * weights * spec.d_in * (3 * iterations + 2)

    def solving_nbytes(self, spec: WeightSpec) -> int:
        # The order of rounding is found in fp64, beside the Gram matrices that the descent holds.
        return super().solving_nbytes(spec) + (24 * spec.d_in**2 if restarts(spec) else 0)

    def quick(self) -> "Armor":
        if self.solver != "exact":
            return self
        return replace(self, iterations=QUICK_ITERATIONS, grid_iterations=QUICK_ITERATIONS)

    def at_effort(self, effort: Effort) -> "Armor":
        work = WORK[effort]
        if self.objective != "gram":
            return self  # its iterations are of another kind
        iterations = work.iterations if self.iterations is None else self.iterations
        grid_iterations = work.grid_iterations if self.grid_iterations is None else self.grid_iterations
        return replace(self, iterations=iterations, grid_iterations=grid_iterations)

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        if self.objective == "gram":
            gram = statistics.require_gram().to(weight.device)
            chain, losses = solve_gram(weight, gram, spec, self._gram_schedule())
            return Solution(chain, tuple(losses))
        return self._diagonal(weight, statistics.require_diagonal().to(weight.device), spec)

    def _diagonal(self, weight: Tensor, moment: Tensor, spec: WeightSpec) -> Solution:
        scale = power_of_two(weight)
        normalised = normalise(weight.to(torch.float32) / scale)
        problem = Problem.from_weight(normalised.weight, _unit_mean(moment), spec)
        stages = stages_for(weight.device)
        if self.solver == "exact":
            factors, losses = solve_exact(problem, self._diagonal_iterations, stages)
        else:
            factors, losses = solve_paper(problem, self._schedule())
        factors = balanced(problem, factors, normalised)
        chain = finish(DiagonalObjective(problem, stages), factors, normalised, scale, spec)
        return Solution(chain, tuple(losses))

    @property
    def _diagonal_iterations(self) -> int:
        return DIAGONAL_ITERATIONS if self.iterations is None else self.iterations

    def _gram_schedule(self) -> GramSchedule:
        gram = GramSchedule.gram if self.iterations is None else self.iterations
        grid = GramSchedule.grid if self.grid_iterations is None else self.grid_iterations
        return GramSchedule(min(GramSchedule.diagonal, gram), gram, grid, self.damping)

    def _schedule(self) -> PaperSchedule:
        iterations = PaperSchedule.iterations if self.iterations is None else self.iterations
        return PaperSchedule(iterations, self.learning_rate, self.patience, seed=self.seed)


def _unit_mean(moment: Tensor) -> Tensor:
    """Second moments scaled to mean 1, so that they stay in the range of fp32 (a common factor is irrelevant)."""
    mean = moment.double().mean()
    return (moment.double() / mean if mean > 0 else moment).to(torch.float32)
