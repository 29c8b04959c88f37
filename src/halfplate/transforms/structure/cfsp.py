"""CFSP, its fine half: the MLP channels with the smallest values go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from halfplate.models.sources import Source
from halfplate.transforms.base import Settled, Statistics, making
from halfplate.transforms.structure.graph import CHANNELS, StructureGraph
from halfplate.transforms.structure.scored import DOWN, Layer, MomentScoring
from halfplate.transforms.structure.widths import one_size


@dataclass(frozen=True)
class Cfsp(MomentScoring):
    """Scores an MLP channel by the norm of its values, and leaves the heads whole.

    That is what the authors' code computes: its terms of the weights are normalised over the axis over which they are then averaged, so
    that they cancel. The coarse half of the paper, which makes layers that turn the hidden state less narrower than others, has no place
    in a plain configuration, which has one width for all layers.

    Source: CFSP, arXiv 2409.13199.
    """

    name = "cfsp"
    version = 1
    summary = "keep the MLP channels with the largest values; heads stay whole"

    def sizes(self, graph: StructureGraph, budget: int) -> dict[str, int]:
        return one_size(graph, CHANNELS, budget, self.keep)

    def settled(self, source: Source, statistics: Statistics) -> Settled:
        return Settled(self.configuration(source), making(self.cutter(source, scores, statistics).tensor))


def scores(layer: Layer) -> dict[str, Tensor]:
    """The second moments of the inputs of down."""
    mean, variance = (layer.statistics[f"{DOWN}.{name}"].double() for name in ("mean", "variance"))
    return {CHANNELS: variance + mean.square()}


CFSP = Cfsp()
