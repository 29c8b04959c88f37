"""One matrix to factorise with the true output error, and the exact updates of its factors."""

import ctypes
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.formats.quantizers import Uniform
from halfplate.formats.quantizers.rounding import GROUP
from halfplate.kernels import native
from halfplate.solvers.armor.native_rows import has_native_values, table_of
from halfplate.solvers.armor.problem import Factors, Problem, Wrapper
from halfplate.solvers.armor.stages import Moments, native_buffers
from halfplate.solvers.armor.sweep import Grid, Levels, sweep_tiles
from halfplate.solvers.armor.wrappers import regular_inverse, update_out_blocks

# Passes over the blocks of B in one update. The blocks are coupled, and a pass is cheap compared with the other products.
PASSES = 2
# The loss is a difference of sums. If it is below this share of the loss of the zero matrix, or what the values of the core would leave
# one by one is this many times that loss (the factors have grown in directions that hardly any input constrains), fp32 rounding
# would dominate, so fp64 is used.
PRECISE, LARGE = 1e-3, 4.0
ROWS = 256  # rows of a temporary product that are computed at once


@dataclass(frozen=True, eq=False)
class GramProblem:
    """Minimise tr((W − A S B) H (W − A S B)ᵀ) over A, S and B, with inputs scaled so that H has a unit diagonal.

    tiles: W scaled by the root mean square of its inputs, padded with zeros and cut into tiles.
    gram: H, fp32 (cols, cols), 0 for dead inputs.
    pulled: W H, fp32 (rows, cols).
    total: the loss of the zero matrix.
    """

    tiles: Problem
    gram: Tensor
    pulled: Tensor
    total: float

    @classmethod
    def from_tiles(cls, tiles: Problem, gram: Tensor) -> "GramProblem":
        """tiles: of the scaled weight. gram: the scaled H, (d_in, d_in) without padding, fp32 or fp64."""
        padding = tiles.weight.shape[1] - gram.shape[0]
        padded = functional.pad(gram.to(torch.float32), (0, padding, 0, padding)).contiguous()
        pulled = tiles.weight @ padded
        return cls(tiles, padded, pulled, _dot(pulled, tiles.weight))


@dataclass(frozen=True, eq=False)
class Point:
    """Factors and intermediate results for the next update.

    steps: scales of an integer core, fp32 (rows, ceil(cols / group)), or None.
    against, product: W H Bᵀ and S B H Bᵀ, both fp32 (rows, cols).
    loss: absolute.
    """

    factors: Factors
    steps: Tensor | None
    against: Tensor
    product: Tensor
    loss: float


@dataclass(frozen=True, eq=False)
class GramObjective:
    """The true output error; with `levels`, the core holds quantised values."""

    problem: GramProblem
    levels: Levels | None = None

    @property
    def tiles(self) -> Problem:
        return self.problem.tiles

    def updated(self, at: Point) -> Factors:
        between = replace(at.factors, out_blocks=updated_out(self.problem, at))
        return replace(between, in_blocks=updated_in(self.problem, between))

    def swept(self, factors: Factors, after: Point) -> Point:
        return swept(self.problem, factors, after.steps, self.levels)

    def refitted_out(self, factors: Factors) -> Tensor:
        return updated_out(self.problem, measured(self.problem, factors))

    def refitted_in(self, factors: Factors) -> Tensor:
        return updated_in(self.problem, factors)


def measured(problem: GramProblem, factors: Factors, steps: Tensor | None = None) -> Point:
    """The loss of `factors`, unchanged."""
    against, in_gram = _times_blocks(problem.pulled, factors.in_blocks), gram_inside(problem, factors.in_blocks)
    return _point(problem, factors, steps, against, factors.core @ in_gram, in_gram.diagonal())


