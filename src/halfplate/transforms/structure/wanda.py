"""Wanda for whole channels and heads, a baseline: the weights times the norms of what they read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from halfplate.models.sources import Source
from halfplate.transforms.base import MeasuredTransform, Settled, Statistics
from halfplate.transforms.structure.graph import CHANNELS, HEADS
from halfplate.transforms.structure.probes import Moments
from halfplate.transforms.structure.scored import DOWN, OUTPUT, Layer, Scoring
from halfplate.transforms.structure.shrinking import making


@dataclass(frozen=True)
class Wanda(Scoring, MeasuredTransform):
    """Scores an input of down or o by the sum of |W| over its column times the norm of the input; a head by the sum over its inputs.

    Source: Wanda, arXiv 2306.11695, with a whole column as the unit, as FLAP (arXiv 2312.11983) compares itself with it.
    """

    name = "wanda-structured"
    version = 1
    summary = "keep the MLP channels and heads with the largest weights times inputs; a baseline"

    def probe(self, source: Source, layer: int) -> Moments:
        return Moments((OUTPUT, DOWN))

    def statistics_nbytes(self, source: Source) -> int:
        return moments_nbytes(source)

    def settled(self, source: Source, statistics: Statistics) -> Settled:
        return Settled(self.configuration(source), making(self.cutter(source, scores, statistics).tensor))


def moments_nbytes(source: Source) -> int:
    """Bytes of the mean and the variance of each input of down and o."""
    config = source.config
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size)
    return int(8 * (config.intermediate_size + heads))


def scores(layer: Layer) -> dict[str, Tensor]:
    """The scores from the moments of the inputs."""

    def of_inputs(module: str) -> Tensor:
        mean, variance = (layer.statistics[f"{module}.{name}"].double() for name in ("mean", "variance"))
        return layer.weight(module).abs().sum(0) * (variance + mean.square()).sqrt()

    return {CHANNELS: of_inputs(DOWN), HEADS: layer.by_head(of_inputs(OUTPUT))}


WANDA = Wanda()
