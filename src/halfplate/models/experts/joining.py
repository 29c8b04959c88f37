"""Replacing the experts modules of a model by linears, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from halfplate.models.experts.families import layout_of
from halfplate.models.experts.layout import Layout
from halfplate.models.experts.module import Expert, LinearExperts, experts_of, hand_over


def recognised(model: nn.Module) -> dict[str, Layout]:
    """The experts modules of transformers in a model that `linear_experts` replaces, by name."""
    found = {name: layout_of(module) for name, module in model.named_modules()}
    return {name: layout for name, layout in found.items() if layout is not None}


def linear_experts(model: nn.Module) -> nn.Module:
    """Replace every experts module of `model`, in place, by one of linears; returns `model`. The linears are views of the same tensors."""
    for name, layout in recognised(model).items():
        model.set_submodule(name, _linear(model.get_submodule(name), layout))
    return model


def joined_experts(model: nn.Module) -> nn.Module:
    """Undo `linear_experts`, in place; returns `model`. All linears must be of torch (`halfplate.runtime.restore`, `dequantize`)."""
    for name, module in experts_of(model).items():
        model.set_submodule(name, _joined(module))
    return model


def _linear(original: nn.Module, layout: Layout) -> LinearExperts:
    slots, experts = layout.slots(), []
    joined = {tensor.name: original.get_parameter(tensor.name) for tensor in layout.joined}
    # Unbound once, because indexing a parameter thousands of times is slow.
    tensors = {
        tensor.name: tensor.by_expert(joined[tensor.name].detach(), layout.experts).unbind() for tensor in layout.joined
    }
    grads = any(parameter.requires_grad for parameter in joined.values())
    for number in range(layout.experts):
        expert = Expert()
        for linear in layout.linears:
            own = {
                key: slots[f"{linear}.{key}"].of(tensors[slots[f"{linear}.{key}"].joined][number])
                for key in (("weight", "bias") if layout.biased else ("weight",))
            }
            expert.add_module(linear, _linear_of(own["weight"], own.get("bias"), grads))
        experts.append(expert.train(original.training))
    return LinearExperts(original, layout, experts)


def _linear_of(weight: Tensor, bias: Tensor | None, grads: bool) -> nn.Linear:
    # nn.Linear would initialise the weights of thousands of experts first.
    linear: nn.Linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = weight.shape
    linear.register_parameter("weight", nn.Parameter(weight, requires_grad=grads))
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=grads))
    return linear


def _joined(module: LinearExperts) -> nn.Module:
    layout, kind = module.layout, module.kind
    experts = [dict(expert.named_parameters()) for expert in module.experts]
    ours = {"kind", "family", "layout", *map(str, range(layout.experts))}
    original = _of_class(kind, module, ours)
    for owner in {tensor.name.rpartition(".")[0] for tensor in layout.joined} - {""}:
        left: Any = module.get_submodule(owner)
        original.set_submodule(owner, _of_class(left.kind, left, {"kind"}))
    grads = experts[0]["up_proj.weight"].requires_grad
    with torch.no_grad():
        for joined in layout.joined:
            tensor = layout.joined_tensor(
                joined.name, [{key: value.detach() for key, value in one.items()} for one in experts]
            )
            place, _, leaf = joined.name.rpartition(".")
            original.get_submodule(place).register_parameter(leaf, nn.Parameter(tensor, requires_grad=grads))
    return original


def _of_class(kind: Any, module: nn.Module, without: set[str]) -> nn.Module:
    """A module of the class `kind` with what `module` has, except what is named."""
    made: nn.Module = kind.__new__(kind)
    nn.Module.__init__(made)
    hand_over(module, made, without)
    return made