def swept(
    problem: GramProblem,
    factors: Factors,
    steps: Tensor | None = None,
    levels: Levels | None = None,
    off_grid: bool = False,
) -> Point:
    """A copy of the core in which every group in turn gets its best mask and values; with `levels`, quantised values with the scales `steps`.

    off_grid: whether the core is not quantised yet; then values that no input constrains are rounded to nearest.
    """
    tiles = problem.tiles
    in_gram = gram_inside(problem, factors.in_blocks)  # C
    against = _times_blocks(problem.pulled, factors.in_blocks)
    product = factors.core @ in_gram  # U
    out_gram = factors.out_blocks.mT @ factors.out_blocks  # G
    error = _out_times(factors.out_blocks.mT, against).sub_(_out_times(out_gram, product))  # E
    before, factors = factors.core if off_grid else None, replace(factors, core=factors.core.clone())
    core = factors.core
    steps = None if steps is None else steps.clone()
    if core.device.type == "cpu" and native.available() and (levels is None or has_native_values(levels.quantizer)):
        _sweep_native(tiles, core, error, product, out_gram, in_gram, steps, levels, off_grid)
    else:
        shape = (tiles.row_tiles, tiles.row_tile, -1)
        grid = None if steps is None or levels is None else Grid(steps.reshape(shape), levels, off_grid)
        everywhere = in_gram.expand(len(out_gram), -1, -1)
        swept = sweep_tiles(core.reshape(shape), error.reshape(shape), out_gram, everywhere, tiles.pattern, grid)
        core = swept.reshape(core.shape)
        product = core @ in_gram
    if before is not None and steps is not None and levels is not None:
        felt = _felt(tiles, out_gram, in_gram)
        if not bool(felt.all()):
            core = torch.where(felt, core, _nearest(before, steps, levels))
            product = core @ in_gram
    strengths = in_gram.diagonal().clone()
    del error, in_gram  # most of the memory in a wide layer
    return _point(problem, replace(factors, core=core), steps, against, product, strengths)


def _felt(tiles: Problem, out_gram: Tensor, in_gram: Tensor) -> Tensor:
    """Where a change of the core could change the loss, group by group: bool (rows, cols)."""
    groups = (in_gram.diagonal() > 0).reshape(-1, tiles.pattern.m).any(1).repeat_interleave(tiles.pattern.m)
    return (out_gram.diagonal(dim1=1, dim2=2).reshape(-1, 1) > 0) & groups


def _nearest(core: Tensor, steps: Tensor, levels: Levels) -> Tensor:
    """The nearest quantised value of each value of `core` (rows, cols)."""
    each = steps.repeat_interleave(levels.group, 1)[:, : core.shape[1]]
    return levels.quantizer.decode(levels.quantizer.nearest(core, each), each)


def updated_out(problem: GramProblem, point: Point) -> Tensor:
    """The minimiser over A: A + (R H Zᵀ)(Z H Zᵀ + λI)⁻¹ with Z = S B, regularised towards A."""
    tiles, factors = problem.tiles, point.factors
    residual = point.against - _out_times(factors.out_blocks, point.product)  # R H Bᵀ
    shape = (tiles.row_tiles, tiles.row_tile, -1)
    core = factors.core.reshape(shape).mT
    moments = Moments(
        (residual.reshape(shape) @ core).double(),
        (point.product.reshape(shape) @ core).double(),
        torch.zeros(0, dtype=torch.float64, device=core.device),
    )
    return update_out_blocks(factors.out_blocks, moments, tiles.out_wrapper)


def updated_in(problem: GramProblem, factors: Factors) -> Tensor:
    """The minimiser over each block of B in turn: B_j + (T_jᵀT_j + λI)⁻¹ T_jᵀ R H_:j (H_jj + λI)⁻¹ with T = A S."""
    tiles = problem.tiles
    if tiles.in_wrapper is Wrapper.IDENTITY:
        return factors.in_blocks
    size, cols = tiles.col_tile, tiles.weight.shape[1]
    left = _out_times(factors.out_blocks, factors.core)  # T
    square = left.T @ left  # TᵀT: (cols, cols)
    # T_jᵀ W H_:j of each block: (col_tiles, c, c)
    wanted = _columns(left, size).mT @ _columns(problem.pulled, size)
    blocks = factors.in_blocks.clone()
    right = (blocks @ problem.gram.reshape(-1, size, cols)).reshape(cols, cols)  # B H
    solve = _BlockSolver(_diagonal_blocks(square, size), _diagonal_blocks(problem.gram, size), tiles.in_wrapper)
    for _ in range(PASSES):
        for j in range(tiles.col_tiles):
            here = slice(j * size, (j + 1) * size)
            change = solve(j, wanted[j] - square[here] @ right[:, here])
            blocks[j] += change
            right[here] += change @ problem.gram[here]
    return blocks


class _BlockSolver:
    """(Q_j + λI)⁻¹ N (H_j + μI)⁻¹ for each block j, in fp64; for diagonal wrappers, the minimiser over their diagonal."""

    def __init__(self, squares: Tensor, grams: Tensor, kind: Wrapper) -> None:
        if kind is Wrapper.DIAGONAL:
            self.left, self.right = regular_inverse(squares * grams), None
        else:
            self.left, self.right = regular_inverse(squares), regular_inverse(grams)

    def __call__(self, j: int, slope: Tensor) -> Tensor:
        slope = slope.double()
        if self.right is None:
            return torch.diag(self.left[j] @ slope.diagonal()).to(torch.float32)
        return (self.left[j] @ slope @ self.right[j]).to(torch.float32)


