"""What all pruning of experts has in common: how many stay, what is measured of their routing, and the tensors of the result."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from halfplate.models.experts import LinearExperts, experts_of
from halfplate.models.experts.module import hits
from halfplate.models.sources import Source
from halfplate.models.streamed import StreamedModel
from halfplate.transforms.base import MeasuredTransform, Probe, Settled, Statistics, Transform, making
from halfplate.transforms.structure.mixture import Mixture, why_not
from halfplate.transforms.structure.probes import rows, stored

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOKENS, SALIENCY, OUTPUT = "tokens", "saliency", "output"


class Routes(Probe):
    """How the experts of a layer are used; shapes for E experts of a layer of width d. A layer without experts has `tokens` of shape (0,).

    tokens: (E,) tokens that are routed to each.
    saliency: (E,) the mean over these tokens of the routing weight times the norm of the expert's output; 0 without tokens.
    output: (E, d) the mean output of each expert over tokens of the layer, also those that go to others; only if `outputs`. Of all
        tokens as many are taken as an expert receives on average, evenly spread.
    """

    def __init__(self, outputs: bool = False) -> None:
        self.outputs = outputs
        self._sums: dict[str, Tensor] = {}
        self._sampled = 0

    def watch(self, layer: nn.Module) -> list[RemovableHandle]:
        found = experts_of(layer).values()
        return [module.register_forward_pre_hook(self._add, with_kwargs=True) for module in found]

    @torch.no_grad()
    def _add(self, module: LinearExperts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call, experts = module.call(args, kwargs), module.layout.experts
        x, chosen, weights = call.hidden, call.chosen, call.weights
        if not self._sums:
            names = (TOKENS, SALIENCY)
            self._sums = {name: torch.zeros(experts, dtype=torch.float64, device=x.device) for name in names}
            if self.outputs:
                self._sums[OUTPUT] = torch.zeros(experts, x.shape[-1], dtype=torch.float64, device=x.device)
        hit = hits(chosen, experts)
        for number, slots in zip(hit.numbers, hit.slots.split(hit.counts), strict=True):
            gates = weights.reshape(-1)[slots].double()
            norms = rows(module.run(number, x[slots // chosen.shape[-1]])).double().norm(dim=1)
            self._sums[TOKENS][number] += len(slots)
            self._sums[SALIENCY][number] += (gates * norms).sum()
        if self.outputs:
            sample = x[:: max(1, experts // chosen.shape[-1])]
            for number in range(experts):
                self._sums[OUTPUT][number] += rows(module.run(number, sample)).double().sum(0)
            self._sampled += len(sample)

    def statistics(self) -> dict[str, Tensor]:
        if not self._sums:
            return {TOKENS: torch.zeros(0, dtype=torch.float32, device="cpu")}
        found = dict(self._sums)
        found[SALIENCY] = found[SALIENCY] / found[TOKENS].clamp_min(1)
        if self.outputs:
            found[OUTPUT] = found[OUTPUT] / self._sampled
        return {name: stored(value) for name, value in found.items()}


@dataclass(frozen=True)
class Candidates:
    """The experts of a layer among which some are chosen: all of them, or those of one group of the router.

    numbers: of these experts in the layer.
    """

    model: StreamedModel
    mixture: Mixture
    layer: int
    numbers: range
    statistics: Mapping[str, Tensor]

    def of(self, name: str) -> Tensor:
        """A statistic of these experts, fp64: a value or a row each."""
        return self.statistics[name][self.numbers.start : self.numbers.stop].double()

    def router(self) -> Tensor:
        """The rows of the router's matrix for these experts, fp64 (n, hidden)."""
        names = self.mixture.tensors(self.layer, None)
        matrix = next(name for name in names if name.endswith(".weight"))
        return self.model.read(matrix).double()[self.numbers.start : self.numbers.stop]

    def weights(self, number: int) -> list[Tensor]:
        """All tensors of one of these experts, fp64; number: its place among them."""
        names = self.mixture.tensors(self.layer, self.numbers[number])
        return [self.model.read(name).double() for name in names]


