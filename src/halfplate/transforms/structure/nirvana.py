"""NIRVANA: the channels and heads go whose weights move the logits least, to first order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from halfplate.models.linears import find_blocks
from halfplate.models.sources import Source
from halfplate.transforms.base import Settled, Statistics, WholeTransform, making
from halfplate.transforms.structure.graph import CHANNELS, HEADS, StructureGraph
from halfplate.transforms.structure.probes import stored
from halfplate.transforms.structure.scored import DOWN, OUTPUT, Layer, Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Linears whose rows belong to channels, and to heads.
ROWS = {
    CHANNELS: ("mlp.gate_proj", "mlp.up_proj"),
    HEADS: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}


@dataclass(frozen=True)
class Nirvana(Scoring, WholeTransform):
    """Scores a weight by |g · w|, where g is the gradient of the largest logit over the positions, averaged over the vocabulary and the samples.

    A channel or a head has the sum over all weights that it owns. The paper has one threshold for the channels of all layers and one for
    the heads; here every layer keeps as many, because a plain configuration has one number for all.

    Source: NIRVANA, arXiv 2509.14230.
    """

    name = "nirvana"
    version = 1
    summary = "keep the MLP channels and heads whose weights times gradients are largest; holds the whole model"

    def statistics_nbytes(self, source: Source) -> int:
        graph = StructureGraph.of(source)
        return 4 * (graph.size(CHANNELS) + graph.heads)

    def measured(self, model: PreTrainedModel, ids: Tensor, tell: Callable[[int], None]) -> list[dict[str, Tensor]]:
        blocks = find_blocks(model)[1]
        names = (*ROWS[CHANNELS], *ROWS[HEADS], DOWN, OUTPUT)
        for block in blocks:
            for name in names:
                block.get_submodule(name).requires_grad_(True)
        for number, sample in enumerate(ids.split(1), start=1):
            found: Any = model(sample, use_cache=False)
            (found.logits[0].float().amax(0).mean() / len(ids)).backward()
            tell(number)
        return [_summed(block, model.config.num_key_value_heads) for block in blocks]

    def settled(self, source: Source, statistics: Statistics) -> Settled:
        return Settled(self.configuration(source), making(self.cutter(source, scores, statistics).tensor))


def _summed(block: Any, heads: int) -> dict[str, Tensor]:
    """The sums of |g · w| over each channel and each head of k and v, after which the gradients are freed."""
    found = {}
    for kind, reader in ((CHANNELS, DOWN), (HEADS, OUTPUT)):
        parts = [_saliency(block.get_submodule(reader)).sum(0)]
        parts += [_saliency(block.get_submodule(name)).sum(1) for name in ROWS[kind]]
        if kind == HEADS:
            parts = [part.reshape(heads, -1).sum(1) for part in parts]
        found[kind] = stored(sum(parts[1:], parts[0]))
    block.zero_grad()
    return found


def _saliency(linear: Any) -> Tensor:
    saliency: Tensor = (linear.weight.grad.double() * linear.weight.detach().double()).abs()
    return saliency


def scores(layer: Layer) -> dict[str, Tensor]:
    """What was measured, fp64."""
    return {kind: layer.statistics[kind].double() for kind in ROWS}


NIRVANA = Nirvana()
