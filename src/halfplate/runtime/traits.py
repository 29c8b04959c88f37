"""What a decoder computes besides its linears, read off a transformers model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfplate.models.experts import LinearExperts
from halfplate.runtime.architectures import Angles, Architecture, NormKind, config_of, inner_of
from halfplate.runtime.backends.cpu import PackedLinear

# Names of activations in configurations, as numbers of halfplate::Activation in kernels/src/runtime.h.
ACTIVATIONS = {
    "silu": 0,
    "swish": 0,
    "gelu_pytorch_tanh": 1,
    "gelu_new": 1,
    "gelu_fast": 1,
    "gelu": 2,
    "relu2": 3,
}
CLAMPED = 4
# The rotary type whose tables change while a text grows.
GROWING_ROPE = "dynamic"
# The epsilon of norms that have no attribute for it (OlmoLayerNorm).
UNNAMED_EPSILON = 1e-5


@dataclass(frozen=True)
class MixtureTraits:
    """The experts of a layer.

    experts, chosen: their number, and how many each token uses.
    normalised: whether the weights of those are divided by their sum.
    shared: whether there is one that all tokens use.
    logistic, groups, chosen_groups, scale, least_sum: as in halfplate::Mixture.
    """

    experts: int
    chosen: int
    normalised: bool
    shared: bool
    logistic: bool = False
    groups: int = 1
    chosen_groups: int = 1
    scale: float = 1.0
    least_sum: float = 0.0


@dataclass(frozen=True)
class LayerTraits:
    """What differs between layers.

    window: number of positions that attention reads, the new one included; 0 means all.
    table: which tables of `Traits.tables` rotate queries and keys; None means that they are not rotated.
    mixture: its experts; None for an ordinary MLP.
    """

    window: int
    table: int | None
    mixture: MixtureTraits | None


@dataclass(frozen=True)
class Traits:
    """What the native step computes for a model, besides its linears.

    norm: kind of all norms, with the same epsilon.
    head_norms: whether queries and keys have norms.
    tables: the layer types with rotary tables of their own; `(None,)` if all layers share one.
    rotary_dim: numbers of a head that are rotated.
    activation: number of halfplate::Activation.
    gate_alpha, gate_limit: of an activation with bounds, else 0.
    attention_cap, logit_cap: y = cap tanh(x / cap); 0 means none.
    """

    norm: NormKind
    epsilon: float
    head_dim: int
    heads: int
    kv_heads: int
    head_norms: bool
    tables: tuple[str | None, ...]
    rotary_dim: int
    activation: int
    gate_alpha: float
    gate_limit: float
    embedding_scale: float
    attention_scale: float
    residual_scale: float
    logit_scale: float
    attention_cap: float
    logit_cap: float
    layers: tuple[LayerTraits, ...]
    version: int = 1


def traits_of(model: Any, architecture: Architecture) -> Traits | str:
    """The traits of a model of `architecture`, or why the native step cannot compute them.

    Raises AttributeError if the model has other modules or entries than the architecture says.
    """
    return _refusal(model, architecture) or _read(model, architecture)


def norms_of(model: Any, architecture: Architecture) -> list[Any]:
    """All modules of a model that are norms: of every layer, and the last one."""
    names = [name for name in (*architecture.norms, *(architecture.head_norms or ())) if name]
    found = [layer.get_submodule(name) for layer in inner_of(model).layers for name in names]
    return [*found, inner_of(model).get_submodule(architecture.final_norm)]


def linears_of(model: Any, architecture: Architecture) -> Iterator[tuple[str, Any]]:
    """The names and modules of all linears that the native step multiplies by, except routers."""
    for number, layer in enumerate(inner_of(model).layers):
        names, module = [*architecture.qkv, architecture.out], _mixture_module(layer, architecture)
        if module is None:
            names += architecture.mlp
        else:
            assert architecture.mixture is not None
            of_experts = f"{architecture.mixture.module}.experts"
            leaves = module.experts.layout.linears
            names += [
                f"{of_experts}.{expert}.{leaf}" for expert in range(module.experts.layout.experts) for leaf in leaves
            ]
            names += architecture.mixture.shared if has_shared(layer, architecture) else ()
        for name in names:
            yield f"layers.{number}.{name}", layer.get_submodule(name)
    yield "lm_head", model.lm_head


def has_shared(layer: Any, architecture: Architecture) -> bool:
    """Whether a layer with experts has one that all tokens use."""
    shared = () if architecture.mixture is None else architecture.mixture.shared
    module = layer if shared else None
    for part in shared[0].split(".") if shared else ():
        module = getattr(module, part, None)
    return module is not None


def norm_weights(module: Any, kind: NormKind, count: int) -> Tensor:
    """The weights of a norm of `count` numbers as the native step reads them: fp32 (count,), followed by biases for LayerNorm (2, count)."""
    weight = getattr(module, "weight", None)
    weight = torch.ones(count, dtype=torch.float32, device="cpu") if weight is None else weight.detach().float()
    if kind.endswith("+1"):
        weight = weight + 1
    if kind.startswith("mean"):
        bias = getattr(module, "bias", None)
        weight = torch.stack((weight, torch.zeros_like(weight) if bias is None else bias.detach().float()))
    return weight.contiguous()


def short_length(rotary: Any) -> int | None:
    """The length up to which texts have the first angles of `longrope`; longer ones have others at every position. None for other types."""
    if rotary.rope_type != "longrope":
        return None
    return int(rotary.config.rope_parameters["original_max_position_embeddings"])


def rotary_tables(
    rotary: Any, layer_type: str | None, count: int, short: bool, angles: Angles
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the first `count` positions by the module `rotary`, both fp32 (count, rotary_dim), all angles twice.

    short: whether the text ends within `short_length`; beyond it, rows are those of a longer text.
    """
    length = short_length(rotary)
    parts = [(0, count)]
    if length is not None:
        # The module chooses by the last position of a call.
        parts = [(0, min(count, length)), (0, max(count, length + 1))] if short else [(0, max(count, length + 1))]
    arguments = () if layer_type is None else (layer_type,)
    like = torch.empty(1, dtype=torch.float32, device="cpu")
    tables: list[Tensor] = []
    for start, end in parts:
        pair = rotary(like, torch.arange(start, end, dtype=torch.int64, device="cpu")[None], *arguments)
        own = [table[0].detach().float() for table in pair]
        tables = [torch.cat((old, new[len(old) :])) for old, new in zip(tables, own, strict=True)] if tables else own
    cosines, sines = (_angles_twice(table[:count], angles) for table in tables)
    return cosines, sines


