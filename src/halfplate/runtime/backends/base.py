"""What a backend is: a declaration of what it runs, and modules that know what they were packed from."""

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
    """Raised by a backend that finds out by trying that it cannot run a matrix here; the next backend is asked."""


@dataclass(frozen=True)
class Options:
    """What `accelerate` asks of a backend: `activations` as there, and how a linear that is not compressed is stored."""

    activations: str = "float"
    dense_dtype: str | None = None


class Packed(nn.Module, ABC):
    """A linear in the layout of a backend: y = x Wᵀ + bias.

    The state dictionary holds the tensors that it was packed from, bit for bit; it takes no new ones, and stays on its
    device. spec: of the matrix. bias_dtype: None if there is no bias. dtype: that its model computes in. dense_dtype: of
    the weight of the nn.Linear that it stands for; None for a CompressedLinear.
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
        self.saved = True  # whether the state dictionary holds it

    @property
    @abstractmethod
    def path(self) -> str:
        """What runs it, for `explain`."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it computes."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of `spec.alone.layout()`, bit for bit as they were packed, and `bias` if there is one."""

    def stored(self) -> dict[str, Tensor]:
        """The tensors that this linear stands for, by name: those of a CompressedLinear, or weight and bias."""
        tensors = self.tensors()
        bias = tensors.pop("bias", None)
        if self.dense_dtype is not None:
            tensors = {"weight": Chain.from_tensors(self.spec, tensors).dense().to(self.dense_dtype)}
        else:
            # The copy of a shared B that was packed along is stored by another module.
            tensors = {name: tensors[name] for name in self.spec.layout()}
        return tensors if bias is None else tensors | {"bias": bias.to(self.bias_dtype)}

    def restored(self) -> nn.Module:
        """The module that this one was packed from, not connected if it shares the wrapper of another."""
        tensors = {name: tensor.to(self.device) for name, tensor in self.stored().items()}
        module: nn.Module
        if self.dense_dtype is not None:
            module = nn.Linear(self.in_features, self.out_features, self.bias_dtype is not None, device="meta")
        else:
            module = CompressedLinear(self.spec, self.bias_dtype is not None, "meta", self.bias_dtype, self.dtype)
        module.load_state_dict(tensors, assign=True)
        return module.requires_grad_(False)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """The weight (d_out, d_in) in fp32, multiplied out, and the bias (d_out,)."""
        tensors = {name: tensor.to(self.device) for name, tensor in self.tensors().items()}
        bias = tensors.pop("bias", None)
        return Chain.from_tensors(self.spec, tensors).dense(), None if bias is None else bias.float()

    @property
    def weight(self) -> WeightView:
        """What the code of a model may ask of it: dtype, device and shape; its values raise a HalfplateError."""
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
        # Others of the model may be loaded, such as an adapter.
        missing_keys.extend(
            prefix + name for name in (("weight",) if self.dense_dtype is not None else self.spec.layout())
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # What is packed has a layout, which neither another device nor another type would have.
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
    """One way to run linears. It is asked by `refusal`, and packs what it does not refuse.

    name: for people. devices: the kinds of torch devices it is for. capability: what it runs of each field of a
    specification, and the tensors it knows; anything else is refused before the backend sees it. packs_dense: whether
    linears that are not compressed are packed too.
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
        """Why it runs nothing on `device`, which is of its kind; None if it does."""
        return None

    @final
    def pack(self, linear: CompressedLinear, options: Options | None = None) -> Packed:
        """The linear in the layout of this backend; its own tensors are left as they are.

        Raises HalfplateError for what it refuses, for a tensor that is not part of the matrix and for damaged values, and
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
        """`pack` of a linear that is supported and holds no other tensors than `spec` says."""

    def pack_dense(self, linear: nn.Linear, options: Options | None = None) -> Packed:
        """A linear that is not compressed in the layout of this backend, if it `packs_dense`."""
        raise HalfplateError(f"{self.name} packs compressed linears only")


def _tensors_below(linear: nn.Module) -> Iterator[str]:
    """The names of all tensors that a module holds, whatever its specification says."""
    named = chain(linear.named_parameters(), linear.named_buffers())
    return (name for name, _ in named)
