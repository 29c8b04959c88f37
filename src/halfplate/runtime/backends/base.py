"""The interface of backends: a declaration of what a backend supports, and modules that keep what they were packed from."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from halfplate.errors import HalfplateError
from halfplate.formats import Chain, CompressedLinear, WeightSpec
from halfplate.formats.plain import WeightView
from halfplate.kernels.capability import Capability, Refusal, check_tensors


class CannotPack(HalfplateError):
    """Raised by a backend if packing shows that it cannot run a matrix; the next backend is tried."""


@dataclass(frozen=True)
class Options:
    """Options of `accelerate` for backends: `activations`, and the type in which uncompressed linears are stored."""

    activations: str = "auto"
    dense_dtype: str | None = None


class Packed(nn.Module, ABC):
    """A linear in the layout of a backend: y = x Wᵀ + bias.

    The state dictionary holds the tensors that it was packed from, bit for bit. It loads no new ones, and cannot be moved to
    another device.

    spec: of the matrix.
    bias_dtype: None if there is no bias.
    dtype: in which its model computes.
    dense_dtype: weight type of the nn.Linear that it replaces; None if it replaces a CompressedLinear.
    """

    def __init__(
        self,
        spec: WeightSpec,
        bias_dtype: torch.dtype | None,
        dtype: torch.dtype,
        dense_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.out_features, self.in_features = spec.d_out, spec.d_in
        self.bias_dtype, self.dtype, self.dense_dtype = bias_dtype, dtype, dense_dtype
        self.saved = True  # whether the state dictionary includes this linear

    @property
    @abstractmethod
    def path(self) -> str:
        """The kernel, for `explain`."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device that it computes on."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of `spec.alone.layout()`, bit for bit as before packing, and `bias` if there is one."""

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the linear that it replaces, by name: those of a CompressedLinear, or weight and bias."""
        tensors = self.tensors()
        bias = tensors.pop("bias", None)
        if self.dense_dtype is not None:
            tensors = {"weight": Chain.from_tensors(self.spec, tensors).dense().to(self.dense_dtype)}
        else:
            # A shared B was packed as a copy; another module stores it.
            tensors = {name: tensors[name] for name in self.spec.layout()}
        return tensors if bias is None else tensors | {"bias": bias.to(self.bias_dtype)}

    def restored(self) -> nn.Module:
        """The module that this one was packed from, not yet connected if it shares the wrapper of another."""
        tensors = {name: tensor.to(self.device) for name, tensor in self.stored().items()}
        module: nn.Module
        if self.dense_dtype is not None:
            module = nn.Linear(self.in_features, self.out_features, self.bias_dtype is not None, device="meta")
        else:
            module = CompressedLinear(self.spec, self.bias_dtype is not None, "meta", self.bias_dtype, self.dtype)
        module.load_state_dict(tensors, assign=True)
        return module.requires_grad_(False)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """The full weight (d_out, d_in) in fp32, and the bias (d_out,)."""
        tensors = {name: tensor.to(self.device) for name, tensor in self.tensors().items()}
        bias = tensors.pop("bias", None)
        return Chain.from_tensors(self.spec, tensors).dense(), None if bias is None else bias.float()

    @property
    def weight(self) -> WeightView:
        """A stand-in for the weight with dtype, device and shape; reading its values raises HalfplateError."""
        return WeightView((self.out_features, self.in_features), self.dtype, self.device)

    @property
    def bias(self) -> Tensor | None:
        """The bias (d_out,) in its own type; None if there is none."""
        return None if self.bias_dtype is None else self.stored()["bias"]

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
        # Other tensors of the model may be loaded, such as an adapter.
        missing_keys.extend(
            prefix + name for name in (("weight",) if self.dense_dtype is not None else self.spec.layout())
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # The packed layout is only valid for this device and type.
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if moved.device != self.device:
            raise HalfplateError(
                f"device={str(moved.device)!r}: the linear is packed for {self.device}; call halfplate.runtime.restore(model) first"
            )
        self.dtype = moved.dtype
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias_dtype is not None}, {self.spec.format} {self.spec.pattern} {self.spec.core_dtype}"


class Backend(ABC):
    """One way to run linears. `refusal` says what it does not support, and `pack` packs the others.

    name: for messages.
    devices: the torch device types that it supports.
    capability: the supported values of each field of a specification, and the known tensors; others are refused.
    packs_dense: whether it also packs uncompressed linears.
    """

    name: str
    devices: frozenset[str]
    capability: Capability
    packs_dense = False

    @final
    def refusal(self, spec: WeightSpec, device: torch.device) -> Refusal | None:
        """Why it does not run a matrix of `spec` on `device`; None if it does."""
        refusal = self.capability.refusal(spec)
        if refusal is None and device.type not in self.devices:
            refusal = Refusal(f"{self.name} are for {' and '.join(sorted(self.devices))}, not for {device.type}")
        if refusal is None and (reason := self.unavailable(device)) is not None:
            refusal = Refusal(reason)
        return refusal

    def unavailable(self, device: torch.device) -> str | None:
        """Why it does not work on `device`, which has one of its types; None if it does."""
        return None

    @final
    def pack(self, linear: CompressedLinear, options: Options | None = None) -> Packed:
        """The linear in the layout of this backend; the tensors of `linear` are not changed.

        Raises HalfplateError for an unsupported matrix, for a tensor that is not part of the matrix and for damaged values, and
        CannotPack if packing shows that it cannot run the linear.
        """
        if (refusal := self.refusal(linear.spec, linear.device)) is not None:
            raise HalfplateError(refusal.reason)
        check_tensors(linear.spec.alone, chain(_tensors_below(linear), linear.tensors()))
        packed = self._pack(linear, options or Options())
        if not isinstance(packed, Packed) or packed.spec != linear.spec:
            raise HalfplateError(
                f"{self.name} packed {linear.spec} to a {type(packed).__name__}, expected a Packed of the same; report this to its author"
            )
        return packed.train(linear.training)

    @abstractmethod
    def _pack(self, linear: CompressedLinear, options: Options) -> Packed:
        """`pack` for a supported linear with exactly the tensors of its specification."""

    def pack_dense(self, linear: nn.Linear, options: Options | None = None) -> Packed:
        """An uncompressed linear in the layout of this backend, if it `packs_dense`."""
        raise HalfplateError(f"{self.name} packs compressed linears only")


def _tensors_below(linear: nn.Module) -> Iterator[str]:
    """The names of all tensors of a module, whatever its specification says."""
    named = chain(linear.named_parameters(), linear.named_buffers())
    return (name for name, _ in named)
