"""The tasks that engines run. Each reads its input from files and gives the same result on every machine."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from halfplate.calibration.collect import StageSums, recorded_inputs, stage_sums
from halfplate.compression.heap import trim
from halfplate.compression.hidden_states import Arguments, Batches, HiddenStates
from halfplate.compression.kept_statistics import load_statistics, save_sums
from halfplate.compression.open_layer import LayerView, OpenLayers
from halfplate.compression.recorded_inputs import InputsOfOne, RecordedInputs
from halfplate.compression.remembered import RememberedOutputs
from halfplate.compression.task_memory import memory_to_solve
from halfplate.compression.token_arguments import TokenArguments
from halfplate.engines.needs import Needs
from halfplate.formats import WeightSpec
from halfplate.formats.linear import assembled
from halfplate.methods.base import Method
from halfplate.methods.solving import MatrixRecord, solve_matrices
from halfplate.models.blockwise import BlockwiseModel
from halfplate.statistics import InputStatistics, Statistic
from halfplate.storage.artifact import Artifact, save_artifact


@dataclass(frozen=True)
class CollectSums:
    """Collect sums over the inputs of the linears `names` of a layer, for some chunks of batches.

    dense: what `RecordInputs` wrote for this layer, if cross moments are collected.
    chunks: the batches of each chunk; each chunk is summed separately, and then the chunks are added in order.
    out: an artifact for the sums, if the task runs in another process than the caller.
    memory: bytes.
    own: arguments that depend on the tokens.
    """

    view: LayerView
    names: tuple[str, ...]
    statistic: Statistic
    token_limit: float | None
    hidden: HiddenStates
    dense: RecordedInputs | None
    arguments: Arguments
    chunks: tuple[tuple[int, ...], ...]
    out: Path | None = None
    memory: int = 0
    own: TokenArguments | None = None

    keeps: ClassVar[type[Any]] = OpenLayers

    @property
    def cost(self) -> float:
        return float(sum(map(len, self.chunks)))

    @property
    def needs(self) -> Needs:
        return self.view.needs(self.memory)

    @torch.no_grad()
    def run(self, layers: OpenLayers) -> StageSums | Path:
        trim()
        torch.set_num_threads(self.view.threads)
        blockwise, _ = layers.open(self.view)
        sums = StageSums()
        with assembled(blockwise.blocks[self.view.index]):
            for chunk in self.chunks:
                sums.merge(self._sums(blockwise, chunk, layers.remembered))
        if self.out is None:
            return sums
        save_sums(self.out, sums)
        return self.out

    def _sums(self, blockwise: BlockwiseModel, chunk: tuple[int, ...], remembered: RememberedOutputs) -> StageSums:
        index, layer = self.view.index, blockwise.blocks[self.view.index]
        inputs = Batches(self.hidden, self.arguments, index, self.view.device, chunk, self.own)
        dense = None if self.dense is None else InputsOfOne(self.dense, self.names[0], self.view.device, chunk)
        targets = [name.removeprefix(f"{blockwise.prefix}.{index}.") for name in self.names]
        return stage_sums(
            blockwise,
            index,
            inputs,
            self.names,
            self.statistic,
            dense,
            self.token_limit,
            during=lambda position: remembered.recalling(layer, chunk[position], targets),
        )


@dataclass(frozen=True, kw_only=True)
class OverBatches:
    """What tasks share that run some batches through a layer.

    arguments: of the layer, by the number of samples in a batch.
    numbers: of the batches.
    memory: bytes.
    own: arguments that depend on the tokens.
    """

    view: LayerView
    arguments: Arguments
    numbers: tuple[int, ...]
    memory: int = 0
    own: TokenArguments | None = None

    keeps: ClassVar[type[Any]] = OpenLayers

    @property
    def cost(self) -> float:
        return float(len(self.numbers))

    @property
    def needs(self) -> Needs:
        return self.view.needs(self.memory)

    def batches(self, hidden: HiddenStates) -> Batches:
        """These batches of `hidden`, as inputs of the layer."""
        return Batches(hidden, self.arguments, self.view.index, self.view.device, self.numbers, self.own)


@dataclass(frozen=True, kw_only=True)
class RecordInputs(OverBatches):
    """Run some batches through the original layer, and write the inputs of the linears `names` to `inputs` and the outputs to `out`.

    out: none for the last layer.
    """

    names: tuple[str, ...]
    dense: HiddenStates
    inputs: RecordedInputs
    out: HiddenStates | None

    @torch.no_grad()
    def run(self, layers: OpenLayers) -> None:
        trim()
        torch.set_num_threads(self.view.threads)
        blockwise, _ = layers.open(self.view)
        batches = self.batches(self.dense)
        for position, number in enumerate(self.numbers):
            found, after = recorded_inputs(blockwise, self.view.index, batches[position], self.names)
            self.inputs.write(number, found)
            if self.out is not None:
                self.out.write(number, after.hidden, after.carried)


@dataclass(frozen=True)
class SolveMatrices:
    """Solve one matrix, or all that share a wrapper, write them to an artifact, and return their records.

    statistics: the statistics, or the artifact that `save_statistics` wrote with the name of the input's leader.
    """

    view: LayerView
    specs: Mapping[str, WeightSpec]
    method: Method
    cross_damping: float | Literal["none"]
    statistics: InputStatistics | tuple[Path, str]
    out: Path

    keeps: ClassVar[type[Any]] = OpenLayers

    @property
    def cost(self) -> float:
        return float(sum(spec.d_out * spec.d_in * spec.d_in for spec in self.specs.values()))

    @property
    def needs(self) -> Needs:
        return self.view.needs(memory_to_solve(self.method, self.specs.values()))

    @torch.no_grad()
    def run(self, layers: OpenLayers) -> list[MatrixRecord]:
        trim()
        torch.set_num_threads(self.view.threads)
        statistics = self.statistics
        if not isinstance(statistics, InputStatistics):
            statistics = load_statistics(*statistics, self.view.device)
        names = list(self.specs)
        weights = [layers.weight(self.view, name) for name in names]
        solved, records = solve_matrices(names, weights, self.method, statistics, self.specs, self.cross_damping)
        tensors = {
            f"{name}.{key}": tensor
            for name, compressed in zip(names, solved, strict=True)
            for key, tensor in compressed.tensors().items()
            if key in self.specs[name].layout()
        }
        save_artifact(self.out, tensors, facts_of(records, self.specs), durable=False)
        return records


@dataclass(frozen=True, kw_only=True)
class RunLayer(OverBatches):
    """Run some batches through a layer: from `hidden` to `out`, and through the original layer from `dense` to `dense_out`."""

    hidden: HiddenStates | None
    out: HiddenStates | None
    dense: HiddenStates | None
    dense_out: HiddenStates | None

    @torch.no_grad()
    def run(self, layers: OpenLayers) -> None:
        trim()
        torch.set_num_threads(self.view.threads)
        blockwise, before = layers.open(self.view, dense=self.dense is not None)
        for source, target, module in ((self.hidden, self.out, None), (self.dense, self.dense_out, before)):
            if source is None or target is None:
                continue
            batches, layer = self.batches(source), blockwise.blocks[self.view.index] if module is None else module
            with assembled(layer):
                for position, number in enumerate(self.numbers):
                    with layers.remembered.recalling(layer, number) if module is None else nullcontext():
                        after = blockwise.run_block(self.view.index, batches[position], module)
                    target.write(number, after.hidden, after.carried)


def facts_of(records: list[MatrixRecord], specs: Mapping[str, WeightSpec]) -> dict[str, object]:
    """The facts that an artifact stores about its matrices."""
    return {
        "specs": {record.name: specs[record.name].to_json() for record in records},
        "records": {record.name: record.to_json() | {"seconds": record.seconds} for record in records},
    }


def records_in(artifact: Artifact) -> list[MatrixRecord]:
    """The records of the matrices in an artifact."""
    return [MatrixRecord.from_json(name, entry) for name, entry in artifact.facts["records"].items()]