# An expert of the result: the experts of the layer that it is made of, with weights whose sum is 1.
Blend = Mapping[int, float]


@dataclass(frozen=True)
class ExpertPruning(MeasuredTransform):
    """A transform after which every layer has fewer experts, and the model at most `keep` times its parameters.

    The router keeps its rows of the experts that stay, in their order, and each token goes to as many experts as before. If the router
    chooses from groups, the same number stays in every group. A plain configuration has one number of experts for all layers.
    """

    shrinks: ClassVar[bool] = True
    keep: float = 1.0

    @abstractmethod
    def blends(self, candidates: Candidates, count: int) -> list[Blend]:
        """The `count` experts that become of the candidates, by their place among them, in the order of the result."""

    def keeping(self, keep: float) -> Transform:
        return replace(self, keep=keep)

    def refusal(self, source: Source) -> str | None:
        if (reason := why_not(source)) is not None:
            return reason
        Mixture.of(source).count(self.keep)
        return None

    def described(self, source: Source) -> str:
        mixture = Mixture.of(source)
        count = mixture.count(self.keep)
        share = mixture.parameters(count) / mixture.parameters()
        told = f"keeps {share:.1%} of {mixture.parameters() / 1e6:.1f} million parameters: {count} of {mixture.experts} experts in a layer"
        return told if mixture.groups == 1 else f"{told}, {count // mixture.groups} in each group"

    def configuration(self, source: Source) -> PretrainedConfig:
        mixture = Mixture.of(source)
        return mixture.configuration(mixture.count(self.keep))

    def probe(self, source: Source, layer: int) -> Routes:
        return Routes()

    def statistics_nbytes(self, source: Source) -> int:
        return 4 * 2 * Mixture.of(source).experts

    def settled(self, source: Source, statistics: Statistics) -> Settled:
        mixture = Mixture.of(source)
        made = _Made(self, StreamedModel(source), mixture, mixture.count(self.keep), statistics)
        return Settled(mixture.configuration(made.count), making(made.tensor))


class _Made:
    """Makes the tensors of the result; the choice in the current layer is remembered."""

    def __init__(
        self, pruning: ExpertPruning, model: StreamedModel, mixture: Mixture, count: int, statistics: Statistics
    ) -> None:
        self.pruning, self.model, self.mixture, self.count, self.statistics = pruning, model, mixture, count, statistics
        self._current: tuple[int, list[Blend]] = (-1, [])

    def tensor(self, name: str) -> Tensor:
        """The tensor `name` of the result, fp32."""
        place = self.mixture.places.get(name)
        if place is None:
            return self.model.read(name)
        blends = self._chosen(place.layer)
        if place.number is None:
            whole = self.model.read(name)
            return torch.stack([_blended({number: whole[number] for number in blend}, blend) for blend in blends])
        blend = blends[place.number]
        return _blended({number: self.model.read(self.mixture.named(name, number)) for number in blend}, blend)

    def _chosen(self, layer: int) -> list[Blend]:
        if self._current[0] != layer:
            mixture, statistics = self.mixture, self.statistics(layer)
            found: list[Blend] = []
            size = mixture.experts // mixture.groups
            for start in range(0, mixture.experts, size):
                numbers = range(start, start + size)
                if self.count == mixture.experts:
                    found += [{number: 1.0} for number in numbers]
                    continue
                candidates = Candidates(self.model, mixture, layer, numbers, statistics)
                blends = self.pruning.blends(candidates, self.count // mixture.groups)
                found += [{numbers[member]: share for member, share in blend.items()} for blend in blends]
            self._current = layer, found
        return self._current[1]


def _blended(tensors: Mapping[int, Tensor], blend: Blend) -> Tensor:
    if len(blend) == 1:
        return next(iter(tensors.values()))
    total = sum(tensor.double() * blend[number] for number, tensor in tensors.items())
    assert isinstance(total, Tensor)
    return total.to(torch.float32)
