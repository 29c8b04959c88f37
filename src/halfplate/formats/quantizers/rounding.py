"""Rounding values to their stored form: floating-point numbers, or codes of a quantizer with its parameters.

Values of a core share parameters per row and 128 (or 64, or 32) input columns; values of an int8 wrapper share a scale per row.
"""

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.dtypes import stored_dtype
from halfplate.errors import HalfplateError
from halfplate.formats.quantizers import Quantizer, storage_of
from halfplate.formats.quantizers.storage import Storage
from halfplate.formats.quantizers.uniform import INT8

GROUP = 128  # default number of columns that share a scale
GROUPS = (16, 32, 64, 128)  # those of 16 are for unpruned cores, and have no kernel
ROW_HALVES = 10  # the smallest scale of a wrapper row is the one without clipping, halved this often
CHUNK = 1 << 17  # values rounded at once, so that they stay in the cache


def round_to_float(values: Tensor, name: str, argument: str) -> Tensor:
    """`values` in the type `name`; raises HalfplateError naming `argument` if a value is too large for it."""
    rounded = values.to(stored_dtype(name, argument))
    if not bool(rounded.isfinite().all()):
        raise _too_large(values, torch.finfo(rounded.dtype).max, name, argument)
    return rounded


def round_groups(
    values: Tensor, quantizer: Quantizer, width: int, storage: Storage | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Round to nearest, with separate parameters for every `width` consecutive values of a row that the quantizer can store.

    values: (rows, count).
    storage: of the groups; None for that of groups of 32 columns or more.
    Returns q, int8 (rows, count), and for each of `quantizer.stored` a tensor, fp16 (rows, ceil(count / width)).
    Raises HalfplateError naming the core_dtype if fp16 cannot hold a parameter.
    """
    numbers, fitted = fit_groups(values, quantizer, width)
    storage = storage or storage_of(quantizer)
    if storage.span == 1:
        return numbers, fitted
    parameters = storage.nearest(quantizer.stored, fitted, storage.units(quantizer.stored, fitted))
    for rows in torch.arange(len(values), dtype=torch.int64, device=values.device).split(
        max(CHUNK // values.shape[1], 1)
    ):
        each = (part[rows].float().repeat_interleave(width, 1)[:, : values.shape[1]] for part in parameters)
        numbers[rows] = quantizer.nearest(values[rows].detach().float(), *each).to(torch.int8)
    return numbers, parameters


def fit_groups(values: Tensor, quantizer: Quantizer, width: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`round_groups` with the best fp16 parameters of each group alone, whether or not the quantizer can store them."""
    rows, count = values.shape
    groups = -(-count // width)
    numbers = torch.empty(rows, count, dtype=torch.int8, device=values.device)
    parameters = tuple(torch.empty(rows, groups, dtype=torch.float16, device=values.device) for _ in quantizer.stored)
    step = max(CHUNK // (groups * width), 1)
    for start in range(0, rows, step):
        chunk = functional.pad(values[start : start + step].detach().float(), (0, groups * width - count))
        nearest, found = quantizer.refit(chunk.reshape(-1, groups, width))
        _check_fits(values, quantizer, found, "core_dtype")
        for whole, part in zip(parameters, found, strict=True):
            whole[start : start + step] = part
        numbers[start : start + step] = nearest.reshape(-1, groups * width)[:, :count].to(torch.int8)
    return numbers, parameters


def round_rows(matrix: Tensor, argument: str = "wrapper_dtype", energy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round each row (last dimension) to int8 in -127..127 and an fp16 scale (...), rounded up so that nothing is clipped.

    energy: weight of the squared error of each value, in a shape that broadcasts to `matrix`. With it, the scale with the least
        error is chosen among the scale without clipping and its halves, so that a large value of an input with hardly any energy
        does not reduce the precision of all others.
    Raises HalfplateError naming `argument` if fp16 cannot hold a scale.
    """
    matrix = matrix.detach().float()
    shares = [1.0] if energy is None else [0.5**halves for halves in range(ROW_HALVES + 1)]
    numbers, parameters = INT8.refit(matrix, shares, energy)
    _check_fits(matrix, INT8, parameters, argument)
    return numbers.to(torch.int8), parameters[0]


def _check_fits(values: Tensor, quantizer: Quantizer, parameters: tuple[Tensor, ...], argument: str) -> None:
    if all(bool(part.isfinite().all()) for part in parameters):
        return
    largest = torch.tensor(torch.finfo(torch.float16).max, dtype=torch.float32, device="cpu")
    ends = torch.tensor(quantizer.range, dtype=torch.int64, device="cpu")
    limit = float(quantizer.decode(ends, *[largest] * len(parameters)).abs().max())
    raise _too_large(values, limit, quantizer.name, argument)


def _too_large(values: Tensor, limit: float, name: str, argument: str) -> HalfplateError:
    largest = float(values.abs().max())
    cure = "scale the weight down" if name in ("fp32", "bf16") else "use bf16"
    return HalfplateError(f"{argument}={name!r} cannot hold {largest:.3g}, expected at most {limit:.3g}; {cure}")
