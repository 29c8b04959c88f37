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
from halfplate.solvers.armor.sweep import Levels
from halfplate.solvers.obs import inverse_factor

ROUNDS = 4
DAMPING = 1e-4  # of H, only for the order of compensation; the descent minimises the true error
COLUMNS = 64  # between two updates of all later columns; only the speed depends on it


def restarts(spec: WeightSpec) -> bool:
    """Whether a quantised core of `spec` is solved with restarts: only without wrappers, which couple its rows."""
    return spec.pattern.is_dense and not (spec.out_block or spec.in_block)


def descend_from_restarts(objective: GramObjective, wanted: Point, iterations: int) -> tuple[Point, list[float]]:
    """Descend from `ROUNDS` starts, each rounded with the scales of the best point before it; every row keeps its best.

    wanted: the core before it is quantised, and the first scales; its wrappers are identities, so the rows are independent.
    iterations: of all descents together.
    Returns the best point, and the losses from the first start on, relative to the zero matrix.
    """
    assert objective.levels is not None, "a quantised core has codes"
    assert wanted.steps is not None, "a quantised core has scales"
    if (
        wanted.factors.core.device.type == "cpu"
        and native.available()
        and has_native_values(objective.levels.quantizer)
    ):
        return _native(objective, objective.levels, wanted, wanted.steps, iterations)
    return descend_in_torch(objective, wanted, iterations)


def _native(
    objective: GramObjective, levels: Levels, wanted: Point, steps: Tensor, iterations: int
) -> tuple[Point, list[float]]:
    problem, core = objective.problem, wanted.factors.core
    gram = gram_inside(problem, wanted.factors.in_blocks)
    order = Order.of(gram)
    rounds = max(1, min(ROUNDS, iterations))
    values, steps, absolute = solve_rows(
        core, gram, order.columns, order.spread, steps, levels, rounds, iterations // rounds
    )
    best = measured(problem, replace(wanted.factors, core=values), steps)
    return best, [loss / problem.total if problem.total else 0.0 for loss in absolute]


def descend_in_torch(objective: GramObjective, wanted: Point, iterations: int) -> tuple[Point, list[float]]:
    """`descend_from_restarts` sweep by sweep, on any device and for any quantizer; the reference of the native form."""
    problem, core = objective.problem, wanted.factors.core
    gram = gram_inside(problem, wanted.factors.in_blocks)
    order = Order.of(gram)
    rounds = max(1, min(ROUNDS, iterations))

    def descended(scales: Tensor | None) -> tuple[Point, list[float]]:
        assert scales is not None, "a quantised core has scales"
        assert objective.levels is not None, "a quantised core has codes"
        rounded = round_in_order(core, order, (scales,), objective.levels)
        start = measured(problem, replace(wanted.factors, core=rounded), scales)
        return descend(objective, start, iterations // rounds, problem.total, moves_core=False)

    def remaining(at: Point) -> Tensor:
        """The loss of each row: (rows, 1)."""
        missing = core - at.factors.core
        return ((missing @ gram) * missing).sum(1, keepdim=True)

    best, losses = descended(wanted.steps)
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
        best = measured(problem, replace(wanted.factors, core=kept), scales)
        losses.append(best.loss / problem.total if problem.total else 0.0)
    return best, losses


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
