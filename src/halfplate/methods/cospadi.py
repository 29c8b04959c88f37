"""CoSpaDi: a sparse dictionary by K-SVD and orthogonal matching pursuit."""

from dataclasses import dataclass

from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.spec import WeightSpec
from halfplate.methods.dictionaries import DictionaryMethod
from halfplate.solvers.dictionary import coefficients_on, principal, pursued, updated_by_atom


@dataclass(frozen=True)
class CoSpaDi(DictionaryMethod):
    """W ≈ C · A: sparse coding of the weighted rows and updates of one atom after another, in turn.

    iterations: of both. The first atoms are principal directions of the weighted rows.

    Source: Makhov et al., CoSpaDi, arXiv 2509.22075. Its dictionaries that several layers share are not implemented.
    """

    name = "cospadi"
    summary = "sparse dictionary by K-SVD and matching pursuit, without a core"
    iterations: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise HalfplateError(f"iterations={self.iterations} must be at least 1; try 5")

    def flops(self, spec: WeightSpec) -> float:
        options = spec.options("dictionary")
        atoms, kept = int(options["atoms"]), int(options["kept"])
        return 2.0 * self.iterations * spec.d_out * (kept**3 + kept * atoms**2 + 8 * kept * spec.d_in)

    def _solved(self, rows: Tensor, atoms: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
        found = principal(rows, atoms)
        support = pursued(rows, found, kept)
        coefficients = coefficients_on(rows, found, support)
        for iteration in range(self.iterations):
            found, coefficients = updated_by_atom(rows, found, coefficients)
            if iteration < self.iterations - 1:
                support = pursued(rows, found, kept)
            coefficients = coefficients_on(rows, found, support)
        return found, coefficients, support