def _angles_twice(table: Tensor, angles: Angles) -> Tensor:
    if angles == "twice":
        return table.contiguous()
    once = table[:, ::2] if angles == "in pairs" else table
    return torch.cat((once, once), 1)


def _refusal(model: Any, architecture: Architecture) -> str | None:
    config, rotary = config_of(model), inner_of(model).rotary_emb
    for entry in architecture.refused:
        if getattr(config, entry, None):
            return f"{entry}={getattr(config, entry)!r} has no native step"
    activation = getattr(config, architecture.activation)
    if activation not in ACTIVATIONS:
        return f"the activation {activation!r} has no native step"
    types = sorted(set(rotary.rope_type.values())) if isinstance(rotary.rope_type, dict) else [rotary.rope_type]
    if GROWING_ROPE in types or (len(types) > 1 and "longrope" in types):
        return f"rotary embeddings of type {' and '.join(types)} have no native step"
    epsilons = {_epsilon(norm) for norm in norms_of(model, architecture)}
    if len(epsilons) > 1:
        return f"norms with different epsilons ({', '.join(map(str, sorted(epsilons)))}) have no native step"
    for kind in getattr(config, "layer_types", None) or () if architecture.windows == "by layer" else ():
        if kind not in ("full_attention", "sliding_attention"):
            return f"layers of type {kind!r} have no native step"
    for number, layer in enumerate(inner_of(model).layers):
        module = _mixture_module(layer, architecture)
        if module is not None and not isinstance(module.experts, LinearExperts):
            return f"the experts of layer {number} are not separate linears, so they have no native step"
        gate = architecture.mixture.shared_gate if architecture.mixture and module is not None else None
        if gate is not None and not isinstance(layer.get_submodule(gate), nn.Linear | PackedLinear):
            return f"{gate} of layer {number} is compressed and not in kernel layout"
    return None


