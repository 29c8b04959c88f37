"""The interface of the parts of a compressed matrix, and of their training."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from halfplate.dtypes import STORED
from halfplate.formats.quantizers.rounding import round_to_float

if TYPE_CHECKING:
    from halfplate.formats.spec import WeightSpec

# Shape and element type of stored tensors, by their name below the module.
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
Forward = Callable[[Tensor], Tensor]
P = TypeVar("P", bound="Part", covariant=True)
Q = TypeVar("Q", bound="Outer", covariant=True)


class Part(ABC):
    """A stored piece of a matrix. An object holds its tensors; class methods describe it before there are any.

    kinds: names of what its tensors hold, for tables, values first.
    trained: whether it has values that can be trained.
    """

    kinds: ClassVar[tuple[str, ...]]
    trained: ClassVar[bool] = True

    @classmethod
    def present(cls, spec: "WeightSpec") -> bool:
        """Whether a matrix of `spec` has this part; only called for parts with their own fields in a specification."""
        return True

    @classmethod
    def check_spec(cls, spec: "WeightSpec") -> None:
        """Raise HalfplateError if `spec` has an invalid part; `spec.options(name)` are the options of a part in `spec.parts`."""
        return

    @classmethod
    @abstractmethod
    def layout(cls, spec: "WeightSpec") -> Layout:
        """The stored tensors of this part in a matrix of `spec`, whether the matrix itself stores them or another one that shares them."""

    @classmethod
    def borrowed(cls, spec: "WeightSpec") -> bool:
        """Whether another matrix stores the tensors of this part."""
        return False

    @classmethod
    def kind(cls, tensor: str) -> str:
        """The kind (one of `kinds`) of the tensor with that name."""
        return cls.kinds[0]

    @classmethod
    def step(cls, tensor: str) -> int | None:
        """The number of the step of size that the tensor belongs to, if a reader may leave the last steps out; else None."""
        return None

    @classmethod
    def at_steps(cls, spec: "WeightSpec", steps: int) -> "WeightSpec":
        """`spec` with the first `steps` steps of this part alone."""
        raise NotImplementedError(f"{cls.__name__} has no steps")

    @classmethod
    def check(cls, spec: "WeightSpec", tensor: str, values: Tensor, name: str) -> None:
        """Raise HalfplateError, naming `name`, if a stored tensor holds invalid values; floats are already known to be finite."""
        return

    @classmethod
    def rows_together(cls, spec: "WeightSpec") -> int:
        """Number of rows that cannot be separated, counted from the first row."""
        return 1

    @classmethod
    @abstractmethod
    def from_tensors(cls, spec: "WeightSpec", tensors: Mapping[str, Tensor]) -> Self:
        """Build the part from the tensors of `layout`, which are among `tensors`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of `layout`."""

    @abstractmethod
    def rows(self, spec: "WeightSpec", start: int) -> Self:
        """The part for the `spec.d_out` rows from `start` on, a multiple of `rows_together`."""

    @classmethod
    def columns_together(cls, spec: "WeightSpec") -> int | None:
        """Number of columns that cannot be separated, counted from the first column; None if the part mixes all of them."""
        return None

    def cut_columns(self, spec: "WeightSpec", start: int) -> Self:
        """The part for the `spec.d_in` columns from `start` on, a multiple of `columns_together`, of a product that is summed."""
        raise NotImplementedError(f"{type(self).__name__} cannot be cut into columns")

    @abstractmethod
    def trainable(self, spec: "WeightSpec", values_too: bool) -> "Trainable[Part]":
        """A module with the values of the part as fp32 parameters. values_too: whether the values of the core have gradients."""


class Outer(Part):
    """A part around those before it: a factor, a term of a sum, or an order of the inputs."""

    @abstractmethod
    def apply(self, x: Tensor, inner: Forward) -> Tensor:
        """x (..., d_in) to (..., d_out), in the dtype of `x`. inner: does the same for all parts before this one."""

    @abstractmethod
    def around(self, matrix: Tensor) -> Tensor:
        """The matrix (d_out, d_in) of this part and all before it, in the dtype of `matrix`, the matrix of those before it."""

    def trainable(self, spec: "WeightSpec", values_too: bool) -> "TrainableOuter[Outer]":
        return TrainableNumbers(self, spec)


class Trainable(nn.Module, Generic[P]):
    """The values of a part as parameters."""

    @property
    def leverage(self) -> float:
        """Root mean square change of the weights per step of a parameter."""
        return 1.0

    @abstractmethod
    def stored(self) -> P:
        """The part in its stored types; raises HalfplateError if a value is out of the range of its type."""


class TrainableOuter(Trainable[Q]):
    """The values of a part around a core."""

    @abstractmethod
    def current(self) -> Q:
        """The part with its current values, in fp32, with gradients."""


class TrainableNumbers(TrainableOuter[Q]):
    """Every floating-point tensor of the part is a parameter; other tensors are fixed."""

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
