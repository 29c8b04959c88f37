"""Choosing one candidate per matrix with the least total loss within one budget."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halfplate.errors import HalfplateError

# Costs are counted in this many parts of the budget. Rounding up wastes less than one part per matrix.
UNITS = 20_000


@dataclass(frozen=True)
class Level:
    """Cost (bytes or seconds) and loss (a quantity that adds up over matrices) of one candidate of a matrix."""

    cost: float
    loss: float


def allocate(matrices: Sequence[Sequence[Level]], budget: float) -> list[int]:
    """The index of the candidate of each matrix, with the least total loss and a total cost of at most `budget`.

    A multiple-choice knapsack, solved by dynamic programming over costs rounded up to `budget` / 20,000, so that the budget is never
    exceeded. The loss is the minimum for the rounded costs. Of equal losses the cheaper choice wins.
    Raises HalfplateError, naming the smallest possible budget, if even the cheapest candidates cost more.
    """
    least = sum(min(level.cost for level in levels) for levels in matrices)
    if not least <= budget:
        raise HalfplateError(
            f"budget={budget:.6g} cannot be met, the least is {least:.6g}; raise it, or offer cheaper candidates"
        )
    # Rounding up may not make the least impossible.
    unit = max(budget / (UNITS - len(matrices)), sys.float_info.min) if budget > 0 else 1.0
    room = UNITS
    best = np.zeros(room + 1)  # least loss of the matrices so far for each cost
    choices = np.zeros((len(matrices), room + 1), dtype=np.int16)
    for number, levels in enumerate(matrices):
        after = np.full(room + 1, np.inf)
        # Cheap candidates first, so that a more expensive one is only chosen if it is better.
        for index in sorted(range(len(levels)), key=lambda index: levels[index].cost):
            if levels[index].cost > budget:
                continue
            cost = int(np.ceil(levels[index].cost / unit))
            if cost > room:
                continue
            loss = best[: room + 1 - cost] + levels[index].loss
            better = loss < after[cost:]
            after[cost:][better] = loss[better]
            choices[number, cost:][better] = index
        best = after
    chosen, left = [0] * len(matrices), room
    for number in range(len(matrices) - 1, -1, -1):
        chosen[number] = int(choices[number, left])
        left -= int(np.ceil(matrices[number][chosen[number]].cost / unit))
    return _within(matrices, chosen, budget)


def _within(matrices: Sequence[Sequence[Level]], chosen: list[int], budget: float) -> list[int]:
    """The choice, moved to cheaper candidates with the least harm while it exceeds the budget because of rounding."""

    def total() -> float:
        return sum(levels[index].cost for levels, index in zip(matrices, chosen, strict=True))

    while (excess := total() - budget) > 1e-9 * abs(budget):
        moves = [
            ((other.loss - levels[now].loss) / min(levels[now].cost - other.cost, excess), number, index)
            for number, (levels, now) in enumerate(zip(matrices, chosen, strict=True))
            for index, other in enumerate(levels)
            if other.cost < levels[now].cost
        ]
        _, number, index = min(moves)
        chosen[number] = index
    return chosen
