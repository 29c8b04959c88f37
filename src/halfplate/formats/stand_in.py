"""Replacing a linear or an embedding by its compressed module, and back."""

from typing import Any

import torch
from torch import nn

from halfplate.errors import HalfplateError
from halfplate.formats.embedding import CompressedEmbedding, check_table, embedding_scale
from halfplate.formats.linear import CompressedLinear, CompressedMatrix
from halfplate.formats.plain import is_plain_linear
from halfplate.formats.spec import WeightSpec


def stand_in(module: Any, spec: WeightSpec, name: str) -> CompressedMatrix:
    """The compressed module of `spec` for the linear or embedding `module` called `name`; its tensors are on the meta device.

    Raises HalfplateError if `module` is neither, does more than multiply or look up, or has another shape.
    """
    scale = embedding_scale(module)
    if not is_plain_linear(module) and scale is None:
        raise HalfplateError(
            f"quantization_config.modules names {name!r}, which is a {type(module).__name__}, expected a plain Linear or Embedding; write the checkpoint again"
        )
    weight = module.weight
    if tuple(weight.shape) != (spec.d_out, spec.d_in):
        raise HalfplateError(
            f"quantization_config.modules[{name!r}].shape={[spec.d_out, spec.d_in]} does not fit the model, "
            f"expected {list(weight.shape)}; write the checkpoint again"
        )
    if scale is not None:
        check_table(spec, name)
        return CompressedEmbedding(spec, module, "meta")
    bias = module.bias
    return CompressedLinear(spec, bias is not None, "meta", None if bias is None else bias.dtype, weight.dtype)


def dense_module(module: CompressedMatrix, dtype: torch.dtype) -> nn.Module:
    """The linear or embedding that `module` replaced, with the full matrix in `dtype`."""
    if isinstance(module, CompressedEmbedding):
        return module.dense_module(dtype)
    assert isinstance(module, CompressedLinear), "nothing else is compressed"
    weight, bias = module.dense()
    linear = nn.Linear(module.in_features, module.out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype).detach(), requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return linear
