"""Products of several packed matrices, each with rows of its own, in one native call; e.g. the experts that tokens are routed to."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.kernels import native
from halfplate.kernels.linear import CPU, _extent, _floats


class Member(ctypes.Structure):
    """Mirror of `halfplate::Member` in src/runtime.h."""

    _fields_ = [
        ("matrix", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("bytes", "from", "to", "tokens", "column", "d_out")],
    ]


def multiply_group(
    x: Tensor, packed: Sequence[Sequence[Tensor]], counts: Sequence[int], widths: Sequence[int]
) -> Tensor:
    """The products of groups of rows with matrices of their own: (sum of `counts`, sum of `widths`) in the dtype of `x`.

    Values are those of `multiply` for each group and matrix, bit for bit, if it expands no core. Matrices may be of different types. NaN and
    inf propagate as there.

    x: (sum of `counts`, d_in) of fp32, bf16 or fp16, the rows of the first group first; or (1, d_in), the row of every group.
    packed: the matrices of each group, whose products stand side by side.
    counts: the rows of each group, at least 1.
    widths: the outputs of each matrix of a group.
    Raises HalfplateError for matrices and rows that do not fit each other.
    """
    rows, width = sum(counts), sum(widths)
    shared = x.shape[0] == 1 and rows == len(counts)
    if x.ndim != 2 or not x.is_cpu or not x.is_floating_point() or not (shared or x.shape[0] == rows):
        raise HalfplateError(
            f"x is {x.dtype} {tuple(x.shape)} on {x.device}, expected floating point ({rows}, d_in) on cpu; pass the rows of all groups"
        )
    if len(packed) != len(counts) or any(len(matrices) != len(widths) for matrices in packed):
        raise HalfplateError(
            f"packed has {len(packed)} groups, expected {len(counts)} of {len(widths)} matrices; pass those of each group"
        )
    if rows == 0:
        return x.new_empty(0, width)
    given = _floats(x)
    members, row = [], 0
    for matrices, count in zip(packed, counts, strict=True):
        column = 0
        for matrix, d_out in zip(matrices, widths, strict=True):
            address = native.address(matrix, torch.uint8, "packed")
            members.append((address, matrix.numel(), 0 if shared else row, row, count, column, d_out))
            column += d_out
        row += count
    table = (Member * len(members))(*members)  # type: ignore[misc]  # ctypes takes tuples
    y = torch.empty(rows, width, dtype=torch.float32, device=CPU)
    extent, apart = _extent(given)
    status = native.library().halfplate_group(
        *(ctypes.byref(table), ctypes.sizeof(table), len(members)),
        *(given.data_ptr(), extent, given.shape[0], given.shape[1], apart),
        *(y.data_ptr(), y.nbytes, rows, width),
        torch.get_num_threads(),
    )
    if status:
        native.check(status, f"group of {len(members)} matrices and {rows} rows")
    return y if x.dtype == torch.float32 else y.to(x.dtype)
