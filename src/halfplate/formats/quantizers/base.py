"""The interface of quantizers, and the search for a scale that all of them can use."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from halfplate.formats.quantizers.storage import HALVES, Storage, SuperScales

TRIES = 16  # number of scales that are compared
SUPER_COLUMNS = 256  # that share a super-scale at the least


class Quantizer(Protocol):
    """Maps values to integers q of a few bits and back, with fp16 parameters that a group of values shares.

    A quantizer does not depend on matrices: its callers group, mask and pack values. A stored code is q + 2^(bits − 1), so q
    fits int8. A quantizer may also have `storage`, which says how the parameters of groups are stored (`storage_of`).
    """

    @property
    def name(self) -> str:
        """Its name as a value of `core_dtype`."""

    @property
    def bits(self) -> int:
        """Bits per code, at most 8."""

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest q."""

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the parameters of a group: `scales` is stored as `weight_scales`, unless the quantizer has a `storage`."""

    def nearest(self, values: Tensor, *parameters: Tensor) -> Tensor:
        """The q whose value is nearest to each of `values`, in their dtype; 0 if the scale is 0.

        parameters: in the order of `stored`, in shapes that broadcast to `values`.
        """

    def decode(self, numbers: Tensor, *parameters: Tensor) -> Tensor:
        """The values of the q in `numbers` (any dtype), in the dtype of the parameters."""

    def refit(
        self, values: Tensor, shares: Sequence[float] | None = None, energy: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The best parameters for groups of values, and their q.

        values: fp32 (..., width), one group per row.
        shares: fractions of the scale without clipping that are compared; None for those of the quantizer.
        energy: weight of the squared error of each value, in a shape that broadcasts to `values`.
        Returns q, fp32 (..., width), and fp16 parameters (...), which are not finite if fp16 cannot hold them.
        """


def storage_of(quantizer: Quantizer, group: int = SUPER_COLUMNS) -> Storage:
    """How the parameters of groups of `group` columns are stored: as the quantizer's `storage` says, or as fp16 numbers if it has none.

    Under super-scales, smaller groups share one across at least as many columns as a block of ggml's K types has.
    """
    storage: Storage = getattr(quantizer, "storage", HALVES)
    if isinstance(storage, SuperScales) and storage.span * group < SUPER_COLUMNS:
        return replace(storage, span=SUPER_COLUMNS // group)
    return storage


def has_scales_alone(quantizer: Quantizer) -> bool:
    """Whether every value is a scale times a number that only depends on the code, as the sweep of ARMOR needs."""
    return quantizer.stored == ("scales",)


def whole_numbers(quantizer: Quantizer) -> tuple[int, ...] | None:
    """The number that each code multiplies its scale by, smallest q first; None if they are not whole or there are other parameters."""
    if not has_scales_alone(quantizer):
        return None
    least, greatest = quantizer.range
    every = torch.arange(least, greatest + 1, dtype=torch.float32, device="cpu")
    numbers = [float(number) for number in quantizer.decode(every, torch.ones_like(every)).tolist()]
    return tuple(map(int, numbers)) if all(number.is_integer() for number in numbers) else None


def shares_down_to(least: float) -> list[float]:
    """`TRIES` fractions of the scale without clipping, from 1 down to `least`."""
    return [1 - (1 - least) * attempt / (TRIES - 1) for attempt in range(TRIES)]


def best_scales(
    values: Tensor,
    unclipped: Tensor,
    shares: Sequence[float],
    rounded: Callable[[Tensor], Tensor],
    energy: Tensor | None = None,
) -> Tensor:
    """The fp16 scale with the least squared error for each row of `values`, fp32 (..., width); not finite if none fits.

    unclipped: the scales without clipping, fp32 (...).
    rounded: returns `values` rounded with fp16 scales (...), in a tensor that may be overwritten.
    shares, energy: as in `Quantizer.refit`.
    """
    best, best_error = half_above(unclipped), torch.full_like(unclipped, torch.inf)
    if len(shares) == 1 or not bool(best.isfinite().all()):
        return best
    for share in shares:
        scales = half_above(unclipped * share)
        error = rounded(scales).sub_(values).square_()
        error = (error if energy is None else error.mul_(energy)).sum(-1)
        better = error < best_error
        best, best_error = torch.where(better, scales, best), torch.where(better, error, best_error)
    return best


def half_above(values: Tensor) -> Tensor:
    """The smallest fp16 number not below each of `values`, fp32, 0 or more."""
    half = values.to(torch.float16)
    # For non-negative fp16 numbers, the next larger number has the next larger bit pattern.
    above = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.float() < values, above, half)
