"""FLAP: channels and heads whose inputs hardly fluctuate go, and their mean moves into a bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from halfplate.models.sources import Source
from halfplate.transforms.base import Settled, Statistics, making
from halfplate.transforms.structure.graph import CHANNELS, HEADS, PREFIX
from halfplate.transforms.structure.scored import DOWN, OUTPUT, Cutter, Layer, MomentScoring, layer_of

# Entries of a Llama configuration that give biases to all linears of a half of the layer, and what reads the removed units there.
FLAGS = {HEADS: ("attention_bias", OUTPUT), CHANNELS: ("mlp_bias", DOWN)}


@dataclass(frozen=True)
class Flap(MomentScoring):
    """Scores an input of down or o by its variance times the squared norm of its column; a head by the mean over its inputs.

    What the mean of the removed inputs gives is added to the bias of the linear, in the models of which transformers and llama.cpp know
    such a bias (Llama); other models lose it. The paper also spreads the cut over the layers; here every layer is as wide as the others.

    Source: FLAP, arXiv 2312.11983.
    """

    name = "flap"
    version = 1
    summary = "keep the MLP channels and heads whose inputs fluctuate most; the mean of the others becomes a bias"

    def added(self, source: Source) -> dict[str, Any]:
        if source.config.model_type != "llama":
            return {}
        plain = self.graph(source, {})
        if plain.parameters() <= self.budget(source):
            return {}  # everything stays
        graph = self.graph(source, {flag: True for flag, _ in FLAGS.values()})
        sizes = self.sizes(graph, self.budget(source))
        return {FLAGS[kind][0]: True for kind, units in sizes.items() if units < graph.size(kind)}

    def described(self, source: Source) -> str:
        told = super().described(source)
        return (
            told
            if source.config.model_type == "llama"
            else f"{told}; without the biases that keep the mean of the others"
        )

    def settled(self, source: Source, statistics: Statistics) -> Settled:
        cutter = self.cutter(source, scores, statistics)
        return Settled(self.configuration(source), making(lambda name: compensated(cutter, name)))


def scores(layer: Layer) -> dict[str, Tensor]:
    """The scores from the variances of the inputs."""

    def of_inputs(module: str) -> Tensor:
        return layer.statistics[f"{module}.variance"].double() * layer.weight(module).square().sum(0)

    # A sum over a head ranks as the mean does.
    return {CHANNELS: of_inputs(DOWN), HEADS: layer.by_head(of_inputs(OUTPUT))}


def compensated(cutter: Cutter, name: str) -> Tensor:
    """The tensor `name` of the result; a bias of down or o also adds what the mean of the removed inputs gives."""
    tensor, index = cutter.tensor(name), layer_of(name)
    for kind, (_, module) in FLAGS.items():
        if index is None or name != f"{PREFIX}.{index}.{module}.bias" or kind not in cutter.kept(index):
            continue
        layer = cutter.layer(index)
        means = layer.statistics[f"{module}.mean"].double()
        members = cutter.graph.dimension(kind, index).members
        weight = next(member for member in members if member.tensor == f"{PREFIX}.{index}.{module}.weight")
        means[weight.entries(cutter.kept(index)[kind], cutter.graph.size(kind))] = 0
        tensor = tensor + (layer.weight(module) @ means.to(tensor.device)).to(tensor.dtype)
    return tensor


FLAP = Flap()
