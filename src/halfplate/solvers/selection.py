"""Choosing which N of every M consecutive inputs a row keeps."""

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.pattern import Pattern


def keep_largest(score: Tensor, pattern: Pattern) -> Tensor:
    """Keep the N largest scores of every group of M consecutive inputs, of equal ones the first.

    Returns bool (d_out, d_in) with exactly N true entries in each group, the same on every run and device.

    score: (d_out, d_in), any real dtype, infinities allowed.
    Raises HalfplateError if M does not divide d_in or a score is NaN.
    """
    d_out, d_in = score.shape
    pattern.kept(d_in)
    if bool(score.isnan().any()):
        row, column = score.isnan().nonzero()[0].tolist()
        raise HalfplateError(
            f"score[{row}, {column}] is NaN, expected a number; check the weight and the input statistics for NaN"
        )
    groups = score.reshape(d_out, -1, pattern.m)
    # topk does not define the order of equal scores; a stable sort does.
    kept = groups.sort(dim=-1, descending=True, stable=True).indices[..., : pattern.n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).reshape(d_out, d_in)
