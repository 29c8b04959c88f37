"""Solving one matrix of a model, or several that share a wrapper, and measuring the error."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats import Chain, WeightSpec
from halfplate.formats.sharing import split, stacked, stacked_spec
from halfplate.methods.base import Method
from halfplate.solvers.target import corrected_weight
from halfplate.statistics import InputStatistics, Statistic


@dataclass(frozen=True)
class MatrixRecord:
    """The result for one matrix.

    relative_error: squared output error relative to that of a zero matrix, weighted as `error_kind` says: by `gram` (the true output
        error), by its `diagonal`, or unweighted (`weight`).
    losses: the solver's objective by iteration.
    tokens: calibration tokens that were routed to the expert of this matrix; None for other matrices, which see all.
    """

    name: str
    relative_error: float
    error_kind: str
    losses: tuple[float, ...]
    seconds: float
    tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The entry in the checkpoint, without times, so that equal runs give equal files."""
        tokens = {} if self.tokens is None else {"tokens": self.tokens}
        return {
            "relative_error": self.relative_error,
            "error_kind": self.error_kind,
            "losses": list(self.losses),
        } | tokens

    @classmethod
    def from_json(cls, name: str, entry: Mapping[str, Any]) -> "MatrixRecord":
        """The record for an entry of `to_json`, with `seconds` if they are known."""
        losses = tuple(float(loss) for loss in entry["losses"])
        seconds, tokens = entry.get("seconds", 0.0), entry.get("tokens")
        return cls(name, entry["relative_error"], entry["error_kind"], losses, seconds, tokens)

    def facts(self) -> dict[str, Any]:
        """The facts for the log and trackers."""
        ends = {"first_loss": self.losses[0], "loss": self.losses[-1]} if self.losses else {}
        return {
            "event": "matrix",
            "name": self.name,
            "relative_error": self.relative_error,
            "error_kind": self.error_kind,
            **ends,
            "iterations": max(len(self.losses) - 1, 0),
            **({} if self.tokens is None else {"tokens": self.tokens}),
            "seconds": round(self.seconds, 3),
        }


def solve_matrices(
    names: Sequence[str],
    weights: Sequence[Tensor],
    method: Method,
    statistics: InputStatistics,
    specs: Mapping[str, WeightSpec],
    cross_damping: float | Literal["none"],
) -> tuple[list[Chain], list[MatrixRecord]]:
    """Compress the matrices `names`, one or all that share a wrapper, by `method`, and measure the errors.

    Matrices that share a wrapper are solved as one; each of them has the losses of that solve.

    weights: fp32 (d_out, d_in) each.
    statistics: of their common input.
    cross_damping: of the correction for inputs from compressed layers (halfplate.solvers.target), or `none`.
    Raises HalfplateError naming the matrix if the method refuses it or its values do not fit their types.
    """
    start = time.perf_counter()
    wanted = [specs[name] for name in names]
    if statistics.cross is not None and cross_damping != "none" and method.requires >= Statistic.GRAM:
        gram, cross = statistics.require_gram(), statistics.cross
        weights = [corrected_weight(weight, gram, cross, cross_damping) for weight in weights]
    solved, losses = solve_group(weights, method, statistics, wanted, names[0])
    seconds = (time.perf_counter() - start) / len(names)
    records = []
    for name, weight, compressed in zip(names, weights, solved, strict=True):
        spec, dense = compressed.spec, compressed.dense()
        if not bool(dense.isfinite().all()):
            raise HalfplateError(
                f"{name}: method={method.name!r} gave values that core_dtype={spec.core_dtype!r}, wrapper_dtype={spec.wrapper_dtype!r} cannot hold; "
                "try --core-dtype fp32 --wrapper-dtype fp32, another method, or --exclude it"
            )
        error, kind = relative_error(weight, dense, statistics)
        records.append(MatrixRecord(name, error, kind, losses, seconds))
    return solved, records


def solve_group(
    weights: Sequence[Tensor], method: Method, statistics: InputStatistics, specs: Sequence[WeightSpec], name: str
) -> tuple[list[Chain], tuple[float, ...]]:
    """Compress `weights` (d_out, d_in) of one input, stacked if there are several; returns the matrices and the losses.

    Raises HalfplateError naming the matrix `name` if the method refuses it.
    """
    try:
        solution = method.compress(stacked(weights, specs), statistics, stacked_spec(specs))
    except HalfplateError as refusal:
        # The method does not know the name of the matrix.
        raise HalfplateError(f"{name}: {refusal}") from None
    return split(solution.weight, specs), tuple(solution.losses)


def relative_error(weight: Tensor, dense: Tensor, statistics: InputStatistics) -> tuple[float, str]:
    """tr(D H Dᵀ) / tr(W H Wᵀ) with D = W - `dense`, both (d_out, d_in), and what stood for H; 0 if both traces are 0."""
    error, whole, _, kind = squared_errors(weight, dense, statistics)
    return (error / whole if whole > 0 else 0.0), kind


def squared_errors(weight: Tensor, dense: Tensor, statistics: InputStatistics) -> tuple[float, float, float, str]:
    """tr(D H Dᵀ) and tr(W H Wᵀ) with D = W - `dense`, both (d_out, d_in), what both are to be multiplied by, and what stood for H.

    H is the Gram matrix, else its diagonal, else the identity.
    """

    def weighted(matrix: Tensor) -> float:
        if statistics.gram is not None:
            gram = statistics.gram.to(matrix.dtype)
            return float(((matrix @ gram) * matrix).sum(dtype=torch.float64))
        squares = matrix.square()
        if statistics.diagonal is not None:
            squares = squares * statistics.diagonal
        return float(squares.sum(dtype=torch.float64))

    # Squares of large weights would leave the range of fp32.
    largest = weight.abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
    weight, dense, scale = weight / largest, dense / largest, float(largest) ** 2
    kind = "gram" if statistics.gram is not None else "diagonal" if statistics.diagonal is not None else "weight"
    # Round-off can take the trace of a near-singular Gram just below zero.
    return max(weighted(weight - dense), 0.0), weighted(weight), scale, kind
