"""The kernels as operators of torch, so that `torch.compile` and `torch.export` trace through them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.kernels.group import multiply_group
from halfplate.kernels.linear import expand_from, expands, multiply, read_header

_library = torch.library.Library("halfplate", "FRAGMENT")
_library.define("linear(Tensor x, Tensor packed, int d_out) -> Tensor")
_library.define("linears(Tensor x, Tensor[] packed, SymInt[] d_outs, SymInt width) -> Tensor")
_library.impl("linear", multiply, "CPU")


def _linear_shape(x: Tensor, packed: Tensor, d_out: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], d_out)


def _multiply_all(x: Tensor, packed: Sequence[Tensor], d_outs: Sequence[int], width: int) -> Tensor:
    if len(packed) == 1 and d_outs[0] == width:
        return multiply(x, packed[0], width)
    rows, side_by_side = x.reshape(-1, x.shape[-1]), sum(d_outs)
    # No core is expanded for fewer tokens than an unpruned one; headers need not be read then.
    few = len(rows) < expand_from(sparse=False)
    if len(rows) and packed and (few or not any(expands(read_header(matrix), len(rows)) for matrix in packed)):
        y = multiply_group(rows, [packed], [len(rows)], d_outs)
        y = y if side_by_side == width else functional.pad(y, (0, width - side_by_side))
        return y.view(*x.shape[:-1], width)
    y, start = x.new_empty(*x.shape[:-1], width), 0
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

    One operator. It multiplies all matrices in one parallel region, and rounds their common inputs once if they take them as int8; with many
    tokens in floats, it multiplies one after the other. d_outs: outputs of each matrix, at most `width` in sum.
    """
    products: Tensor = torch.ops.halfplate.linears(x, packed, d_outs, width)
    return products
