"""The coupled dimensions of a decoder: which axes of which tensors shrink together, and what the model has after that."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfplate.models.sources import Source, skeleton
from halfplate.transforms.base import pieces_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PREFIX = "model.layers"
# Kinds of dimensions. A unit of `heads` is a head of k and v with the heads of q that read it; one of `pairs` are the two values in each
# head that RoPE rotates together.
CHANNELS, HEADS, PAIRS, HIDDEN, LAYERS = "channels", "heads", "pairs", "hidden", "layers"
WORDS = {
    CHANNELS: "MLP channels",
    HEADS: "heads of k and v",
    PAIRS: "pairs of values in each head",
    HIDDEN: "hidden dimensions",
    LAYERS: "layers",
}


@dataclass(frozen=True)
class Member:
    """An axis of a tensor, seen as (outer, units, inner): unit u owns the entries [:, u, :].

    outer, inner: both 1 if every entry is a unit.
    """

    tensor: str
    axis: int
    outer: int = 1
    inner: int = 1

    def entries(self, kept: Tensor, units: int) -> Tensor:
        """The entries of the axis that belong to the units `kept`, int64, in their order. units: of the whole axis."""
        starts = torch.arange(self.outer, dtype=torch.int64, device="cpu")[:, None, None] * units + kept[:, None]
        inside = torch.arange(self.inner, dtype=torch.int64, device="cpu")
        return (starts * self.inner + inside).flatten()


@dataclass(frozen=True)
class Dimension:
    """Units that are kept or removed in all members at once.

    kind: one of `WORDS`.
    layer: None if all layers share it.
    """

    kind: str
    layer: int | None
    size: int
    members: tuple[Member, ...]


# The units that are kept, ascending int64, by kind and layer of their dimension.
Kept = Mapping[tuple[str, int | None], Tensor]


@dataclass(frozen=True)
class StructureGraph:
    """The dimensions of a model of `LLAMA_LIKE`, and the shapes of its tensors by name; a tied tensor appears once."""

    config: PretrainedConfig
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, source: Source) -> StructureGraph:
        """The graph of a source, from its configuration."""
        pieces = pieces_of(skeleton(source))
        return cls(source.config, {name: shape for piece in pieces for name, (_, shape) in piece.entries.items()})

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def heads(self) -> int:
        """Heads of k and v."""
        return int(self.config.num_key_value_heads)

    @property
    def queries(self) -> int:
        """Heads of q that read one head of k and v."""
        return int(self.config.num_attention_heads) // self.heads

    @property
    def head_dim(self) -> int:
        return self.shapes[f"{PREFIX}.0.self_attn.k_proj.weight"][0] // self.heads

    def size(self, kind: str) -> int:
        """Units of every dimension of a kind."""
        if kind == LAYERS:
            return self.layers
        return {
            CHANNELS: int(self.config.intermediate_size),
            HEADS: self.heads,
            PAIRS: self.head_dim // 2,
            HIDDEN: int(self.config.hidden_size),
        }[kind]

    def dimension(self, kind: str, layer: int | None) -> Dimension:
        """The dimension of a kind in a layer; `hidden` has layer None."""
        members = self._hidden() if layer is None else self._inside(kind, f"{PREFIX}.{layer}")
        return Dimension(kind, layer, self.size(kind), tuple(one for one in members if one.tensor in self.shapes))

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """All dimensions but the layers themselves."""
        each = (self.dimension(kind, layer) for layer in range(self.layers) for kind in (CHANNELS, HEADS, PAIRS))
        return (*each, self.dimension(HIDDEN, None))

    @cached_property
    def _axes(self) -> dict[str, list[tuple[Dimension, Member]]]:
        """The members of each tensor with their dimensions."""
        found: dict[str, list[tuple[Dimension, Member]]] = {name: [] for name in self.shapes}
        for dimension in self.dimensions:
            for member in dimension.members:
                found[member.tensor].append((dimension, member))
        return found

    def _inside(self, kind: str, layer: str) -> list[Member]:
        heads, queries, head_dim = self.heads, self.queries, self.head_dim
        q, k, v, o = (f"{layer}.self_attn.{name}_proj" for name in "qkvo")
        if kind == CHANNELS:
            rows = [f"{layer}.mlp.{name}_proj.{leaf}" for name in ("gate", "up") for leaf in ("weight", "bias")]
            return [*(Member(name, 0) for name in rows), Member(f"{layer}.mlp.down_proj.weight", 1)]
        if kind == HEADS:
            found = [
                Member(f"{name}.{leaf}", 0, inner=width * head_dim)
                for name, width in ((q, queries), (k, 1), (v, 1))
                for leaf in ("weight", "bias")
            ]
            return [*found, Member(f"{o}.weight", 1, inner=queries * head_dim)]
        # The second half of a head holds the partners of the first.
        found = [
            Member(f"{name}.{leaf}", 0, outer=2 * count)
            for name, count in ((q, heads * queries), (k, heads), (v, heads))
            for leaf in ("weight", "bias")
        ]
        norms = [Member(f"{layer}.self_attn.{name}_norm.weight", 0, outer=2) for name in "qk"]
        return [*found, Member(f"{o}.weight", 1, outer=2 * heads * queries), *norms]

    def _hidden(self) -> list[Member]:
        readers, writers = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
        found = []
        for name in self.shapes:
            module, _, leaf = name.rpartition(".")
            last = module.rpartition(".")[2]
            if last in readers and leaf == "weight":
                found.append(Member(name, 1))
            elif last in writers:
                found.append(Member(name, 0))
            elif module in ("model.embed_tokens", "lm_head"):
                found.append(Member(name, 1))
            elif last in ("norm", "input_layernorm", "post_attention_layernorm"):
                found.append(Member(name, 0))
        return found

    def parameters(self, sizes: Mapping[str, int] | None = None) -> int:
        """Parameters of the model whose dimensions of each kind in `sizes` have that many units in every layer."""
        sizes = sizes or {}
        layers = sizes.get(LAYERS, self.layers)
        outer, inside = self._parameters(sizes)
        return outer + layers * inside

    @cached_property
    def _counted(self) -> dict[str, bool]:
        """The tensors of the first layer (True), for which the others stand, and those outside the layers (False)."""
        inside = {name: name.startswith(f"{PREFIX}.") for name in self.shapes}
        return {name: within for name, within in inside.items() if not within or name.startswith(f"{PREFIX}.0.")}

    def _parameters(self, sizes: Mapping[str, int]) -> tuple[int, int]:
        """Parameters outside the layers, and of one layer."""
        found = {True: 0, False: 0}
        for name, inside in self._counted.items():
            axes = list(self.shapes[name])
            for dimension, member in self._axes[name]:
                units = sizes.get(dimension.kind, dimension.size)
                axes[member.axis] = axes[member.axis] // dimension.size * units
            found[inside] += prod(axes)
        return found[False], found[True]

    def cut(self, name: str, tensor: Tensor, kept: Kept) -> Tensor:
        """The tensor `name` with the units `kept` of its dimensions; dimensions that `kept` lacks stay whole."""
        # Pairs divide what a head owns, so heads are cut last, in the narrower tensor.
        for dimension, member in sorted(self._axes[name], key=lambda found: found[0].kind == HEADS):
            chosen = kept.get((dimension.kind, dimension.layer))
            if chosen is None:
                continue
            if dimension.kind == HEADS and (pairs := kept.get((PAIRS, dimension.layer))) is not None:
                member = Member(name, member.axis, inner=member.inner // self.size(PAIRS) * len(pairs))
            entries = member.entries(chosen, dimension.size).to(tensor.device)
            tensor = tensor.index_select(member.axis, entries)
        return tensor

    def configuration(self, sizes: Mapping[str, int]) -> PretrainedConfig:
        """The configuration of a model with these sizes, in a copy."""
        config = deepcopy(self.config)
        if CHANNELS in sizes:
            config.intermediate_size = sizes[CHANNELS]
        if HEADS in sizes:
            config.num_key_value_heads = sizes[HEADS]
            config.num_attention_heads = sizes[HEADS] * self.queries
        if PAIRS in sizes:
            config.head_dim = 2 * sizes[PAIRS]
        elif {HEADS, HIDDEN} & sizes.keys():
            config.head_dim = self.head_dim  # which followed from the two otherwise
        if HIDDEN in sizes:
            config.hidden_size = sizes[HIDDEN]
        if LAYERS in sizes:
            config.num_hidden_layers = sizes[LAYERS]
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[: sizes[LAYERS]]
        return config if self.divided(sizes) else _as_mistral(config)

    def divided(self, sizes: Mapping[str, int]) -> bool:
        """Whether the heads of q divide the width of the model, which transformers asks of a Llama and of no other family."""
        heads, hidden = sizes.get(HEADS, self.heads) * self.queries, sizes.get(HIDDEN, self.size(HIDDEN))
        return self.config.model_type != "llama" or hidden % heads == 0

    def allowed(self, sizes: Mapping[str, int]) -> bool:
        """Whether a configuration can say these sizes: that of the family, or for a Llama without biases that of a Mistral."""
        biased = self.config.model_type == "llama" and (self.config.attention_bias or self.config.mlp_bias)
        return not biased or self.divided(sizes)


def _as_mistral(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a Llama without biases as that of a Mistral, which computes the same."""
    from transformers import MistralConfig

    own = ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp")
    entries = {name: value for name, value in config.to_dict().items() if name not in own}
    found: PretrainedConfig = MistralConfig.from_dict(entries | {"sliding_window": None})
    return found
