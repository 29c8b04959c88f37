"""The published algorithm (`solver: paper`), kept for comparison: Adam, and one sampled group per tile and iteration."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.solvers.armor.problem import Factors, Problem, Wrapper
from halfplate.solvers.armor.sweep import best_group


@dataclass(frozen=True)
class PaperSchedule:
    """Settings of the published run (arXiv 2510.05528, section 4 and appendix)."""

    iterations: int = 20_000
    learning_rate: float = 1e-4
    patience: int = 100
    tolerance: float = 1e-6
    seed: int = 0


class _Adam:
    """Adam (betas 0.9 and 0.999, eps 1e-8) on one tensor in place."""

    def __init__(self, value: Tensor, learning_rate: float) -> None:
        self.value, self.learning_rate, self.steps = value, learning_rate, 0
        self.mean, self.square = torch.zeros_like(value), torch.zeros_like(value)

    def step(self, gradient: Tensor) -> None:
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        size = self.learning_rate / (1 - 0.9**self.steps)
        root = self.square.sqrt().mul_((1 - 0.999**self.steps) ** -0.5).add_(1e-8)
        self.value.addcdiv_(self.mean, root, value=-size)


class PaperRun:
    """State of the algorithm on one problem; `step` is one iteration, `loss` the current loss.

    The core is stored as (col_tiles, rows, col_tile), so that products with B are batches over column tiles and products
    with A batches over row tiles of the row-major view. The residual and the pulled-back error are updated by the change
    of the sampled groups instead of being computed again, so an iteration costs one forward and one backward product.
    """

    def __init__(self, problem: Problem, schedule: PaperSchedule) -> None:
        self.problem = problem
        self.factors = problem.start()
        self.mask = self.factors.core != 0
        self.generator = torch.Generator(problem.weight.device).manual_seed(schedule.seed)
        self.adams = {
            "core": _Adam(self.factors.core, schedule.learning_rate),
            "out": _Adam(self.factors.out_blocks, schedule.learning_rate),
            "in": _Adam(self.factors.in_blocks, schedule.learning_rate),
        }
        self._forward()

    @property
    def loss(self) -> float:
        """Σ d (W − A S B)², in fp64."""
        return float((self.residual.double().square() * self.problem.moment).sum())

    def step(self) -> float:
        """One continuous and one discrete step; returns the loss between them."""
        self._continuous_step()
        self._forward()
        loss = float((self.weighted * self.residual).sum(dtype=torch.float64))
        self._discrete_step()
        return loss

    def _columns(self, matrix: Tensor) -> Tensor:
        """(rows, cols) as batches over column tiles, (col_tiles, rows, col_tile), a view."""
        return matrix.view(matrix.shape[0], self.problem.col_tiles, self.problem.col_tile).transpose(0, 1)

    def _rows(self, matrix: Tensor) -> Tensor:
        """(rows, cols) as batches over row tiles, (row_tiles, row_tile, cols), a view."""
        return matrix.view(self.problem.row_tiles, self.problem.row_tile, matrix.shape[1])

    def _times_in(self, matrix: Tensor, blocks: Tensor) -> Tensor:
        """matrix (rows, cols) times block-diagonal blocks."""
        out = torch.empty_like(matrix)
        torch.bmm(self._columns(matrix), blocks, out=self._columns(out))
        return out

    def _out_times(self, blocks: Tensor, matrix: Tensor) -> Tensor:
        """Block-diagonal blocks times matrix (rows, cols)."""
        return torch.bmm(blocks, self._rows(matrix)).view_as(matrix)

    def _forward(self) -> None:
        """Z = S B, R = W − A Z, and E = Aᵀ R D Bᵀ with its half-way product Aᵀ R D."""
        problem, factors = self.problem, self.factors
        self.right = self._times_in(factors.core, factors.in_blocks)
        self.residual = problem.weight - self._out_times(factors.out_blocks, self.right)
        self.weighted = self.residual * problem.moment
        self.pulled = self._out_times(factors.out_blocks.mT, self.weighted)
        self.error = self._times_in(self.pulled, factors.in_blocks.mT)

    def _continuous_step(self) -> None:
        """One Adam step on A, B and the kept values of S along the exact gradient of the loss."""
        problem, factors = self.problem, self.factors
        out_gradient = torch.bmm(self._rows(self.weighted), self._rows(self.right).mT).mul_(-2)
        in_gradient = torch.bmm(self._columns(factors.core).mT, self._columns(self.pulled)).mul_(-2)
        self.adams["core"].step(self.error * self.mask * -2)
        factors.core.mul_(self.mask)
        for adam, gradient, kind in (
            ("out", out_gradient, problem.out_wrapper),
            ("in", in_gradient, problem.in_wrapper),
        ):
            if kind is Wrapper.DIAGONAL:
                gradient = torch.diag_embed(gradient.diagonal(dim1=1, dim2=2))
            if kind is not Wrapper.IDENTITY:
                self.adams[adam].step(gradient)

    def _discrete_step(self) -> None:
        """In every tile, draw a group by the L1 norm of its gradient and give it its best mask and values."""
        problem, factors = self.problem, self.factors
        m, row_tile, col_tile = problem.pattern.m, problem.row_tile, problem.col_tile
        groups = col_tile // m
        # |gradient| of group g of row r in tile (i, j): (row_tiles, row_tile, col_tiles, groups)
        size = self.error.abs().view(problem.row_tiles, row_tile, problem.col_tiles, groups, m).sum(-1)
        size = size.transpose(1, 2).reshape(-1, row_tile * groups)  # (tiles, groups of the tile)
        # Inverting the cumulative distribution takes one random number per tile.
        cumulative = size.cumsum(1)
        draws = (
            torch.rand(size.shape[0], 1, generator=self.generator, dtype=torch.float32, device=size.device)
            * cumulative[:, -1:]
        )
        chosen = torch.searchsorted(cumulative, draws, right=True)[:, 0].clamp_max(size.shape[1] - 1)  # (tiles,)
        tile = torch.arange(chosen.shape[0], dtype=torch.int64, device=chosen.device)
        tile_row, tile_col = tile // problem.col_tiles, tile % problem.col_tiles
        local_row, start = chosen // groups, chosen % groups * m
        row = tile_row * row_tile + local_row  # (tiles,)
        local = start[:, None] + torch.arange(
            m, dtype=torch.int64, device=chosen.device
        )  # (tiles, m), column inside the tile
        column = tile_col[:, None] * col_tile + local

        picked = factors.in_blocks[tile_col[:, None], local]  # rows of B: (tiles, m, col_tile)
        moment = problem.moment.view(problem.col_tiles, 1, col_tile)[tile_col]
        gram = (picked * moment) @ picked.mT  # C of the group: (tiles, m, m)
        out_column = factors.out_blocks[tile_row, :, local_row]  # column of A: (tiles, row_tile)
        scale = out_column.square().sum(1, keepdim=True)  # G_rr
        alive = scale > 0
        pull = torch.where(alive, self.error[row[:, None], column] / scale, 0)
        old = factors.core[row[:, None], column]
        new = torch.where(alive, best_group(old, pull, gram, problem.pattern), old)

        factors.core[row[:, None], column] = new
        self.mask[row[:, None], column] = new != 0
        step = ((new - old)[:, None] @ picked)[:, 0]  # change of Z in its row: (tiles, col_tile)
        self._apply(step, out_column, row, tile_row, tile_col)

    def _apply(self, step: Tensor, out_column: Tensor, row: Tensor, tile_row: Tensor, tile_col: Tensor) -> None:
        """Apply a change of one row of Z in every tile to Z, R, R D, Aᵀ R D and E."""
        problem, factors = self.problem, self.factors
        shape = (problem.row_tiles, problem.row_tile, problem.col_tiles, problem.col_tile)
        across = (problem.row_tiles, problem.col_tiles)
        columns = tile_col[:, None] * problem.col_tile + torch.arange(
            problem.col_tile, dtype=torch.int64, device=row.device
        )
        self.right[row[:, None], columns] += step
        left = out_column.view(*across, -1).transpose(1, 2)[..., None]  # (row_tiles, row_tile, col_tiles, 1)
        weighted_step = step.view(*across, -1) * problem.moment.view(problem.col_tiles, -1)
        self.residual.view(shape).addcmul_(left, step.view(*across, -1)[:, None], value=-1)
        self.weighted.view(shape).addcmul_(left, weighted_step[:, None], value=-1)
        pulled = (factors.out_blocks.mT[tile_row] @ out_column[..., None])[..., 0]  # column of G: (tiles, row_tile)
        left = pulled.view(*across, -1).transpose(1, 2)[..., None]
        self.pulled.view(shape).addcmul_(left, weighted_step[:, None], value=-1)
        error_step = torch.einsum("ijc,jdc->ijd", weighted_step, factors.in_blocks)
        self.error.view(shape).addcmul_(left, error_step[:, None], value=-1)


def solve_paper(problem: Problem, schedule: PaperSchedule) -> tuple[Factors, list[float]]:
    """Run the published algorithm from the start of NoWag-P until its iterations or its patience end.

    Returns the factors and the loss at the start and after each iteration, relative to that of the zero matrix. Unlike in the
    sequential form of theorem 3.1, the loss of the Adam version may rise temporarily.
    """
    total = problem.zero_loss()
    run = PaperRun(problem, schedule)
    losses = [run.loss / total if total else 0.0]
    best, waited = losses[0], 0
    for _ in range(schedule.iterations if losses[0] > 0 else 0):
        losses.append(run.step() / total)
        if not math.isfinite(losses[-1]):
            raise HalfplateError(
                f"learning_rate={schedule.learning_rate} made the loss diverge at iteration {len(losses) - 1}; try 1e-4"
            )
        if losses[-1] < best * (1 - schedule.tolerance):
            best, waited = losses[-1], 0
        else:
            waited += 1
            if waited >= schedule.patience:
                break
    return run.factors, losses
