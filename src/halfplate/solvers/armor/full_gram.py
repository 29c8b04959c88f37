"""The whole solve for the true output error: scaled inputs, a diagonal warm start, the full Gram matrix, an integer core."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfplate.formats.chain import Chain
from halfplate.formats.quantizers import has_scales_alone, quantizer_of, storage_of
from halfplate.formats.quantizers.rounding import round_groups
from halfplate.formats.spec import WeightSpec
from halfplate.solvers.armor.exact import descend, solve_exact
from halfplate.solvers.armor.finish import balanced, finish
from halfplate.solvers.armor.gram import GramObjective, GramProblem, Point, gram_inside, measured, swept
from halfplate.solvers.armor.problem import Problem
from halfplate.solvers.armor.restarts import descend_from_restarts, restarts
from halfplate.solvers.armor.rows import RowsProblem, needs_rows
from halfplate.solvers.armor.stages import stages_for
from halfplate.solvers.armor.sweep import Levels
from halfplate.solvers.normalise import Normalised, power_of_two

LEAST_DAMPING = 1e-5  # directions that no input constrains must not diverge under momentum


@dataclass(frozen=True)
class GramSchedule:
    """Iterations of each phase.

    diagonal, gram, grid: with the diagonal of H, with H, and with H and an integer core.
    damping: added to the unit diagonal of H.
    tolerance: a phase ends after an iteration that gains less than this share of the loss.
    """

    diagonal: int = 20
    gram: int = 20
    grid: int = 16
    damping: float = 0.0
    tolerance: float = 1e-3


def solve_gram(weight: Tensor, gram: Tensor, spec: WeightSpec, schedule: GramSchedule) -> tuple[Chain, list[float]]:
    """Minimise tr((W − A S B) H (W − A S B)ᵀ) and store the factors as `spec` says.

    Rows are not scaled; inputs are scaled by their root mean square, which B absorbs. Returns the matrix and the losses of each
    phase in sequence, relative to the zero matrix: with H, and with an integer core if `spec` has one. The loss falls within a phase.

    weight: fp32 (d_out, d_in).
    gram: H, fp32 or fp64 (d_in, d_in), up to any common factor.
    """
    scaled, scaled_gram, normalised, scale = _scaled(weight, gram, schedule.damping)
    tiles = Problem.from_weight(scaled, (scaled_gram.diagonal() > 0).float(), spec)
    problem = GramProblem.from_tiles(tiles, scaled_gram)
    del scaled_gram  # twice the size of the tensors that the problem keeps
    objective = GramObjective(problem)
    if spec.pattern.is_dense:
        factors, losses = tiles.start(), list[float]()
    else:
        factors, _ = solve_exact(tiles, schedule.diagonal, stages_for(weight.device))
        at, losses = descend(objective, measured(problem, factors), schedule.gram, problem.total, schedule.tolerance)
        factors = at.factors
        del at  # frees two matrices of the size of the weight
    factors = balanced(tiles, factors, normalised)
    quantizer = quantizer_of(spec.core_dtype)
    if quantizer is not None and restarts(spec) and needs_rows(quantizer):
        rows = RowsProblem(factors.core, gram_inside(problem, factors.in_blocks), Levels(quantizer, spec.group))
        found, absolute = rows.solved(schedule.grid)
        factors = replace(factors, core=found.values)
        grid_losses = [loss / problem.total if problem.total else 0.0 for loss in absolute]
        return finish(objective, factors, normalised, scale, spec, found.parameters), losses + grid_losses
    # The sweep only supports scales. N:M groups that straddle two scale groups are rounded to nearest instead.
    if quantizer is None or not has_scales_alone(quantizer) or spec.group % spec.pattern.m:
        return finish(objective, factors, normalised, scale, spec), losses
    levels = Levels(quantizer, spec.group)
    objective = GramObjective(problem, levels)
    _, (steps,) = round_groups(
        factors.core, quantizer, spec.group, storage_of(quantizer, spec.group)
    )  # initial scales for the values of the core
    if restarts(spec):
        factors, steps, grid_losses = descend_from_restarts(objective, factors, steps.float(), schedule.grid)
        return finish(objective, factors, normalised, scale, spec, (steps,)), losses + grid_losses
    start = swept(problem, factors, steps.float(), levels, off_grid=True)
    at, grid_losses = descend(objective, start, schedule.grid, problem.total, schedule.tolerance, moves_core=False)
    at = _storable(problem, at, levels)
    return finish(objective, at.factors, normalised, scale, spec, _alone(at.steps)), losses + grid_losses


def _storable(problem: GramProblem, at: Point, levels: Levels) -> Point:
    """The scales moved to the nearest that can be stored, and every group swept once more with them; `at` if any scale can be."""
    quantizer, storage = levels.quantizer, storage_of(levels.quantizer, levels.group)
    if storage.span == 1:
        return at
    scales = _alone(at.steps)
    (steps,) = storage.nearest(quantizer.stored, scales, storage.units(quantizer.stored, scales))
    return swept(problem, at.factors, steps.float(), levels, off_grid=True)


def _alone(steps: Tensor | None) -> tuple[Tensor]:
    assert steps is not None, "a quantised core has scales"
    return (steps,)


def _scaled(weight: Tensor, gram: Tensor, damping: float) -> tuple[Tensor, Tensor, Normalised, float]:
    """W and H in units of the root mean square of each input, with the scales to undo it; a dead input is not scaled."""
    diagonal = gram.diagonal().double()
    alive = diagonal > 0
    inputs = torch.where(alive, diagonal, 1.0).sqrt()
    scaled_gram = (gram.double() / inputs[:, None]).div_(inputs)
    scaled_gram.diagonal().add_(torch.where(alive, max(damping, LEAST_DAMPING), 0.0))
    mean = inputs[alive].mean() if bool(alive.any()) else inputs.new_ones(())
    inputs = torch.where(alive, inputs / mean, 1.0)
    scale = power_of_two(weight)
    scaled = (weight.double() / scale * inputs).to(torch.float32)
    rows = torch.ones(len(weight), dtype=torch.float32, device=weight.device)
    return scaled, scaled_gram, Normalised(scaled, rows, (1 / inputs).to(torch.float32)), scale
