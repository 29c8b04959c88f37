"""N:M sparsity patterns along the input dimension."""

import re
from dataclasses import dataclass

from halfplate.errors import HalfplateError


@dataclass(frozen=True)
class Pattern:
    """At most `n` non-zeros in every group of `m` consecutive inputs of a row; 1 of 1, called `dense`, keeps all, 0 of 1, `none`, nothing.

    Raises HalfplateError unless 0 < n < m <= 256, or it is `dense` or `none`.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (0 < self.n < self.m <= 256 or self.is_dense or self.is_none):
            raise HalfplateError(f"pattern={self} must be N:M with 0 < N < M <= 256; try 2:4")

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Read `N:M`, `dense` or `none`; raises HalfplateError for anything else."""
        for named in (DENSE, NONE):
            if text == str(named):
                return named
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
        if match is None:
            raise HalfplateError(f"pattern={text!r} is not of the form N:M; try 2:4")
        pattern = cls(int(match[1]), int(match[2]))
        if pattern.is_dense or pattern.is_none:
            what = "every value" if pattern.is_dense else "no value"
            raise HalfplateError(f"pattern={text!r} keeps {what}; write {pattern}")
        return pattern

    def __str__(self) -> str:
        return "dense" if self.is_dense else "none" if self.is_none else f"{self.n}:{self.m}"

    @property
    def is_dense(self) -> bool:
        """Whether every value is kept, so that there is no index."""
        return self.n == self.m == 1

    @property
    def is_none(self) -> bool:
        """Whether no value is kept, so that the matrix has no core and consists of its other parts."""
        return (self.n, self.m) == (0, 1)

    @property
    def index_bits(self) -> int:
        """Bits that store the position of one kept value inside its group."""
        return (self.m - 1).bit_length()

    def kept(self, d_in: int) -> int:
        """Kept values of a row with `d_in` inputs; raises HalfplateError unless M divides `d_in`."""
        if d_in % self.m:
            raise HalfplateError(
                f"d_in={d_in} is not a multiple of M={self.m} (pattern {self}); exclude this matrix or choose an M that divides it"
            )
        return d_in // self.m * self.n

    def index_nbytes(self, d_in: int) -> int:
        """Bytes of the packed positions of one row: each row starts on a byte."""
        return (self.kept(d_in) * self.index_bits + 7) // 8


DENSE = Pattern(1, 1)
NONE = Pattern(0, 1)
