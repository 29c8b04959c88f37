"""ARMOR: a sparse core between block-diagonal wrappers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.spec import WeightSpec
from halfplate.methods.base import Method, Solution, check_inputs
from halfplate.solvers.armor.exact import solve_exact
from halfplate.solvers.armor.finish import finish
from halfplate.solvers.armor.paper import PaperSchedule, solve_paper
from halfplate.solvers.armor.problem import Problem
from halfplate.solvers.armor.stages import stages_for
from halfplate.solvers.normalise import normalise
from halfplate.statistics import InputStatistics, Statistic

EXACT_ITERATIONS = 60
LARGEST_N = 16


@dataclass(frozen=True)
class Armor(Method):
    """W ≈ A · S · B: an N:M core between two block-diagonal wrappers that repair what pruning breaks.

    solver: `exact` minimises over A, B and every group of S in turn; `paper` is the published Adam with sampled groups.
    objective: `diag` weights the error of each input by its second moment. iterations: None takes the solver's own, 60
    exact ones or the published 20,000. learning_rate, patience and seed steer `paper` only. Source: arXiv 2510.05528;
    the exact updates are our own (docs/armor.md).
    """

    name = "armor"
    summary = "sparse core between block-diagonal wrappers that repair the error"
    wrapped = True
    solver: str = "exact"
    objective: str = "diag"
    iterations: int | None = None
    learning_rate: float = 1e-4
    patience: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.solver not in ("exact", "paper"):
            raise HalfplateError(f"solver={self.solver!r} is not one of exact, paper")
        if self.objective != "diag":
            raise HalfplateError(f"objective={self.objective!r} is not available yet; use diag")
        if self.iterations is not None and self.iterations < 0:
            raise HalfplateError(f"iterations={self.iterations} must be 0 or more; try {EXACT_ITERATIONS}")
        if not 0 < self.learning_rate < float("inf"):
            raise HalfplateError(f"learning_rate={self.learning_rate} must be a positive number; try 1e-4")
        if self.patience < 1:
            raise HalfplateError(f"patience={self.patience} must be at least 1; try 100")

    def check_spec(self, spec: WeightSpec) -> None:
        super().check_spec(spec)
        if spec.pattern.n > LARGEST_N:
            raise HalfplateError(
                f"pattern={spec.pattern} keeps more than {LARGEST_N} of a group, which method 'armor' does not solve; try 2:4 or 16:32"
            )

    @property
    def requires(self) -> Statistic:
        return Statistic.DIAGONAL

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        # A power of two brings the weight near 1 and back without rounding, so that no square leaves the range of fp32.
        largest = float(weight.abs().max())
        scale = 2.0 ** math.floor(math.log2(largest)) if largest else 1.0
        normalised = normalise(weight.to(torch.float32) / scale)
        moment = _unit_mean(statistics.require_diagonal().to(weight.device))
        problem = Problem.from_weight(normalised.weight, moment, spec)
        stages = stages_for(weight.device)
        if self.solver == "exact":
            iterations = EXACT_ITERATIONS if self.iterations is None else self.iterations
            factors, losses = solve_exact(problem, iterations, stages)
        else:
            factors, losses = solve_paper(problem, self._schedule())
        chain = finish(problem, factors, normalised, scale, spec, stages)
        return Solution(chain, tuple(losses))

    def _schedule(self) -> PaperSchedule:
        iterations = PaperSchedule.iterations if self.iterations is None else self.iterations
        return PaperSchedule(iterations, self.learning_rate, self.patience, seed=self.seed)


def _unit_mean(moment: Tensor) -> Tensor:
    """Second moments with mean 1 (any common factor is irrelevant), so that no input scale leaves the range of fp32."""
    mean = moment.double().mean()
    return (moment.double() / mean if mean > 0 else moment).to(torch.float32)
