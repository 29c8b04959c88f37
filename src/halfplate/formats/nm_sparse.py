"""Cores: N:M sparse matrices as kept values and their positions, or dense ones."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.errors import HalfplateError
from halfplate.formats.packing import pack, unpack
from halfplate.formats.quantizers import QUANTIZERS, Quantizer, quantizer_of
from halfplate.formats.rounding import GROUP, round_groups, round_to_float
from halfplate.formats.spec import WeightSpec
from halfplate.pattern import Pattern


@dataclass(frozen=True, eq=False)
class Grid:
    """What turns codes into values: the quantizer, codes in a row, columns of a scale.

    parameters: for each of `quantizer.stored` a tensor, fp16 (d_out, ceil(d_in / group)).
    """

    parameters: tuple[Tensor, ...]
    quantizer: Quantizer
    count: int
    group: int = GROUP

    def rows(self, rows: slice) -> "Grid":
        """The same for some of the rows."""
        return replace(self, parameters=tuple(part[rows].contiguous() for part in self.parameters))


@dataclass(frozen=True, eq=False)
class NMSparse:
    """A matrix (d_out, d_in) that keeps N of every M consecutive inputs of a row; all of them if the pattern is dense.

    stored: the kept values, fp32, bf16 or fp16 (d_out, d_in · N / M), or with a `grid` their codes, uint8, packed (d_out,
    ceil(d_in · N / M · bits / 8)). index: uint8, packed positions (halfplate.formats.packing); None if the pattern is dense.
    """

    stored: Tensor
    index: Tensor | None
    pattern: Pattern
    grid: Grid | None = None

    @classmethod
    def from_dense(
        cls, weight: Tensor, mask: Tensor | None, pattern: Pattern, core_dtype: str, group: int = GROUP
    ) -> "NMSparse":
        """Keep `weight` (d_out, d_in) where the boolean `mask` has exactly N true entries in each group, and round it.

        mask: None if the pattern is dense. group: columns that share a scale, on a grid. Raises HalfplateError where a kept value
        is too large for `core_dtype`.
        """
        values, positions, index = _kept(weight, mask, pattern)
        quantizer = quantizer_of(core_dtype)
        if quantizer is None:
            return cls(round_to_float(values, core_dtype, "core_dtype"), index, pattern)
        if group % pattern.m == 0:
            integers, parameters = round_groups(values, quantizer, group // pattern.m * pattern.n)
        else:  # groups straddle the columns of two scales; zeros change neither scale nor error
            assert positions is not None, "a dense pattern straddles nothing"
            assert mask is not None, "a sparse pattern needs its mask"
            integers, parameters = round_groups(weight.masked_fill(~mask, 0), quantizer, group)
            integers = integers.reshape(len(weight), -1, pattern.m).gather(-1, positions).reshape(len(weight), -1)
        return cls._of_integers(integers, parameters, index, pattern, quantizer, group)

    @classmethod
    def from_codes(
        cls,
        integers: Tensor,
        scales: Tensor | tuple[Tensor, ...],
        mask: Tensor | None,
        pattern: Pattern,
        core_dtype: str,
        group: int = GROUP,
    ) -> "NMSparse":
        """Store numbers that already lie on a grid, as they are.

        integers: q, int8 (d_out, d_in). scales: fp16 (d_out, ceil(d_in / group)); a tuple of such tensors for a quantizer that stores
        others. mask: bool (d_out, d_in) with exactly N true entries in each group, None if the pattern is dense. Raises
        HalfplateError where a q is not a code of `core_dtype`, or a scale is not finite.
        """
        quantizer = QUANTIZERS.get(core_dtype)
        parameters = scales if isinstance(scales, tuple) else (scales,)
        least, greatest = quantizer.range
        outside = (integers < least) | (integers > greatest)
        if bool(outside.any()):
            raise HalfplateError(
                f"integers={int(integers[outside][0])} is not a code of core_dtype={core_dtype!r}, expected {least} to {greatest}"
            )
        if not all(bool(part.isfinite().all()) for part in parameters):
            raise HalfplateError(
                f"core_dtype={core_dtype!r} cannot hold a scale above {torch.finfo(torch.float16).max:.3g}; use bf16"
            )
        values, _, index = _kept(integers, mask, pattern)
        return cls._of_integers(values, parameters, index, pattern, quantizer, group)

    @classmethod
    def _of_integers(
        cls,
        integers: Tensor,
        parameters: tuple[Tensor, ...],
        index: Tensor | None,
        pattern: Pattern,
        quantizer: Quantizer,
        group: int,
    ) -> "NMSparse":
        codes = pack(integers.to(torch.int16) + (1 << quantizer.bits - 1), quantizer.bits)
        return cls(codes, index, pattern, Grid(parameters, quantizer, integers.shape[1], group))

    @classmethod
    def from_tensors(cls, spec: WeightSpec, tensors: Mapping[str, Tensor]) -> "NMSparse":
        """Put the stored tensors of the core of a matrix, named as in `spec.layout()`, back together."""
        stored, grid = tensors["weight"].reshape(spec.d_out, -1), None
        if (quantizer := quantizer_of(spec.core_dtype)) is not None:
            parameters = tuple(tensors[f"weight_{name}"] for name in quantizer.stored)
            grid = Grid(parameters, quantizer, spec.pattern.kept(spec.d_in), spec.group)
        return cls(stored, tensors.get("weight_index"), spec.pattern, grid)

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], self._kept // self.pattern.n * self.pattern.m

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by their name below the module."""
        # A dense core must not have the shape of the weight of a dense layer, which would take it without a word.
        tensors = {"weight": self.stored[None] if self.pattern.is_dense else self.stored}
        if self.index is not None:
            tensors["weight_index"] = self.index
        if self.grid is not None:
            named = zip(self.grid.quantizer.stored, self.grid.parameters, strict=True)
            tensors |= {f"weight_{name}": part for name, part in named}
        return tensors

    @property
    def values(self) -> Tensor:
        """The kept values: (d_out, kept), as stored, or exact in fp32 where they are on a grid."""
        if self.grid is None:
            return self.stored
        groups = self.columns() // self.grid.group
        return self.grid.quantizer.decode(
            self.integers(), *(part.float().gather(1, groups) for part in self.grid.parameters)
        )

    def integers(self) -> Tensor:
        """The q of each kept value on a grid: fp32 (d_out, kept)."""
        assert self.grid is not None, "floating-point values have no q"
        bits = self.grid.quantizer.bits
        return unpack(self.stored, self.grid.count, bits).float() - (1 << bits - 1)

    def columns(self) -> Tensor:
        """The input that each kept value multiplies: int64 (d_out, kept)."""
        starts = (
            torch.arange(self._kept, dtype=torch.int64, device=self.stored.device) // self.pattern.n * self.pattern.m
        )
        if self.index is None:
            return starts.expand(len(self.stored), -1)
        return starts + unpack(self.index, self._kept, self.pattern.index_bits)

    def mask(self) -> Tensor:
        """True where a value is kept: bool (d_out, d_in)."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.stored.device)
        return mask.scatter_(1, self.columns(), True)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix with its zeros: (d_out, d_in)."""
        if self.index is None:
            return self.values.to(dtype)
        zeros = torch.zeros(self.shape, dtype=dtype, device=self.stored.device)
        return zeros.scatter(1, self.columns(), self.values.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) to x Sᵀ (..., d_out), in the dtype of `x`."""
        return functional.linear(x, self.dense(x.dtype))

    @property
    def _kept(self) -> int:
        return self.stored.shape[1] if self.grid is None else self.grid.count


def _kept(matrix: Tensor, mask: Tensor | None, pattern: Pattern) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Kept values (d_out, kept), their positions in each group (d_out, groups, N), and these packed; None if dense."""
    if pattern.is_dense:
        return matrix, None, None
    assert mask is not None, "a sparse pattern needs its mask"
    # Sorting "not kept" stably moves the kept columns of each group to its front, in rising order.
    groups = (~mask).reshape(len(matrix), -1, pattern.m).to(torch.uint8)
    positions = groups.argsort(dim=-1, stable=True)[:, :, : pattern.n].contiguous()
    values = matrix.reshape(len(matrix), -1, pattern.m).gather(-1, positions).reshape(len(matrix), -1)
    return values, positions, pack(positions.reshape(len(matrix), -1), pattern.index_bits)
