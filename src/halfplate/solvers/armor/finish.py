"""From solved factors to stored tensors: balance, round, and let the wrappers repair the rounding."""

from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.formats.chain import Chain
from halfplate.formats.parts.core import NMSparse
from halfplate.formats.parts.wrapper import InWrapper, OutWrapper, Wrapper
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.spec import WeightSpec
from halfplate.solvers.armor.exact import Refit
from halfplate.solvers.armor.problem import Factors, Problem
from halfplate.solvers.normalise import Normalised
from halfplate.solvers.selection import keep_largest

W = TypeVar("W", bound=Wrapper)


def balanced(tiles: Problem, factors: Factors, normalised: Normalised) -> Factors:
    """Use the free diagonal scales between A, S and B to give columns of diag(rows) A and rows of B diag(columns) unit length.

    The core then has the range of the weight, so no stored type overflows.

    normalised: the row and column scales that were removed from the tiles.
    """
    rows, columns = _scales(tiles, normalised)
    out_norms = (factors.out_blocks * rows).norm(dim=1)  # (row_tiles, r)
    in_norms = (factors.in_blocks * columns).norm(dim=2)  # (col_tiles, c)
    out_norms = torch.where(out_norms > 0, out_norms, 1.0)
    in_norms = torch.where(in_norms > 0, in_norms, 1.0)
    return Factors(
        factors.out_blocks / out_norms[:, None, :],
        factors.core * out_norms.reshape(-1, 1) * in_norms.reshape(1, -1),
        factors.in_blocks / in_norms[:, :, None],
    )


def finish(
    objective: Refit,
    factors: Factors,
    normalised: Normalised,
    scale: float,
    spec: WeightSpec,
    parameters: tuple[Tensor, ...] = (),
) -> Chain:
    """Store scale · diag(rows) · A S B · diag(columns), with balanced factors, in the types of `spec`.

    Once S is rounded, B is solved again for it and rounded, then A for both.

    normalised: the row and column scales that were removed from the problem.
    scale: a power of two, which is applied to the core.
    parameters: those of the quantizer of a core that is quantised, (rows, ceil(cols / spec.group)) each; empty if it is to be rounded.
    Raises HalfplateError if a value is too large for its type.
    """
    tiles = objective.tiles
    rows, columns = _scales(tiles, normalised)
    stored_core = _stored_core(factors.core, scale, spec, parameters)
    padding = (0, factors.core.shape[1] - spec.d_in, 0, factors.core.shape[0] - spec.d_out)
    rounded = Factors(
        factors.out_blocks, functional.pad(stored_core.dense() / scale, padding).contiguous(), factors.in_blocks
    )

    in_wrapper = out_wrapper = None
    if spec.in_block:
        in_blocks = objective.refitted_in(rounded) * columns
        energy = (tiles.moment / columns.reshape(-1).square())[: spec.d_in]  # of the inputs themselves
        in_wrapper = _wrapper(InWrapper, in_blocks, spec.d_in, spec.in_block, spec.wrapper_dtype, energy)
        rounded.in_blocks = _padded(in_wrapper, tiles.col_tile) / columns
    if spec.out_block:
        out_blocks = objective.refitted_out(rounded) * rows
        out_wrapper = _wrapper(OutWrapper, out_blocks, spec.d_out, spec.out_block, spec.wrapper_dtype)
    return Chain.of(spec, stored_core, out_wrapper, in_wrapper)


def _stored_core(core: Tensor, scale: float, spec: WeightSpec, parameters: tuple[Tensor, ...]) -> NMSparse:
    values = core[: spec.d_out, : spec.d_in]
    mask = None if spec.pattern.is_dense else keep_largest(values.abs(), spec.pattern)
    if not parameters:
        return NMSparse.from_dense(values * scale, mask, spec.pattern, spec.core_dtype, spec.group)
    parameters = tuple(part[: spec.d_out, : -(-spec.d_in // spec.group)] for part in parameters)
    each = [part.repeat_interleave(spec.group, 1)[:, : spec.d_in] for part in parameters]
    integers = QUANTIZERS.get(spec.core_dtype).nearest(values, *each).to(torch.int8)
    scaled = tuple((part * scale).half() for part in parameters)
    return NMSparse.from_codes(integers, scaled, mask, spec.pattern, spec.core_dtype, spec.group)


def _scales(tiles: Problem, normalised: Normalised) -> tuple[Tensor, Tensor]:
    """The factors for the rows of A and the columns of B, (row_tiles, r, 1) and (col_tiles, 1, c), 1 in the padding."""
    rows = _tiled(normalised.rows, tiles.row_tiles, tiles.row_tile)[:, :, None]
    return rows, _tiled(normalised.columns, tiles.col_tiles, tiles.col_tile)[:, None, :]


def _tiled(scale: Tensor, tiles: int, size: int) -> Tensor:
    return functional.pad(scale.to(torch.float32), (0, tiles * size - scale.shape[0]), value=1.0).reshape(tiles, size)


def _wrapper(
    kind: type[W], blocks: Tensor, size: int, block: int, wrapper_dtype: str, energy: Tensor | None = None
) -> W:
    if block == 1:  # a diagonal wrapper is solved in larger tiles, of which only the diagonal is not 0
        blocks = blocks.diagonal(dim1=1, dim2=2).reshape(-1, 1, 1)
    return kind.from_padded(blocks, size, block, wrapper_dtype, energy)


def _padded(wrapper: Wrapper, tile: int) -> Tensor:
    """The values of a stored wrapper, fp32, in the tiles (tiles, tile, tile) in which it was solved."""
    blocks, tail = wrapper.floats(torch.float32)
    if blocks is not None and blocks.shape[1] == 1:
        diagonal = functional.pad(blocks.reshape(-1), (0, -wrapper.size % tile))
        return torch.diag_embed(diagonal.reshape(-1, tile))
    parts = [] if blocks is None else [blocks]
    if tail is not None:
        padding = tile - tail.shape[0]
        parts.append(functional.pad(tail, (0, padding, 0, padding))[None])
    return torch.cat(parts)
