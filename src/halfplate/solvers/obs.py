"""Optimal brain surgeon: prune and round column after column, with every later column compensating for the error so far."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfplate.formats.quantizers import QUANTIZERS, Quantizer, storage_of
from halfplate.formats.quantizers.rounding import GROUP, fit_groups
from halfplate.pattern import Pattern
from halfplate.solvers.selection import keep_largest

# A pivot below this fraction of the mean second moment is rounding error of a singular Gram matrix.
SMALLEST_PIVOT = 1e-12


@dataclass(frozen=True, eq=False)
class Swept:
    """The result of a sweep.

    weight: updated, zero where pruned, (d_out, d_in).
    mask: bool, (d_out, d_in).
    quantizer: of the weights, None for floating-point weights.
    parameters: one tensor per name in `quantizer.stored`, fp16 (d_out, ceil(d_in / group)).
    """

    weight: Tensor
    mask: Tensor
    quantizer: Quantizer | None = None
    parameters: tuple[Tensor, ...] = ()
    group: int = GROUP

    def integers(self) -> Tensor:
        """The q of every weight: int8 (d_out, d_in)."""
        assert self.quantizer is not None, "floating-point values have no q"
        each = [part.float().repeat_interleave(self.group, 1) for part in self.parameters]
        found = self.quantizer.nearest(self.weight, *(part[:, : self.weight.shape[1]] for part in each))
        return found.to(torch.int8)


def obs_sweep(
    weight: Tensor,
    gram: Tensor,
    pattern: Pattern,
    damping: float,
    column_block: int = 128,
    core_dtype: str | None = None,
    group: int = GROUP,
) -> Swept:
    """Choose an N:M mask of `weight` and update the kept values to minimise the output error tr((W − Ŵ) H (W − Ŵ)ᵀ).

    With H⁻¹ = UᵀU, U upper triangular, a group is chosen by W² / U_jj² when the sweep reaches it, and the error e of column j
    subtracts e · U_j: / U_jj from the columns from j on. A dead input (zero second moment) gets weight zero.

    weight: (d_out, d_in) fp32 or fp64, not changed.
    gram: (d_in, d_in), the second moments H of the inputs, up to any common factor.
    damping: added to the diagonal of H, as a fraction of its mean over inputs that are not dead; increased tenfold until H can
        be factorised.
    column_block: columns between two updates of all later columns, rounded down to whole groups; affects only the speed.
    core_dtype: name of the quantizer that rounds kept values when the sweep reaches them; parameters are fitted to the current
        values of each row and `group` columns (a multiple of M).

    Source: SparseGPT, arXiv 2301.00774, algorithm 1; with a quantizer and all weights kept, GPTQ, arXiv 2210.17323.
    """
    d_in = weight.shape[1]
    pattern.kept(d_in)
    factor = _upper_factor(gram, damping)
    remaining = weight.T.clone(memory_format=torch.contiguous_format)  # (d_in, d_out): a column of W is contiguous
    remaining[gram.diagonal() <= 0] = 0
    mask = torch.zeros_like(remaining, dtype=torch.bool)
    quantizer = QUANTIZERS.get(core_dtype) if core_dtype else None
    step = group if quantizer else max(column_block // pattern.m, 1) * pattern.m
    parameters = []
    # Super-scales are chosen from the values of all their groups when the sweep reaches the first.
    storage = storage_of(quantizer, group) if quantizer else None
    units: tuple[Tensor, ...] = ()
    for start in range(0, d_in, step):
        end = min(start + step, d_in)
        rows = _inverse_rows(factor, start, end)
        pivots = rows.diagonal().to(weight.dtype)
        # The change of the columns from j on for an error of 1 in column j: (columns, d_in - start).
        spread = (rows / rows.diagonal()[:, None]).to(weight.dtype)
        rounded = None
        if quantizer and storage:
            place = start // step % storage.span
            if storage.span > 1 and not place:
                ahead = slice(start, min(start + step * storage.span, d_in))
                first = (1 / factor.diagonal()[ahead]).to(weight.dtype)
                fitted = _parameters(remaining[ahead], first, pattern, quantizer, step)
                units = storage.units(quantizer.stored, fitted)
            fitted = _parameters(remaining[start:end], pivots, pattern, quantizer, step)
            here = tuple(unit[:, place : place + 1] for unit in units)
            parameters.append(storage.nearest(quantizer.stored, fitted, here) if units else fitted)
            rounded = _rounding(quantizer, [part[:, 0].to(weight.dtype) for part in parameters[-1]])
        error = _sweep_block(remaining[start:end], mask[start:end], spread, pivots, pattern, rounded)
        remaining[end:].addmm_(spread[:, end - start :].T, error, alpha=-1)
    joined = tuple(torch.cat(parts, 1) for parts in zip(*parameters, strict=True))
    return Swept(remaining.T.contiguous(), mask.T.contiguous(), quantizer, joined, group)


def _sweep_block(
    block: Tensor,
    mask: Tensor,
    spread: Tensor,
    pivots: Tensor,
    pattern: Pattern,
    rounded: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Sweep over columns of W: updates `block` and fills `mask`, both (columns, d_out); returns the error of each column.

    rounded: rounds a column (d_out,); None keeps it.
    """
    lost = torch.zeros_like(block)
    width = block.shape[0]
    for group in range(0, width, pattern.m):
        columns = slice(group, group + pattern.m)
        mask[columns] = _choice(block[columns], pivots[columns], pattern)
        for j in range(group, group + pattern.m):
            kept = block[j] if rounded is None else rounded(block[j])
            kept = kept.masked_fill(~mask[j], 0)
            lost[j] = block[j] - kept
            block[j] = kept
            block[j + 1 :].addr_(spread[j, j + 1 : width], lost[j], alpha=-1)
    return lost


