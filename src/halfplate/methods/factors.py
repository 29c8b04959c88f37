"""What methods without a core share: how much of a matrix they may take, and the sizes among which a budget chooses."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial

from halfplate.errors import HalfplateError
from halfplate.formats.spec import WeightSpec
from halfplate.methods.base import Method
from halfplate.solvers.whitening import WEIGHTINGS, check_weighting
from halfplate.statistics import Statistic

# Of the original bytes; a budget chooses among these.
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class CorelessMethod(Method):
    """A method whose result has no core, and whose size follows from a share of the original bytes.

    Its fields are declared by each method, with its own defaults:

    share: fraction of the original bytes, at 2 bytes a weight, that the parts take at most.
    weighting, damping: of the errors (`Whitening.of`).
    """

    sparse = False
    coreless = True
    share: float
    weighting: str
    damping: float

    def __post_init__(self) -> None:
        check_share(self.share)
        check_weighting(self.weighting, self.damping)

    @property
    def requires(self) -> Statistic:
        return WEIGHTINGS[self.weighting]

    def sized(self, spec: WeightSpec) -> WeightSpec:
        return self._at_share(spec, self.share)

    def sizes(self, spec: WeightSpec) -> Iterator[WeightSpec]:
        return at_shares(partial(self._at_share, spec))

    @abstractmethod
    def _at_share(self, spec: WeightSpec, share: float) -> WeightSpec:
        """`spec` with the largest parts within `share`; raises HalfplateError if there are none."""


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
