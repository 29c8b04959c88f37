"""ROCKET: a sparse dictionary from one eigendecomposition."""

from dataclasses import dataclass

from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.spec import WeightSpec
from halfplate.methods.dictionaries import DictionaryMethod
from halfplate.solvers.dictionary import atoms_for, coefficients_on, largest_support, principal


@dataclass(frozen=True)
class Rocket(DictionaryMethod):
    """W ≈ C · A: principal directions of the weighted rows, the largest coefficients of each row, and atoms fitted to them.

    iterations: of least squares for coefficients and atoms in turn, on the same support; the paper takes steps of Adam instead.

    The size of every matrix can be chosen by a budget (`--budget`, `--fit`), which replaces the knapsack of the paper; all bytes count,
    also those of positions. Each row keeps equally many coefficients; the paper moves 0.5 % of them between rows.

    Source: ROCKET, from the authors of CoSpaDi (steps 1 to 5 of its factorisation).
    """

    name = "rocket"
    summary = "sparse dictionary from principal directions, then least squares, without a core"
    iterations: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 0:
            raise HalfplateError(f"iterations={self.iterations} must be 0 or more; try 5")

    def flops(self, spec: WeightSpec) -> float:
        options = spec.options("dictionary")
        coding = spec.d_out * (int(options["kept"]) ** 3 + int(options["atoms"]) * spec.d_in)
        return 20.0 * spec.d_out * spec.d_in * min(spec.d_out, spec.d_in) + 2.0 * (self.iterations + 2) * coding

    def _solved(self, rows: Tensor, atoms: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
        found = principal(rows, atoms)
        coefficients = rows @ found.T
        support = largest_support(coefficients.abs(), kept)
        coefficients = coefficients * support
        for _ in range(self.iterations + 1):
            found = atoms_for(rows, coefficients)
            coefficients = coefficients_on(rows, found, support)
        return found, coefficients, support
