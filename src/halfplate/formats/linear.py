"""The module that replaces an `nn.Linear` in a compressed model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfplate.errors import HalfplateError
from halfplate.formats.chain import Chain
from halfplate.formats.spec import WeightSpec


class CompressedLinear(nn.Module):
    """y = x (A S B)ᵀ + bias. Every stored tensor of `spec.layout()` is registered under its name on disk.

    `to(dtype)` changes the type of the bias and the type to compute in; stored tensors keep their types.

    spec: shape and types of the matrix.
    bias: whether there is a bias (d_out,).
    device: where the empty tensors are created (`meta` while transformers builds a model).
    bias_dtype: element type of the bias.
    dtype: type of the linear that it replaces, in which the model computes; the stored core, `weight`, has another type.
    lender: the module whose input wrapper this one shares, if `spec` names one; not part of the state of this module.
    """

    weight: Tensor
    bias: Tensor | None
    lender: "CompressedLinear | None"
    # The full matrix (d_out, d_in) inside `assembled`.
    _whole: Tensor | None = None

    def __init__(
        self,
        spec: WeightSpec,
        bias: bool,
        device: torch.device | str | None = None,
        bias_dtype: torch.dtype | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        self.lend(None)
        self.out_features, self.in_features = spec.d_out, spec.d_in
        for name, (shape, dtype) in spec.layout().items():
            tensor = torch.empty(shape, dtype=dtype, device=device)
            if dtype.is_floating_point:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)
        empty_bias = torch.empty(spec.d_out, dtype=bias_dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty_bias is None else nn.Parameter(empty_bias, requires_grad=False))

    @classmethod
    def from_weight(cls, weight: Chain, spec: WeightSpec, bias: Tensor | None) -> "CompressedLinear":
        """Wrap a solved matrix; its tensors are shared, not copied."""
        return cls.from_stored(weight.tensors(), spec, bias)

    @classmethod
    def from_stored(cls, stored: Mapping[str, Tensor], spec: WeightSpec, bias: Tensor | None) -> "CompressedLinear":
        """Wrap the tensors of `spec.layout()`; they are shared, not copied."""
        module = cls(spec, bias is not None, device="meta", bias_dtype=None if bias is None else bias.dtype)
        tensors = dict(stored)
        if bias is not None:
            tensors["bias"] = bias.detach()
        module.load_state_dict(tensors, assign=True)
        return module.requires_grad_(False)

    def stored(self) -> dict[str, Tensor]:
        """The module's own tensors by their name in `spec.layout()`, and `bias` if there is one."""
        tensors: dict[str, Tensor] = {name: getattr(self, name) for name in self.spec.layout()}
        return tensors if self.bias is None else tensors | {"bias": self.bias}

    def lend(self, lender: "CompressedLinear | None") -> None:
        """Set the module whose input wrapper this one applies."""
        # Not a submodule, because its tensors belong to the module that stores them.
        object.__setattr__(self, "lender", lender)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that the module computes with: `stored()` and shared ones; raises HalfplateError if those are not available."""
        stored = self.stored()
        if self.spec.in_shared is None:
            return stored
        if self.lender is None:
            raise HalfplateError(
                f"in_shared={self.spec.in_shared!r}: the module that holds the input wrapper is not connected; call halfplate.formats.connect(model)"
            )
        shared = {name: tensor for name, tensor in self.lender.stored().items() if name in self.spec.borrowed}
        if any(tensor.is_meta for tensor in shared.values()) and not self.weight.is_meta:
            raise HalfplateError(
                f"in_shared={self.spec.in_shared!r}: that module is offloaded while its input wrapper is needed; load the model without offloading it"
            )
        return stored | shared

    @property
    def matrix(self) -> Chain:
        """The matrix of this module, over its tensors and those of its lender."""
        return Chain.from_tensors(self.spec, self.tensors())

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """The full weight (d_out, d_in) in fp32, and the bias (d_out,)."""
        return self.matrix.dense(), None if self.bias is None else self.bias.float()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        stored = {name: getattr(self, name).data for name in self.spec.layout()}
        super()._apply(fn, recurse)
        # `model.to(dtype)` sets the type to compute in. Stored tensors keep theirs, because casting would round them.
        for name, before in stored.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                after.data = before.to(after.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) to (..., d_out) in the dtype of `x`."""
        y = self.matrix.forward(x) if self._whole is None else functional.linear(x, self._whole.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.spec.format} {self.spec.pattern} {self.spec.core_dtype}"


@contextmanager
def assembled(module: nn.Module) -> Iterator[None]:
    """Context manager in which every CompressedLinear below `module` multiplies by its full matrix, which is fastest for many tokens."""
    linears = [part for part in module.modules() if isinstance(part, CompressedLinear)]
    try:
        for linear in linears:
            linear._whole = linear.matrix.dense()
        yield
    finally:
        for linear in linears:
            linear._whole = None
