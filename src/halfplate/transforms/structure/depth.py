"""Depth pruning: the layers go that turn the hidden state least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfplate.models.sources import Source
from halfplate.models.streamed import StreamedModel
from halfplate.transforms.base import MeasuredTransform, Settled, Statistics, making
from halfplate.transforms.structure.graph import LAYERS, PREFIX, StructureGraph
from halfplate.transforms.structure.probes import Angle
from halfplate.transforms.structure.scored import best, layer_of
from halfplate.transforms.structure.shrinking import Shrinking
from halfplate.transforms.structure.widths import one_size


@dataclass(frozen=True)
class Depth(Shrinking, MeasuredTransform):
    """Removes the layers with the smallest angle between their input and their output.

    Source: ShortGPT, arXiv 2403.03853, whose block influence is 1 minus the cosine of that angle; the angle itself, which weighs large
    turns less, as in arXiv 2403.17887.
    """

    name = "depth"
    version = 1
    summary = "remove the layers that turn the hidden state least"

    def refused(self, source: Source) -> str | None:
        kinds = sorted(set(getattr(source.config, "layer_types", None) or ()))
        if len(kinds) > 1:
            return f"its layers are of several kinds ({', '.join(kinds)}), and which of them remain would depend on the text"
        return None

    def sizes(self, graph: StructureGraph, budget: int) -> dict[str, int]:
        return one_size(graph, LAYERS, budget, self.keep)

    def probe(self, source: Source, layer: int) -> Angle:
        return Angle()

    def statistics_nbytes(self, source: Source) -> int:
        return 4

    def settled(self, source: Source, statistics: Statistics) -> Settled:
        target, model = self.target(source), StreamedModel(source)
        angles = torch.cat([statistics(index)["angle"] for index in range(target.graph.layers)])
        kept = best(angles, target.sizes[LAYERS]).tolist()

        def tensor(name: str) -> Tensor:
            index = layer_of(name)
            if index is not None:
                name = name.replace(f"{PREFIX}.{index}.", f"{PREFIX}.{kept[index]}.", 1)
            return model.read(name)

        return Settled(target.configuration, making(tensor))


DEPTH = Depth()
