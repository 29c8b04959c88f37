"""What methods that make a sparse dictionary share."""

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.chain import Chain
from halfplate.formats.parts.dictionary import Dictionary
from halfplate.formats.parts.no_core import NoCore
from halfplate.formats.quantizers.rounding import round_to_float
from halfplate.formats.spec import ExtraPart, WeightSpec
from halfplate.methods.base import Solution, check_inputs
from halfplate.methods.factors import CorelessMethod, check_smaller, largest, nothing_left
from halfplate.solvers.dictionary import coefficients_on
from halfplate.solvers.whitening import Whitening
from halfplate.statistics import InputStatistics


@dataclass(frozen=True)
class DictionaryMethod(CorelessMethod):
    """W ≈ C · A: each output adds up a few of the atoms A, for the least output error.

    share: fraction of the original bytes, at 2 bytes a weight, that atoms, coefficients and their positions take at most.
    ratio: atoms for each coefficient of a row.
    weighting, damping: as for method svd.
    """

    share: float = 0.5
    ratio: float = 2.0
    weighting: str = "gram"
    damping: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.ratio < float("inf"):
            raise HalfplateError(f"ratio={self.ratio} must be a number of atoms for each coefficient, 1 or more; try 2")

    @property
    def parts(self) -> tuple[ExtraPart, ...]:
        return (ExtraPart.of("dictionary", atoms=1, kept=1),)

    def _at_share(self, spec: WeightSpec, share: float) -> WeightSpec:
        def at(atoms: int) -> WeightSpec:
            kept = max(round(atoms / self.ratio), 1)
            return replace(spec, parts=(ExtraPart.of("dictionary", atoms=atoms, kept=kept),))

        atoms = largest(1, min(spec.d_out, spec.d_in), lambda atoms: at(atoms).nbytes <= share * spec.dense_nbytes)
        if atoms < 1:
            raise nothing_left(share, spec, "one atom", at(1).nbytes)
        return at(atoms)

    def check_spec(self, spec: WeightSpec) -> None:
        super().check_spec(spec)
        atoms = int(spec.options("dictionary")["atoms"])
        if atoms > min(spec.d_out, spec.d_in):
            raise HalfplateError(
                f"atoms={atoms} of a matrix {spec.d_out}×{spec.d_in} must be at most {min(spec.d_out, spec.d_in)}"
            )
        check_smaller(spec, f"atoms={atoms}")

    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        check_inputs(self, weight, statistics, spec)
        whitening = Whitening.of(self.weighting, statistics, weight, self.damping)
        most = float(weight.abs().max())
        rows = whitening.into(weight.double() / (most if most > 0 else 1.0))
        atoms, kept = (int(spec.options("dictionary")[name]) for name in ("atoms", "kept"))
        found, coefficients, support = self._solved(rows, atoms, kept)
        # Atoms get the size of the weights, and coefficients are fitted to the atoms as they are stored.
        stored = whitening.back(found)
        sizes = stored.abs().amax(1, keepdim=True).clamp_min(1e-150)
        exponent = most**0.5 if most > 0 else 1.0
        rounded = round_to_float((stored / sizes * exponent).float(), spec.wrapper_dtype, "wrapper_dtype")
        coefficients = coefficients_on(rows, whitening.into(rounded.double() / exponent), support)
        sized = round_to_float((coefficients * (most / exponent)).float(), spec.wrapper_dtype, "wrapper_dtype")
        part = Dictionary.of(rounded, torch.where(support, sized, 0.0), support)
        return Solution(Chain.of(spec, NoCore.of(spec, weight.device), part))

    @abstractmethod
    def _solved(self, rows: Tensor, atoms: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
        """Atoms (atoms, d_in), coefficients and their support, bool (d_out, atoms), for whitened rows (d_out, d_in)."""
