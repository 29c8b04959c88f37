"""GPT-2's Conv1D, a linear that stores its weight as (d_in, d_out), as an nn.Linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class TransposedLinear(nn.Linear):
    """An nn.Linear in the place of a Conv1D; files of the original model store its weight as (d_in, d_out)."""


@torch.no_grad()
def as_linears(model: nn.Module) -> tuple[str, ...]:
    """Replace every Conv1D of `model` by a TransposedLinear, in place, and return their names. Works on the meta device."""
    from transformers.pytorch_utils import Conv1D

    found: dict[str, Any] = {name: module for name, module in model.named_modules() if type(module) is Conv1D}
    for name, module in found.items():
        linear = TransposedLinear(module.nx, module.nf, device="meta")
        linear.weight = nn.Parameter(module.weight.T.contiguous(), requires_grad=module.weight.requires_grad)
        linear.bias = module.bias
        model.set_submodule(name, linear.train(module.training))
    return tuple(found)


@torch.no_grad()
def as_conv1d(model: nn.Module, names: tuple[str, ...]) -> None:
    """Undo `as_linears`: put a Conv1D in the place of each of the linears `names`."""
    from transformers.pytorch_utils import Conv1D

    for name in names:
        linear: Any = model.get_submodule(name)
        with torch.device("meta"):
            module = Conv1D(linear.out_features, linear.in_features)
        module.weight = nn.Parameter(linear.weight.T.contiguous(), requires_grad=linear.weight.requires_grad)
        module.bias = linear.bias
        model.set_submodule(name, module.train(linear.training))


def transposed_weights(model: nn.Module) -> frozenset[str]:
    """The full names of the weights that files of the original model store as (d_in, d_out)."""
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, TransposedLinear))


def shapes_in_files(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of an empty `model`, by name, as files of the original model store it."""
    transposed = transposed_weights(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    return {name: shape[::-1] if name in transposed else shape for name, shape in shapes.items()}
