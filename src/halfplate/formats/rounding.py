"""Rounding values to the types they are stored in: floating-point numbers, and numbers on a grid.

A number on a grid is q · scale. Cores share one fp16 scale in each row and 128 (or 64, or 32) input columns; wrappers one in
each row.
"""

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.dtypes import stored_dtype
from halfplate.errors import HalfplateError

GROUP = 128  # columns that share a scale where nothing else is said
GROUPS = (32, 64, 128)
TRIES = 16  # scales that are compared, from the one that clips nothing down
# To what share of it; of the four levels of two bits the best leave all of a group's tail out.
LEAST_SHRINK = {2: 0.25, 3: 0.6, 4: 0.6, 8: 0.6}
ROW_HALVES = 10  # the least scale of a row of a wrapper is that which clips nothing, halved so often
CHUNK = 1 << 17  # values rounded at once: all passes over them stay in the cache


def grid_range(bits: int) -> tuple[int, int]:
    """Least and greatest q of a code of `bits`; eight bits leave out -128, so that |q| fits seven."""
    return (-127 if bits == 8 else -(1 << bits - 1)), (1 << bits - 1) - 1


def round_to_float(values: Tensor, name: str, argument: str) -> Tensor:
    """`values` in the type called `name`; raises HalfplateError naming `argument` where one is too large for it."""
    rounded = values.to(stored_dtype(name, argument))
    if not bool(rounded.isfinite().all()):
        raise _too_large(values, torch.finfo(rounded.dtype).max, name, argument)
    return rounded


def round_to_grid(values: Tensor, bits: int, width: int, name: str) -> tuple[Tensor, Tensor]:
    """Round to nearest, every `width` consecutive values of a row on a grid of their own.

    values: (rows, count). Returns q, int8 (rows, count), and fp16 scales (rows, ceil(count / width)). Of the scale that
    clips nothing and smaller ones, down to its `LEAST_SHRINK`, that of least squared error is taken, as rounded to fp16. Groups of zeros have scale 0.
    Raises HalfplateError where fp16 cannot hold a scale; `name` is the core_dtype that it blames.
    """
    rows, count = values.shape
    groups = -(-count // width)
    least, greatest = grid_range(bits)
    integers = torch.empty(rows, count, dtype=torch.int8, device=values.device)
    scales = torch.empty(rows, groups, dtype=torch.float16, device=values.device)
    shrinks = [1 - (1 - LEAST_SHRINK[bits]) * attempt / (TRIES - 1) for attempt in range(TRIES)]
    step = max(CHUNK // (groups * width), 1)
    for start in range(0, rows, step):
        chunk = functional.pad(values[start : start + step].detach().float(), (0, groups * width - count))
        chunk = chunk.reshape(-1, groups, width)
        scale = _best_scale(chunk, shrinks, least, greatest)
        if not bool(scale.isfinite().all()):
            raise _too_large(values, greatest * torch.finfo(torch.float16).max, name, "core_dtype")
        scales[start : start + step] = scale
        nearest = _nearest(chunk, scale, least, greatest)
        integers[start : start + step] = nearest.reshape(-1, groups * width)[:, :count].to(torch.int8)
    return integers, scales


def round_rows(matrix: Tensor, argument: str = "wrapper_dtype", energy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round each row (last dimension) to int8 in -127..127 and an fp16 scale (...), rounded up so that nothing clips.

    energy: what the squared error of each number counts, in a shape that spreads over `matrix`. With it the scale is that of
    least error, of the one that clips nothing and its halves, so that the large number of an input of hardly any energy
    does not take the precision of all others. Raises HalfplateError naming `argument` where fp16 cannot hold a scale.
    """
    least, greatest = grid_range(8)
    matrix = matrix.detach().float()
    shrinks = [1.0] if energy is None else [0.5**halves for halves in range(ROW_HALVES + 1)]
    scale = _best_scale(matrix, shrinks, least, greatest, energy)
    if not bool(scale.isfinite().all()):
        raise _too_large(matrix, greatest * torch.finfo(torch.float16).max, "int8", argument)
    return _nearest(matrix, scale, least, greatest).to(torch.int8), scale


def _best_scale(
    values: Tensor, shrinks: list[float], least: int, greatest: int, energy: Tensor | None = None
) -> Tensor:
    """The fp16 scale of least squared error for each row of `values`, fp32 (..., width); inf where none fits.

    shrinks: shares of the scale that clips nothing, which are compared. energy: as in `round_rows`.
    """
    unclipped = values.abs().amax(-1) / greatest
    best, best_error = _half_above(unclipped), torch.full_like(unclipped, torch.inf)
    if len(shrinks) == 1 or not bool(best.isfinite().all()):
        return best
    for shrink in shrinks:
        scale = _half_above(unclipped * shrink)
        error = _nearest(values, scale, least, greatest).mul_(scale.float()[..., None]).sub_(values).square_()
        error = (error if energy is None else error.mul_(energy)).sum(-1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def _nearest(values: Tensor, scale: Tensor, least: int, greatest: int) -> Tensor:
    """The q of each value, fp32, for one scale a group."""
    inverse = torch.where(scale > 0, scale.float().reciprocal(), 0.0)
    return (values * inverse[..., None]).round_().clamp_(least, greatest)


def _half_above(values: Tensor) -> Tensor:
    """The least fp16 number that is not below each of `values`, fp32, 0 or more."""
    half = values.to(torch.float16)
    # Of fp16 numbers that are not negative, the next larger one has the next larger bits.
    above = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.float() < values, above, half)


def _too_large(values: Tensor, limit: float, name: str, argument: str) -> HalfplateError:
    largest = float(values.abs().max())
    cure = "scale the weight down" if name in ("fp32", "bf16") else "use bf16"
    return HalfplateError(f"{argument}={name!r} cannot hold {largest:.3g}, expected at most {limit:.3g}; {cure}")
