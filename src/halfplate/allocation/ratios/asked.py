"""Checking what a recipe asks of ratios."""

from __future__ import annotations

import math
from typing import Protocol

from halfplate.allocation.ratios import RATIOS, UNIFORM, WELORE, Ratios
from halfplate.allocation.ratios.formats import Format, family
from halfplate.errors import HalfplateError
from halfplate.pattern import Pattern
from halfplate.registry import unknown

RANKED = "svd"  # the method whose ranks may differ


class Asked(Protocol):
    """The fields of a recipe that ratios concern."""

    @property
    def ratios(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def owl_lambda(self) -> float: ...
    @property
    def parsed_pattern(self) -> Pattern: ...
    @property
    def core_dtype(self) -> str: ...
    @property
    def types(self) -> tuple[str, ...]: ...
    @property
    def budgeted(self) -> bool: ...


def formats_asked(asked: Asked) -> list[Format]:
    """The formats that the layers may have under the ratios of a recipe, as far as a method could refuse one; none if all are equal.

    Raises HalfplateError for an unknown rule, and if there is nothing that it could spread.
    """
    if not 0 <= asked.owl_lambda <= 0.5:
        raise HalfplateError(f"owl_lambda={asked.owl_lambda} must be a fraction of the weights, 0 to 0.5; try 0.08")
    if asked.ratios == UNIFORM:
        return []
    if asked.ratios not in (names := [*RATIOS.names(), WELORE]):
        raise unknown("ratios", asked.ratios, [UNIFORM, *names])
    fits = asked.method == RANKED if asked.ratios == WELORE else not asked.parsed_pattern.is_none
    if not fits:
        raise HalfplateError(
            f"ratios={asked.ratios!r} does not fit method {asked.method!r}; use {WELORE} with method {RANKED}, and the others with one that prunes or quantises"
        )
    if asked.budgeted:
        raise HalfplateError(
            f"ratios={asked.ratios!r} and a budget both choose the format of each matrix; leave one of them out"
        )
    if asked.ratios == WELORE:
        return []
    rule, pattern = RATIOS.get(asked.ratios), asked.parsed_pattern
    if pattern.is_dense:
        return [Format(pattern, name) for name in _types(asked, rule)]
    spread = 2 * asked.owl_lambda if rule.spreads else 1.0
    most = min(pattern.m - 1, math.ceil(pattern.n + spread * pattern.m))
    return [Format(Pattern(most, pattern.m), asked.core_dtype)]


def _types(asked: Asked, rule: Ratios) -> list[str]:
    """The types of cores over which the bits of the layers are spread."""
    if not rule.spreads:
        raise HalfplateError(
            f"ratios={asked.ratios!r} counts weights of a magnitude, which says nothing of bits, and pattern dense keeps all; try 4:8, or ratios farms"
        )
    if asked.types:
        raise HalfplateError(
            f"ratios={asked.ratios!r} with types={', '.join(asked.types)}: both choose the type of matrices; leave one of them out"
        )
    found = family(asked.core_dtype)
    if len(found) < 2:
        raise HalfplateError(
            f"ratios={asked.ratios!r} spreads N of M or bits over the layers, and core_dtype={asked.core_dtype!r} with pattern dense has neither; "
            "try pattern 4:8, or core_dtype int4"
        )
    return found
