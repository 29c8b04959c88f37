"""Wanda for whole channels and heads, a baseline: the weights times the norms of what they read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from halfplate.models.sources import Source
from halfplate.transforms.base import Settled, Statistics, making
from halfplate.transforms.structure.graph import CHANNELS, HEADS
from halfplate.transforms.structure.scored import DOWN, OUTPUT, Layer, MomentScoring


@dataclass(frozen=True)
class Wanda(MomentScoring):
    """Scores an input of down or o by the sum of |W| over its column times the norm of the input; a head by the sum over its inputs.

    Source: Wanda, arXiv 2306.11695, with a whole column as the unit, as FLAP (arXiv 2312.11983) compares itself with it.
    """

    name = "wanda-structured"
    version = 1
    summary = "keep the MLP channels and heads with the largest weights times inputs; a baseline"

    def settled(self, source: Source, statistics: Statistics) -> Settled:
        return Settled(self.configuration(source), making(self.cutter(source, scores, statistics).tensor))


def scores(layer: Layer) -> dict[str, Tensor]:
    """The scores from the moments of the inputs."""

    def of_inputs(module: str) -> Tensor:
        mean, variance = (layer.statistics[f"{module}.{name}"].double() for name in ("mean", "variance"))
        return layer.weight(module).abs().sum(0) * (variance + mean.square()).sqrt()

    return {CHANNELS: of_inputs(DOWN), HEADS: layer.by_head(of_inputs(OUTPUT))}


WANDA = Wanda()
