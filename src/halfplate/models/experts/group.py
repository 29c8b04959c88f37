"""Running several experts together, by the native kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from halfplate.kernels import native
from halfplate.kernels.group import multiply_group
from halfplate.kernels.linear import expand_from, read_header


@dataclass
class Group:
    """Experts that run together.

    each: the slots of each expert.
    matrices: its packed matrices, in the order in which they run.
    counts: the number of its slots.
    """

    each: list[Tensor] = field(default_factory=list)
    matrices: list[list[Tensor]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, slots: Tensor, matrices: list[Tensor]) -> None:
        """Add an expert."""
        self.each.append(slots)
        self.matrices.append(matrices)
        self.counts.append(len(slots))

    def slots(self) -> Tensor:
        """The slots of all experts, in order."""
        return torch.cat(self.each)

    def products(self, x: Tensor, part: slice) -> Tensor:
        """The rows `x` of the experts times those of their matrices, side by side: (slots, outputs)."""
        packed = [matrices[part] for matrices in self.matrices]
        return multiply_group(x, packed, self.counts, [read_header(matrix).d_out for matrix in packed[0]])


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
        watched = linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__
        # The class itself declares it, because another one may have its own `forward`.
        matrix = linear._buffers.get("packed") if "in_kernel_layout" in type(linear).__dict__ else None
        if matrix is None or watched:
            return None
        found.append(matrix)
    return found
