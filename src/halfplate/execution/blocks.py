"""Compression of a model in place, decoder block by decoder block, in one process."""

from collections import defaultdict

import torch

from halfplate.calibration import CalibrationTokens, collect_against_dense, collect_block
from halfplate.execution.clock import Clock
from halfplate.execution.matrix import MatrixRecord, compress_matrix
from halfplate.execution.progress import Report
from halfplate.models.blockwise import BlockInputs, BlockwiseModel
from halfplate.models.sources import LoadedModel
from halfplate.planning import Plan
from halfplate.statistics import InputStatistics, Statistic

BATCH = 8  # samples that run through a block at once


class _Calibration:
    """The hidden states of the calibration tokens on their way through the blocks.

    dense: what the dense model has. compressed: what the blocks compressed so far make of it; None where statistics are those
    of the dense model.
    """

    def __init__(self, loaded: LoadedModel, tokens: CalibrationTokens, inputs: str, needed: Statistic) -> None:
        self.needed = needed
        self.blockwise = BlockwiseModel(loaded.model)
        self.dense = [self.blockwise.embed(batch) for batch in tokens.ids.to(loaded.model.device).split(BATCH)]
        self.compressed: list[BlockInputs] | None = list(self.dense) if inputs == "compressed" else None

    def statistics(self, block: int, names: list[str]) -> dict[str, InputStatistics]:
        """Statistics of the linears `names` of a block that is still dense; the dense hidden states pass through it."""
        if not names:
            self.dense = self._through(block, self.dense)
            return {}
        if self.compressed is None:
            collected, self.dense = collect_block(self.blockwise, block, self.dense, names, self.needed)
        else:
            collected, self.dense = collect_against_dense(
                self.blockwise, block, self.compressed, self.dense, names, self.needed
            )
        return collected

    def leave(self, block: int) -> None:
        """The compressed hidden states pass through the block, which is as it will be stored."""
        if self.compressed is not None:
            self.compressed = self._through(block, self.compressed)

    def _through(self, block: int, inputs: list[BlockInputs]) -> list[BlockInputs]:
        return [self.blockwise.run_block(block, batch) for batch in inputs]


@torch.no_grad()
def compress_blocks(
    loaded: LoadedModel,
    plan: Plan,
    needed: Statistic,
    tokens: CalibrationTokens | None,
    report: Report,
    clock: Clock,
) -> list[MatrixRecord]:
    """Replace every planned linear of the model in place, and say what became of each."""
    recipe, method = plan.recipe, plan.recipe.create_method()
    names: dict[int, list[str]] = defaultdict(list)
    for matrix in plan.matrices:
        if matrix.spec is not None and matrix.block is not None:
            names[matrix.block].append(matrix.name)
    total, last = len(plan.specs), max(names)
    records: list[MatrixRecord] = []
    report("compressing", 0, total)
    calibration = None
    if tokens is not None:
        with clock("statistics"):
            calibration = _Calibration(loaded, tokens, recipe.inputs, needed)
    for block in range(last + 1):
        collected: dict[str, InputStatistics] = {}
        if calibration is not None:
            with clock("statistics"):
                collected = calibration.statistics(block, names[block])
        with clock("solving"):
            for name in names[block]:
                found = collected.pop(name, InputStatistics())
                records.append(
                    compress_matrix(loaded.model, name, method, found, plan.specs[name], recipe.cross_damping)
                )
                report("compressing", len(records), total)
        if calibration is not None and block < last:
            with clock("statistics"):
                calibration.leave(block)
    return records
