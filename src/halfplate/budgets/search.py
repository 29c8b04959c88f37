"""The evolutionary search over candidates, by the KL of the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from halfplate.allocation import Evolution, evolve
from halfplate.allocation.evolution import STAGES
from halfplate.budgets.measure import Unit
from halfplate.budgets.store import LevelStore
from halfplate.calibration import BATCH
from halfplate.models.blockwise import BlockwiseModel
from halfplate.recovery.loss import divergence
from halfplate.telemetry.progress import Report

TOKENS = 8192  # tokens of the last stage
FEWER = 4  # each earlier stage has this many times fewer tokens


def search_samples(samples: int, seq_len: int) -> int:
    """The number of calibration sequences that measure the KL and are not used for the solves; at least one."""
    return max(1, min(-(-TOKENS // seq_len), samples // 2))


class ModelAtLevels:
    """The original model with its linears replaced by chosen candidates, and its KL to the original.

    A context manager; leaving it restores the original weights.

    ids: int64 (sequences, L).
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], store: LevelStore, ids: Tensor) -> None:
        self.model, self.units, self.store = model, units, store
        self.blockwise = BlockwiseModel(model)
        self.ids = ids.to(next(model.parameters()).device)
        # Logits of a large vocabulary are many times larger than the hidden states.
        self.hidden = torch.cat([self._hidden(batch) for batch in self.ids.split(BATCH)])
        self.linears = [[cast(nn.Linear, model.get_submodule(name)) for name in unit.names] for unit in units]
        self.dense = [[linear.weight.data for linear in linears] for linears in self.linears]
        self.now: list[int | None] = [None] * len(units)

    def __enter__(self) -> ModelAtLevels:
        return self

    def __exit__(self, *_: object) -> None:
        for linears, weights in zip(self.linears, self.dense, strict=True):
            for linear, weight in zip(linears, weights, strict=True):
                linear.weight.data = weight

    def kl(self, choice: tuple[int, ...], stage: int, generation: int) -> float:
        """Nats per token on the text of a stage; early stages use different text in each generation."""
        self._install(choice)
        count: int = max(1, len(self.ids) // FEWER ** (STAGES - 1 - stage))
        rows = torch.arange(count, dtype=torch.int64, device="cpu")
        if stage < STAGES - 1:
            rows = (rows + generation * count) % len(self.ids)
        total = 0.0
        for part in rows.split(BATCH):
            batch = self.blockwise.embed(self.ids[part])
            embedded = batch
            for block in range(len(self.blockwise.blocks)):
                batch = self.blockwise.run_block(block, batch)
            logits = self.blockwise.finish(batch).flatten(0, 1)
            dense = self.blockwise.finish(replace(embedded, hidden=self.hidden[part])).flatten(0, 1)
            total += float(divergence(logits, dense)) * len(part)
        return total / float(count)

    def _install(self, choice: tuple[int, ...]) -> None:
        for number, (level, before) in enumerate(zip(choice, self.now, strict=True)):
            if level != before:
                linears = self.linears[number]
                matrices = self.store.dense((number, level), linears[0].weight.device)
                for linear, matrix in zip(linears, matrices, strict=True):
                    linear.weight.data = matrix
                self.now[number] = level

    def _hidden(self, ids: Tensor) -> Tensor:
        batch = self.blockwise.embed(ids)
        for block in range(len(self.blockwise.blocks)):
            batch = self.blockwise.run_block(block, batch)
        return batch.hidden


def search_levels(
    model: nn.Module,
    units: Sequence[Unit],
    store: LevelStore,
    ids: Tensor,
    start: Sequence[int],
    budget: float,
    settings: Evolution,
    report: Report,
) -> tuple[list[int], dict[str, Any]]:
    """The candidates that the search from `start` selects, and a JSON object that describes the search.

    The search is EvoPress (halfplate.allocation.evolution).

    ids: tokens that the solves in `store` have not seen.
    """
    costs = [[level.cost for level in unit.levels] for unit in units]
    with ModelAtLevels(model, units, store, ids) as at_levels:
        found = evolve(
            costs,
            start,
            budget,
            at_levels.kl,
            settings,
            lambda generation, loss: report(
                "searching levels",
                generation,
                settings.generations,
                f"KL {loss:.4f}",
                facts={"event": "generation", "generation": generation, "kl": loss},
            ),
        )
    trajectory = [{"generation": number, "kl": loss} for number, loss in enumerate(found.losses)]
    return list(found.choice), {
        "method": "evolution",
        "offspring": settings.offspring,
        "tokens": ids.numel(),
        "moved": sum(a != b for a, b in zip(start, found.choice, strict=True)),
        "trajectory": trajectory,
    }
