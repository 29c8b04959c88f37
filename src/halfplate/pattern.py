"""N:M sparsity patterns along the input dimension."""

import math
import re
from dataclasses import dataclass

from halfplate.errors import HalfplateError


@dataclass(frozen=True)
class Pattern:
    """At most `n` non-zeros in every group of `m` consecutive inputs of a row.

    Raises HalfplateError unless 0 < n < m <= 256.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m <= 256:
            raise HalfplateError(f"pattern={self} must keep fewer than M of M, with 0 < N < M <= 256; try 2:4")

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Read `N:M`; raises HalfplateError on anything else."""
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
        if match is None:
            raise HalfplateError(f"pattern={text!r} is not of the form N:M; try 2:4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def index_bits(self) -> int:
        """Bits that store the position of one kept value inside its group."""
        return math.ceil(math.log2(self.m))

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
