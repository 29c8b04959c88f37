"""The experts of a model as units that can go: what belongs to each, and what the model has without some of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil, prod
from typing import TYPE_CHECKING

from halfplate.errors import HalfplateError
from halfplate.models.experts import experts_of
from halfplate.models.experts.routers import (
    ROUTED,
    experts_per_token,
    least_in_a_group,
    router_groups,
    router_rows,
    with_experts,
)
from halfplate.models.linears import find_blocks
from halfplate.models.sources import Source, skeleton
from halfplate.transforms.base import pieces_of
from halfplate.transforms.structure.shrinking import Identity

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Place:
    """Where a tensor of a mixture belongs. number: of its expert; None for a tensor of the router, with a row for each expert."""

    layer: int
    number: int | None


@dataclass(frozen=True)
class Mixture:
    """The experts of a model of `ROUTED`, the same number in every layer that has any.

    shapes: of all tensors by name; a tied tensor appears once.
    modules: the experts module of each layer that has one, by the index of the layer.
    experts: their number in a layer.
    """

    config: PretrainedConfig
    shapes: Mapping[str, tuple[int, ...]]
    modules: Mapping[int, str]
    experts: int

    @classmethod
    def of(cls, source: Source) -> Mixture:
        """The experts of a source, from its configuration; it must have some."""
        return _of(Identity(source))

    @property
    def groups(self) -> int:
        """Equal groups of neighbouring experts, in each of which the same number must stay."""
        return router_groups(self.config)

    @property
    def least(self) -> int:
        """The fewest experts of a layer with which every token still finds as many as it goes to."""
        return self.groups * least_in_a_group(self.config)

    @cached_property
    def places(self) -> dict[str, Place]:
        """The tensors that belong to experts and routers, by name."""
        found: dict[str, Place] = {}
        for layer, module in self.modules.items():
            found |= {name: Place(layer, None) for name in router_rows(self.shapes, module)}
            for name in self.shapes:
                if name.startswith(f"{module}.") and (number := self._number(module, name)) is not None:
                    found[name] = Place(layer, number)
        return found

    def _number(self, module: str, name: str) -> int | None:
        first = name.removeprefix(f"{module}.").partition(".")[0]
        return int(first) if first.isdigit() else None

    def named(self, name: str, number: int) -> str:
        """The tensor of another expert in the place of `name`."""
        place = self.places[name]
        module = self.modules[place.layer]
        return name.replace(f"{module}.{place.number}.", f"{module}.{number}.", 1)

    def tensors(self, layer: int, number: int | None) -> list[str]:
        """The tensors of one expert, or of the router if `number` is None."""
        return self._owned[Place(layer, number)]

    @cached_property
    def _owned(self) -> dict[Place, list[str]]:
        found: dict[Place, list[str]] = defaultdict(list)
        for name, place in self.places.items():
            found[place].append(name)
        return found

    def parameters(self, count: int | None = None) -> int:
        """Parameters of the model with `count` experts in a layer, or with all; every tensor counts once."""
        total = sum(map(prod, self.shapes.values()))
        # Experts are as large as each other, and so are the rows of a router.
        of_experts = sum(prod(self.shapes[name]) for name in self.places)
        return total if count is None else total - of_experts + of_experts // self.experts * count

    def configuration(self, count: int) -> PretrainedConfig:
        """The configuration of a model with `count` experts in a layer, in a copy."""
        config = deepcopy(self.config)
        with_experts(config, self.experts, count)
        return config

    def count(self, keep: float) -> int:
        """The most experts of a layer with which the model has at most `keep` times its parameters.

        Raises HalfplateError if tokens would not find as many experts as they go to.
        """
        budget = int(keep * self.parameters())
        fitting = [n for n in range(self.groups, self.experts + 1, self.groups) if self.parameters(n) <= budget]
        count = fitting[-1] if fitting else 0
        if count < self.least:
            share = self.parameters(self.least) / self.parameters()
            why = f"each token goes to {experts_per_token(self.config)}"
            if self.groups > 1:
                why += f", chosen from some of {self.groups} groups"
            left = f"{count} of {self.experts} experts in a layer" if count else "no expert"
            raise HalfplateError(
                f"keep={keep:g} leaves {left}, and {why}; keep at least {_up(share):g} ({self.least} experts), and compress the result for fewer bytes"
            )
        return count


@lru_cache(maxsize=4)
def _of(key: Identity) -> Mixture:
    model = skeleton(key.source)
    prefix, _ = find_blocks(model)
    found = experts_of(model)
    modules = {int(name.removeprefix(f"{prefix}.").partition(".")[0]): name for name in found}
    shapes = {name: shape for piece in pieces_of(model) for name, (_, shape) in piece.entries.items()}
    return Mixture(key.source.config, shapes, modules, next(iter(found.values())).layout.experts)


def why_not(source: Source) -> str | None:
    """Why the experts of a model cannot be pruned, as a clause; None if they can."""
    kind, model = source.config.model_type, skeleton(source)
    found = experts_of(model)
    if not found:
        return "it has no experts that a router chooses from; to remove channels, heads or layers, use flap, modegpt or depth"
    if kind not in ROUTED:
        return f"it is not known which tensors of a {kind} model its router has for each expert; expected one of {', '.join(ROUTED)}"
    if source.further:
        return f"{len(source.further)} of its tensors predict further tokens, and would not fit to fewer experts"
    tied = tied_names(model)
    for module in found:
        if any(name.startswith(f"{module}.") for name in tied):
            return f"{module} shares tensors with other experts, so that none can go alone; use a model whose experts are their own"
    return None


def tied_names(model: PreTrainedModel) -> set[str]:
    """The tensors of a model, as transformers names them, that others share or are shared by."""
    return {name for pair in (model.all_tied_weights_keys or {}).items() for name in pair}


def _up(share: float) -> float:
    """`share` rounded up to three digits."""
    return ceil(1000 * share) / 1000
