"""Exact updates of the wrappers from their normal equations."""

import torch
from torch import Tensor

from halfplate.solvers.armor.problem import Wrapper
from halfplate.solvers.armor.stages import Moments

RIDGE = 1e-6  # regularisation towards the previous wrapper, relative to the mean diagonal


def update_out_blocks(blocks: Tensor, moments: Moments, kind: Wrapper) -> Tensor:
    """A + (R D Zᵀ)(Z D Zᵀ + λI)⁻¹ for each block: the minimiser over A, regularised towards A so that dead inputs do not change it."""
    if kind is Wrapper.IDENTITY:
        return blocks
    return blocks + _correction(moments.cross.mT, moments.square, kind).mT.to(blocks.dtype)


def update_in_blocks(blocks: Tensor, moments: Moments, kind: Wrapper) -> Tensor:
    """B + (TᵀT + λI)⁻¹ Tᵀ R for each block: the minimiser over B; the second moments cancel."""
    if kind is Wrapper.IDENTITY:
        return blocks
    return blocks + _correction(moments.cross, moments.square, kind).to(blocks.dtype)


def _correction(cross: Tensor, square: Tensor, kind: Wrapper) -> Tensor:
    """(square + λI)⁻¹ cross, fp64 (tiles, b, b); for a diagonal wrapper, its diagonal, solved entry by entry."""
    ridge = _ridge(square)
    if kind is Wrapper.DIAGONAL:
        return torch.diag_embed(cross.diagonal(dim1=1, dim2=2) / (square + ridge).diagonal(dim1=1, dim2=2))
    factor, failed = torch.linalg.cholesky_ex(square + ridge)
    correction = torch.cholesky_solve(cross, factor)
    return torch.where((failed == 0)[:, None, None] & correction.isfinite().all(), correction, 0.0)


def regular_inverse(square: Tensor) -> Tensor:
    """(square + λI)⁻¹, fp64 (tiles, b, b), of positive semidefinite blocks; 0 for a block of zeros."""
    square = square.double()
    factor, failed = torch.linalg.cholesky_ex(square + _ridge(square))
    inverse = torch.cholesky_inverse(factor)
    alive = square.diagonal(dim1=1, dim2=2).mean(1) > 0
    usable = (failed == 0) & alive & inverse.isfinite().all(2).all(1)
    return torch.where(usable[:, None, None], inverse, 0.0)


def _ridge(square: Tensor) -> Tensor:
    """λI of each block (tiles, b, b); I for a block without any input, whose update is then 0."""
    mean = square.diagonal(dim1=1, dim2=2).mean(1)
    return torch.diag_embed(torch.where(mean > 0, RIDGE * mean, 1.0)[:, None].expand(square.shape[:2]))
