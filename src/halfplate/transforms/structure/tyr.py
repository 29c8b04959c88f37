"""Týr-the-Pruner, its local pruner: channels and heads go as the optimal brain surgeon removes them, and what reads the others is refitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from halfplate.models.sources import Source
from halfplate.transforms.base import MeasuredTransform, Probe, Settled, Statistics, making
from halfplate.transforms.structure.graph import CHANNELS, HEADS, PREFIX, StructureGraph
from halfplate.transforms.structure.least_squares import refitted, surgeon
from halfplate.transforms.structure.probes import Gram, stored
from halfplate.transforms.structure.scored import DOWN, OUTPUT, Cutter, Layer, Scores, Scoring, layer_of
from halfplate.transforms.structure.shrinking import Target

ROUNDS = 16  # in which channels go; heads go one by one
RIDGE = 0.01  # added to the diagonal of second moments, relative to its mean
READERS = {CHANNELS: DOWN, HEADS: OUTPUT}


@dataclass(frozen=True)
class Tyr(Scoring, MeasuredTransform):
    """Removes the channels and heads whose removal changes the outputs of down and o least, if the rest is refitted, round by round.

    The paper, like DarwinLM, makes several versions of each layer in this way and searches for the best widths of all layers. Here every
    layer is as wide as the others, because a plain configuration has one width for all.

    Source: Týr-the-Pruner, arXiv 2503.09657, and DarwinLM, arXiv 2502.07780.
    """

    name = "tyr"
    version = 1
    summary = "remove MLP channels and heads in rounds, each time what a refit replaces best; refit down and o"

    def probe(self, source: Source, layer: int) -> Inputs:
        return Inputs(_readers(self.target(source)))

    def statistics_nbytes(self, source: Source) -> int:
        graph = StructureGraph.of(source)
        values = graph.heads * graph.queries * graph.head_dim
        return 4 * (graph.size(CHANNELS) ** 2 + values**2)

    def held_nbytes(self, source: Source) -> int:
        # Second moments in fp64, their inverse, and what updates it.
        return super().held_nbytes(source) + 5 * 2 * self.statistics_nbytes(source)

    def settled(self, source: Source, statistics: Statistics) -> Settled:
        cutter = self.cutter(source, _chosen(self.target(source)), statistics)
        return Settled(self.configuration(source), making(lambda name: _tensor(cutter, name)))


class Inputs(Probe):
    """The second moments of the inputs of the linears `names`, (d_in, d_in) each by name."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.grams = {name: Gram() for name in names}

    def watch(self, layer: nn.Module) -> list[RemovableHandle]:
        return [
            layer.get_submodule(name).register_forward_pre_hook(lambda _, args, gram=gram: gram.add(args[0]))
            for name, gram in self.grams.items()
        ]

    def statistics(self) -> dict[str, Tensor]:
        found = {name: stored(gram.mean) for name, gram in self.grams.items()}
        return found or {"nothing": torch.zeros(1, dtype=torch.float32, device="cpu")}


def _readers(target: Target) -> tuple[str, ...]:
    """What reads the dimensions that shrink."""
    return tuple(READERS[kind] for kind, units in target.sizes.items() if units < target.graph.size(kind))


def _chosen(target: Target) -> Scores:
    """Scores of a layer: 1 for the units that stay."""

    def scores(layer: Layer) -> dict[str, Tensor]:
        found = {}
        for kind, reader in READERS.items():
            units, count = target.graph.size(kind), target.sizes.get(kind, target.graph.size(kind))
            if count < units:
                weight, gram = layer.weight(reader), damped(layer.statistics[reader].double())
                rounds = ROUNDS if kind == CHANNELS else units - count
                kept = surgeon(weight, gram, weight.shape[1] // units, count, rounds)
                found[kind] = torch.zeros(units, dtype=torch.float64, device="cpu")
                found[kind][kept] = 1
        return found

    return scores


def damped(gram: Tensor) -> Tensor:
    """Second moments with RIDGE times the mean of their diagonal added to it; inputs that are always 0 cost nothing then."""
    added = RIDGE * float(gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    return gram + added * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def _tensor(cutter: Cutter, name: str) -> Tensor:
    """The tensor `name` of the result, fp32; down and o are refitted."""
    index = layer_of(name)
    for kind, reader in READERS.items():
        if index is not None and name == f"{PREFIX}.{index}.{reader}.weight" and kind in cutter.kept(index):
            layer = cutter.layer(index)
            member = next(one for one in cutter.graph.dimension(kind, index).members if one.tensor == name)
            inputs = member.entries(cutter.kept(index)[kind], cutter.graph.size(kind))
            gram = damped(layer.statistics[reader].double())
            return refitted(layer.weight(reader), gram, inputs).float()
    return cutter.tensor(name)


TYR = Tyr()
