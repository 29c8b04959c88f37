"""The tasks that record the inputs of the experts of a layer, and solve one expert from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from halfplate.calibration.experts import (
    ORIGINAL,
    OWN,
    SAMPLED,
    ExpertInputs,
    blended,
    down_input,
    experts_call,
    sums_of,
)
from halfplate.compression.heap import trim
from halfplate.compression.hidden_states import HiddenStates
from halfplate.compression.kept_statistics import load_statistics, save_statistics
from halfplate.compression.open_layer import LayerView, OpenLayers
from halfplate.compression.task_memory import memory_to_solve
from halfplate.compression.tasks import OverBatches, facts_of
from halfplate.engines.needs import Needs
from halfplate.formats import Chain, WeightSpec
from halfplate.formats.linear import assembled
from halfplate.formats.sharing import sharing_groups
from halfplate.methods.base import Method
from halfplate.methods.solving import MatrixRecord, solve_matrices
from halfplate.models.experts import LinearExperts
from halfplate.statistics import InputStatistics, Statistic
from halfplate.storage.artifact import save_artifact


@dataclass(frozen=True, kw_only=True)
class RecordExperts(OverBatches):
    """Run some batches through a layer up to its experts, and write what these receive.

    hidden, dense: inputs of the layer, and those in the original model if cross moments are collected.
    """

    module: str
    hidden: HiddenStates
    dense: HiddenStates | None
    inputs: ExpertInputs

    @torch.no_grad()
    def run(self, layers: OpenLayers) -> None:
        trim()
        torch.set_num_threads(self.view.threads)
        blockwise, before = layers.open(self.view, dense=self.dense is not None)
        index = self.view.index
        for stream, states, block in ((OWN, self.hidden, None), (ORIGINAL, self.dense, before)):
            if states is None:
                continue
            batches = self.batches(states)
            with assembled(blockwise.blocks[index] if block is None else block):
                for position, number in enumerate(self.numbers):
                    found = experts_call(blockwise, index, batches[position], self.module, block)
                    self.inputs.write(stream, number, found)


@dataclass(frozen=True)
class AllTokens:
    """Statistics of the inputs of all experts, over all tokens of the layer; returned, or written to the artifact `out`."""

    view: LayerView
    module: str
    inputs: ExpertInputs
    statistic: Statistic
    token_limit: float | None
    out: Path | None
    memory: int = 0

    keeps: ClassVar[type[Any]] = OpenLayers
    cost: ClassVar[float] = 1.0

    @property
    def needs(self) -> Needs:
        return self.view.needs(self.memory)

    @torch.no_grad()
    def run(self, layers: OpenLayers) -> InputStatistics | tuple[Path, str]:
        torch.set_num_threads(self.view.threads)
        found = sums_of(self.inputs, self.inputs.everything(), self.statistic, self.token_limit, self.view.device)
        if self.out is None:
            return found
        save_statistics(self.out, {self.module: found})
        return self.out, self.module


@dataclass(frozen=True)
class SolveExpert:
    """Solve the matrices of one expert, from the tokens that are routed to it, and write them to one artifact.

    specs: of the matrices to compress.
    everything: statistics of all tokens, or the artifact that holds them and the name inside.
    follows: whether the down projection is solved for the outputs of the compressed gate and up projections.
    """

    view: LayerView
    module: str
    number: int
    specs: Mapping[str, WeightSpec]
    method: Method
    cross_damping: float | Literal["none"]
    inputs: ExpertInputs
    everything: InputStatistics | tuple[Path, str]
    statistic: Statistic
    token_limit: float | None
    follows: bool
    out: Path

    keeps: ClassVar[type[Any]] = OpenLayers

    @property
    def cost(self) -> float:
        return float(sum(spec.d_out * spec.d_in * spec.d_in for spec in self.specs.values()))

    @property
    def needs(self) -> Needs:
        return self.view.needs(2 * memory_to_solve(self.method, self.specs.values()))

    @torch.no_grad()
    def run(self, layers: OpenLayers) -> list[MatrixRecord]:
        trim()
        torch.set_num_threads(self.view.threads)
        experts = layers.model(self.view).model.get_submodule(self.module)
        assert isinstance(experts, LinearExperts)
        names = {leaf: f"{self.module}.{self.number}.{leaf}" for leaf in experts.layout.linears}
        weights = {leaf: layers.weight(self.view, name) for leaf, name in names.items()}
        first = [leaf for leaf in names if leaf != "down_proj" and names[leaf] in self.specs]
        solved: dict[str, Chain] = {}
        records: list[MatrixRecord] = []
        tokens = self.inputs.routed(self.number)
        if first:
            statistics = blended(self._statistics(tokens, None), self._everything(), weights["up_proj"].shape[1])
            self._solve([names[leaf] for leaf in first], [weights[leaf] for leaf in first], statistics, solved, records)
            del statistics
        if names["down_proj"] in self.specs:
            through = self._down_inputs(layers, experts, names, weights, solved)
            width = weights["down_proj"].shape[1]
            sample = self.inputs.sample(SAMPLED * width)
            statistics = blended(self._statistics(tokens, through), self._statistics(sample, through), width)
            self._solve([names["down_proj"]], [weights["down_proj"]], statistics, solved, records)
        tensors = {
            f"{name}.{key}": tensor
            for name, compressed in solved.items()
            for key, tensor in compressed.tensors().items()
            if key in self.specs[name].layout()
        }
        records = [replace(record, tokens=tokens.tokens) for record in records]
        save_artifact(self.out, tensors, facts_of(records, self.specs), durable=False)
        return records

    def _everything(self) -> InputStatistics:
        found = self.everything
        return found if isinstance(found, InputStatistics) else load_statistics(*found, self.view.device)

    def _statistics(self, tokens: Any, through: Any) -> InputStatistics:
        return sums_of(self.inputs, tokens, self.statistic, self.token_limit, self.view.device, through)

    def _solve(
        self,
        names: list[str],
        weights: list[Tensor],
        statistics: InputStatistics,
        solved: dict[str, Chain],
        records: list[MatrixRecord],
    ) -> None:
        of = dict(zip(names, weights, strict=True))
        for group in sharing_groups({name: self.specs[name] for name in names}):
            chains, found = solve_matrices(
                group, [of[name] for name in group], self.method, statistics, self.specs, self.cross_damping
            )
            solved |= dict(zip(group, chains, strict=True))
            records += found

    def _down_inputs(
        self,
        layers: OpenLayers,
        experts: LinearExperts,
        names: Mapping[str, str],
        weights: Mapping[str, Tensor],
        solved: Mapping[str, Chain],
    ) -> dict[str, Any]:
        """For each stream, what makes the inputs of the down projection: compressed linears for its own, the original ones for the other."""
        biased = experts.layout.biased
        biases = {leaf: layers.model(self.view).read(f"{names[leaf]}.bias") if biased else None for leaf in names}
        original = {leaf: (weights[leaf], biases[leaf]) for leaf in names if leaf != "down_proj"}
        own = {
            leaf: (solved[names[leaf]].dense() if self.follows and names[leaf] in solved else weight, bias)
            for leaf, (weight, bias) in original.items()
        }
        return {OWN: down_input(experts, own), ORIGINAL: down_input(experts, original)}
