"""What all structured pruning has in common: how much stays, and the sizes that follow, before any tensor is read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from halfplate.models.sources import Source
from halfplate.transforms.base import LLAMA_LIKE, Transform
from halfplate.transforms.structure.graph import StructureGraph
from halfplate.transforms.structure.widths import spoken

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Target:
    """What a model becomes.

    graph: of the source, with the tensors that the result has in addition (biases, a head of its own).
    sizes: units of each kind of dimension that may change, in every layer.
    """

    graph: StructureGraph
    sizes: Mapping[str, int]

    @property
    def parameters(self) -> int:
        return self.graph.parameters(self.sizes)

    @property
    def configuration(self) -> PretrainedConfig:
        return self.graph.configuration(self.sizes)

    @property
    def spoken(self) -> str:
        """The sizes in words."""
        return spoken(self.graph, self.sizes)


@dataclass(frozen=True)
class Shrinking(Transform):
    """A transform after which a model has at most `keep` times its parameters; every tensor counts once."""

    shrinks: ClassVar[bool] = True
    keep: float = 1.0

    @abstractmethod
    def sizes(self, graph: StructureGraph, budget: int) -> dict[str, int]:
        """The sizes of a result with at most `budget` parameters; raises HalfplateError if there are none."""

    def added(self, source: Source) -> dict[str, Any]:
        """The entries of the configuration with which the model has the tensors that the result needs in addition."""
        return {}

    def refused(self, source: Source) -> str | None:
        """A reason why a model of `LLAMA_LIKE` is not supported, as a clause; None if it is."""
        return None

    def target(self, source: Source) -> Target:
        """What the model becomes; raises HalfplateError if `keep` is too small for it."""
        return _target(self, Identity(source))

    def budget(self, source: Source) -> int:
        """The parameters that the result has at most."""
        return int(self.keep * StructureGraph.of(source).parameters())

    def graph(self, source: Source, entries: Mapping[str, Any]) -> StructureGraph:
        """The graph of the source with these entries of its configuration."""
        config = deepcopy(source.config)
        for name, value in entries.items():
            setattr(config, name, value)
        return StructureGraph.of(replace(source, config=config, tensors={}, in_model_form=True))

    def keeping(self, keep: float) -> Transform:
        return replace(self, keep=keep)

    def refusal(self, source: Source) -> str | None:
        kind = source.config.model_type
        if kind not in LLAMA_LIKE:
            return f"it is not known which dimensions of a {kind} model shrink together; expected one of {', '.join(LLAMA_LIKE)}"
        if source.further:
            return f"{len(source.further)} of its tensors predict further tokens, and would not fit to a smaller model"
        if (reason := self.refused(source)) is not None:
            return reason
        self.target(source)
        return None

    def described(self, source: Source) -> str:
        target, whole = self.target(source), StructureGraph.of(source).parameters()
        other = (
            ""
            if target.graph.divided(target.sizes)
            else "; written as a Mistral, whose heads need not divide its width"
        )
        return f"keeps {target.parameters / whole:.1%} of {whole / 1e6:.1f} million parameters: {target.spoken}{other}"

    def configuration(self, source: Source) -> PretrainedConfig:
        return self.target(source).configuration


class Identity:
    """A source as a key, which equals no other object: planning asks for the same many times."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.source is self.source

    def __hash__(self) -> int:
        return id(self.source)


@lru_cache(maxsize=4)
def _target(transform: Shrinking, key: Identity) -> Target:
    source = key.source
    graph = transform.graph(source, transform.added(source))
    return Target(graph, transform.sizes(graph, transform.budget(source)))
