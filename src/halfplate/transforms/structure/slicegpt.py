"""SliceGPT: the residual stream turned to its principal components, of which the last go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from halfplate.models.sources import Source
from halfplate.models.streamed import StreamedModel
from halfplate.transforms.base import MeasuredTransform, Probe, Settled, Statistics, making
from halfplate.transforms.rotate import NORM, NORMS, in_basis, place_of
from halfplate.transforms.structure.graph import HIDDEN, StructureGraph
from halfplate.transforms.structure.probes import Gram, stored
from halfplate.transforms.structure.scored import has_head_size
from halfplate.transforms.structure.shrinking import Shrinking
from halfplate.transforms.structure.widths import one_size

OUT = "output"  # the input of the last norm, in the statistics of the last layer


@dataclass(frozen=True)
class SliceGPT(Shrinking, MeasuredTransform):
    """Multiplies each norm into the linears after it, rotates the residual stream by its principal components, and keeps the first ones.

    The paper rotates every half of a layer by a matrix of its own, and stores what turns one basis into the next in each residual
    connection. A plain configuration has no place for these, so all layers share one rotation: that of what all norms return, summed. A
    norm of fewer values divides by a smaller root mean square; its weight, one number, restores the size that the values had on average.
    A head that is tied to the embedding becomes a tensor of its own, because the last norm is multiplied into it alone.

    Source: SliceGPT, arXiv 2401.15024, section 3.
    """

    name = "slicegpt"
    version = 1
    summary = "rotate the residual stream by its principal components and keep the first; unties a tied head"

    def added(self, source: Source) -> dict[str, Any]:
        return {"tie_word_embeddings": False}

    def refused(self, source: Source) -> str | None:
        if has_head_size(StructureGraph.of(source)):
            return None
        return f"the configuration of a {source.config.model_type} model has no head_dim, so its heads would become narrower with it"

    def sizes(self, graph: StructureGraph, budget: int) -> dict[str, int]:
        return one_size(graph, HIDDEN, budget, self.keep)

    def probe(self, source: Source, layer: int) -> Normalised:
        return Normalised(layer == source.config.num_hidden_layers - 1)

    def statistics_nbytes(self, source: Source) -> int:
        return 3 * 4 * int(source.config.hidden_size) ** 2

    def held_nbytes(self, source: Source) -> int:
        # The products in fp64, and the sums while they are decomposed.
        return 2 * super().held_nbytes(source) + 6 * 8 * int(source.config.hidden_size) ** 2

    def settled(self, source: Source, statistics: Statistics) -> Settled:
        target = self.target(source)
        sliced = _Sliced(StreamedModel(source), target.sizes[HIDDEN], statistics)
        return Settled(target.configuration, making(sliced.tensor))


class Normalised(Probe):
    """The mean of x xᵀ over the inputs x of each norm, divided by their root mean square: `input_layernorm` and so on.

    last: also of the output of the layer, `output`.
    """

    def __init__(self, last: bool) -> None:
        self.grams = {name: Gram() for name in (*NORMS, *([OUT] if last else []))}

    def watch(self, layer: nn.Module) -> list[RemovableHandle]:
        def before(name: str) -> Any:
            return lambda _, args: self._add(name, args[0])

        found = [layer.get_submodule(name).register_forward_pre_hook(before(name)) for name in NORMS]
        if OUT in self.grams:
            found.append(layer.register_forward_hook(lambda _, args, out: self._add(OUT, out)))
        return found

    def _add(self, name: str, hidden: Any) -> None:
        inputs = (hidden[0] if isinstance(hidden, tuple) else hidden).float()
        self.grams[name].add(inputs / inputs.square().mean(-1, keepdim=True).sqrt())

    def statistics(self) -> dict[str, Tensor]:
        return {name: stored(gram.mean) for name, gram in self.grams.items()}


class _Sliced:
    """Makes the tensors of the result one by one."""

    def __init__(self, model: StreamedModel, size: int, statistics: Statistics) -> None:
        self.model, self.statistics = model, statistics
        self.last = len(model.blocks) - 1
        total = sum(gram.double() for index in range(self.last + 1) for gram in statistics(index).values())
        assert isinstance(total, Tensor)
        self.basis = principal(total, size)

    def tensor(self, name: str) -> Tensor:
        """The tensor `name` of the result, fp32."""
        index, kind, _ = place_of(self.model, name)
        if name == NORM:
            return self._norm(self.last, OUT)
        if index is not None and kind in NORMS:
            return self._norm(index, kind)
        return in_basis(self.model, name, self.model.read(name).double(), self.basis).to(torch.float32)

    def _norm(self, index: int, kind: str) -> Tensor:
        """The weight of a norm: how much larger its inputs were, given that part of their energy is gone."""
        gram = self.statistics(index)[kind].double()
        energy = float((self.basis * (gram @ self.basis)).sum() / gram.trace())
        width, size = self.basis.shape
        return torch.full((size,), math.sqrt(energy * width / size), dtype=torch.float32, device="cpu")


def principal(gram: Tensor, size: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues of a symmetric matrix, fp64 (d, size), largest first, with a fixed sign."""
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :size]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    signed: Tensor = vectors * largest.sign()
    return signed


SLICEGPT = SliceGPT()