def _choice(columns: Tensor, pivots: Tensor, pattern: Pattern) -> Tensor:
    """Which weights of whole groups of `columns` (columns, d_out) to keep: those with the largest W² / U_jj²."""
    # |W| / U_jj has the same order as its square and cannot overflow.
    return keep_largest((columns.abs() / pivots[:, None]).T, pattern).T


def _parameters(
    columns: Tensor, pivots: Tensor, pattern: Pattern, quantizer: Quantizer, group: int
) -> tuple[Tensor, ...]:
    """fp16 parameters (d_out, groups) for the values of `columns` (columns of whole scale groups, d_out) that would be kept now."""
    kept = columns.masked_fill(~_choice(columns, pivots, pattern), 0)
    return fit_groups(kept.T, quantizer, group)[1]


def _rounding(quantizer: Quantizer, parameters: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that rounds columns (d_out,) with parameters (d_out,)."""
    return lambda column: quantizer.decode(quantizer.nearest(column, *parameters), *parameters)


def damped_inverse(gram: Tensor, damping: float) -> Tensor:
    """(H + λI)⁻¹ with the damping of `obs_sweep`, fp64 (d_in, d_in), in units of the mean second moment of live inputs."""
    factor = _upper_factor(gram, damping)
    rows = _inverse_rows(factor, 0, len(factor))
    return rows.T @ rows


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """U / diag(U), fp32 (d_in, d_in), of `obs_sweep`: row j is the change of the columns from j on for an error of 1 in column j."""
    factor, width = _upper_factor(gram, damping), len(gram)
    found = torch.zeros(width, width, dtype=torch.float32, device=gram.device)
    for start in range(0, width, 128):  # in fp64, all rows at once would double the memory
        end = min(start + 128, width)
        rows = _inverse_rows(factor, start, end)
        found[start:end, start:] = rows / rows.diagonal()[:, None]
    return found


def _upper_factor(gram: Tensor, damping: float) -> Tensor:
    """The upper triangular R, fp64, with R Rᵀ = H + λ I, in units of the mean second moment of live inputs.

    It is the inverse of SparseGPT's U, computed without H⁻¹: the Cholesky factor of H with rows and columns in reverse order.
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
