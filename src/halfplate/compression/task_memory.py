"""Rough estimates of the memory that the tasks of a compression need; too high rather than too low."""

from __future__ import annotations

from collections.abc import Iterable

from halfplate.formats import WeightSpec
from halfplate.methods.base import Method
from halfplate.solvers.target import correcting_nbytes
from halfplate.statistics import Statistic

PROCESS_NBYTES = 700_000_000  # Python with torch and transformers


def memory_to_solve(method: Method, specs: Iterable[WeightSpec]) -> int:
    """Bytes needed to correct matrices of one input for compressed inputs and to solve them, together if there are several."""
    specs = list(specs)
    weights = sum(spec.d_out * spec.d_in for spec in specs)
    width = max(spec.d_in for spec in specs) if method.requires >= Statistic.GRAM else 0
    correcting = correcting_nbytes(weights, width) if width else 0
    solving = sum(method.solving_nbytes(spec) for spec in specs)
    return PROCESS_NBYTES + 4 * weights + 16 * width**2 + max(correcting, solving)


def memory_to_run(specs: Iterable[WeightSpec], hidden: int) -> int:
    """Bytes needed to run text through a layer of these matrices and through the original layer; hidden: values of one batch."""
    # Each compressed matrix is also held multiplied out.
    weights = 3 * 4 * sum(spec.d_out * spec.d_in for spec in specs)
    return PROCESS_NBYTES + weights + 16 * 4 * hidden


def memory_to_collect(specs: Iterable[WeightSpec], needed: Statistic) -> int:
    """Bytes of the sums of one chunk and of one batch, if each matrix has its own input."""
    return sum(24 * spec.d_in**2 for spec in specs) if needed >= Statistic.GRAM else 0
