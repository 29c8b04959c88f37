"""Checking how a recipe spreads one share over the layers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol

from halfplate.errors import HalfplateError
from halfplate.formats.spec import WeightSpec
from halfplate.methods.base import Method
from halfplate.pattern import Pattern


class Spread(Protocol):
    """The fields of a recipe that ratios concern."""

    @property
    def ratios(self) -> str: ...
    @property
    def owl_lambda(self) -> float: ...
    @property
    def method(self) -> str: ...
    @property
    def budgeted(self) -> bool: ...
    @property
    def parsed_pattern(self) -> Pattern: ...

    def create_method(self) -> Method: ...
    def spec(self, d_out: int, d_in: int, block: int) -> WeightSpec: ...


def check_ratios(asked: Spread) -> None:
    """Raise HalfplateError if the ratios do not fit the method, the pattern or a budget."""
    if not 0 <= asked.owl_lambda <= 0.5:
        raise HalfplateError(f"owl_lambda={asked.owl_lambda} must be a fraction of the weights, 0 to 0.5; try 0.08")
    if asked.ratios == "uniform":
        return
    pattern, method = asked.parsed_pattern, asked.create_method()
    if pattern.is_dense:
        raise HalfplateError(
            f"ratios={asked.ratios!r} spreads N of M over the layers, and pattern dense has none; try 4:8"
        )
    if (asked.ratios == "welore") != (asked.method == "svd"):
        raise HalfplateError(
            f"ratios={asked.ratios!r} does not fit method {asked.method!r}; use welore with method svd, and owl with one that prunes"
        )
    if asked.budgeted:
        raise HalfplateError(
            f"ratios={asked.ratios!r} and a budget both choose the pattern of each matrix; leave one of them out"
        )
    if pattern.is_none:
        return
    most = min(pattern.m - 1, math.ceil(pattern.n + 2 * asked.owl_lambda * pattern.m))
    method.check_spec(replace(asked.spec(1, pattern.m, 0), pattern=Pattern(most, pattern.m)))
