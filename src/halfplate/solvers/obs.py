"""Optimal brain surgeon: prune and round column after column, every later column making up for the error so far."""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfplate.dtypes import GRIDS
from halfplate.formats.rounding import GROUP, grid_range, round_to_grid
from halfplate.pattern import Pattern
from halfplate.solvers.selection import keep_largest

# A pivot below this fraction of the mean second moment is rounding error of a singular Gram.
SMALLEST_PIVOT = 1e-12


@dataclass(frozen=True, eq=False)
class Swept:
    """weight: updated, zero where pruned, (d_out, d_in). mask: bool, likewise. scales: fp16 (d_out, ceil(d_in / group)) of a grid."""

    weight: Tensor
    mask: Tensor
    scales: Tensor | None = None
    group: int = GROUP

    def integers(self) -> Tensor:
        """The q of every weight on its grid: int8 (d_out, d_in)."""
        assert self.scales is not None, "floating-point values have no q"
        scales = self.scales.float().repeat_interleave(self.group, 1)[:, : self.weight.shape[1]]
        return torch.where(scales > 0, self.weight / scales, 0).round().to(torch.int8)


def obs_sweep(
    weight: Tensor,
    gram: Tensor,
    pattern: Pattern,
    damping: float,
    column_block: int = 128,
    core_dtype: str | None = None,
    group: int = GROUP,
) -> Swept:
    """Choose an N:M mask of `weight` and update the kept values against the output error tr((W − Ŵ) H (W − Ŵ)ᵀ).

    weight: (d_out, d_in) fp32 or fp64, left as it is. gram: (d_in, d_in), the second moment H of the inputs, any common
    factor. damping: added to the diagonal of H, as a fraction of its mean over the inputs that are not dead; raised
    tenfold until H can be factorised. column_block: columns between two updates of all later columns, rounded down to
    groups; it changes the speed, not the result. A dead input (zero second moment) gets weight zero. core_dtype: a grid on
    which kept values are rounded as the sweep reaches them; each row has a scale for `group` columns (of which M must be
    a divisor), the best for what stands there when the sweep arrives.

    Source: SparseGPT, arXiv 2301.00774, Algorithm 1; with a grid and all weights kept, GPTQ, arXiv 2210.17323. With
    H⁻¹ = UᵀU, U upper triangular, a group is chosen by W² / U_jj² when the sweep reaches it, and the error e of column j
    takes e · U_j: / U_jj from the columns from j on.
    """
    d_in = weight.shape[1]
    pattern.kept(d_in)
    factor = _upper_factor(gram, damping)
    remaining = weight.T.clone(memory_format=torch.contiguous_format)  # (d_in, d_out): a column of W is contiguous
    remaining[gram.diagonal() <= 0] = 0
    mask = torch.zeros_like(remaining, dtype=torch.bool)
    step = group if core_dtype else max(column_block // pattern.m, 1) * pattern.m
    scales = []
    for start in range(0, d_in, step):
        end = min(start + step, d_in)
        rows = _inverse_rows(factor, start, end)
        pivots = rows.diagonal().to(weight.dtype)
        # What an error of 1 takes from the columns at and after it: (columns, d_in - start).
        spread = (rows / rows.diagonal()[:, None]).to(weight.dtype)
        grid = None
        if core_dtype:
            scales.append(_scales(remaining[start:end], pivots, pattern, core_dtype))
            grid = scales[-1][:, 0].to(weight.dtype), *grid_range(GRIDS[core_dtype])
        error = _sweep_block(remaining[start:end], mask[start:end], spread, pivots, pattern, grid)
        remaining[end:].addmm_(spread[:, end - start :].T, error, alpha=-1)
    return Swept(remaining.T.contiguous(), mask.T.contiguous(), torch.cat(scales, 1) if scales else None, group)


def _sweep_block(
    block: Tensor, mask: Tensor, spread: Tensor, pivots: Tensor, pattern: Pattern, grid: tuple[Tensor, int, int] | None
) -> Tensor:
    """Sweep over columns of W: updates `block` and fills `mask`, both (columns, d_out); returns what each column lost.

    grid: scales (d_out,), least and greatest q.
    """
    lost = torch.zeros_like(block)
    width = block.shape[0]
    for group in range(0, width, pattern.m):
        columns = slice(group, group + pattern.m)
        mask[columns] = _choice(block[columns], pivots[columns], pattern)
        for j in range(group, group + pattern.m):
            kept = block[j]
            if grid is not None:
                scale, least, greatest = grid
                kept = torch.where(scale > 0, kept / scale, 0).round().clamp(least, greatest) * scale
            kept = kept.masked_fill(~mask[j], 0)
            lost[j] = block[j] - kept
            block[j] = kept
            block[j + 1 :].addr_(spread[j, j + 1 : width], lost[j], alpha=-1)
    return lost


def _choice(columns: Tensor, pivots: Tensor, pattern: Pattern) -> Tensor:
    """Which of whole groups of `columns` (columns, d_out) to keep: those of greatest W² / U_jj²."""
    # |W| / U_jj orders like its square and cannot overflow where W² would.
    return keep_largest((columns.abs() / pivots[:, None]).T, pattern).T


def _scales(columns: Tensor, pivots: Tensor, pattern: Pattern, core_dtype: str) -> Tensor:
    """fp16 scales (d_out, 1) for what would be kept of `columns` (those of one scale, d_out) as they stand."""
    kept = columns.masked_fill(~_choice(columns, pivots, pattern), 0)
    return round_to_grid(kept.T, GRIDS[core_dtype], len(kept), core_dtype)[1]


def damped_inverse(gram: Tensor, damping: float) -> Tensor:
    """(H + λI)⁻¹ with the damping of `obs_sweep`, fp64 (d_in, d_in), in units of the mean living second moment."""
    factor = _upper_factor(gram, damping)
    rows = _inverse_rows(factor, 0, len(factor))
    return rows.T @ rows


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
