"""Better starts for a quantised core without wrappers: round column after column, and let later columns compensate.

A sweep changes one group at a time and ends where no single change helps. Rounding in order with compensation (GPTQ) moves all later
columns at once, so it starts a descent elsewhere; with the scales of the best descent so far, that is mostly lower.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfplate.formats.spec import WeightSpec
from halfplate.kernels import native
from halfplate.solvers.armor.exact import descend
from halfplate.solvers.armor.gram import GramObjective, Point, gram_inside, measured
from halfplate.solvers.armor.native_rows import has_native_values, solve_rows
from halfplate.solvers.armor.problem import Factors
from halfplate.solvers.armor.sweep import Levels
from halfplate.solvers.obs import inverse_factor

ROUNDS = 4
DAMPING = 1e-4  # of H, only for the order of compensation; the descent minimises the true error
COLUMNS = 64  # between two updates of all later columns; only the speed depends on it


def restarts(spec: WeightSpec) -> bool:
    """Whether a quantised core of `spec` is solved with restarts: only without wrappers, which couple its rows."""
    return spec.pattern.is_dense and not (spec.out_block or spec.in_block)


def descend_from_restarts(
    objective: GramObjective, wanted: Factors, steps: Tensor, iterations: int
) -> tuple[Factors, Tensor, list[float]]:
    """Descend from `ROUNDS` starts, each rounded with the scales of the best point before it; every row keeps its best.

    wanted: with the core before it is quantised; its wrappers are diagonal, so the rows are independent.
    steps: the first scales, fp32 (rows, ceil(cols / group)).
    iterations: of all descents together.
    Returns the best factors, their scales, and the losses from the first start on, relative to the zero matrix.
    """
    assert objective.levels is not None, "a quantised core has codes"
    if wanted.core.device.type == "cpu" and native.available() and has_native_values(objective.levels.quantizer):
        return _native(objective, objective.levels, wanted, steps, iterations)
    return descend_in_torch(objective, wanted, steps, iterations)


def _native(
    objective: GramObjective, levels: Levels, wanted: Factors, steps: Tensor, iterations: int
) -> tuple[Factors, Tensor, list[float]]:
    problem = objective.problem
    gram = gram_inside(problem, wanted.in_blocks)
    order = Order.of(gram)
    rounds = max(1, min(ROUNDS, iterations))
    values, steps, absolute = solve_rows(
        wanted.core, gram, order.columns, order.spread, steps, levels, rounds, iterations // rounds
    )
    losses = [loss / problem.total if problem.total else 0.0 for loss in absolute]
    return replace(wanted, core=values), steps, losses


def descend_in_torch(
    objective: GramObjective, wanted: Factors, steps: Tensor, iterations: int
) -> tuple[Factors, Tensor, list[float]]:
    """`descend_from_restarts` sweep by sweep, on any device and for any quantizer; the reference of the native form."""
    problem, core = objective.problem, wanted.core
    gram = gram_inside(problem, wanted.in_blocks)
    order = Order.of(gram)
    rounds = max(1, min(ROUNDS, iterations))

    def descended(scales: Tensor | None) -> tuple[Point, list[float]]:
        assert scales is not None, "a quantised core has scales"
        assert objective.levels is not None, "a quantised core has codes"
        rounded = round_in_order(core, order, (scales,), objective.levels)
        start = measured(problem, replace(wanted, core=rounded), scales)
        return descend(objective, start, iterations // rounds, problem.total, moves_core=False)

    def remaining(at: Point) -> Tensor:
        """The loss of each row: (rows, 1)."""
        missing = core - at.factors.core
        return ((missing @ gram) * missing).sum(1, keepdim=True)

    best, losses = descended(steps)
    least = remaining(best)
    for _ in range(rounds - 1):
        at, _ = descended(best.steps)
        found = remaining(at)
        better = found < least
        if not bool(better.any()):
            break  # the same scales would give the same start again
        assert at.steps is not None, "a quantised core has scales"
        assert best.steps is not None, "a quantised core has scales"
        kept = torch.where(better, at.factors.core, best.factors.core)
        scales = torch.where(better, at.steps, best.steps)
        least = torch.where(better, found, least)
        best = measured(problem, replace(wanted, core=kept), scales)
        losses.append(best.loss / problem.total if problem.total else 0.0)
    assert best.steps is not None, "a quantised core has scales"
    return best.factors, best.steps, losses


@dataclass(frozen=True, eq=False)
class Order:
    """The order of the columns, those of the strongest inputs first, and how an error in one is spread over the later ones.

    columns: int64 (cols,).
    spread: upper triangular with a unit diagonal, fp32 (cols, cols), in this order.
    """

    columns: Tensor
    spread: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> "Order":
        columns = gram.diagonal().argsort(descending=True, stable=True)
        return cls(columns, inverse_factor(gram[columns][:, columns], DAMPING))


def round_in_order(core: Tensor, order: Order, parameters: tuple[Tensor, ...], levels: Levels) -> Tensor:
    """`core` (rows, cols) quantised with `parameters` (rows, ceil(cols / group)), each column compensating for those before it.

    Source: GPTQ, arXiv 2210.17323, with static scales and columns in falling order of their second moment.
    """
    each = (part.repeat_interleave(levels.group, 1)[:, : core.shape[1]] for part in parameters)
    left, *steps = (matrix.T[order.columns].contiguous() for matrix in (core, *each))  # a column is contiguous
    for start in range(0, len(left), COLUMNS):
        end = min(start + COLUMNS, len(left))
        lost = torch.empty_like(left[start:end])
        for j in range(start, end):
            here = [part[j] for part in steps]
            rounded = levels.quantizer.decode(levels.quantizer.nearest(left[j], *here), *here)
            lost[j - start] = left[j] - rounded
            left[j] = rounded
            left[j + 1 : end].addr_(order.spread[j, j + 1 : end], lost[j - start], alpha=-1)
        left[end:].addmm_(order.spread[start:end, end:].T, lost, alpha=-1)
    found = torch.empty_like(left)
    found[order.columns] = left
    return found.T.contiguous()
