"""Essential sparsity: up to which sparsity a model loses little when its smallest weights go, and where the fall begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from halfplate.allocation.ratios.essential import bins, histogram, magnitude
from halfplate.telemetry.progress import Report

SPARSITIES = tuple(number / 10 for number in range(1, 10))
TOLERANCE = 0.05  # nats per token: 5 % of the perplexity
SEQUENCES = 4


@dataclass(frozen=True)
class Knee:
    """The loss of a model without its smallest weights.

    dense: its loss with all of them, in nats per token. losses: at each of `sparsities`.
    sparsity: the largest one up to which no loss is more than TOLERANCE above `dense`; 0 if there is none.
    """

    dense: float
    sparsities: tuple[float, ...]
    losses: tuple[float, ...]
    sparsity: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def knee_of(dense: float, sparsities: Sequence[float], losses: Sequence[float]) -> Knee:
    """The knee of a measured curve; sparsities ascending."""
    found = 0.0
    for sparsity, loss in zip(sparsities, losses, strict=True):
        if not loss <= dense + TOLERANCE:
            break
        found = sparsity
    return Knee(dense, tuple(sparsities), tuple(losses), found)


@torch.no_grad()
def find_knee(model: nn.Module, names: Sequence[str], ids: Tensor, report: Report) -> Knee:
    """Remove the smallest weights of the linears `names` step by step, in the whole model by one magnitude, and measure the loss.

    The weights are not restored. ids: int64 (samples, L), of which the first SEQUENCES are used.
    Source: Essential Sparsity, arXiv 2306.03805, which finds the knee in the quality of tasks.
    """
    weights = [cast(nn.Linear, model.get_submodule(name)).weight for name in names]
    counts = sum((histogram(weight) for weight in weights), torch.zeros(bins(), dtype=torch.int64, device="cpu"))
    report("finding the knee", 0, len(SPARSITIES) + 1)
    losses = [_loss(model, ids)]
    for sparsity in SPARSITIES:
        least = magnitude(counts, 1 - sparsity)
        for weight in weights:
            weight.masked_fill_(weight.abs() < least, 0)
        losses.append(_loss(model, ids))
        report("finding the knee", len(losses), len(SPARSITIES) + 1)
    return knee_of(losses[0], SPARSITIES, losses[1:])


def _loss(model: nn.Module, ids: Tensor) -> float:
    """The mean loss per predicted token."""
    found = list(_losses(model, ids[:SEQUENCES]))
    return sum(found) / len(found)


def _losses(model: nn.Module, ids: Tensor) -> Iterator[float]:
    for sequence in ids.split(1):
        logits = model(sequence, use_cache=False).logits[0, :-1].float()
        yield float(nn.functional.cross_entropy(logits, sequence[0, 1:]))
