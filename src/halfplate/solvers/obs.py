"""Optimal brain surgeon: prune column after column, every later column making up for the error so far."""

import torch
from torch import Tensor

from halfplate.pattern import Pattern
from halfplate.solvers.selection import keep_largest

# A pivot below this fraction of the mean second moment is rounding error of a singular Gram.
SMALLEST_PIVOT = 1e-12


def obs_sweep(
    weight: Tensor, gram: Tensor, pattern: Pattern, damping: float, column_block: int = 128
) -> tuple[Tensor, Tensor]:
    """Choose an N:M mask of `weight` and update the kept values against the output error tr((W − Ŵ) H (W − Ŵ)ᵀ).

    weight: (d_out, d_in) fp32 or fp64, left as it is. gram: (d_in, d_in), the second moment H of the inputs, any common
    factor. damping: added to the diagonal of H, as a fraction of its mean over the inputs that are not dead; raised
    tenfold until H can be factorised. column_block: columns between two updates of all later columns, rounded down to
    groups; it changes the speed, not the result. Returns the updated weight, zero where pruned, and the bool mask, both
    (d_out, d_in). A dead input (zero second moment) gets weight zero.

    Source: SparseGPT, arXiv 2301.00774, Algorithm 1. With H⁻¹ = UᵀU, U upper triangular, a group is chosen by W² / U_jj²
    when the sweep reaches it, and pruning w of column j subtracts w · U_j: / U_jj from the columns from j on.
    """
    d_in = weight.shape[1]
    pattern.kept(d_in)
    factor = _upper_factor(gram, damping)
    remaining = weight.T.clone(memory_format=torch.contiguous_format)  # (d_in, d_out): a column of W is contiguous
    remaining[gram.diagonal() <= 0] = 0
    mask = torch.zeros_like(remaining, dtype=torch.bool)
    step = max(column_block // pattern.m, 1) * pattern.m
    for start in range(0, d_in, step):
        end = min(start + step, d_in)
        rows = _inverse_rows(factor, start, end)
        pivots = rows.diagonal()
        # What a pruned 1 takes from the columns at and after it: (columns, d_in - start).
        spread = (rows / pivots[:, None]).to(weight.dtype)
        pruned = _sweep_block(remaining[start:end], mask[start:end], spread, pivots.to(weight.dtype), pattern)
        remaining[end:].addmm_(spread[:, end - start :].T, pruned, alpha=-1)
    return torch.where(mask, remaining, 0).T.contiguous(), mask.T.contiguous()


def _sweep_block(block: Tensor, mask: Tensor, spread: Tensor, pivots: Tensor, pattern: Pattern) -> Tensor:
    """Sweep over columns of W: updates `block` and fills `mask`, both (columns, d_out); returns the pruned values."""
    pruned = torch.zeros_like(block)
    width = block.shape[0]
    for group in range(0, width, pattern.m):
        columns = slice(group, group + pattern.m)
        # |W| / U_jj orders like its square and cannot overflow where W² would.
        mask[columns] = keep_largest((block[columns].abs() / pivots[columns, None]).T, pattern).T
        for j in range(group, group + pattern.m):
            pruned[j] = block[j].masked_fill(mask[j], 0)
            block[j + 1 :].addr_(spread[j, j + 1 : width], pruned[j], alpha=-1)
    return pruned


def _upper_factor(gram: Tensor, damping: float) -> Tensor:
    """The upper triangular R, fp64, with R Rᵀ = H + λ I, in units of the mean living second moment.

    It is the inverse of SparseGPT's U, found without forming H⁻¹: the Cholesky factor of H with rows and columns in
    reverse order.
    """
    backwards = gram.flip(0, 1).double()
    diagonal = backwards.diagonal()
    dead = diagonal <= 0
    if not bool(dead.all()):
        backwards /= diagonal[~dead].mean()
    backwards[dead, :] = 0
    backwards[:, dead] = 0
    diagonal[dead] = 1
    added = 0.0
    while True:
        diagonal += damping - added
        added = damping
        lower, failed = torch.linalg.cholesky_ex(backwards)
        if not failed and float(lower.diagonal().min()) ** 2 >= SMALLEST_PIVOT:
            upper: Tensor = lower.flip(0, 1)
            return upper
        damping = max(10 * damping, 10 * SMALLEST_PIVOT)


def _inverse_rows(factor: Tensor, start: int, end: int) -> Tensor:
    """Rows `start` to `end` of the inverse of an upper triangular matrix (d_in, d_in), from column `start` on."""
    unit = torch.eye(end - start, factor.shape[0] - start, dtype=factor.dtype, device=factor.device)
    rows: Tensor = torch.linalg.solve_triangular(factor[start:, start:], unit, upper=True, left=False)
    return rows
