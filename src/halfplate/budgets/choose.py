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
from halfplate.headroom import spoken_above
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
    evolution = plan.recipe.evolution
    judging = search_samples(*tokens.ids.shape) if evolution is not None else 0
    # Text that the solves have seen would favour formats that can overfit it most.
    solving = tokens.ids[: len(tokens.ids) - judging] if judging < len(tokens.ids) else tokens.ids
    record = None
    with LevelStore() if evolution is not None else nullcontext() as store:
        with clock("choosing levels"):
            measurement = LevelMeasurement(loaded, plan, solving, store)
            units = measurement.run(report)
            budget = _left(plan, measurement.dense_seconds)
            picked = _knapsack(plan, units, budget, measurement.dense_seconds)
        if evolution is not None:
            assert store is not None
            with clock("searching levels"):
                ids = tokens.ids[len(tokens.ids) - judging :]
                picked, record = search_levels(loaded.model, units, store, ids, picked, budget, evolution, report)
    chosen = {
        name: spec for unit, index in zip(units, picked, strict=True) for name, spec in unit.levels[index].specs.items()
    }
    matrices = tuple(replace(matrix, spec=chosen.get(matrix.name, matrix.spec)) for matrix in plan.matrices)
    return replace(plan, matrices=matrices), record


def _left(plan: Plan, dense_seconds: float) -> float:
    """The bytes, or the seconds per token, that the units may cost."""
    if plan.limit is None:
        assert plan.recipe.time_budget is not None, "every budget is in bytes or in time"
        return plan.recipe.time_budget * dense_seconds
    # Tables that are not free take their part of the bytes first.
    fixed = [matrix.spec for matrix in plan.matrices if matrix.block is None and not matrix.free]
    return plan.limit.matrices - sum(plan.limit.cost(spec) for spec in fixed if spec is not None)


def _knapsack(plan: Plan, units: list[Unit], budget: float, dense_seconds: float) -> list[int]:
    options = [[Level(level.cost, unit.harm * level.error) for level in unit.levels] for unit in units]
    try:
        return allocate(options, budget)
    except HalfplateError:
        least, limit = sum(min(level.cost for level in levels) for levels in options), plan.limit
        if limit is None:
            asked, named = f"time_budget={plan.recipe.time_budget:g}", f"{least / dense_seconds:.4f}"
        else:
            bytes_ = int(limit.total - budget + least)
            asked = limit.asked
            named = f"{bytes_ / plan.dense_nbytes:.4f}" if plan.recipe.budget is not None else spoken_above(bytes_)
        raise HalfplateError(
            f"{asked} cannot be met: the least is {named}; raise it, or add fields to --choose"
        ) from None
