"""The native form of a descent of rows.py: values that are a number times a scale plus a minimum, under any storage of both."""

import ctypes

import torch
from torch import Tensor

from halfplate.formats.quantizers import storage_of
from halfplate.formats.quantizers.storage import Halves, SuperScales
from halfplate.kernels import native
from halfplate.solvers.armor.native_rows import LARGEST_TABLE
from halfplate.solvers.armor.stages import native_buffers
from halfplate.solvers.armor.sweep import Levels

STORED = (("scales",), ("scales", "minima"))  # parameters that native code knows


def affine_numbers(levels: Levels) -> Tensor | None:
    """What the scale is multiplied by for each code, fp32, rising; None if native code does not know the values or how they are stored.

    Each value is the number times the scale, plus the minimum if there is one.
    """
    quantizer = levels.quantizer
    if quantizer.stored not in STORED or not isinstance(storage_of(quantizer, levels.group), Halves | SuperScales):
        return None
    least, greatest = quantizer.range
    codes = torch.arange(least, greatest + 1, dtype=torch.float32, device="cpu")
    one, zero = torch.ones_like(codes), torch.zeros_like(codes)
    others = (one,) * (len(quantizer.stored) - 1)
    numbers = quantizer.decode(codes, one, *(zero for _ in others))
    if others and not torch.equal(quantizer.decode(codes, zero, *others), one):
        return None
    listed = len(numbers) <= LARGEST_TABLE and bool((numbers.diff() > 0).all())
    return numbers if listed or _are_consecutive(numbers) else None


def _are_consecutive(numbers: Tensor) -> bool:
    return bool((numbers.diff() == 1).all()) and float(numbers[0]).is_integer()


def descend_affine(
    wanted: Tensor,
    gram: Tensor,
    columns: Tensor,
    spread: Tensor,
    parameters: tuple[Tensor, ...],
    units: tuple[Tensor, ...],
    levels: Levels,
    sweeps: int,
    fits_freely: bool,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Minimise (w − s) C (w − s)ᵀ for every row over codes and storable parameters: one start, and `sweeps` sweeps.

    A sweep fits the parameters and then the codes of one group after the other. `affine_numbers` must know the quantizer.

    wanted, gram, columns, spread: as in `native_rows.solve_rows`.
    parameters: the first ones, fp32 (rows, ceil(cols / group)), storable with `units`, which are shaped like them.
    fits_freely: whether to return, too, what leaves least for the codes at the end, whether or not it can be stored.
    Returns the values, the parameters, those that were freely fitted or none, and the losses, absolute: fp64 (1 + sweeps, rows), at the
    start and after each sweep.
    """
    storage, numbers = storage_of(levels.quantizer, levels.group), affine_numbers(levels)
    assert numbers is not None, "affine_numbers knows the quantizer"
    table = None if _are_consecutive(numbers) else numbers
    found = [part.contiguous().clone() for part in parameters]
    steps, minima = _two(found)
    step_units, minimum_units = _two([part.contiguous() for part in units] if isinstance(storage, SuperScales) else [])
    free = [torch.empty_like(part) for part in found] if fits_freely else []
    free_steps, free_minima = _two(free)
    wanted, gram = wanted.contiguous(), gram.contiguous()
    values, order = torch.empty_like(wanted), columns.to(torch.int64).contiguous()
    losses = torch.empty(1 + sweeps, len(wanted), dtype=torch.float64, device="cpu")
    addresses, sizes = native_buffers(wanted, gram, spread, table, steps, values)
    (wanted_at, gram_at, spread_at, table_at, steps_at, values_at) = addresses
    rows = native.Rows(
        *(wanted_at, gram_at, spread_at, order.data_ptr(), table_at, steps_at, values_at, losses.data_ptr()),
        *wanted.shape,
        int(numbers[0]),
        int(numbers[0]) + len(numbers) - 1,
        levels.group,
        1,
        sweeps,
        torch.get_num_threads(),
        (*sizes[:3], order.nbytes, *sizes[3:], losses.nbytes),
    )
    addresses, sizes = native_buffers(minima, step_units, minimum_units, free_steps, free_minima)
    most = (1 << storage.bits) - 1 if isinstance(storage, SuperScales) else 0
    arguments = native.AffineRows(rows, *addresses, most, sizes)
    native.check(native.library().halfplate_affine_rows(ctypes.byref(arguments)), "descent over rows with minima")
    return values, tuple(found), tuple(free), losses


def _two(parts: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """The scales and the minima, None where there are none."""
    return (parts[0] if parts else None), (parts[1] if len(parts) > 1 else None)
