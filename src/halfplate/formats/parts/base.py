"""What a part of a compressed matrix is, and how its numbers are trained."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from halfplate.dtypes import STORED
from halfplate.formats.encoding.rounding import round_to_float

if TYPE_CHECKING:
    from halfplate.formats.spec import WeightSpec

# Shape and element type of stored tensors, by their name below the module.
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
Forward = Callable[[Tensor], Tensor]
P = TypeVar("P", bound="Part", covariant=True)
Q = TypeVar("Q", bound="Outer", covariant=True)


class Part(ABC):
    """A stored piece of a matrix. An object holds its tensors; class methods tell of it before there are any.

    kinds: what its tensors hold, in words for tables, the numbers first. trained: whether it has numbers that training can move.
    """

    kinds: ClassVar[tuple[str, ...]]
    trained: ClassVar[bool] = True

    @classmethod
    def present(cls, spec: "WeightSpec") -> bool:
        """Whether a matrix of `spec` has this part; asked of the parts that every specification has a field for."""
        return True

    @classmethod
    def check_spec(cls, spec: "WeightSpec") -> None:
        """Raise HalfplateError if `spec` asks for a part that cannot be; `spec.options(name)` are those of a part named in `spec.parts`."""
        return

    @classmethod
    @abstractmethod
    def layout(cls, spec: "WeightSpec") -> Layout:
        """The tensors that a matrix of `spec` stores for this part, whether the matrix itself or one that it shares them with."""

    @classmethod
    def borrowed(cls, spec: "WeightSpec") -> bool:
        """Whether another matrix stores the tensors of this part."""
        return False

    @classmethod
    def kind(cls, tensor: str) -> str:
        """What the tensor of that name holds, one of `kinds`."""
        return cls.kinds[0]

    @classmethod
    def check(cls, spec: "WeightSpec", tensor: str, values: Tensor, name: str) -> None:
        """Raise HalfplateError, naming `name`, if a stored tensor holds values that the part does not allow; floats are finite already."""
        return

    @classmethod
    def rows_together(cls, spec: "WeightSpec") -> int:
        """Rows that cannot be cut apart, counted from the first."""
        return 1

    @classmethod
    @abstractmethod
    def from_tensors(cls, spec: "WeightSpec", tensors: Mapping[str, Tensor]) -> Self:
        """Put the part together from the tensors of `layout`, among others."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of `layout`."""

    @abstractmethod
    def rows(self, spec: "WeightSpec", start: int) -> Self:
        """The part of the `spec.d_out` rows from `start` on, a multiple of `rows_together`."""

    @abstractmethod
    def trainable(self, spec: "WeightSpec", values_too: bool) -> "Trainable[Part]":
        """A module whose parameters are the numbers of the part, fp32. values_too: whether those of the core ask for a gradient."""


class Outer(Part):
    """A part that stands around those before it: a factor, a term of a sum, an order of the inputs."""

    @abstractmethod
    def apply(self, x: Tensor, inner: Forward) -> Tensor:
        """x (..., d_in) to (..., d_out), in the dtype of `x`. inner: does the same for all parts before this one."""

    @abstractmethod
    def around(self, matrix: Tensor) -> Tensor:
        """The matrix (d_out, d_in) of this part and all before it, whose matrix is `matrix`, in its dtype."""

    def trainable(self, spec: "WeightSpec", values_too: bool) -> "TrainableOuter[Outer]":
        return TrainableNumbers(self, spec)


class Trainable(nn.Module, Generic[P]):
    """The numbers of a part as parameters."""

    @property
    def leverage(self) -> float:
        """How far a weight moves with a step of a parameter, as a root mean square."""
        return 1.0

    @abstractmethod
    def stored(self) -> P:
        """The part in its stored types; raises HalfplateError if a number has left the range of its type."""


class TrainableOuter(Trainable[Q]):
    """The numbers of a part that stands around a core."""

    @abstractmethod
    def current(self) -> Q:
        """The part as it stands, in fp32, with its graph."""


class TrainableNumbers(TrainableOuter[Q]):
    """Every floating-point tensor of the part is a parameter; the others stay."""

    def __init__(self, part: Q, spec: "WeightSpec") -> None:
        super().__init__()
        self._class, self._spec = type(part), spec
        self._dtypes = {name: tensor.dtype for name, tensor in part.tensors().items()}
        for name, tensor in part.tensors().items():
            key = name.removeprefix("weight_")
            if tensor.is_floating_point():
                self.register_parameter(key, nn.Parameter(tensor.detach().float().clone()))
            else:
                self.register_buffer(key, tensor, persistent=False)

    def current(self) -> Q:
        return self._class.from_tensors(self._spec, self._tensors())

    def stored(self) -> Q:
        names = {dtype: name for name, dtype in STORED.items()}
        rounded = {
            name: round_to_float(tensor, names[self._dtypes[name]], "wrapper_dtype").contiguous()
            if tensor.is_floating_point()
            else tensor
            for name, tensor in self._tensors().items()
        }
        return self._class.from_tensors(self._spec, rounded)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name.removeprefix("weight_")) for name in self._dtypes}
