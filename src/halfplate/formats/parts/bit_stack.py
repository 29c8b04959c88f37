"""A stack of sign matrices with low-rank magnitudes, of which a reader may leave the last ones out."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from halfplate.dtypes import STORED
from halfplate.errors import HalfplateError
from halfplate.formats.encoding.packing import pack, unpack
from halfplate.formats.parts.base import Forward, Layout, Outer
from halfplate.formats.parts.options import whole_numbers

if TYPE_CHECKING:
    from halfplate.formats.spec import WeightSpec

NAME = "bit_stack"
MOST_LEVELS = 64
SIGNS, LEFT, RIGHT = "weight_signs", "weight_magnitude_left", "weight_magnitude_right"
# Columns whose signs take whole multiples of four bytes, so that tensors of any type that follow begin at a multiple of their size.
TOGETHER = 32


@dataclass(frozen=True, eq=False)
class Level:
    """signs ⊙ (left · right).

    signs: packed, uint8 (d_out, 4 · ceil(d_in / 32)); a set bit is −1.
    left, right: (d_out, rank) and (rank, d_in), in one floating-point type.
    """

    signs: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, negative: Tensor, left: Tensor, right: Tensor) -> "Level":
        """negative: bool (d_out, d_in)."""
        padded = torch.nn.functional.pad(negative, (0, -negative.shape[1] % TOGETHER))
        return cls(pack(padded, 1), left, right)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The full matrix: (d_out, d_in)."""
        magnitudes = self.left.to(dtype) @ self.right.to(dtype)
        return magnitudes * (1 - 2 * unpack(self.signs, magnitudes.shape[1], 1).to(dtype))


@dataclass(frozen=True, eq=False)
class BitStack(Outer):
    """W = inner + Σ signs ⊙ (left · right), over the levels of a stack, each of which approximates what those before it leave.

    Options: `levels`, and `rank` of the magnitudes. Source: Wang et al., BitStack, arXiv 2410.23918.
    """

    levels: tuple[Level, ...]
    kinds = ("magnitudes", "signs")

    @classmethod
    def check_spec(cls, spec: "WeightSpec") -> None:
        whole_numbers(spec, NAME, levels=MOST_LEVELS, rank=min(spec.d_out, spec.d_in))
        if spec.wrapper_dtype not in STORED:
            raise HalfplateError(
                f"wrapper_dtype={spec.wrapper_dtype!r} is not a type for the magnitudes of a stack; use {', '.join(STORED)}"
            )

    @classmethod
    def layout(cls, spec: "WeightSpec") -> Layout:
        options, dtype = spec.options(NAME), STORED[spec.wrapper_dtype]
        rank, layout = int(options["rank"]), Layout()
        for level in range(int(options["levels"])):
            layout |= {
                f"{LEFT}_{level}": ((spec.d_out, rank), dtype),
                f"{RIGHT}_{level}": ((rank, spec.d_in), dtype),
                f"{SIGNS}_{level}": ((spec.d_out, 4 * -(-spec.d_in // TOGETHER)), torch.uint8),
            }
        return layout

    @classmethod
    def kind(cls, tensor: str) -> str:
        return "signs" if tensor.startswith(SIGNS) else "magnitudes"

    @classmethod
    def step(cls, tensor: str) -> int | None:
        return int(tensor.rpartition("_")[2])

    @classmethod
    def at_steps(cls, spec: "WeightSpec", steps: int) -> "WeightSpec":
        cut = (replace(extra, options=(("levels", steps), *_others(extra.options))) for extra in spec.parts)
        return replace(spec, parts=tuple(cut))

    @classmethod
    def check(cls, spec: "WeightSpec", tensor: str, values: Tensor, name: str) -> None:
        if tensor.startswith(SIGNS) and bool(unpack(values, 8 * values.shape[1], 1)[:, spec.d_in :].any()):
            raise HalfplateError(f"{name} has padding bits that are not 0; the file is damaged, write it again")

    @classmethod
    def from_tensors(cls, spec: "WeightSpec", tensors: Mapping[str, Tensor]) -> Self:
        levels = range(int(spec.options(NAME)["levels"]))
        return cls(tuple(Level(*(tensors[f"{name}_{level}"] for name in (SIGNS, LEFT, RIGHT))) for level in levels))

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for number, level in enumerate(self.levels):
            named |= {
                f"{LEFT}_{number}": level.left,
                f"{RIGHT}_{number}": level.right,
                f"{SIGNS}_{number}": level.signs,
            }
        return named

    def around(self, matrix: Tensor) -> Tensor:
        return reduce(lambda sum_, level: sum_ + level.dense(matrix.dtype), self.levels, matrix)

    def apply(self, x: Tensor, inner: Forward) -> Tensor:
        # One level at a time, so that no more than one full matrix is in memory.
        return reduce(lambda y, level: y + x @ level.dense(x.dtype).T, self.levels, inner(x))

    def rows(self, spec: "WeightSpec", start: int) -> Self:
        rows = slice(start, start + spec.d_out)
        return type(self)(
            tuple(
                Level(level.signs[rows].contiguous(), level.left[rows].contiguous(), level.right)
                for level in self.levels
            )
        )

    @classmethod
    def columns_together(cls, spec: "WeightSpec") -> int | None:
        return TOGETHER

    def cut_columns(self, spec: "WeightSpec", start: int) -> Self:
        columns, bytes_ = slice(start, start + spec.d_in), slice(start // 8, start // 8 + 4 * -(-spec.d_in // TOGETHER))
        return type(self)(
            tuple(
                Level(level.signs[:, bytes_].contiguous(), level.left, level.right[:, columns].contiguous())
                for level in self.levels
            )
        )


def _others(
    options: tuple[tuple[str, str | int | float | bool], ...],
) -> tuple[tuple[str, str | int | float | bool], ...]:
    return tuple(option for option in options if option[0] != "levels")
