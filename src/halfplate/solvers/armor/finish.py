"""From solved factors to stored tensors: balance, round, and let the wrappers repair the rounding."""

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.formats.block_diagonal import BlockDiagonal
from halfplate.formats.chain import Chain
from halfplate.formats.nm_sparse import NMSparse
from halfplate.formats.spec import WeightSpec
from halfplate.solvers.armor.problem import Factors, Problem
from halfplate.solvers.armor.stages import Stages
from halfplate.solvers.armor.wrappers import update_in_blocks, update_out_blocks
from halfplate.solvers.normalise import Normalised
from halfplate.solvers.selection import keep_largest


def finish(
    problem: Problem, factors: Factors, normalised: Normalised, scale: float, spec: WeightSpec, stages: Stages
) -> Chain:
    """Store scale · diag(rows) · A S B · diag(columns) in the types of `spec`.

    normalised: the rows and columns that `problem` was solved without. scale: a power of two, which goes into the core.
    Once S is rounded, B is solved again for it and rounded, then A for both. Raises HalfplateError where a value is too
    large for its type.
    """
    rows = _tiled(normalised.rows, problem.row_tiles, problem.row_tile)[:, :, None]  # scales rows of A
    columns = _tiled(normalised.columns, problem.col_tiles, problem.col_tile)[:, None, :]  # scales columns of B
    out_blocks, core, in_blocks = _balance(factors.out_blocks * rows, factors.core, factors.in_blocks * columns)

    stored = core[: spec.d_out, : spec.d_in] * scale
    mask = keep_largest(stored.abs(), spec.pattern)
    stored_core = NMSparse.from_dense(stored, mask, spec.pattern, spec.core_dtype)
    padding = (0, core.shape[1] - spec.d_in, 0, core.shape[0] - spec.d_out)
    rounded = Factors(
        out_blocks / rows, functional.pad(stored_core.dense() / scale, padding).contiguous(), in_blocks / columns
    )

    in_wrapper = out_wrapper = None
    if spec.in_block:
        moments = stages.input_moments(problem, rounded)
        in_blocks = update_in_blocks(rounded.in_blocks, moments, problem.in_wrapper) * columns
        in_wrapper = _wrapper(in_blocks, spec.d_in, spec.in_block, spec.wrapper_dtype)
        rounded.in_blocks = _padded(in_wrapper, problem.col_tile) / columns
    if spec.out_block:
        moments = stages.output_moments(problem, rounded)
        out_blocks = update_out_blocks(rounded.out_blocks, moments, problem.out_wrapper) * rows
        out_wrapper = _wrapper(out_blocks, spec.d_out, spec.out_block, spec.wrapper_dtype)
    return Chain(spec, stored_core, out_wrapper, in_wrapper)


def _tiled(scale: Tensor, tiles: int, size: int) -> Tensor:
    """A scale a row or column as (tiles, size), 1 in the padding."""
    return functional.pad(scale.to(torch.float32), (0, tiles * size - scale.shape[0]), value=1.0).reshape(tiles, size)


def _balance(out_blocks: Tensor, core: Tensor, in_blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Use the free diagonal scales between A, S and B to give columns of A and rows of B unit length.

    The core then has the range of the weight itself, and no stored type overflows for want of balance.
    """
    out_norms, in_norms = out_blocks.norm(dim=1), in_blocks.norm(dim=2)  # (row_tiles, r), (col_tiles, c)
    out_norms = torch.where(out_norms > 0, out_norms, 1.0)
    in_norms = torch.where(in_norms > 0, in_norms, 1.0)
    scaled = core * out_norms.reshape(-1, 1) * in_norms.reshape(1, -1)
    return out_blocks / out_norms[:, None, :], scaled, in_blocks / in_norms[:, :, None]


def _wrapper(blocks: Tensor, size: int, block: int, wrapper_dtype: str) -> BlockDiagonal:
    if block == 1:  # solved in larger tiles, of which only the diagonal is not 0
        blocks = blocks.diagonal(dim1=1, dim2=2).reshape(-1, 1, 1)
    return BlockDiagonal.from_padded(blocks, size, block, wrapper_dtype)


def _padded(wrapper: BlockDiagonal, tile: int) -> Tensor:
    """The numbers that a stored wrapper stands for, fp32, in the tiles (tiles, tile, tile) that it was solved in."""
    blocks, tail = wrapper.floats(torch.float32)
    if blocks is not None and blocks.shape[1] == 1:
        diagonal = functional.pad(blocks.reshape(-1), (0, -wrapper.size % tile))
        return torch.diag_embed(diagonal.reshape(-1, tile))
    parts = [] if blocks is None else [blocks]
    if tail is not None:
        padding = tile - tail.shape[0]
        parts.append(functional.pad(tail, (0, padding, 0, padding))[None])
    return torch.cat(parts)
