"""Cutting each layer to its MLP channels and heads with the highest scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halfplate.models.sources import Source
from halfplate.models.streamed import StreamedModel
from halfplate.transforms.base import MeasuredTransform
from halfplate.transforms.structure.graph import CHANNELS, HEADS, PREFIX, Kept, StructureGraph
from halfplate.transforms.structure.probes import Moments
from halfplate.transforms.structure.shrinking import Shrinking, Target
from halfplate.transforms.structure.widths import one_size, two_sizes

DOWN, OUTPUT = "mlp.down_proj", "self_attn.o_proj"  # what reads the channels, and the heads
Scores = Callable[["Layer"], dict[str, Tensor]]


@dataclass(frozen=True)
class Layer:
    """A layer of the source: its tensors, read when they are asked for, and its statistics."""

    model: StreamedModel
    graph: StructureGraph
    index: int
    statistics: Mapping[str, Tensor]

    def weight(self, module: str) -> Tensor:
        """The weight of a linear, fp64 (d_out, d_in); module: its name inside the layer."""
        return self.model.read(f"{PREFIX}.{self.index}.{module}.weight").double()

    def by_head(self, inputs: Tensor) -> Tensor:
        """Sums of values of the inputs of `OUTPUT` (d_in,) over each head of k and v."""
        return inputs.reshape(self.graph.heads, -1).sum(1)


@dataclass(frozen=True)
class Scoring(Shrinking):
    """Removes MLP channels and heads, the same number in every layer, because a plain configuration has one number for all.

    Heads stay if the configuration has no size of its own for them (Qwen2), since it would follow from their number.
    """

    def sizes(self, graph: StructureGraph, budget: int) -> dict[str, int]:
        if not has_head_size(graph):
            return one_size(graph, CHANNELS, budget, self.keep)
        return two_sizes(graph, HEADS, budget, self.keep)

    def cutter(self, source: Source, scores: Scores, statistics: Callable[[int], Mapping[str, Tensor]]) -> Cutter:
        """What makes the tensors of the result."""
        return Cutter(StreamedModel(source), self.target(source), scores, statistics)


@dataclass(frozen=True)
class MomentScoring(Scoring, MeasuredTransform):
    """Scores by the mean and the variance of each input of `OUTPUT` and `DOWN`."""

    def probe(self, source: Source, layer: int) -> Moments:
        return Moments((OUTPUT, DOWN))

    def statistics_nbytes(self, source: Source) -> int:
        graph = StructureGraph.of(source)
        return 8 * (graph.size(CHANNELS) + graph.heads * graph.queries * graph.head_dim)


def has_head_size(graph: StructureGraph) -> bool:
    """Whether the class of the configuration has an entry for the size of a head."""
    return graph.config.model_type != "qwen2"


class Cutter:
    """Makes the tensors of the result, layer by layer; the kept units of the current layer are remembered."""

    def __init__(
        self,
        model: StreamedModel,
        target: Target,
        scores: Scores,
        statistics: Callable[[int], Mapping[str, Tensor]],
    ) -> None:
        self.model, self.target, self.graph = model, target, target.graph
        self._scores, self._statistics = scores, statistics
        self._current: tuple[int, dict[str, Tensor]] = (-1, {})

    def layer(self, index: int) -> Layer:
        return Layer(self.model, self.graph, index, self._statistics(index))

    def kept(self, index: int) -> dict[str, Tensor]:
        """The units of a layer that stay, ascending int64, by kind."""
        if self._current[0] != index:
            sizes = self.target.sizes
            smaller = [kind for kind, units in sizes.items() if units < self.graph.size(kind)]
            found = self._scores(self.layer(index)) if smaller else {}
            self._current = index, {kind: best(found[kind], sizes[kind]) for kind in smaller}
        return self._current[1]

    def tensor(self, name: str) -> Tensor:
        """The tensor `name` of the result, fp32; a bias that the source lacks is 0."""
        index = layer_of(name)
        if name not in self.model.stored:
            whole = torch.zeros(self.graph.shapes[name], dtype=torch.float32, device="cpu")
        else:
            whole = self.model.read(name)
        if index is None:
            return whole
        kept: Kept = {(kind, index): units for kind, units in self.kept(index).items()}
        return self.graph.cut(name, whole, kept)


def best(scores: Tensor, count: int) -> Tensor:
    """The indices of the `count` highest scores, ascending int64; of equal scores, the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def layer_of(name: str) -> int | None:
    """The index of the layer of a tensor, None outside the layers."""
    return int(name.removeprefix(f"{PREFIX}.").partition(".")[0]) if name.startswith(f"{PREFIX}.") else None
