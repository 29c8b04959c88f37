"""A linear in kernel layout, in the place of a compressed or a dense one."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfplate.errors import HalfplateError
from halfplate.formats import Chain, CompressedLinear, NMSparse, WeightSpec
from halfplate.kernels.linear import multiply, pack, read_header, unpack
from halfplate.kernels.operators import linear
from halfplate.pattern import DENSE


class PackedLinear(nn.Module):
    """y = x Wᵀ + bias by the native kernels; the weight exists in kernel layout only.

    The state dictionary holds the stored tensors that it was packed from, bit for bit. Made by `of_compressed` and
    `of_dense`. Gradients flow to inputs, through the torch path, and to no weight: `restore` the model to train it.
    """

    packed: Tensor

    def __init__(
        self, spec: WeightSpec, packed: Tensor, bias_dtype: torch.dtype | None, dense_dtype: torch.dtype | None
    ):
        super().__init__()
        self.spec = spec
        self.out_features, self.in_features = spec.d_out, spec.d_in
        self.bias_dtype = bias_dtype
        self.dense_dtype = dense_dtype  # of the weight of the nn.Linear it stands for; None for a CompressedLinear
        self.saved = True
        self.register_buffer("packed", packed, persistent=False)

    @classmethod
    def of_compressed(cls, module: CompressedLinear, activations: str = "float") -> "PackedLinear":
        """Pack a compressed linear; raises HalfplateError on values that no writer leaves."""
        packed = pack(module.spec.alone, module.tensors(), activations, module.bias)
        return cls(module.spec, packed, None if module.bias is None else module.bias.dtype, None)

    @classmethod
    def of_dense(cls, module: nn.Linear, core_dtype: str | None = None, activations: str = "float") -> "PackedLinear":
        """Pack a dense linear in `core_dtype`; None takes bf16 where that holds every weight exactly, else fp32."""
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
        return cls(spec, packed, None if module.bias is None else module.bias.dtype, weight.dtype)

    @property
    def takes_bytes(self) -> bool:
        """Whether activations are rounded to int8."""
        return bool(read_header(self.packed).activations)

    def stored(self) -> dict[str, Tensor]:
        """The tensors that this linear stands for, by name: those of a CompressedLinear, or weight and bias."""
        tensors = unpack(self.spec.alone, self.packed)
        bias = tensors.pop("bias", None)
        if self.spec.in_shared:
            # The copy of B that was packed along is stored by another module.
            tensors = {name: tensors[name] for name in self.spec.layout()}
        if self.dense_dtype is not None:
            tensors = {"weight": Chain.from_tensors(self.spec, tensors).dense().to(self.dense_dtype)}
        if bias is not None:
            tensors["bias"] = bias.to(self.bias_dtype)
        return tensors

    def restored(self) -> nn.Module:
        """The module that this one was packed from, not connected where it shares the wrapper of another."""
        tensors = self.stored()
        module: nn.Module
        if self.dense_dtype is not None:
            module = nn.Linear(self.in_features, self.out_features, self.bias_dtype is not None, device="meta")
        else:
            module = CompressedLinear(self.spec, self.bias_dtype is not None, "meta", self.bias_dtype)
        module.load_state_dict(tensors, assign=True)
        return module.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) to (..., d_out) in the dtype of `x`."""
        if torch.compiler.is_compiling():
            return linear(x, self.packed, self.out_features)
        if torch.is_grad_enabled() and x.requires_grad:
            return self._differentiable(x)
        return multiply(x, self.packed, self.out_features)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """The weight (d_out, d_in) in fp32, multiplied out, and the bias (d_out,)."""
        tensors = unpack(self.spec.alone, self.packed)
        bias = tensors.pop("bias", None)
        return Chain.from_tensors(self.spec, tensors).dense(), bias

    def _differentiable(self, x: Tensor) -> Tensor:
        weight, bias = self.dense()
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "this linear is in kernel layout and has no weight of its own; call halfplate.runtime.restore(model) first, or load with kernels=False"
            )
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.saved:
            destination.update({prefix + name: tensor for name, tensor in self.stored().items()})

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], *args: Any
    ) -> None:
        if any(name.startswith(prefix) for name in state_dict):
            raise HalfplateError(
                f"{prefix.rstrip('.')} is in kernel layout and takes no new weights; call halfplate.runtime.restore(model) first"
            )
        # Others of the model may be loaded, such as an adapter.
        missing_keys.extend(
            prefix + name for name in (("weight",) if self.dense_dtype is not None else self.spec.layout())
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        device = fn(torch.empty(0, dtype=torch.float32, device="cpu")).device
        if device.type != "cpu":
            raise HalfplateError(
                f"device={str(device)!r}: the linear is packed for the processor; call halfplate.runtime.restore(model) first"
            )
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias_dtype is not None}, {self.spec.format} {self.spec.pattern} {self.spec.core_dtype}"
