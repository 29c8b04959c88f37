"""One matrix of a model: solve it, put the result in its place, and judge it."""

import time
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.methods.base import Method
from halfplate.models.linears import replace_linear
from halfplate.solvers.target import corrected_weight
from halfplate.statistics import InputStatistics, Statistic


@dataclass(frozen=True)
class MatrixRecord:
    """What became of one matrix.

    relative_error: squared error of the outputs over that of a zero matrix, weighted as `error_kind` says: by the `gram`
    (the true output error), by its `diagonal`, or by nothing (`weight`). losses: the solver's objective by iteration.
    """

    name: str
    relative_error: float
    error_kind: str
    losses: tuple[float, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """What the checkpoint keeps; times would make equal runs unequal."""
        return {"relative_error": self.relative_error, "error_kind": self.error_kind, "losses": list(self.losses)}

    def facts(self) -> dict[str, Any]:
        """What the log and trackers are told."""
        ends = {"first_loss": self.losses[0], "loss": self.losses[-1]} if self.losses else {}
        return {
            "event": "matrix",
            "name": self.name,
            "relative_error": self.relative_error,
            "error_kind": self.error_kind,
            **ends,
            "iterations": max(len(self.losses) - 1, 0),
            "seconds": round(self.seconds, 3),
        }


def compress_matrix(
    model: nn.Module,
    name: str,
    method: Method,
    statistics: InputStatistics,
    spec: WeightSpec,
    cross_damping: float | Literal["none"],
) -> MatrixRecord:
    """Replace the linear `name` of `model` by what `method` makes of it, and judge that.

    cross_damping: of the correction for inputs that come through a compressed prefix (halfplate.solvers.target), or `none`.
    Raises HalfplateError naming the matrix where the method refuses it or its values do not fit their types.
    """
    start = time.perf_counter()
    linear = cast(nn.Linear, model.get_submodule(name))
    weight = linear.weight.detach().float()
    if statistics.cross is not None and cross_damping != "none" and method.requires >= Statistic.GRAM:
        weight = corrected_weight(weight, statistics.require_gram(), statistics.cross, cross_damping)
    try:
        solution = method.compress(weight, statistics, spec)
    except HalfplateError as refusal:
        # A method does not know which matrix it works on.
        raise HalfplateError(f"{name}: {refusal}") from None
    dense = solution.weight.dense()
    if not bool(dense.isfinite().all()):
        raise HalfplateError(
            f"{name}: method={method.name!r} gave values that core_dtype={spec.core_dtype!r}, wrapper_dtype={spec.wrapper_dtype!r} cannot hold; "
            "try --core-dtype fp32 --wrapper-dtype fp32, another method, or --exclude it"
        )
    replace_linear(model, name, CompressedLinear.from_weight(solution.weight, spec, linear.bias))
    error, kind = relative_error(weight, dense, statistics)
    return MatrixRecord(name, error, kind, tuple(solution.losses), time.perf_counter() - start)


def relative_error(weight: Tensor, dense: Tensor, statistics: InputStatistics) -> tuple[float, str]:
    """tr(D H Dᵀ) / tr(W H Wᵀ) with D = W - `dense`, both (d_out, d_in), and what stood for H.

    H is the Gram matrix, else its diagonal, else the identity. It is 0 where both traces are.
    """

    def weighted(matrix: Tensor) -> float:
        if statistics.gram is not None:
            gram = statistics.gram.to(matrix.dtype)
            return float(((matrix @ gram) * matrix).sum(dtype=torch.float64))
        squares = matrix.square()
        if statistics.diagonal is not None:
            squares = squares * statistics.diagonal
        return float(squares.sum(dtype=torch.float64))

    # Squares of large weights would leave the range of fp32; the ratio does not know their scale.
    largest = weight.abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
    weight, dense = weight / largest, dense / largest
    kind = "gram" if statistics.gram is not None else "diagonal" if statistics.diagonal is not None else "weight"
    # Round-off can take the trace of a near-singular Gram just below zero.
    error, whole = max(weighted(weight - dense), 0.0), weighted(weight)
    return (error / whole if whole > 0 else 0.0), kind
