"""Compression of a model in place, decoder block by decoder block, in one process."""

import copy
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import nn

from halfplate.calibration import CalibrationTokens, DenseRun, collect_block, collect_stage, input_stages
from halfplate.execution.clock import Clock
from halfplate.execution.matrix import MatrixRecord, compress_matrix
from halfplate.execution.progress import Report
from halfplate.models.blockwise import BlockInputs, BlockwiseModel
from halfplate.models.sources import LoadedModel
from halfplate.planning import Plan
from halfplate.recipe import Recipe
from halfplate.statistics import InputStatistics, Statistic

BATCH = 8  # samples that run through a block at once


Stage = tuple[list[str], dict[str, InputStatistics]]


class _Inputs:
    """Hidden states of the calibration tokens on their way through the blocks."""

    def __init__(self, loaded: LoadedModel, tokens: CalibrationTokens, needed: Statistic, clock: Clock) -> None:
        self.needed, self.clock = needed, clock
        with clock("statistics"):
            self.blockwise = BlockwiseModel(loaded.model)
            self.hidden = [self.blockwise.embed(batch) for batch in tokens.ids.to(loaded.model.device).split(BATCH)]

    def stages(self, block: int, names: list[str]) -> Iterator[Stage]:
        """Linears of a block whose statistics can be had together, with these; what is compressed in between counts."""
        raise NotImplementedError

    def _through(self, block: int, inputs: list[BlockInputs], module: nn.Module | None = None) -> list[BlockInputs]:
        return [self.blockwise.run_block(block, batch, module) for batch in inputs]


class _DenseInputs(_Inputs):
    """Statistics of what the dense model has: all linears of a block in one pass."""

    def stages(self, block: int, names: list[str]) -> Iterator[Stage]:
        with self.clock("statistics"):
            if names:
                collected, self.hidden = collect_block(self.blockwise, block, self.hidden, names, self.needed)
            else:
                collected, self.hidden = {}, self._through(block, self.hidden)
        yield names, collected


class _CompressedInputs(_Inputs):
    """Statistics of what the linears compressed so far make of the tokens; with `corrected`, beside the dense model's."""

    def __init__(
        self, loaded: LoadedModel, tokens: CalibrationTokens, needed: Statistic, clock: Clock, corrected: bool
    ) -> None:
        super().__init__(loaded, tokens, needed, clock)
        self.dense = list(self.hidden) if corrected else None

    def stages(self, block: int, names: list[str]) -> Iterator[Stage]:
        dense = None if self.dense is None else DenseRun(copy.deepcopy(self.blockwise.blocks[block]), self.dense)
        for stage in input_stages(self.blockwise, block, self.hidden[0], names) if names else []:
            with self.clock("statistics"):
                collected = collect_stage(self.blockwise, block, self.hidden, stage, self.needed, dense)
            yield stage, collected
        with self.clock("statistics"):
            if dense is not None:
                self.dense = self._through(block, dense.inputs, dense.block)
            self.hidden = self._through(block, self.hidden)


def _inputs(
    loaded: LoadedModel, tokens: CalibrationTokens | None, recipe: Recipe, needed: Statistic, clock: Clock
) -> _Inputs | None:
    if tokens is None:
        return None
    if recipe.inputs == "dense":
        return _DenseInputs(loaded, tokens, needed, clock)
    return _CompressedInputs(loaded, tokens, needed, clock, corrected=recipe.cross_damping != "none")


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
    records: dict[str, MatrixRecord] = {}
    report("compressing", 0, len(plan.specs))
    inputs = _inputs(loaded, tokens, recipe, needed, clock)
    for block in range(max(names) + 1):
        stages: Iterator[Stage] = iter([(names[block], {})]) if inputs is None else inputs.stages(block, names[block])
        for stage, collected in stages:
            for name in stage:
                with clock("solving"):
                    found = collected.pop(name, InputStatistics())
                    records[name] = compress_matrix(
                        loaded.model, name, method, found, plan.specs[name], recipe.cross_damping
                    )
                report("compressing", len(records), len(plan.specs))
    return [records[name] for name in plan.specs]
