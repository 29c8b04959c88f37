"""The statistics of the inputs of a matrix that methods may use."""

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from halfplate.errors import HalfplateError


class Statistic(IntEnum):
    """Kinds of input statistics; each includes those before it."""

    NONE = 0
    DIAGONAL = 1
    GRAM = 2


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Second moments of the inputs X (tokens, d_in) of one matrix.

    tokens: rows of X.
    diagonal: fp32 (d_in,), mean of X².
    gram: fp32 or fp64 (d_in, d_in), XᵀX / tokens.
    cross: fp64 (d_in, d_in), X_originalᵀ X / tokens, if X comes from compressed layers and X_original from the original model.
    """

    tokens: int = 0
    diagonal: Tensor | None = None
    gram: Tensor | None = None
    cross: Tensor | None = None

    def require_diagonal(self) -> Tensor:
        """The diagonal; raises HalfplateError if it was not collected."""
        if self.diagonal is None:
            raise HalfplateError(
                "statistics=none were collected, expected the diagonal of the second moment; calibrate first"
            )
        return self.diagonal

    def require_gram(self) -> Tensor:
        """The Gram matrix; raises HalfplateError if it was not collected."""
        if self.gram is None:
            raise HalfplateError(
                "statistics without a Gram matrix were collected, expected one; calibrate with Statistic.GRAM"
            )
        return self.gram
