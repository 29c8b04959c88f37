"""A backend that expands every matrix to full size once, for matrices without a native kernel.

It takes more memory than the torch path, but does not unpack the weights at every call.
"""

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.formats import CompressedLinear
from halfplate.kernels.capability import CORE, WRAPPERS
from halfplate.runtime.backends import Backend, Capability, Options, Packed, anything

FIELDS = ("d_out", "d_in", "pattern", "core_dtype", "out_block", "in_block", "wrapper_dtype")
MORE = ("rank", "permuted", "group", "in_shared", "same_as", "parts")
TENSORS = ("weight_left", "weight_right", "weight_permutation")


class Expanded(Packed):
    """y = x Wᵀ + bias with W (d_out, d_in) in the type of the model."""

    matrix: Tensor
    added: Tensor | None

    def __init__(self, linear: CompressedLinear) -> None:
        super().__init__(linear.spec, None if linear.bias is None else linear.bias.dtype, linear.dtype)
        matrix, bias = linear.dense()
        self.register_buffer("matrix", matrix.detach().to(linear.dtype), persistent=False)
        self.register_buffer("added", None if bias is None else bias.detach(), persistent=False)
        self._held = {name: tensor.detach() for name, tensor in linear.tensors().items()}

    @property
    def path(self) -> str:
        return f"expanded {self.spec.pattern} in {self.matrix.dtype}"

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._held)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.matrix.to(x.dtype), None if self.added is None else self.added.to(x.dtype))


class Expanding(Backend):
    """Supports all current fields and tensors of the format; later ones are refused until they are declared."""

    name = "expanded matrices"
    devices = frozenset({"cpu", "cuda"})
    capability = Capability(dict.fromkeys(FIELDS + MORE, anything()), frozenset(CORE + WRAPPERS + TENSORS))

    def _pack(self, linear: CompressedLinear, options: Options) -> Packed:
        return Expanded(linear)


EXPANDING = Expanding()
