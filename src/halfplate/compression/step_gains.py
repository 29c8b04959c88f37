"""What each step of size of each matrix gains for the model, which decides the order in which a checkpoint stores the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfplate.compression.work_folder import WorkFolder
from halfplate.formats import Chain, WeightSpec
from halfplate.methods.solving import MatrixRecord
from halfplate.models.sources import Source
from halfplate.models.streamed import StreamedModel
from halfplate.planning import Plan
from halfplate.planning.memory import PROBE_LENGTH, PROBE_SAMPLES
from halfplate.recovery.loss import divergence
from halfplate.storage.artifact import load_artifact
from halfplate.storage.tensor_file import read_tensor
from halfplate.telemetry.progress import Report

# The KL is measured with this many steps of a matrix: with one, it is beyond the range in which it is proportional to the error.
PROBE_STEPS = 2


@torch.no_grad()
def step_losses(
    source: Source, plan: Plan, work: WorkFolder, ids: Tensor | None, records: Sequence[MatrixRecord], report: Report
) -> dict[str, tuple[float, ...]]:
    """The KL to the original model that each matrix with steps causes with none of them, with the first, and so on; empty without steps.

    The KL of a matrix is assumed to be proportional to its relative output error, as budgets do, by a factor that is measured with
    PROBE_STEPS of its steps in the original model. Holds the whole model. Without `ids`, the factors are 1.
    """
    losses = {record.name: record.losses for record in records if plan.specs[record.name].steps()}
    if not losses or ids is None:
        return losses
    with StreamedModel(source, plan.recipe.device).running(held=True) as model:
        torch.nn.Module.to(model, plan.recipe.device)
        probe = ids[:PROBE_SAMPLES, :PROBE_LENGTH].to(plan.recipe.device)
        original = _logits(model, probe)
        found = {}
        for done, (name, each) in enumerate(losses.items()):
            steps = min(PROBE_STEPS, len(each) - 1)
            block = next(matrix.block for matrix in plan.matrices if matrix.name == name)
            matrix = _dense(work, block, name, plan.specs[name], steps)
            harm = _harm(model, name, matrix, probe, original) / each[steps] if each[steps] > 0 else 0.0
            found[name] = tuple(harm * loss for loss in each)
            report("ordering", done + 1, len(losses))
    return found


def _dense(work: WorkFolder, block: int | None, name: str, spec: WeightSpec, steps: int) -> Tensor:
    """The full matrix of the first `steps` steps, from the finished file of its layer."""
    artifact = load_artifact(work.outer if block is None else work.layer(block))
    assert artifact is not None, "every layer is finished"
    cut = spec.at_steps(steps)
    return Chain.from_tensors(
        cut, {key: read_tensor(artifact.tensors[f"{name}.{key}"]) for key in cut.layout()}
    ).dense()


def _harm(model: Any, name: str, matrix: Tensor, probe: Tensor, original: Tensor) -> float:
    """KL to the original model, nats per token, with this matrix alone replaced."""
    weight = model.get_submodule(name).weight
    before = weight.data
    try:
        weight.data = matrix.to(before)
        return float(divergence(_logits(model, probe), original))
    finally:
        weight.data = before


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.flatten(0, 1)
