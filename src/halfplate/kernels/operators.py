"""The kernels as operators of torch, so that `torch.compile` and `torch.export` trace through them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from halfplate.kernels.linear import expand_from, multiply

_library = torch.library.Library("halfplate", "FRAGMENT")
_library.define("linear(Tensor x, Tensor packed, int d_out) -> Tensor")
_library.define("linears(Tensor x, Tensor[] packed, SymInt[] d_outs, SymInt width) -> Tensor")
_library.impl("linear", multiply, "CPU")


def _linear_shape(x: Tensor, packed: Tensor, d_out: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], d_out)


def _multiply_all(x: Tensor, packed: Sequence[Tensor], d_outs: Sequence[int], width: int) -> Tensor:
    y, start = x.new_empty(*x.shape[:-1], width), 0
    # Few tokens are multiplied in fp32: one cast for all matrices, and each result is cast as it is put in its place.
    few = x.numel() < expand_from(sparse=False) * x.shape[-1]
    x = x.float() if few else x
    for matrix, d_out in zip(packed, d_outs, strict=True):
        y[..., start : start + d_out] = multiply(x, matrix, d_out)
        start += d_out
    y[..., start:] = 0
    return y


def _linears_shape(x: Tensor, packed: Sequence[Tensor], d_outs: Sequence[int], width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


_library.impl("linears", _multiply_all, "CPU")
torch.library.register_fake("halfplate::linear", _linear_shape, lib=_library)
torch.library.register_fake("halfplate::linears", _linears_shape, lib=_library)


def linear(x: Tensor, packed: Tensor, d_out: int) -> Tensor:
    """`multiply` as an operator that tracing treats as one call."""
    product: Tensor = torch.ops.halfplate.linear(x, packed, d_out)
    return product


def linears(x: Tensor, packed: Sequence[Tensor], d_outs: Sequence[int], width: int) -> Tensor:
    """The products of x (..., d_in) with several packed matrices side by side, then zeros: (..., width) in the dtype of `x`.

    One operator, which multiplies the matrices one after the other. d_outs: outputs of each matrix, at most `width` in sum.
    """
    products: Tensor = torch.ops.halfplate.linears(x, packed, d_outs, width)
    return products
