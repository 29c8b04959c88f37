"""Solving an embedding or an output layer: an unpruned table whose rows do not depend on each other."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats import Chain, NMSparse, WeightSpec
from halfplate.methods.base import Method
from halfplate.methods.rtn import RoundToNearest
from halfplate.methods.solving import MatrixRecord, squared_errors
from halfplate.statistics import InputStatistics, Statistic

ROWS = 4096  # solved at once
# Fraction of the mean second moment of the head's inputs that is added to the diagonal for a tied table: it weighs the error of a row
# as an input against its error in the logits. KL of SmolLM2 with an int4 table, groups of 32, on WikiText-2 valid: 0.064 with 10, 0.048
# with 1, 0.0424 with 0.1, 0.0431 with 0.01, 0.117 rounded to nearest.
AS_EMBEDDING = 0.1


def uses_gram(method: Method, spec: WeightSpec) -> bool:
    """Whether `method` solves a table of `spec` by a Gram matrix; a table that it does not solve is rounded to nearest."""
    if method.requires < Statistic.GRAM:
        return False
    try:
        method.check_spec(spec)
    except HalfplateError:
        return False
    return True


def table_statistics(gram: Tensor, tied: bool) -> InputStatistics:
    """Statistics of a head. gram: of its inputs, fp64 (hidden, hidden). tied: whether the table is the embedding, too."""
    if tied:
        gram = gram + AS_EMBEDDING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return InputStatistics(1, gram.diagonal().float(), gram)


def solve_table(
    name: str, weight: Tensor, method: Method, statistics: InputStatistics, spec: WeightSpec
) -> tuple[Chain, MatrixRecord]:
    """Compress the table `weight` (vocabulary, hidden) called `name`, ROWS rows at a time; without a Gram matrix, round it to nearest."""
    method = method if statistics.gram is not None else RoundToNearest()
    cores: list[NMSparse] = []
    errors = wholes = 0.0
    kind = "weight"
    for rows in weight.split(ROWS):
        try:
            chain = method.compress(rows, statistics, replace(spec, d_out=len(rows))).weight
        except HalfplateError as refusal:
            raise HalfplateError(f"{name}: {refusal}") from None
        error, whole, scale, kind = squared_errors(rows, chain.dense(), statistics)
        errors, wholes = errors + error * scale, wholes + whole * scale
        cores.append(chain.core)
    record = MatrixRecord(name, errors / wholes if wholes > 0 else 0.0, kind, (), 0.0)
    return Chain.of(spec, NMSparse.joined(cores)), record
