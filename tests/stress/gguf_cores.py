"""Cores that the exact types of GGUF are tested with."""

import torch

from halfplate.formats import NMSparse
from halfplate.pattern import DENSE


def core_of(weight: torch.Tensor, core_dtype: str, group: int) -> NMSparse:
    return NMSparse.from_dense(weight, None, DENSE, core_dtype, group)


def difficult(rows: int, columns: int, seed: int) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[2, :64] = 0  # a scale of zero
    weight[3] *= 1e-6  # scales that fp16 holds with few bits
    weight[4] = weight[4].abs()  # a minimum of zero
    return weight
