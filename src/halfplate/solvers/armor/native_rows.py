"""The native form of restarts.py: all descents of a row in one call, many rows in the lanes of a vector."""

import ctypes

import torch
from torch import Tensor

from halfplate.formats.quantizers import Quantizer, Uniform
from halfplate.kernels import native
from halfplate.solvers.armor.stages import native_buffers
from halfplate.solvers.armor.sweep import Levels

LARGEST_TABLE = 32  # numbers of a quantizer that the native code looks through: as in src/armor.h


def has_native_values(quantizer: Quantizer) -> bool:
    """Whether native code knows the values of the quantizer: evenly spaced ones, or few enough in rising order."""
    if isinstance(quantizer, Uniform):
        return True
    table = table_of(quantizer)
    return len(table) <= LARGEST_TABLE and bool((table.diff() > 0).all())


def table_of(quantizer: Quantizer) -> Tensor:
    """The value of each code with a scale of 1, fp32."""
    least, greatest = quantizer.range
    codes = torch.arange(least, greatest + 1, dtype=torch.float32, device="cpu")
    return quantizer.decode(codes, torch.ones(1, dtype=torch.float32, device="cpu"))


def solve_rows(
    wanted: Tensor,
    gram: Tensor,
    columns: Tensor,
    spread: Tensor,
    steps: Tensor,
    levels: Levels,
    rounds: int,
    sweeps: int,
) -> tuple[Tensor, Tensor, list[float]]:
    """Minimise (w − s) C (w − s)ᵀ for every row over codes and scales, from `rounds` starts with `sweeps` sweeps each.

    wanted: W, fp32 (rows, cols). gram: C, fp32 (cols, cols). columns, spread: as in `restarts.Order`.
    steps: the first scales, fp32 (rows, ceil(cols / group)), each one that fp16 holds.
    Returns the values, the scales and the losses, absolute: at the first start, after each sweep of the first descent, and after
    each other descent.
    """
    table = None if isinstance(levels.quantizer, Uniform) else table_of(levels.quantizer)
    values, found = torch.empty_like(wanted), steps.contiguous().clone()
    losses = torch.empty(sweeps + rounds, dtype=torch.float64, device="cpu")
    order = columns.to(torch.int64).contiguous()
    (wanted_at, gram_at, spread_at, table_at, steps_at, values_at), sizes = native_buffers(
        wanted.contiguous(), gram.contiguous(), spread, table, found, values
    )
    wanted_size, gram_size, spread_size, table_size, steps_size, values_size = sizes
    arguments = native.Rows(
        wanted_at,
        gram_at,
        spread_at,
        order.data_ptr(),
        table_at,
        steps_at,
        values_at,
        losses.data_ptr(),
        *wanted.shape,
        *levels.quantizer.range,
        levels.group,
        rounds,
        sweeps,
        torch.get_num_threads(),
        (wanted_size, gram_size, spread_size, order.nbytes, table_size, steps_size, values_size, losses.nbytes),
    )
    native.check(native.library().halfplate_rows(ctypes.byref(arguments)), "descent over rows")
    return values, found, losses.tolist()
