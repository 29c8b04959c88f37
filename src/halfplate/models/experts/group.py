"""Running several experts together, by the native kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from halfplate.kernels import native
from halfplate.kernels.group import multiply_group
from halfplate.kernels.linear import expand_from, read_header


def products(x: Tensor, packed: Sequence[Sequence[Tensor]], counts: Sequence[int]) -> Tensor:
    """`multiply_group` for matrices whose outputs are as many in every group."""
    return multiply_group(x, packed, counts, [read_header(matrix).d_out for matrix in packed[0]])


def rows_in_group(x: Tensor) -> int:
    """Experts that fewer rows of `x` than this are routed to may run together; with more, each is faster alone.

    Gradients and tracing need every linear by itself.
    """
    traced = torch.compiler.is_compiling() or isinstance(x, FakeTensor) or not x.is_cpu
    differentiated = torch.is_grad_enabled() and x.requires_grad
    return 0 if traced or differentiated or not native.available() else expand_from(sparse=False)


def kernel_matrices(linears: Sequence[nn.Module]) -> list[Tensor] | None:
    """The packed matrices of linears; None if one is not in kernel layout, or if something else sees its inputs or outputs."""
    found = []
    for linear in linears:
        state = linear.__dict__  # attributes of modules are slow
        watched = state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state
        # The class itself declares it, because another one may have its own `forward`.
        if watched or "in_kernel_layout" not in type(linear).__dict__:
            return None
        found.append(state["_buffers"]["packed"])
    return found
