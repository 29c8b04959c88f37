"""Cores: N:M sparse matrices as kept values with positions, or unpruned matrices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd, lcm
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfplate.dtypes import STORED
from halfplate.errors import HalfplateError
from halfplate.formats.encoding.packing import check_padding, check_positions, pack, packed_nbytes, unpack
from halfplate.formats.parts.base import Layout, Part, Trainable
from halfplate.formats.quantizers import QUANTIZERS, Quantizer, has_scales_alone, quantizer_of, storage_of
from halfplate.formats.quantizers.rounding import GROUP, round_groups, round_to_float
from halfplate.formats.quantizers.storage import Storage
from halfplate.pattern import Pattern

if TYPE_CHECKING:
    from halfplate.formats.spec import WeightSpec

VALUES, INDEX = "weight", "weight_index"


@dataclass(frozen=True, eq=False)
class Grid:
    """The mapping from codes to values: the quantizer, the number of codes per row, the columns per scale, and the groups of a row.

    stored: the tensors of the layout of the quantizer's storage, with a row for each row of the matrix.
    """

    stored: tuple[Tensor, ...]
    quantizer: Quantizer
    count: int
    group: int
    groups: int

    @classmethod
    def of(cls, parameters: tuple[Tensor, ...], quantizer: Quantizer, count: int, group: int) -> "Grid":
        """parameters: one tensor per name in `quantizer.stored`, fp16 (d_out, ceil(d_in / group)); raises HalfplateError if it cannot store them."""
        stored = storage_of(quantizer, group).stored(quantizer.stored, parameters)
        return cls(stored, quantizer, count, group, parameters[0].shape[1])

    @property
    def storage(self) -> Storage:
        """How the parameters are stored."""
        return storage_of(self.quantizer, self.group)

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        """One tensor per name in `quantizer.stored`, fp16 (d_out, groups)."""
        return self.storage.parameters(self.quantizer.stored, self.stored, self.groups)

    @property
    def named(self) -> dict[str, Tensor]:
        """The stored tensors by their name below the module."""
        names = self.storage.layout(self.quantizer.stored, self.groups)
        return {f"weight_{name}": part for name, part in zip(names, self.stored, strict=True)}

    def cut_columns(self, spec: "WeightSpec", start: int) -> "Grid":
        """The same for the `spec.d_in` columns from `start` on, which begin at a super-scale."""
        storage, groups = storage_of(self.quantizer), -(-spec.d_in // self.group)
        before = storage.layout(self.quantizer.stored, start // self.group).values()
        widths = storage.layout(self.quantizer.stored, groups).values()
        stored = tuple(
            part[:, first : first + width].contiguous()
            for part, (first, _), (width, _) in zip(self.stored, before, widths, strict=True)
        )
        return replace(self, stored=stored, count=spec.pattern.kept(spec.d_in), groups=groups)

    def rows(self, rows: slice | Tensor) -> "Grid":
        """The same for some of the rows: a slice, or their numbers, int64 (n,)."""
        return replace(self, stored=tuple(part[rows].contiguous() for part in self.stored))


@dataclass(frozen=True, eq=False)
class NMSparse(Part):
    """A matrix (d_out, d_in) that keeps N of every M consecutive inputs of a row, or all of them if the pattern is dense.

    stored: the kept values, fp32, bf16 or fp16 (d_out, d_in · N / M); with a `grid`, their packed codes, uint8 (d_out,
        ceil(d_in · N / M · bits / 8)).
    index: packed positions, uint8 (halfplate.formats.encoding.packing); None if the pattern is dense.
    """

    stored: Tensor
    index: Tensor | None
    pattern: Pattern
    grid: Grid | None = None
    kinds = ("kept values", "positions", "scales")

    @classmethod
    def present(cls, spec: "WeightSpec") -> bool:
        return not spec.pattern.is_none

    @classmethod
    def layout(cls, spec: "WeightSpec") -> Layout:
        kept, quantizer = spec.pattern.kept(spec.d_in), quantizer_of(spec.core_dtype)
        shape: tuple[int, ...] = (spec.d_out, kept if quantizer is None else packed_nbytes(kept, quantizer.bits))
        # Has the name of the original weight, but a shape that an nn.Linear of other software refuses.
        if spec.pattern.is_dense:
            shape = (1, *shape)
        layout: Layout = {VALUES: (shape, STORED.get(spec.core_dtype, torch.uint8))}
        if not spec.pattern.is_dense:
            layout[INDEX] = ((spec.d_out, spec.pattern.index_nbytes(spec.d_in)), torch.uint8)
        return layout if quantizer is None else layout | _scales_layout(spec, quantizer)

    @classmethod
    def kind(cls, tensor: str) -> str:
        return {VALUES: "kept values", INDEX: "positions"}.get(tensor, "scales")

    @classmethod
    def check(cls, spec: "WeightSpec", tensor: str, values: Tensor, name: str) -> None:
        if tensor == INDEX:
            check_positions(values, spec.pattern.kept(spec.d_in), spec.pattern, name)
        elif tensor == VALUES and not values.is_floating_point():
            _check_codes(spec, values.reshape(spec.d_out, -1), name)
        elif values.dtype == torch.uint8:
            storage = storage_of(QUANTIZERS.get(spec.core_dtype), spec.group)
            check_padding(values, -(-spec.d_in // spec.group), storage.bits, name)

    @classmethod
    def from_dense(
        cls, weight: Tensor, mask: Tensor | None, pattern: Pattern, core_dtype: str, group: int = GROUP
    ) -> "NMSparse":
        """Keep `weight` (d_out, d_in) at the true entries of `mask`, and round it.

        mask: bool (d_out, d_in) with exactly N true entries per group; None if the pattern is dense.
        group: columns that share a scale of a quantizer.
        Raises HalfplateError if a kept value is too large for `core_dtype`.
        """
        values, positions, index = _kept(weight, mask, pattern)
        quantizer = quantizer_of(core_dtype)
        if quantizer is None:
            return cls(round_to_float(values, core_dtype, "core_dtype"), index, pattern)
        if group % pattern.m == 0:
            integers, parameters = round_groups(
                values, quantizer, group // pattern.m * pattern.n, storage_of(quantizer, group)
            )
        else:  # N:M groups straddle scale groups; zeros change neither scale nor error
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
        """Store values that are already quantised, without changing them.

        integers: q, int8 (d_out, d_in).
        scales: fp16 (d_out, ceil(d_in / group)); a tuple of tensors for a quantizer with other parameters.
        mask: bool (d_out, d_in) with exactly N true entries per group, None if the pattern is dense.
        Raises HalfplateError if a q is not a code of `core_dtype`, or a scale is not finite.
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
        return cls(codes, index, pattern, Grid.of(parameters, quantizer, integers.shape[1], group))

    @classmethod
    def from_tensors(cls, spec: "WeightSpec", tensors: Mapping[str, Tensor]) -> Self:
        stored, grid = tensors[VALUES].reshape(spec.d_out, -1), None
        if (quantizer := quantizer_of(spec.core_dtype)) is not None:
            parameters = tuple(tensors[name] for name in _scales_layout(spec, quantizer))
            grid = Grid(parameters, quantizer, spec.pattern.kept(spec.d_in), spec.group, -(-spec.d_in // spec.group))
        return cls(stored, tensors.get(INDEX), spec.pattern, grid)

    @classmethod
    def joined(cls, cores: Sequence["NMSparse"]) -> "NMSparse":
        """The core of the rows of all `cores`, of one form, in their order."""
        first, grids = cores[0], [core.grid for core in cores if core.grid is not None]
        indices = [core.index for core in cores if core.index is not None]
        grid = None
        if first.grid is not None:
            columns = zip(*(one.stored for one in grids), strict=True)
            grid = replace(first.grid, stored=tuple(torch.cat(parts) for parts in columns))
        stored = torch.cat([core.stored for core in cores])
        return replace(first, stored=stored, index=torch.cat(indices) if indices else None, grid=grid)

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], self._kept // self.pattern.n * self.pattern.m

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        # A dense core must not have the shape of an nn.Linear weight, which would silently accept it.
        tensors = {VALUES: self.stored[None] if self.pattern.is_dense else self.stored}
        if self.index is not None:
            tensors[INDEX] = self.index
        return tensors if self.grid is None else tensors | self.grid.named

    @property
    def values(self) -> Tensor:
        """The kept values: (d_out, kept), as stored, or exact in fp32 if they are quantised."""
        if self.grid is None:
            return self.stored
        groups = self.columns() // self.grid.group
        return self.grid.quantizer.decode(
            self.integers(), *(part.float().gather(1, groups) for part in self.grid.parameters)
        )

    def integers(self) -> Tensor:
        """The q of each kept value: fp32 (d_out, kept)."""
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
        """bool (d_out, d_in), true where a value is kept."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.stored.device)
        return mask.scatter_(1, self.columns(), True)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The full matrix: (d_out, d_in)."""
        if self.index is None:
            return self.values.to(dtype)
        zeros = torch.zeros(self.shape, dtype=dtype, device=self.stored.device)
        return zeros.scatter(1, self.columns(), self.values.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) to x Sᵀ (..., d_out), in the dtype of `x`."""
        return functional.linear(x, self.dense(x.dtype))

    def rows(self, spec: "WeightSpec", start: int) -> Self:
        return self.take(slice(start, start + spec.d_out))

    def take(self, rows: slice | Tensor) -> Self:
        """The core of some of the rows: a slice, or their numbers, int64 (n,)."""
        grid = None if self.grid is None else self.grid.rows(rows)
        index = None if self.index is None else self.index[rows].contiguous()
        return replace(self, stored=self.stored[rows].contiguous(), index=index, grid=grid)

    @classmethod
    def columns_together(cls, spec: "WeightSpec") -> int | None:
        pattern, quantizer, together = spec.pattern, quantizer_of(spec.core_dtype), spec.pattern.m
        streams = [] if pattern.is_dense else [pattern.index_bits]
        if quantizer is not None:
            together = lcm(together, spec.group * storage_of(quantizer).span)
            streams.append(quantizer.bits)
        # Streams of bits are cut at whole bytes.
        return lcm(together, *(pattern.m * (8 // gcd(8, pattern.n * bits)) for bits in streams))

    def cut_columns(self, spec: "WeightSpec", start: int) -> Self:
        pattern, first, kept = self.pattern, spec.pattern.kept(start), spec.pattern.kept(spec.d_in)

        def cut(tensor: Tensor, bits: int) -> Tensor:
            return tensor[:, first * bits // 8 :][:, : packed_nbytes(kept, bits)].contiguous()

        index = None if self.index is None else cut(self.index, pattern.index_bits)
        if self.grid is None:
            return replace(self, stored=self.stored[:, first : first + kept].contiguous(), index=index)
        stored = cut(self.stored, self.grid.quantizer.bits)
        return replace(self, stored=stored, index=index, grid=self.grid.cut_columns(spec, start))

    def trainable(self, spec: "WeightSpec", values_too: bool) -> "TrainableCore":
        return TrainableCore(self, spec, values_too)

    @property
    def _kept(self) -> int:
        return self.stored.shape[1] if self.grid is None else self.grid.count


def _scales_layout(spec: "WeightSpec", quantizer: Quantizer) -> Layout:
    """The stored tensors of the parameters of all groups."""
    columns = storage_of(quantizer, spec.group).layout(quantizer.stored, -(-spec.d_in // spec.group))
    return {f"weight_{name}": ((spec.d_out, width), dtype) for name, (width, dtype) in columns.items()}


def _kept(matrix: Tensor, mask: Tensor | None, pattern: Pattern) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Kept values (d_out, kept), their positions in each group (d_out, groups, N), and the packed positions; None if dense."""
    if pattern.is_dense:
        return matrix, None, None
    assert mask is not None, "a sparse pattern needs its mask"
    # A stable sort by "not kept" moves the kept columns of each group to its front, in increasing order.
    groups = (~mask).reshape(len(matrix), -1, pattern.m).to(torch.uint8)
    positions = groups.argsort(dim=-1, stable=True)[:, :, : pattern.n].contiguous()
    values = matrix.reshape(len(matrix), -1, pattern.m).gather(-1, positions).reshape(len(matrix), -1)
    return values, positions, pack(positions.reshape(len(matrix), -1), pattern.index_bits)


def _check_codes(spec: "WeightSpec", packed: Tensor, name: str) -> None:
    quantizer, kept = QUANTIZERS.get(spec.core_dtype), spec.pattern.kept(spec.d_in)
    least, greatest = (number + (1 << quantizer.bits - 1) for number in quantizer.range)
    if (least, greatest) != (0, (1 << quantizer.bits) - 1):
        codes = unpack(packed, kept, quantizer.bits)
        outside = (codes < least) | (codes > greatest)
        if bool(outside.any()):
            raise HalfplateError(
                f"{name} holds the code {int(codes[outside][0])}, expected {least} to {greatest}; the file is damaged, write it again"
            )
    check_padding(packed, kept, quantizer.bits, name)


class TrainableCore(Trainable[NMSparse]):
    """A core with trainable values; its positions and codes are fixed.

    values: the kept values (d_out, kept), or the scales (d_out, ceil(d_in / group)).
    """

    columns: Tensor
    integers: Tensor | None

    def __init__(self, core: NMSparse, spec: "WeightSpec", values_too: bool) -> None:
        super().__init__()
        self.start, self._dtype, self._group = core, spec.core_dtype, spec.group
        self.values = nn.Parameter((core.stored if core.grid is None else _scales(core.grid)).float(), values_too)
        self.register_buffer("columns", core.columns(), persistent=False)
        self.register_buffer("integers", None if core.grid is None else core.integers(), persistent=False)

    @property
    def leverage(self) -> float:
        """As in `Trainable`: a scale moves all its weights in proportion to their codes."""
        if self.integers is None:
            return 1.0
        assert self.start.grid is not None, "codes have a quantizer"
        one = torch.ones((), dtype=torch.float32, device=self.integers.device)
        return max(1.0, float(self.start.grid.quantizer.decode(self.integers, one).square().mean().sqrt()))

    def dense(self) -> Tensor:
        """The full matrix with gradients: fp32 (d_out, d_in)."""
        values: Tensor = self.values
        if self.integers is not None:
            # A scale that training makes negative is reflected, because only positive scales are stored.
            assert self.start.grid is not None, "codes have a quantizer"
            scales = values.abs().gather(1, self.columns // self._group)
            values = self.start.grid.quantizer.decode(self.integers, scales)
        return values.new_zeros(self.start.shape).scatter(1, self.columns, values)

    def stored(self) -> NMSparse:
        if self.start.grid is None:
            return replace(self.start, stored=round_to_float(self.values, self._dtype, "core_dtype"))
        grid, wanted = self.start.grid, (round_to_float(self.values.detach().abs(), "fp16", "core_dtype"),)
        storage, names = grid.storage, grid.quantizer.stored
        scales = storage.nearest(names, wanted, storage.units(names, wanted))
        return replace(self.start, grid=Grid.of(scales, grid.quantizer, grid.count, grid.group))


def _scales(grid: Grid) -> Tensor:
    if not has_scales_alone(grid.quantizer):
        raise HalfplateError(
            f"core_dtype={grid.quantizer.name!r} stores {' and '.join(grid.quantizer.stored)}, expected scales alone; only those can be trained"
        )
    return grid.parameters[0]
