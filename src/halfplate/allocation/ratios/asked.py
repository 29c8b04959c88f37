"""Checking what a recipe asks of ratios."""

from __future__ import annotations

import math
from typing import Protocol

from halfplate.allocation.ratios import RATIOS, UNIFORM
from halfplate.errors import HalfplateError
from halfplate.pattern import Pattern
from halfplate.registry import unknown


class Asked(Protocol):
    """The fields of a recipe that ratios concern."""

    @property
    def ratios(self) -> str: ...
    @property
    def owl_lambda(self) -> float: ...
    @property
    def parsed_pattern(self) -> Pattern: ...
    @property
    def budgeted(self) -> bool: ...


def most_kept(asked: Asked) -> Pattern | None:
    """The pattern of which a layer keeps most, if layers keep unequal shares.

    Raises HalfplateError for an unknown rule, and if there is nothing that it could spread.
    """
    if not 0 <= asked.owl_lambda <= 0.5:
        raise HalfplateError(f"owl_lambda={asked.owl_lambda} must be a fraction of the weights, 0 to 0.5; try 0.08")
    if asked.ratios == UNIFORM:
        return None
    if asked.ratios not in RATIOS.names():
        raise unknown("ratios", asked.ratios, [UNIFORM, *RATIOS.names()])
    pattern = asked.parsed_pattern
    if pattern.is_dense:
        raise HalfplateError(
            f"ratios={asked.ratios!r} spreads N of M over the layers, and pattern dense has none; try 4:8"
        )
    if asked.budgeted:
        raise HalfplateError(
            f"ratios={asked.ratios!r} and a budget both choose the pattern of each matrix; leave one of them out"
        )
    spread = 2 * asked.owl_lambda if RATIOS.get(asked.ratios).spreads else 1.0
    return Pattern(min(pattern.m - 1, math.ceil(pattern.n + spread * pattern.m)), pattern.m)
