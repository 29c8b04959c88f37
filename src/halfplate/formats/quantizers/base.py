"""What a quantizer is, and the search for a scale that all of them may use."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

TRIES = 16  # scales that are compared


class Quantizer(Protocol):
    """Turns values into whole numbers q of a few bits and back, with fp16 parameters that a group of values shares.

    A quantizer knows no matrix: how values are grouped, masked and packed is the business of its callers. A stored code is
    q + 2^(bits − 1), so q fits int8.
    """

    @property
    def name(self) -> str:
        """What `core_dtype` calls it."""

    @property
    def bits(self) -> int:
        """Bits of a code, at most 8."""

    @property
    def range(self) -> tuple[int, int]:
        """Least and greatest q."""

    @property
    def stored(self) -> tuple[str, ...]:
        """The parameters of a group, as the end of their tensors' names: `scales` is stored as `weight_scales`."""

    def nearest(self, values: Tensor, *parameters: Tensor) -> Tensor:
        """The q whose value is nearest to each of `values`, in their dtype; 0 where the scale is 0.

        parameters: in the order of `stored`, in shapes that spread over `values`.
        """

    def decode(self, numbers: Tensor, *parameters: Tensor) -> Tensor:
        """The values that the q in `numbers`, of any dtype, stand for, in the dtype of the parameters."""

    def refit(
        self, values: Tensor, shares: Sequence[float] | None = None, energy: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The best parameters for groups of values, and the q with them.

        values: fp32 (..., width), a group a row. shares: of the scale that clips nothing, which are compared; those of the
        quantizer if None. energy: what the squared error of each number counts, in a shape that spreads over `values`.
        Returns q, fp32 (..., width), and fp16 parameters (...), which are not finite where fp16 cannot hold them.
        """


def has_scales_alone(quantizer: Quantizer) -> bool:
    """Whether every value is a scale times a number that the code alone decides, as the sweep of ARMOR needs."""
    return quantizer.stored == ("scales",)


def shares_down_to(least: float) -> list[float]:
    """`TRIES` shares of the scale that clips nothing, from 1 down to `least`."""
    return [1 - (1 - least) * attempt / (TRIES - 1) for attempt in range(TRIES)]


def best_scales(
    values: Tensor,
    unclipped: Tensor,
    shares: Sequence[float],
    rounded: Callable[[Tensor], Tensor],
    energy: Tensor | None = None,
) -> Tensor:
    """The fp16 scale of least squared error for each row of `values`, fp32 (..., width); not finite if any does not fit.

    unclipped: the scales that clip nothing, fp32 (...). rounded: gives the values that `values` become with fp16 scales
    (...), in a tensor that may be overwritten. shares, energy: as in `Quantizer.refit`.
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
    """The least fp16 number that is not below each of `values`, fp32, 0 or more."""
    half = values.to(torch.float16)
    # Of fp16 numbers that are not negative, the next larger one has the next larger bits.
    above = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.float() < values, above, half)
