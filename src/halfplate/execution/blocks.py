"""Compression of a model in place, decoder block by decoder block, in one process."""

import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import nn

from halfplate.calibration import BATCH, CalibrationTokens, DenseRun, collect_block, collect_stage, input_stages
from halfplate.execution.clock import Clock
from halfplate.execution.matrix import MatrixRecord, compress_group
from halfplate.execution.progress import Report
from halfplate.formats.linear import assembled
from halfplate.formats.sharing import sharing_groups
from halfplate.models.blockwise import BlockInputs, BlockwiseModel
from halfplate.models.sources import LoadedModel
from halfplate.planning import Plan
from halfplate.recipe import Recipe
from halfplate.recovery.block import BlockTuning, TunedBlock, tune_block
from halfplate.statistics import InputStatistics, Statistic

Stage = tuple[list[str], dict[str, InputStatistics]]


class _Inputs:
    """Hidden states of the calibration tokens on their way through the blocks."""

    def __init__(
        self, loaded: LoadedModel, tokens: CalibrationTokens, recipe: Recipe, needed: Statistic, clock: Clock
    ) -> None:
        self.recipe, self.needed, self.clock = recipe, needed, clock
        self.token_limit = None if recipe.token_limit == "none" else recipe.token_limit
        with clock("statistics"):
            self.blockwise = BlockwiseModel(loaded.model, recipe.precision)
            self.hidden = [self.blockwise.embed(batch) for batch in tokens.ids.to(loaded.model.device).split(BATCH)]

    def stages(self, block: int, names: list[str]) -> Iterator[Stage]:
        """Linears of a block whose statistics can be had together, with these; what is compressed in between counts."""
        raise NotImplementedError

    def leave(self, block: int, last: bool) -> TunedBlock | None:
        """Every stage of the block is compressed; the hidden states go on to the next, unless it is the last."""
        return None

    def _through(self, block: int, inputs: list[BlockInputs], module: nn.Module | None = None) -> list[BlockInputs]:
        with assembled(self.blockwise.blocks[block]):
            return [self.blockwise.run_block(block, batch, module) for batch in inputs]


class _DenseInputs(_Inputs):
    """Statistics of what the dense model has: all linears of a block in one pass."""

    def stages(self, block: int, names: list[str]) -> Iterator[Stage]:
        with self.clock("statistics"):
            if names:
                collected, self.hidden = collect_block(
                    self.blockwise, block, self.hidden, names, self.needed, self.token_limit
                )
            else:
                collected, self.hidden = {}, self._through(block, self.hidden)
        yield names, collected


class _CompressedInputs(_Inputs):
    """Statistics of what the linears compressed so far make of the tokens; beside the dense model's where these serve."""

    def __init__(
        self, loaded: LoadedModel, tokens: CalibrationTokens, recipe: Recipe, needed: Statistic, clock: Clock
    ) -> None:
        super().__init__(loaded, tokens, recipe, needed, clock)
        self.corrected = recipe.corrects(needed)
        self.dense = list(self.hidden) if self.corrected or recipe.tune_block else None
        self.dense_block: nn.Module | None = None

    def stages(self, block: int, names: list[str]) -> Iterator[Stage]:
        dense = None
        if self.dense is not None:
            self.dense_block = copy.deepcopy(self.blockwise.blocks[block])
            dense = DenseRun(self.dense_block, self.dense) if self.corrected else None
        for stage in input_stages(self.blockwise, block, self.hidden[0], names) if names else []:
            with self.clock("statistics"), assembled(self.blockwise.blocks[block]):
                collected = collect_stage(
                    self.blockwise, block, self.hidden, stage, self.needed, dense, self.token_limit
                )
            yield stage, collected

    def leave(self, block: int, last: bool) -> TunedBlock | None:
        tuned = None
        if self.dense is not None and (self.recipe.tune_block or not last):
            with self.clock("statistics"):
                self.dense = self._through(block, self.dense, self.dense_block)
            if self.recipe.tune_block:
                with self.clock("tuning"):
                    settings = BlockTuning(self.recipe.tune_block, seed=self.recipe.seed)
                    targets = [batch.hidden for batch in self.dense]
                    tuned = tune_block(self.blockwise, block, self.hidden, targets, settings)
        if not last:
            with self.clock("statistics"):
                self.hidden = self._through(block, self.hidden)
        return tuned


@dataclass(frozen=True)
class Outcome:
    """What became of each matrix, in the order of the plan, and of each block that was tuned."""

    records: list[MatrixRecord]
    tuned: dict[int, TunedBlock]


@torch.no_grad()
def compress_blocks(
    loaded: LoadedModel,
    plan: Plan,
    needed: Statistic,
    tokens: CalibrationTokens | None,
    report: Report,
    clock: Clock,
) -> Outcome:
    """Replace every planned linear of the model in place, and say what became of each."""
    recipe, method = plan.recipe, plan.recipe.create_method()
    names: dict[int, list[str]] = defaultdict(list)
    for matrix in plan.matrices:
        if matrix.spec is not None and matrix.block is not None:
            names[matrix.block].append(matrix.name)
    records: dict[str, MatrixRecord] = {}
    specs = plan.specs
    weights = {name: spec.d_out * spec.d_in for name, spec in specs.items()}
    share = 0.0
    report("compressing", 0, len(specs), share=0)
    inputs = None
    if tokens is not None:
        kind = _CompressedInputs if recipe.inputs == "compressed" else _DenseInputs
        inputs = kind(loaded, tokens, recipe, needed, clock)
    tuned: dict[int, TunedBlock] = {}
    last = max(names)
    for block in range(last + 1):
        stages: Iterator[Stage] = iter([(names[block], {})]) if inputs is None else inputs.stages(block, names[block])
        for stage, collected in stages:
            for group in sharing_groups({name: specs[name] for name in stage}):
                with clock("solving"):
                    found = [collected.pop(name, InputStatistics()) for name in group]  # one and the same
                    solved = compress_group(loaded.model, group, method, found[0], specs, recipe.cross_damping)
                for record in solved:
                    records[record.name] = record
                    share += weights[record.name] / sum(weights.values())
                    facts = record.facts() | {"block": block}
                    report("compressing", len(records), len(specs), share=min(share, 1), facts=facts)
        if inputs is not None and (done := inputs.leave(block, last=block == last)) is not None:
            tuned[block] = done
        facts = {"event": "block", "block": block} | (asdict(tuned[block]) if block in tuned else {})
        report("compressing", len(records), len(specs), share=min(share, 1), facts=facts)
    return Outcome([records[name] for name in specs], tuned)
