"""Choosing N of M or bits for every decoder layer from its weights and inputs in the original model."""

from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from halfplate.allocation.ratios import RATIOS, Ratios
from halfplate.allocation.ratios.formats import average, formats_of
from halfplate.calibration import BATCH, CalibrationTokens
from halfplate.calibration.experts import collect_layer
from halfplate.models.blockwise import BlockwiseModel
from halfplate.models.sources import LoadedModel
from halfplate.planning import MatrixPlan, Plan
from halfplate.statistics import Statistic
from halfplate.telemetry.clock import Clock
from halfplate.telemetry.progress import Report


@dataclass(frozen=True)
class BlockRatio:
    """What one decoder layer keeps: a pattern, or a type of cores.

    score: the figure by which the rule chose it (OWL: its share of outliers).
    """

    block: int
    score: float
    format: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def ratio_plan(
    loaded: LoadedModel, plan: Plan, tokens: CalibrationTokens, report: Report, clock: Clock
) -> tuple[Plan, list[BlockRatio]]:
    """The plan with N of M, or bits, chosen for every layer by the `ratios` of its recipe, and the choices; the average stays that of the recipe.

    The rule sees the planned matrices and their inputs in the original model.
    """
    recipe = plan.recipe
    rule, format_of = RATIOS.get(recipe.ratios), (recipe.parsed_pattern, recipe.core_dtype, recipe.group_size)
    with clock("choosing ratios"):
        measured = _measured(rule, loaded, plan, tokens, report)
    sizes = [
        sum(m.spec.d_out * m.spec.d_in for m in plan.matrices if m.block == block and m.spec) for block in measured
    ]
    shares = rule.kept(list(measured.values()), sizes, average(*format_of), recipe.owl_lambda)
    formats = dict(zip(measured, formats_of(shares, sizes, *format_of), strict=True))

    def chosen(matrix: MatrixPlan) -> MatrixPlan:
        if matrix.spec is None or matrix.block is None:
            return matrix
        found = formats[matrix.block]
        return replace(matrix, spec=replace(matrix.spec, pattern=found.pattern, core_dtype=found.core_dtype))

    blocks = [
        BlockRatio(block, rule.score(found, share), str(formats[block]))
        for (block, found), share in zip(measured.items(), shares, strict=True)
    ]
    return replace(plan, matrices=tuple(map(chosen, plan.matrices))), blocks


def _measured(
    rule: Ratios, loaded: LoadedModel, plan: Plan, tokens: CalibrationTokens, report: Report
) -> dict[int, Tensor]:
    """What the rule knows of every layer with planned matrices, in order."""
    names: dict[int, list[str]] = defaultdict(list)
    for matrix in plan.matrices:
        if matrix.spec is not None and matrix.block is not None:
            names[matrix.block].append(matrix.name)
    blockwise = BlockwiseModel(loaded.model, plan.recipe.precision)
    hidden = []
    if rule.reads_inputs:
        hidden = [blockwise.embed(batch) for batch in tokens.ids.to(loaded.model.device).split(BATCH)]
    limit = None if plan.recipe.token_limit == "none" else plan.recipe.token_limit
    gated = plan.recipe.expert_tokens == "gated"
    found, last = {}, max(names)
    report("choosing ratios", 0, last + 1)
    for block in range(last + 1):
        norms: list[Tensor] = []
        if rule.reads_inputs and names[block]:
            collected, hidden = collect_layer(blockwise, block, hidden, names[block], Statistic.DIAGONAL, limit, gated)
            norms = [collected[name].require_diagonal().sqrt() for name in names[block]]
        else:
            hidden = [blockwise.run_block(block, batch) for batch in hidden]
        if names[block]:
            linears = (cast(nn.Linear, loaded.model.get_submodule(name)) for name in names[block])
            found[block] = rule.measured([linear.weight.detach().float() for linear in linears], norms)
        report("choosing ratios", block + 1, last + 1)
    return found
