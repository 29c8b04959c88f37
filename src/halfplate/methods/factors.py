"""What methods without a core share: how much of a matrix they may take, and the sizes among which a budget chooses."""

from collections.abc import Callable, Iterator

from halfplate.errors import HalfplateError
from halfplate.formats.spec import WeightSpec

# Of the original bytes; a budget chooses among these.
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def check_share(share: float) -> None:
    """Raise HalfplateError unless `share` is a fraction of a matrix."""
    if not 0 < share < 1:
        raise HalfplateError(f"share={share} must be a fraction of the original bytes, above 0 and below 1; try 0.5")


def largest(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from `least` to `most` that fits, of numbers that fit up to some limit; `least` - 1 if none does."""
    low, high = least - 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def at_shares(sized: Callable[[float], WeightSpec]) -> Iterator[WeightSpec]:
    """The specifications at SHARES that a matrix has."""
    for share in SHARES:
        try:
            yield sized(share)
        except HalfplateError:  # too small for this share
            continue


def check_smaller(spec: WeightSpec, what: str) -> None:
    """Raise HalfplateError unless `spec` takes fewer bytes than the matrix it stands for. what: its size, in words."""
    if spec.nbytes >= spec.dense_nbytes:
        raise HalfplateError(
            f"{what} of a matrix {spec.d_out}×{spec.d_in} takes {spec.nbytes} bytes, and the matrix itself {spec.dense_nbytes}; choose less, or exclude the matrix"
        )


def nothing_left(share: float, spec: WeightSpec, least: str, nbytes: int) -> HalfplateError:
    """The error for a share that is too small. least: the smallest form, in words; nbytes: what that takes."""
    return HalfplateError(
        f"share={share:g} of a matrix {spec.d_out}×{spec.d_in} leaves nothing: {least} takes {nbytes / spec.dense_nbytes:.3f} of it; "
        "raise the share, or exclude the matrix"
    )
