"""Row and column normalisation of a weight before it is scored (NoWag)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Normalised:
    """`weight` = diag(rows)⁻¹ W diag(columns)⁻¹ with its scales, all in the dtype of W.

    weight: (d_out, d_in), rows of L2 norm 1 or 0. rows: (d_out,) and columns: (d_in,), all positive.
    """

    weight: Tensor
    rows: Tensor
    columns: Tensor


def normalise(weight: Tensor) -> Normalised:
    """Divide every column of `weight` (d_out, d_in) by its L2 norm, then every row of the result by its L2 norm.

    The scale of an all-zero row or column is 1. Norms are summed in fp64, so squares neither overflow nor underflow.
    Source: NoWag, as used by ARMOR (arXiv 2510.05528), section 3.
    """
    columns = _norms(weight, dim=0)
    scaled = weight / columns
    rows = _norms(scaled, dim=1)
    return Normalised(scaled / rows[:, None], rows, columns)


def _norms(weight: Tensor, dim: int) -> Tensor:
    norms = torch.linalg.vector_norm(weight, dim=dim, dtype=torch.float64).to(weight.dtype)
    return torch.where(norms == 0, torch.ones_like(norms), norms)


def power_of_two(weight: Tensor) -> float:
    """The power of two that scales `weight` to near 1 without rounding, so that no square leaves the range of fp32."""
    largest = float(weight.abs().max())
    return 2.0 ** math.floor(math.log2(largest)) if largest else 1.0
