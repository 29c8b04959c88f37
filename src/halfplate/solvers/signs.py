"""Sign matrices with low-rank magnitudes that minimise an output error."""

import torch
from torch import Tensor

from halfplate.solvers.whitening import Whitening

PANEL = 64  # columns between two updates of all those that are left; affects only the speed
ROWS = 256  # rows whose normal equations are solved at once
RIDGE = 1e-6  # of the mean of the diagonal of the normal equations


def nearest_signs(matrix: Tensor, magnitudes: Tensor, whitening: Whitening) -> Tensor:
    """bool (d_out, d_in), true for −1: signs s that make ‖(W − s ⊙ A) L‖ small, chosen column after column, from the last one.

    With L lower triangular, column j of the product depends on the errors of the columns from j on alone; each sign is the one that
    is nearest, given those before it (as in GPTQ, arXiv 2210.17323). Without a factor, it is the sign of the entry.

    matrix, magnitudes: W and A, fp64 (d_out, d_in).
    """
    if whitening.factor is None:
        return (matrix * magnitudes) < 0
    factor, scaled, sizes = whitening.factor, matrix * whitening.scales, magnitudes * whitening.scales
    negative = torch.zeros_like(matrix, dtype=torch.bool)
    errors = torch.zeros_like(scaled)
    for start in reversed(range(0, matrix.shape[1], PANEL)):
        end = min(start + PANEL, matrix.shape[1])
        carried = errors[:, end:] @ factor[end:, start:end]
        for column in reversed(range(start, end)):
            ahead = carried[:, column - start] + errors[:, column:end] @ factor[column:end, column]
            wanted = scaled[:, column] + ahead / factor[column, column]
            negative[:, column] = wanted * sizes[:, column] < 0
            errors[:, column] = scaled[:, column] - torch.where(negative[:, column], -1.0, 1.0) * sizes[:, column]
    return negative


def refitted_left(matrix: Tensor, negative: Tensor, right: Tensor, whitening: Whitening) -> Tensor:
    """The left factor with the least ‖(W − signs ⊙ (left · right)) L‖: fp64 (d_out, rank); each row is a least-squares problem of its own."""
    found = []
    for rows in torch.arange(len(matrix), dtype=torch.int64, device=matrix.device).split(ROWS):
        signs = 1 - 2 * negative[rows].double()
        spread = signs[:, None, :] * right
        features = whitening.into(spread.reshape(-1, right.shape[1])).reshape(spread.shape)
        wanted = whitening.into(matrix[rows])
        normal = features @ features.mT
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal.add_(RIDGE * diagonal.mean(1, keepdim=True) + 1e-300)
        found.append(torch.linalg.solve(normal, (features @ wanted[:, :, None]))[:, :, 0])
    return torch.cat(found)
