"""Rounding groups of columns, with every later group compensating for the error so far."""

import torch
from torch import Tensor

from halfplate.formats.quantizers import Quantizer
from halfplate.formats.quantizers.rounding import fit_groups
from halfplate.solvers.whitening import Whitening


def group_sweep(
    weight: Tensor, chosen: Tensor, width: int, quantizer: Quantizer, whitening: Whitening
) -> tuple[Tensor, Tensor]:
    """Round the chosen groups of each row and drop the others, from the last column to the first, for a small ‖(W − Ŵ) L‖.

    With L lower triangular, a column of the product depends on the errors of the columns from it on alone: each value is the nearest
    one given those, and scales are fitted to what a group has to approximate when the sweep reaches it.

    weight: fp64 (d_out, d_in). chosen: bool (d_out, ceil(d_in / width)). whitening: with a factor.
    Returns q, int8 (d_out, d_in), zero where dropped, and the scales, fp16 (d_out, groups).
    """
    factor = whitening.factor
    assert factor is not None, "the sweep needs a Gram matrix"
    errors, integers = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.int8)
    scales = torch.zeros(chosen.shape, dtype=torch.float16, device=weight.device)
    units = whitening.scales  # of the columns of `factor`
    for group in reversed(range(chosen.shape[1])):
        start, end = group * width, min((group + 1) * width, weight.shape[1])
        carried = errors[:, end:] @ factor[end:, start:end]
        pivots = factor.diagonal()[start:end]
        wanted = weight[:, start:end] + carried / pivots / units[start:end]
        kept = chosen[:, group]
        _, fitted = fit_groups(wanted.float(), quantizer, width)
        scales[:, group] = torch.where(kept, fitted[0][:, 0], 0.0)
        for column in reversed(range(start, end)):
            ahead = carried[:, column - start] + errors[:, column:end] @ factor[column:end, column]
            target = (weight[:, column] + ahead / pivots[column - start] / units[column]).float()
            rounded = quantizer.nearest(target, fitted[0][:, 0].float()) * kept
            integers[:, column] = rounded.to(torch.int8)
            value = quantizer.decode(rounded.float(), scales[:, group].float()).double()
            errors[:, column] = (weight[:, column] - value) * units[column]
    return integers, scales
