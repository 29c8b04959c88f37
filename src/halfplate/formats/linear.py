"""Modules that compute with a compressed matrix: their base class, and the replacement of an `nn.Linear`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfplate.errors import HalfplateError
from halfplate.formats.chain import Chain
from halfplate.formats.plain import WeightView
from halfplate.formats.spec import WeightSpec


class CompressedMatrix(nn.Module):
    """A module that computes with one compressed matrix: every tensor of `spec.layout()` is registered under its name on disk.

    `to(dtype)` changes the type that the module computes in; stored tensors keep their types.

    spec: shape and types of the matrix.
    device: of the tensors, which are empty until they are loaded (`meta` while transformers builds a model).
    dtype: type of the original weight, in which the model computes; the stored core, `weight`, has another type.
    lender: the module that stores the tensors named by `spec.borrowed`; not part of the state of this module.
    """

    weight: Tensor
    lender: "CompressedMatrix | None"

    def __init__(
        self, spec: WeightSpec, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        self.lend(None)
        for name, (shape, kind) in spec.layout().items():
            tensor = torch.empty(shape, dtype=kind, device=device)
            if kind.is_floating_point:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)

    def stored(self) -> dict[str, Tensor]:
        """The module's own tensors by their name in `spec.layout()`."""
        return {name: getattr(self, name) for name in self.spec.layout()}

    def lend(self, lender: "CompressedMatrix | None") -> None:
        """Make `lender` the module that stores what this one borrows."""
        # Not as a submodule: its tensors belong to the module that stores them.
        object.__setattr__(self, "lender", lender)
        self._show_weight()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that the module computes with, its own and borrowed ones; HalfplateError if these are not available."""
        stored, spec = self.stored(), self.spec
        if spec.lender is None:
            return stored
        if self.lender is None:
            raise HalfplateError(
                f"{_borrowing(spec)}: that module is not connected; call halfplate.formats.connect(model)"
            )
        shared = {name: tensor for name, tensor in self.lender.stored().items() if name in spec.borrowed}
        if any(tensor.is_meta for tensor in shared.values()) and not any(tensor.is_meta for tensor in stored.values()):
            raise HalfplateError(f"{_borrowing(spec)}: that module is offloaded; load the model without offloading it")
        return stored | shared

    @property
    def matrix(self) -> Chain:
        """The matrix that this module applies, over the tensors of the module and of its lender."""
        return Chain.from_tensors(self.spec, self.tensors())

    def _show_weight(self) -> None:
        """Let model code read the dtype and the device of the weight of a tied head, which has no tensor of that name."""
        if self.spec.same_as is not None:
            device = torch.device("cpu") if self.lender is None else self.lender.device
            self.__dict__["weight"] = WeightView((self.spec.d_out, self.spec.d_in), self.dtype, device)

    @property
    def device(self) -> torch.device:
        """The device of its tensors, or of those of its lender if it stores none."""
        for module in (self, self.lender):
            for tensor in () if module is None else module.stored().values():
                return tensor.device
        return torch.device("cpu")

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        stored = {name: getattr(self, name).data for name in self.spec.layout()}
        super()._apply(fn, recurse)
        # `model.to(dtype)` names the type to compute in; in another, what is stored would round.
        for name, before in stored.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                after.data = before.to(after.device)
        self._show_weight()
        return self


def _borrowing(spec: WeightSpec) -> str:
    return f"in_shared={spec.in_shared!r}" if spec.in_shared else f"same_as={spec.same_as!r}"


class CompressedLinear(CompressedMatrix):
    """y = x (A S B)ᵀ + bias, in the place of an `nn.Linear`.

    spec, device, dtype: as in CompressedMatrix.
    bias: whether a bias (d_out,) is added.
    bias_dtype: element type of the bias.
    """

    bias: Tensor | None
    # The whole matrix (d_out, d_in), while `assembled` holds it.
    _whole: Tensor | None = None

    def __init__(
        self,
        spec: WeightSpec,
        bias: bool,
        device: torch.device | str | None = None,
        bias_dtype: torch.dtype | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(spec, device, dtype)
        self.out_features, self.in_features = spec.d_out, spec.d_in
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
        """The module's own tensors by their name in `spec.layout()`, and `bias` if it has one."""
        return super().stored() if self.bias is None else super().stored() | {"bias": self.bias}

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """The full weight (d_out, d_in) in fp32, and the bias (d_out,)."""
        return self.matrix.dense(), None if self.bias is None else self.bias.float()

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
