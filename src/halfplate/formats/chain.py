"""A compressed matrix: a core and the parts around it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from halfplate.formats.parts.base import Forward, Outer
from halfplate.formats.parts.core import NMSparse
from halfplate.formats.spec import WeightSpec

T = TypeVar("T", bound=Outer)


@dataclass(frozen=True, eq=False)
class Chain:
    """A matrix made of a core and parts `outer`, each applied around those before it, e.g. A · S · B + L · R.

    spec: its specification.
    outer: parts from the core outwards, including parts that another matrix stores for this one.
    """

    spec: WeightSpec
    core: NMSparse
    outer: tuple[Outer, ...] = ()

    @classmethod
    def of(cls, spec: WeightSpec, core: NMSparse, *outer: Outer | None) -> "Chain":
        """The matrix of these parts, in any order; None is ignored."""
        there = (part for part in outer if part is not None)
        return cls(spec, core, tuple(sorted(there, key=lambda part: spec.outer.index(type(part)))))

    @classmethod
    def from_tensors(cls, spec: WeightSpec, tensors: Mapping[str, Tensor]) -> "Chain":
        """Build a matrix from its tensors, named as in `spec.alone.layout()`."""
        outer = tuple(part.from_tensors(spec, tensors) for part in spec.outer)
        return cls(spec, spec.core.from_tensors(spec, tensors), outer)

    def part(self, kind: type[T]) -> T | None:
        """The part of that class, None if there is none."""
        return next((part for part in self.outer if isinstance(part, kind)), None)

    @property
    def shape(self) -> tuple[int, int]:
        return self.core.shape

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by their name below the module."""
        tensors = self.core.tensors()
        for part in self.outer:
            if not part.borrowed(self.spec):
                tensors |= part.tensors()
        return tensors

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The full matrix: (d_out, d_in)."""
        return reduce(lambda matrix, part: part.around(matrix), self.outer, self.core.dense(dtype)).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) to x Wᵀ (..., d_out), in the dtype of `x`."""
        core: Forward = self.core.forward
        return reduce(_wrapped, self.outer, core)(x)


def _wrapped(inner: Forward, part: Outer) -> Forward:
    return lambda x: part.apply(x, inner)