def _read(model: Any, architecture: Architecture) -> Traits:
    config, inner = config_of(model), inner_of(model)
    attention = inner.layers[0].self_attn

    def entry(name: str | None, otherwise: float) -> float:
        value = None if name is None else getattr(config, name)
        return otherwise if value is None else float(value)

    bounds = (0.0, 0.0)
    if architecture.clamped:
        modules = (_mixture_module(layer, architecture) for layer in inner.layers)
        bounds = next((float(one.experts.alpha), float(one.experts.limit)) for one in modules if one is not None)
    types = inner.rotary_emb.rope_type
    tables: tuple[str | None, ...] = tuple(sorted(types)) if isinstance(types, dict) else (None,)
    return Traits(
        norm=architecture.norm,
        epsilon=_epsilon(inner.get_submodule(architecture.final_norm)),
        head_dim=attention.head_dim,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_norms=architecture.head_norms is not None,
        tables=tables,
        rotary_dim=rotary_tables(inner.rotary_emb, tables[0], 1, True, architecture.angles)[0].shape[-1],
        activation=CLAMPED if architecture.clamped else ACTIVATIONS[getattr(config, architecture.activation)],
        gate_alpha=bounds[0],
        gate_limit=bounds[1],
        embedding_scale=entry(architecture.embedding_scale, 1.0),
        attention_scale=attention.scaling,
        residual_scale=entry(architecture.residual_scale, 1.0),
        logit_scale=entry(architecture.logit_scale, 1.0) / entry(architecture.logit_divisor, 1.0),
        attention_cap=entry(architecture.attention_cap, 0.0),
        logit_cap=entry(architecture.logit_cap, 0.0),
        layers=tuple(_layer(config, architecture, layer, i, tables) for i, layer in enumerate(inner.layers)),
    )


def _layer(
    config: Any, architecture: Architecture, layer: Any, number: int, tables: tuple[str | None, ...]
) -> LayerTraits:
    kinds = getattr(config, "layer_types", None) or ()
    sliding = architecture.windows == "all" or (
        architecture.windows == "by layer" and kinds[number] == "sliding_attention"
    )
    table = None
    if architecture.rotated(layer.self_attn):
        table = 0 if tables == (None,) else tables.index(kinds[number])
    return LayerTraits((config.sliding_window or 0) if sliding else 0, table, _mixture(layer, architecture))


def _mixture(layer: Any, architecture: Architecture) -> MixtureTraits | None:
    module, routing = _mixture_module(layer, architecture), architecture.mixture
    if module is None or routing is None:
        return None
    router = getattr(module, routing.router)
    groups = (1, 1) if routing.groups is None else tuple(int(getattr(router, name) or 1) for name in routing.groups)
    return MixtureTraits(
        experts=module.experts.layout.experts,
        chosen=router.top_k,
        normalised=bool(getattr(router, routing.normalised))
        if isinstance(routing.normalised, str)
        else routing.normalised,
        shared=has_shared(layer, architecture),
        logistic=routing.logistic,
        groups=groups[0],
        chosen_groups=groups[1],
        scale=1.0 if routing.scale is None else float(getattr(router, routing.scale)),
        least_sum=0.0 if routing.least_sum is None else float(getattr(router, routing.least_sum)),
    )


def _mixture_module(layer: Any, architecture: Architecture) -> Any:
    """The module with the experts of a layer; None if it has an ordinary MLP."""
    if architecture.mixture is None:
        return None
    module = getattr(layer, architecture.mixture.module)
    return module if hasattr(module, "experts") else None


def _epsilon(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", UNNAMED_EPSILON)))
