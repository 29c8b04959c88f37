"""Magnitude slicing: channels and heads with the smallest weights go. A baseline that needs no text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from halfplate.models.sources import Source
from halfplate.transforms.base import Maker, making
from halfplate.transforms.structure.graph import CHANNELS, HEADS
from halfplate.transforms.structure.scored import DOWN, OUTPUT, Layer, Scoring


@dataclass(frozen=True)
class Magnitude(Scoring):
    """Scores a unit by the squared Frobenius norm of everything that it owns."""

    name = "magnitude-structured"
    version = 1
    summary = "keep the MLP channels and heads with the largest weights; a baseline without calibration"

    def open(self, source: Source) -> Maker:
        return making(self.cutter(source, scores, lambda layer: {}).tensor)


def scores(layer: Layer) -> dict[str, Tensor]:
    """Sums of squared weights: of rows of gate and up and columns of down; of rows of q, k and v and columns of o."""
    channels = layer.weight(DOWN).square().sum(0)
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        channels += layer.weight(name).square().sum(1)
    heads = layer.by_head(layer.weight(OUTPUT).square().sum(0))
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        heads += layer.by_head(layer.weight(name).square().sum(1))
    return {CHANNELS: channels, HEADS: heads}


MAGNITUDE = Magnitude()
