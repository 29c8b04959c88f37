"""A compressed linear with trainable values and a fixed mask."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear, CompressedMatrix
from halfplate.formats.chain import Chain
from halfplate.formats.parts.base import Outer, TrainableOuter
from halfplate.formats.parts.core import TrainableCore
from halfplate.formats.plain import WeightView


class TrainableLinear(nn.Module):
    """y = x Wᵀ + bias with fp32 parameters instead of the stored tensors of a CompressedLinear.

    core: the trainable core; each other part that this linear stores is a submodule named after its class.
    values_too: whether the values of the core have gradients.
    Parameters of parts that another linear stores belong to that one, found through `lender`.
    """

    lender: "TrainableLinear | None"

    def __init__(self, linear: CompressedLinear, values_too: bool) -> None:
        super().__init__()
        self.spec, self.start, self.dtype = linear.spec, linear.matrix, linear.dtype
        self.lend(None)
        self.core: TrainableCore = self.start.core.trainable(self.spec, values_too)
        for part in self._own():
            self.add_module(type(part).__name__, part.trainable(self.spec, values_too))
        self.bias = linear.bias

    def lend(self, lender: "TrainableLinear | None") -> None:
        """Set the linear that stores the shared parts of this one."""
        # Not a submodule, because a shared wrapper is one parameter, not one for each linear that applies it.
        object.__setattr__(self, "lender", lender)

    @property
    def parts(self) -> "list[TrainableCore | TrainableOuter[Outer]]":
        """The trainable parts that this linear stores."""
        return [self.core, *map(self._trainable, self._own())]

    def _own(self) -> list[Outer]:
        return [part for part in self.start.outer if not part.borrowed(self.spec)]

    @property
    def weight(self) -> WeightView:
        """A stand-in for the weight with dtype, device and shape; reading its values raises HalfplateError."""
        return WeightView((self.spec.d_out, self.spec.d_in), self.dtype, self.core.values.device)

    def dense(self) -> Tensor:
        """The full matrix with its current values and gradients, in fp32 even under autocast: (d_out, d_in)."""
        with torch.autocast(self.core.values.device.type, enabled=False):
            outer = (self._trainable(part).current() for part in self.start.outer)
            return reduce(lambda matrix, part: part.around(matrix), outer, self.core.dense())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) to (..., d_out). One product with the full matrix is fastest for many tokens."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.dense().to(x.dtype), bias)

    @torch.no_grad()
    def compressed(self) -> CompressedLinear:
        """The linear in its stored types; raises HalfplateError if a value is out of the range of its type."""
        outer = tuple(self._trainable(part).stored() for part in self.start.outer)
        matrix = Chain(self.spec, self.core.stored(), outer)
        assert torch.equal(matrix.core.mask(), self.start.core.mask()), "tuning must not move the mask"
        linear = CompressedLinear.from_weight(matrix, self.spec, self.bias)
        linear.dtype = self.dtype
        return linear

    def _trainable(self, part: Outer) -> TrainableOuter[Outer]:
        """The trainable form of `part` of a linear."""
        owner = self.lender if part.borrowed(self.spec) else self
        found: TrainableOuter[Outer] = getattr(owner, type(part).__name__)
        return found


@contextmanager
def trainable(module: nn.Module, values_too: bool) -> Iterator[dict[str, TrainableLinear]]:
    """Context manager in which every CompressedLinear below `module` is a TrainableLinear; afterwards it is compressed again.

    Yields them by name. A head that the embedding stores stays as it is. An exception puts the linears back as they were.
    """
    before = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, CompressedLinear) and part.spec.same_as is None
    }
    inside = {name: TrainableLinear(linear, values_too) for name, linear in before.items()}
    lenders = _lenders(before)
    for name, lender in lenders.items():
        inside[name].lend(inside[lender])
    after: dict[str, CompressedLinear] = before
    try:
        for name, linear in inside.items():
            module.set_submodule(name, linear)
        yield inside
        tuned = {name: linear.compressed() for name, linear in inside.items()}
        for name, lender in lenders.items():
            tuned[name].lend(tuned[lender])
        after = tuned
    finally:
        for name, done in after.items():
            module.set_submodule(name, done)


def _lenders(linears: dict[str, CompressedLinear]) -> dict[str, str]:
    """The name of the linear that stores the input wrapper, for each that shares it; both are among `linears`."""
    names: dict[CompressedMatrix, str] = {linear: name for name, linear in linears.items()}
    lenders = {name: linear.lender for name, linear in linears.items() if linear.lender is not None}
    for name, lender in lenders.items():
        if lender not in names:
            raise HalfplateError(
                f"{name} shares the input wrapper of a module outside of what is trained; train both together"
            )
    return {name: names[lender] for name, lender in lenders.items()}
