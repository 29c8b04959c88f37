"""A dictionary of atoms, of which each row of a matrix adds up a few."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from halfplate.dtypes import STORED
from halfplate.errors import HalfplateError
from halfplate.formats.encoding.packing import check_padding, pack, packed_nbytes, unpack
from halfplate.formats.parts.base import Forward, Layout, Outer
from halfplate.formats.parts.options import whole_numbers

if TYPE_CHECKING:
    from halfplate.formats.spec import WeightSpec

NAME = "dictionary"
ATOMS, COEFFICIENTS, CHOSEN = "weight_atoms", "weight_coefficients", "weight_chosen"


@dataclass(frozen=True, eq=False)
class Dictionary(Outer):
    """W = inner + C · A, with exactly `kept` coefficients in each row of C (d_out, atoms).

    Options: `atoms` and `kept`. Source of the form: CoSpaDi, arXiv 2509.22075, which writes it as Wᵀ = D · S.

    atoms: A, (atoms, d_in). coefficients: (d_out, kept), in the order of their atoms.
    chosen: which atoms those are, one bit an atom, uint8 (d_out, ceil(atoms / 8)).
    """

    atoms: Tensor
    coefficients: Tensor
    chosen: Tensor
    kinds = ("dictionaries", "positions")

    @classmethod
    def of(cls, atoms: Tensor, matrix: Tensor, support: Tensor) -> "Dictionary":
        """matrix: C, (d_out, atoms). support: bool of the same shape, with equally many true entries in each row."""
        places = (~support).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(support[0].sum())]
        return cls(atoms.contiguous(), matrix.gather(1, places).contiguous(), pack(support, 1))

    @classmethod
    def check_spec(cls, spec: "WeightSpec") -> None:
        atoms, kept = whole_numbers(spec, NAME, atoms=spec.d_out * spec.d_in, kept=spec.d_out * spec.d_in)
        if kept > atoms:
            raise HalfplateError(f"kept={kept} must be at most atoms={atoms}")
        if spec.wrapper_dtype not in STORED:
            raise HalfplateError(
                f"wrapper_dtype={spec.wrapper_dtype!r} is not a type for a dictionary; use {', '.join(STORED)}"
            )

    @classmethod
    def layout(cls, spec: "WeightSpec") -> Layout:
        atoms, kept = (int(spec.options(NAME)[name]) for name in ("atoms", "kept"))
        dtype = STORED[spec.wrapper_dtype]
        return {
            ATOMS: ((atoms, spec.d_in), dtype),
            COEFFICIENTS: ((spec.d_out, kept), dtype),
            CHOSEN: ((spec.d_out, packed_nbytes(atoms, 1)), torch.uint8),
        }

    @classmethod
    def kind(cls, tensor: str) -> str:
        return "positions" if tensor == CHOSEN else "dictionaries"

    @classmethod
    def check(cls, spec: "WeightSpec", tensor: str, values: Tensor, name: str) -> None:
        if tensor != CHOSEN:
            return
        atoms, kept = (int(spec.options(NAME)[option]) for option in ("atoms", "kept"))
        check_padding(values, atoms, 1, name)
        counts = unpack(values, atoms, 1).sum(1, dtype=torch.int64)
        if bool((counts != kept).any()):
            raise HalfplateError(
                f"{name} chooses {int(counts[counts != kept][0])} atoms in a row, expected {kept}; the file is damaged, write it again"
            )

    @classmethod
    def from_tensors(cls, spec: "WeightSpec", tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors[ATOMS], tensors[COEFFICIENTS], tensors[CHOSEN])

    def tensors(self) -> dict[str, Tensor]:
        return {ATOMS: self.atoms, COEFFICIENTS: self.coefficients, CHOSEN: self.chosen}

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """C in full: (d_out, atoms)."""
        support = unpack(self.chosen, len(self.atoms), 1).bool()
        zeros = torch.zeros(support.shape, dtype=dtype, device=support.device)
        return zeros.masked_scatter(support, self.coefficients.to(dtype))

    def around(self, matrix: Tensor) -> Tensor:
        return matrix + self.matrix(matrix.dtype) @ self.atoms.to(matrix.dtype)

    def apply(self, x: Tensor, inner: Forward) -> Tensor:
        return inner(x) + x @ self.atoms.to(x.dtype).T @ self.matrix(x.dtype).T

    def rows(self, spec: "WeightSpec", start: int) -> Self:
        rows = slice(start, start + spec.d_out)
        return type(self)(self.atoms, self.coefficients[rows].contiguous(), self.chosen[rows].contiguous())

    @classmethod
    def columns_together(cls, spec: "WeightSpec") -> int | None:
        return 1

    def cut_columns(self, spec: "WeightSpec", start: int) -> Self:
        return type(self)(self.atoms[:, start : start + spec.d_in].contiguous(), self.coefficients, self.chosen)
