"""Choosing a format for every matrix within a budget, from measured errors, harm and times."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from halfplate.allocation import Level, allocate
from halfplate.budgets.measure import LevelMeasurement, Unit
from halfplate.budgets.search import search_levels, search_samples
from halfplate.budgets.store import LevelStore
from halfplate.calibration import CalibrationTokens
from halfplate.errors import HalfplateError
from halfplate.models.sources import LoadedModel
from halfplate.planning import Plan
from halfplate.telemetry.clock import Clock
from halfplate.telemetry.progress import Report


@torch.no_grad()
def allocate_plan(
    loaded: LoadedModel, plan: Plan, tokens: CalibrationTokens, report: Report, clock: Clock
) -> tuple[Plan, dict[str, Any] | None]:
    """The plan with a format chosen for every matrix, so that the expected KL is smallest within the budget of its recipe.

    Errors are measured by a quick solve of every candidate on the inputs of the original model. The KL is assumed to be proportional
    to the error of each matrix (it is quadratic in small changes) and to add up. Source: ROCKET (knapsack over measured errors), with
    the KL of the model instead of a proxy. If the recipe says so, an evolutionary search on the KL of the model continues from there,
    and a JSON object describes it. Raises HalfplateError if the budget cannot be met.
    """
    recipe, evolution = plan.recipe, plan.recipe.evolution
    judging = search_samples(*tokens.ids.shape) if evolution is not None else 0
    # Text that the solves have seen would favour formats that can overfit it most.
    solving = tokens.ids[: len(tokens.ids) - judging] if judging < len(tokens.ids) else tokens.ids
    record = None
    with LevelStore() if evolution is not None else nullcontext() as store:
        with clock("choosing levels"):
            measurement = LevelMeasurement(loaded, plan, solving, store)
            units = measurement.run(report)
            share = recipe.budget if recipe.time_budget is None else recipe.time_budget
            assert share is not None
            whole = plan.dense_nbytes if recipe.time_budget is None else measurement.dense_seconds
            # Tables that are not free take their part of the bytes first.
            fixed = [matrix.spec for matrix in plan.matrices if matrix.block is None and not matrix.free]
            taken = sum(spec.nbytes for spec in fixed if spec is not None) if recipe.time_budget is None else 0
            picked = _knapsack(units, share * whole, whole, taken, recipe.time_budget)
        if evolution is not None:
            assert store is not None
            with clock("searching levels"):
                ids = tokens.ids[len(tokens.ids) - judging :]
                picked, record = search_levels(
                    loaded.model, units, store, ids, picked, share * whole - taken, evolution, report
                )
    chosen = {
        name: spec for unit, index in zip(units, picked, strict=True) for name, spec in unit.levels[index].specs.items()
    }
    matrices = tuple(replace(matrix, spec=chosen.get(matrix.name, matrix.spec)) for matrix in plan.matrices)
    return replace(plan, matrices=matrices), record


def _knapsack(units: list[Unit], budget: float, whole: float, taken: float, time_budget: float | None) -> list[int]:
    options = [[Level(level.cost, unit.harm * level.error) for level in unit.levels] for unit in units]
    try:
        return allocate(options, budget - taken)
    except HalfplateError:
        least = sum(min(level.cost for level in levels) for levels in options)
        least = (least + taken) / whole
        name, value = ("budget", budget / whole) if time_budget is None else ("time_budget", time_budget)
        raise HalfplateError(
            f"{name}={value:g} cannot be met: the least is {least:.4f}; raise it, or add fields to --choose"
        ) from None
