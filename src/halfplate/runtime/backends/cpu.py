"""The native CPU kernels, for compressed and uncompressed linears."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfplate.formats import CompressedLinear, NMSparse, WeightSpec
from halfplate.kernels import native
from halfplate.kernels.linear import NATIVE, multiply, pack, read_header, unpack
from halfplate.kernels.operators import linear
from halfplate.pattern import DENSE
from halfplate.runtime.backends.base import Backend, Options, Packed


class PackedLinear(Packed):
    """y = x Wᵀ + bias by the native kernels; the weight exists only in kernel layout.

    Create it with `of_compressed` or `of_dense`. Gradients flow to the inputs, through the torch path, but not to the weight;
    `restore` the model to train it.
    """

    packed: Tensor
    # `packed` may be multiplied without calling `forward`, together with other matrices (models/experts/group.py).
    in_kernel_layout: ClassVar[bool] = True

    def __init__(
        self,
        spec: WeightSpec,
        packed: Tensor,
        bias_dtype: torch.dtype | None,
        dense_dtype: torch.dtype | None,
        dtype: torch.dtype,
    ):
        super().__init__(spec, bias_dtype, dtype, dense_dtype)
        self.register_buffer("packed", packed, persistent=False)

    @classmethod
    def of_compressed(cls, module: CompressedLinear, activations: str = "float") -> "PackedLinear":
        """Pack a compressed linear; raises HalfplateError on invalid values."""
        packed = pack(module.spec.alone, module.tensors(), activations, module.bias)
        return cls(module.spec, packed, None if module.bias is None else module.bias.dtype, None, module.dtype)

    @classmethod
    def of_dense(cls, module: nn.Linear, core_dtype: str | None = None, activations: str = "float") -> "PackedLinear":
        """Pack an uncompressed linear in `core_dtype`; None chooses bf16 if that is exact for every weight, else fp32."""
        weight = module.weight.detach()
        if core_dtype is None:
            half = weight.to(torch.bfloat16)
            core_dtype, exact = (
                ("bf16", half) if torch.equal(half.to(weight.dtype), weight) else ("fp32", weight.float())
            )
            tensors = {"weight": exact[None]}
        else:
            tensors = NMSparse.from_dense(weight.to(torch.float32), None, DENSE, core_dtype).tensors()
        spec = WeightSpec(module.out_features, module.in_features, DENSE, core_dtype)
        packed = pack(spec, tensors, activations, module.bias)
        return cls(spec, packed, None if module.bias is None else module.bias.dtype, weight.dtype, weight.dtype)

    @property
    def path(self) -> str:
        spec = self.spec
        kind = "dense" if str(spec.pattern) == "dense" else str(spec.pattern)
        wrappers = f", wrappers {spec.wrapper_dtype}" if spec.format == "chain" else ""
        inputs = ("", ", int8 activations", ", int8 activations of prompts")[read_header(self.packed).activations]
        return f"native {native.isa()} {kind} {spec.core_dtype}{wrappers}{inputs}"

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def tensors(self) -> dict[str, Tensor]:
        return unpack(self.spec.alone, self.packed)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) to (..., d_out) in the dtype of `x`."""
        if torch.compiler.is_compiling():
            return linear(x, self.packed, self.out_features)
        if torch.is_grad_enabled() and x.requires_grad:
            return self._differentiable(x)
        return multiply(x, self.packed, self.out_features)

    def _differentiable(self, x: Tensor) -> Tensor:
        weight, bias = self.dense()
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class NativeKernels(Backend):
    """The compiled kernels; `halfplate.kernels.linear` declares what they support."""

    name = "native kernels"
    devices = frozenset({"cpu"})
    capability = NATIVE
    packs_dense = True

    def unavailable(self, device: torch.device) -> str | None:
        return native.reason() or None

    def _pack(self, linear: CompressedLinear, options: Options) -> Packed:
        return PackedLinear.of_compressed(linear, options.activations)

    def pack_dense(self, linear: nn.Linear, options: Options | None = None) -> Packed:
        options = options or Options()
        return PackedLinear.of_dense(linear, options.dense_dtype, options.activations)


NATIVE_KERNELS = NativeKernels()
