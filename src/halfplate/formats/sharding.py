"""Cutting a matrix into shards, whose products several processes concatenate (rows) or sum (columns): tensor parallelism.

Rows: rows of the core, whole blocks of A, and all of B. Columns: columns of the core, whole blocks of B, and all of A, because
A · (y₁ + y₂) = A · y₁ + A · y₂.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Literal

from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.chain import Chain
from halfplate.formats.parts.core import NMSparse
from halfplate.formats.quantizers import core_dtypes
from halfplate.formats.quantizers.rounding import GROUPS
from halfplate.formats.spec import WeightSpec

Axis = Literal["rows", "columns"]


def shard_of(spec: WeightSpec, axis: Axis, rank: int, ranks: int, name: str) -> tuple[int, int]:
    """First row or column of the shard of process `rank` of `ranks`, and how many it has.

    Raises HalfplateError, naming the matrix `name`, if it cannot be cut so.
    """
    whole = spec.d_out if axis == "rows" else spec.d_in
    if not 0 <= rank < ranks:
        raise HalfplateError(f"rank={rank} must be 0 to {ranks - 1}, below ranks={ranks}")
    if whole % ranks:
        raise HalfplateError(
            f"{name} has {whole} {axis}, expected a multiple of tensor_parallel_size={ranks}; choose a size that divides them"
        )
    check_shards(spec, axis, whole // ranks, name)
    return rank * (whole // ranks), whole // ranks


def check_shards(spec: WeightSpec, axis: Axis, size: int, name: str) -> None:
    """Raise HalfplateError, naming the matrix `name`, unless `spec` can be cut after every `size` rows or columns.

    The message names the block size or group size that would do.
    """
    if size == (spec.d_out if axis == "rows" else spec.d_in):
        return
    for part, together in _together(spec, axis):
        if together is None:
            raise HalfplateError(
                f"{name}: {part} mixes all columns, so that it cannot be cut into shards of {size}; use tensor_parallel_size=1"
            )
        if size % together:
            raise HalfplateError(
                f"{name}: shards of {size} {axis} cut {part}, which keeps {together} {axis} together; {_cure(spec, axis, size)}"
            )


def shard(spec: WeightSpec, tensors: Mapping[str, Tensor], axis: Axis, start: int, size: int) -> Chain:
    """The `size` rows or columns of a matrix from `start` on, as a matrix with all its tensors of its own.

    tensors: as in `spec.alone.layout()`. `start` and `size` are as `shard_of` says, or multiples of what `check_shards` accepts.
    """
    whole = spec.alone
    matrix = Chain.from_tensors(whole, tensors)
    if axis == "rows":
        part = replace(whole, d_out=size)
        return Chain(part, matrix.core.rows(part, start), tuple(outer.rows(part, start) for outer in matrix.outer))
    part = replace(whole, d_in=size)
    return Chain(
        part, matrix.core.cut_columns(part, start), tuple(outer.cut_columns(part, start) for outer in matrix.outer)
    )


def _together(spec: WeightSpec, axis: Axis) -> Iterator[tuple[str, int | None]]:
    """What each part keeps together, with words for the part."""
    for part in spec.classes:
        words = "the core" if issubclass(part, NMSparse) else f"its {part.__name__}"
        yield words, part.rows_together(spec) if axis == "rows" else part.columns_together(spec)


def _cure(spec: WeightSpec, axis: Axis, size: int) -> str:
    """The largest block size, or else group size or core type, with which shards of `size` would do."""
    largest = spec.out_block if axis == "rows" else spec.in_block
    plain = spec.core_dtype.rstrip("ks")  # the same values without super-scales, if there is such a type
    types = [spec.core_dtype] + [plain] * (plain != spec.core_dtype and plain in core_dtypes())
    groups = sorted({spec.group, *(group for group in GROUPS if group < spec.group)}, reverse=True)
    blocks = range(largest, 0, -1) if largest else (0,)
    for core, group, block in product(types, groups, blocks):
        try:
            found = replace(_with_block(spec.alone, axis, block), core_dtype=core, group=group)
        except HalfplateError:  # a block that the pattern does not allow
            continue
        if all(together is not None and size % together == 0 for _, together in _together(found, axis)):
            chosen = (
                ("block-size", block, largest),
                ("group-size", group, spec.group),
                ("core-dtype", core, spec.core_dtype),
            )
            options = [f"--{option} {value}" for option, value, usual in chosen if value != usual]
            return f"compress with {' '.join(options)}, or use tensor_parallel_size=1"
    return "use tensor_parallel_size=1"


def _with_block(spec: WeightSpec, axis: Axis, block: int) -> WeightSpec:
    return replace(spec, out_block=block) if axis == "rows" else replace(spec, in_block=block)
