"""The interface of all compression methods."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from halfplate.effort import Effort
from halfplate.errors import HalfplateError
from halfplate.formats.chain import Chain
from halfplate.formats.parts.core import NMSparse
from halfplate.formats.spec import ExtraPart, WeightSpec
from halfplate.statistics import InputStatistics, Statistic

UNUSED_CORE = "bf16"  # core_dtype of a matrix without a core, the default of a recipe
WEIGHT_COPIES = 14  # fp32 matrices of the size of the weight that a solver holds at most


@dataclass(frozen=True)
class Solution:
    """A compressed matrix and, for iterative solvers, the objective after each iteration, relative to that of the zero matrix."""

    weight: Chain
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Method(ABC):
    """A way to compress one matrix. Its fields are its typed, immutable configuration.

    A method receives a weight, the statistics of its inputs and the specification of the result. It does not depend on models, files
    or processes, and gives the same result for the same input in every process.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    wrapped: ClassVar[bool] = False  # whether it makes block-diagonal wrappers around the core
    low_rank: ClassVar[bool] = False  # whether it adds a low-rank part to the core
    sparse: ClassVar[bool] = True  # whether it supports N:M patterns
    dense: ClassVar[bool] = False  # whether it supports unpruned cores
    coreless: ClassVar[bool] = False  # whether its result has no core and consists of other parts (pattern none)
    version: ClassVar[int] = 1

    @property
    def parts(self) -> tuple[ExtraPart, ...]:
        """The parts of the result that have no field of their own in a specification."""
        return ()

    @property
    def permutes(self) -> bool:
        """Whether the result reorders its inputs."""
        return False

    @property
    @abstractmethod
    def requires(self) -> Statistic:
        """The statistics that `compress` needs; calibration collects no more."""

    def check_spec(self, spec: WeightSpec) -> None:
        """Raise HalfplateError if this method cannot make a matrix of `spec`; called by planning before any work."""
        if spec.pattern.is_none != self.coreless:
            cure = (
                "which makes no core; use pattern none"
                if self.coreless
                else "which makes a core; use pattern 2:4, or method svd"
            )
            raise HalfplateError(f"pattern='{spec.pattern}' is not supported by method {self.name!r}, {cure}")
        if self.coreless and spec.core_dtype != UNUSED_CORE:
            raise HalfplateError(
                f"core_dtype={spec.core_dtype!r} is the type of a core, and method {self.name!r} makes none; leave it out, or set wrapper_dtype"
            )
        if spec.pattern.is_dense and not self.dense:
            raise HalfplateError(
                f"pattern='dense' is not supported by method {self.name!r}; use pattern 2:4, or method armor, gptq or rtn"
            )
        if not (spec.pattern.is_dense or self.sparse or self.coreless):
            raise HalfplateError(
                f"pattern='{spec.pattern}' is not supported by method {self.name!r}, which does not prune; use pattern dense, or method armor"
            )
        if not self.wrapped and (spec.out_block or spec.in_block):
            raise HalfplateError(
                f"block_size={max(spec.out_block, spec.in_block)} needs wrappers, which method {self.name!r} does not make; use block_size=0"
            )
        if spec.rank and not (self.low_rank or self.coreless):
            raise HalfplateError(
                f"rank={spec.rank} needs a low-rank part, which method {self.name!r} does not make; use rank=0"
            )
        if _names(spec.parts) != _names(self.parts) or not (self.coreless or spec.parts == self.parts):
            raise HalfplateError(
                f"parts={_names(spec.parts)} does not match method {self.name!r}; expected {_names(self.parts)}"
            )
        if spec.permuted and not self.permutes:
            raise HalfplateError(
                f"permuted=True is not supported by method {self.name!r} as configured; use permuted=False"
            )

    def sized(self, spec: WeightSpec) -> WeightSpec:
        """`spec` with the rank or the options of parts that this method has for a matrix of that shape; raises HalfplateError if there are none."""
        return spec

    def sizes(self, spec: WeightSpec) -> Iterable[WeightSpec]:
        """`spec` at other sizes, among which a budget chooses, if this method has such a choice of its own."""
        return ()

    def flops(self, spec: WeightSpec) -> float:
        """Approximate floating-point operations of `compress`; with a measured rate, they estimate the time."""
        weights = spec.d_out * spec.d_in
        if self.requires >= Statistic.GRAM:
            return float(spec.d_in**3 + weights * spec.d_in)
        return 20.0 * weights

    def solving_nbytes(self, spec: WeightSpec) -> int:
        """The most bytes that `compress` holds in addition to the weight and the statistics."""
        grams = 2 * spec.d_in**2 if self.requires >= Statistic.GRAM else 0
        return 8 * grams + 4 * WEIGHT_COPIES * spec.d_out * spec.d_in

    def quick(self) -> "Method":
        """This method with a fraction of the work, for comparing specifications."""
        return self

    def at_effort(self, effort: Effort) -> "Method":
        """This method with the work of an effort, where its options leave it open."""
        return self

    @abstractmethod
    def compress(self, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
        """Compress `weight`, fp32 (d_out, d_in), to the format that `spec` describes."""


def check_inputs(method: Method, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> None:
    """Raise HalfplateError unless `weight`, `spec` and the statistics that `method` requires fit together and are finite."""
    expected = (spec.d_out, spec.d_in)
    if tuple(weight.shape) != expected:
        raise HalfplateError(
            f"weight has shape {tuple(weight.shape)}, expected {expected}; make the specification for this matrix"
        )
    method.check_spec(spec)
    _check_finite("weight", weight)
    if method.requires >= Statistic.DIAGONAL:
        diagonal = statistics.require_diagonal()
        if tuple(diagonal.shape) != (spec.d_in,):
            raise HalfplateError(
                f"diagonal has shape {tuple(diagonal.shape)}, expected {(spec.d_in,)}; collect the statistics of this matrix"
            )
        _check_finite("diagonal", diagonal)
        if bool((diagonal < 0).any()):
            raise HalfplateError(
                f"diagonal={float(diagonal.min()):.3g} at its least, expected 0 or more; a second moment is never negative, collect it again"
            )
    if method.requires >= Statistic.GRAM:
        gram = statistics.require_gram()
        if tuple(gram.shape) != (spec.d_in, spec.d_in):
            raise HalfplateError(
                f"gram has shape {tuple(gram.shape)}, expected {(spec.d_in, spec.d_in)}; collect the statistics of this matrix"
            )
        _check_finite("gram", gram)


def _names(parts: tuple[ExtraPart, ...]) -> list[str]:
    return [part.name for part in parts]


def _check_finite(name: str, tensor: Tensor) -> None:
    if not bool(tensor.isfinite().all()):
        position = (~tensor.isfinite()).nonzero()[0].tolist()
        raise HalfplateError(
            f"{name}{position} is {float(tensor[tuple(position)])}, expected finite numbers; repair the source of it"
        )


def store(weight: Tensor, mask: Tensor, spec: WeightSpec) -> Chain:
    """Store `weight` (d_out, d_in) at the true entries of `mask` (exactly N per group) in the core dtype of `spec`, without wrappers.

    Quantised cores are rounded to nearest, with one scale per row and `spec.group` columns. Raises HalfplateError if a kept value is
    too large for the dtype.
    """
    return Chain.of(spec, NMSparse.from_dense(weight, mask, spec.pattern, spec.core_dtype, spec.group))
