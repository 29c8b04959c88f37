"""Least squares on the inputs of a linear: removing some of them, and refitting what reads the others."""

from __future__ import annotations

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.transforms.structure.scored import best

MOST_TRIES = 24  # of a damping that grows tenfold
DAMPING = 1e-6  # of matrices that are inverted, relative to the mean of the diagonal


def refitted(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """W C[:, S] (C[S, S])⁻¹: the weights of the inputs `kept` with which the outputs are nearest to those of all inputs."""
    factor, _ = factor_of(gram[kept][:, kept], DAMPING)
    return torch.cholesky_solve((weight @ gram[:, kept]).T, factor).T


def factor_of(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """The Cholesky factor of `gram` with `damping` times the mean of its diagonal added to the diagonal, and what was added.

    The damping grows tenfold until there is one, because the statistics are rounded to fp32.
    """
    added = damping * float(gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    damped = gram.clone()
    for _ in range(MOST_TRIES):
        damped.diagonal().copy_(gram.diagonal()).add_(added)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor, added
        added *= 10
    raise HalfplateError(
        f"the statistics of {len(gram)} inputs have no Cholesky factor: they hold NaN or inf; check the weights of the model, or give other calibration text"
    )


def surgeon(weight: Tensor, gram: Tensor, width: int, count: int, rounds: int) -> Tensor:
    """The units of inputs that stay when those go, in `rounds` equal rounds, whose removal changes the outputs least.

    After each round the weights of the inputs that are left are refitted to all original outputs. Returns `count` units, ascending int64.

    weight: fp64 (d_out, units · width). gram: second moments of the inputs, damped, fp64. width: inputs of a unit, side by side.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    left = torch.arange(len(gram) // width, dtype=torch.int64, device="cpu")
    removed = len(left) - count
    for number in range(1, rounds + 1):
        target = len(left) - (removed * number // rounds - removed * (number - 1) // rounds)
        if target == len(left):
            continue
        stay = best(harm(weight, inverse, width), target)
        going = torch.ones(len(left), dtype=torch.bool, device="cpu")
        going[stay] = False
        inputs = going.repeat_interleave(width).to(weight.device)
        part = torch.linalg.solve(inverse[inputs][:, inputs], inverse[inputs])
        weight = (weight - weight[:, inputs] @ part)[:, ~inputs]
        inverse = (inverse - inverse[:, inputs] @ part)[~inputs][:, ~inputs]
        left = left[stay]
    return left


def harm(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """The squared change of the outputs if one unit goes and the others are refitted: tr(W_u (H⁻¹_uu)⁻¹ W_uᵀ) for each unit u.

    inverse: of the second moments H of the inputs.
    """
    units = len(inverse) // width
    blocks = inverse.reshape(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = weight.reshape(len(weight), units, width).permute(1, 2, 0)
    found: Tensor = (torch.linalg.solve(blocks, columns) * columns).sum((1, 2))
    return found