def _point(
    problem: GramProblem, factors: Factors, steps: Tensor | None, against: Tensor, product: Tensor, strengths: Tensor
) -> Point:
    """The point of `factors`, with its loss. strengths: the diagonal of C, (cols,)."""
    out_gram = factors.out_blocks.mT @ factors.out_blocks
    aim = _out_times(factors.out_blocks.mT, against)  # P = Aᵀ W H Bᵀ
    # tr(W H Wᵀ) − 2 ⟨P, S⟩ + ⟨G U, S⟩
    gained, own = _dot(aim, factors.core), _dot(_out_times(out_gram, product), factors.core)
    loss = problem.total - 2 * gained + own
    # Each value alone: in the other sums, those of large factors cancel, and so would hide that they are large.
    apart = _dot(factors.core.square() @ strengths[:, None], out_gram.diagonal(dim1=1, dim2=2).reshape(-1, 1))
    if not (loss >= PRECISE * problem.total and apart <= LARGE * problem.total):
        loss = _precise_loss(problem, factors)
    return Point(factors, steps, against, product, loss)


def _precise_loss(problem: GramProblem, factors: Factors) -> float:
    """tr(R H Rᵀ) in fp64; infinite if it is NaN or negative, so that no step is accepted."""
    loss, in_blocks = 0.0, factors.in_blocks.double()
    tiles = max(ROWS // problem.tiles.row_tile, 1)
    rows = tiles * problem.tiles.row_tile
    for out_blocks, core, weight in zip(
        factors.out_blocks.split(tiles), factors.core.split(rows), problem.tiles.weight.split(rows), strict=True
    ):
        residual = weight.double() - Factors(out_blocks.double(), core.double(), in_blocks).product()
        for part, gram in zip(residual.split(ROWS, 1), problem.gram.split(ROWS, 1), strict=True):
            loss += _dot(residual @ gram.double(), part)
    return loss if loss >= 0 else torch.inf


def gram_inside(problem: GramProblem, blocks: Tensor) -> Tensor:
    """C = B H Bᵀ, the Gram matrix of what the core multiplies: (cols, cols), computed some rows at a time to save memory."""
    size, cols = blocks.shape[1], problem.gram.shape[0]
    found = torch.empty_like(problem.gram)
    tiles = max(ROWS // size, 1)
    for part, rows, out in zip(
        blocks.split(tiles), problem.gram.split(tiles * size), found.split(tiles * size), strict=True
    ):
        right = (part @ rows.reshape(-1, size, cols)).reshape(-1, cols)  # B H
        out.copy_(_times_blocks(right, blocks))
    return found


def _times_blocks(matrix: Tensor, blocks: Tensor) -> Tensor:
    """matrix (rows, cols) times the transpose of block-diagonal blocks (tiles, c, c)."""
    return (_columns(matrix, blocks.shape[1]) @ blocks.mT).transpose(0, 1).reshape(matrix.shape)


def _out_times(blocks: Tensor, matrix: Tensor) -> Tensor:
    """Block-diagonal blocks (tiles, r, r) times matrix (rows, cols)."""
    return (blocks @ matrix.reshape(len(blocks), -1, matrix.shape[1])).reshape(matrix.shape)


def _columns(matrix: Tensor, size: int) -> Tensor:
    """(rows, cols) as batches over column tiles, (col_tiles, rows, size); a view."""
    return matrix.reshape(matrix.shape[0], -1, size).transpose(0, 1)


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal of a square matrix: (tiles, size, size)."""
    tiles = matrix.shape[0] // size
    return matrix.reshape(tiles, size, tiles, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _dot(x: Tensor, y: Tensor) -> float:
    # Only one number is copied from the device.
    return float(sum((a * b).sum(dtype=torch.float64) for a, b in zip(x.split(ROWS), y.split(ROWS), strict=True)))


def _sweep_native(
    tiles: Problem,
    core: Tensor,
    error: Tensor,
    product: Tensor,
    out_gram: Tensor,
    in_gram: Tensor,
    steps: Tensor | None,
    levels: Levels | None,
    off_grid: bool,
) -> None:
    table = None if levels is None or isinstance(levels.quantizer, Uniform) else table_of(levels.quantizer)
    addresses, sizes = native_buffers(core, error, product, out_gram, in_gram, table, steps)
    arguments = native.GramSweep(
        *addresses,
        tiles.row_tiles,
        tiles.row_tile,
        core.shape[1],
        tiles.pattern.n,
        tiles.pattern.m,
        *((0, 0) if levels is None else levels.quantizer.range),
        GROUP if levels is None else levels.group,
        int(off_grid),
        torch.get_num_threads(),
        sizes,
    )
    native.check(native.library().halfplate_gram_sweep(ctypes.byref(arguments)), "sweep over the core")
