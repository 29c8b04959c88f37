"""Choosing N of M for every decoder layer by its outliers in the original model."""

from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from halfplate.allocation.layer_ratios import kept_of_groups, kept_ratios, outlier_share
from halfplate.calibration import BATCH, CalibrationTokens
from halfplate.calibration.experts import collect_layer
from halfplate.models.blockwise import BlockwiseModel
from halfplate.models.sources import LoadedModel
from halfplate.pattern import Pattern
from halfplate.planning import MatrixPlan, Plan
from halfplate.statistics import Statistic
from halfplate.telemetry.clock import Clock
from halfplate.telemetry.progress import Report


@dataclass(frozen=True)
class BlockRatio:
    """The share that one decoder layer keeps. outlier_share: share of its weights with a score above 5 times the mean."""

    block: int
    outlier_share: float
    pattern: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def ratio_plan(
    loaded: LoadedModel, plan: Plan, tokens: CalibrationTokens, report: Report, clock: Clock
) -> tuple[Plan, list[BlockRatio]]:
    """The plan with N of M chosen for every layer by OWL, and the choices; the average stays that of the recipe.

    Scores are |W| · ‖X‖ of the planned matrices on the inputs of the original model.
    """
    with clock("choosing ratios"):
        shares = _outlier_shares(loaded, plan, tokens, report)
    recipe, pattern = plan.recipe, plan.recipe.parsed_pattern
    sizes = [sum(m.spec.d_out * m.spec.d_in for m in plan.matrices if m.block == block and m.spec) for block in shares]
    ratios = kept_ratios(list(shares.values()), sizes, pattern.n / pattern.m, recipe.owl_lambda)
    kept = dict(zip(shares, kept_of_groups(ratios, sizes, pattern), strict=True))
    patterns = {block: Pattern(n, pattern.m) for block, n in kept.items()}

    def chosen(matrix: MatrixPlan) -> MatrixPlan:
        if matrix.spec is None or matrix.block is None:
            return matrix
        return replace(matrix, spec=replace(matrix.spec, pattern=patterns[matrix.block]))

    blocks = [BlockRatio(block, share, str(patterns[block])) for block, share in shares.items()]
    return replace(plan, matrices=tuple(map(chosen, plan.matrices))), blocks


def _outlier_shares(loaded: LoadedModel, plan: Plan, tokens: CalibrationTokens, report: Report) -> dict[int, float]:
    """The outlier share of every layer with planned matrices, in order."""
    names: dict[int, list[str]] = defaultdict(list)
    for matrix in plan.matrices:
        if matrix.spec is not None and matrix.block is not None:
            names[matrix.block].append(matrix.name)
    blockwise = BlockwiseModel(loaded.model, plan.recipe.precision)
    hidden = [blockwise.embed(batch) for batch in tokens.ids.to(loaded.model.device).split(BATCH)]
    limit = None if plan.recipe.token_limit == "none" else plan.recipe.token_limit
    gated = plan.recipe.expert_tokens == "gated"
    shares, last = {}, max(names)
    report("choosing ratios", 0, last + 1)
    for block in range(last + 1):
        if names[block]:
            collected, hidden = collect_layer(blockwise, block, hidden, names[block], Statistic.DIAGONAL, limit, gated)
            weights = {name: cast(nn.Linear, loaded.model.get_submodule(name)).weight for name in names[block]}
            shares[block] = outlier_share(
                [w.detach().float().abs() * collected[name].require_diagonal().sqrt() for name, w in weights.items()]
            )
        else:
            hidden = [blockwise.run_block(block, batch) for batch in hidden]
        report("choosing ratios", block + 1, last + 1)
    return shares
