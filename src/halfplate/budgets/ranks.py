"""Choosing a rank for every matrix by a common threshold on the singular values of the original model (WeLore)."""

from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import nn

from halfplate.allocation.ranks import normalised, ranks_within
from halfplate.formats.spec import WeightSpec
from halfplate.models.sources import LoadedModel
from halfplate.planning import MatrixPlan, Plan
from halfplate.telemetry.clock import Clock
from halfplate.telemetry.progress import Report


@torch.no_grad()
def rank_plan(loaded: LoadedModel, plan: Plan, report: Report, clock: Clock) -> Plan:
    """The plan with a rank for every matrix, at the bytes that it had; a matrix that low rank would enlarge stays as it is.

    The threshold is found by bisection for these bytes; WeLore sets it by hand, and counts ranks instead of bytes.
    """
    specs = plan.layer_specs
    with clock("choosing ranks"):
        spectra = []
        for done, name in enumerate(specs):
            weight = cast(nn.Linear, loaded.model.get_submodule(name)).weight
            spectra.append(normalised(torch.linalg.svdvals(weight.detach().float())).cpu())
            report("choosing ranks", done + 1, len(specs))
        costs = [partial(_nbytes, spec) for spec in specs.values()]
        ranks, threshold = ranks_within(spectra, costs, sum(spec.nbytes for spec in specs.values()))
    chosen = dict(zip(specs, ranks, strict=True))

    def ranked(matrix: MatrixPlan) -> MatrixPlan:
        rank = chosen.get(matrix.name)
        if matrix.spec is None or rank is None:
            return matrix
        spec = replace(matrix.spec, rank=rank)
        if spec.nbytes < spec.dense_nbytes:
            return replace(matrix, spec=spec)
        reason = f"rank {rank} of its singular values above {threshold:.4g} would take more bytes than the matrix"
        return replace(matrix, spec=None, reason=reason)

    return replace(plan, matrices=tuple(map(ranked, plan.matrices)))


def _nbytes(spec: WeightSpec, rank: int) -> int:
    return min(replace(spec, rank=rank).nbytes, spec.dense_nbytes)
