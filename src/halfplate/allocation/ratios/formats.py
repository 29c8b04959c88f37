"""The formats that layers with unequal shares may have: patterns N of M, or types of cores of more and fewer bits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from halfplate.allocation.ratios.layers import kept_of_groups, nearest_steps
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.spec import WeightSpec
from halfplate.pattern import DENSE, Pattern

WHOLE = 16  # bits of a weight that is not compressed
COLUMNS = 1024


@dataclass(frozen=True)
class Format:
    """What the matrices of a layer have in place of the format of the recipe."""

    pattern: Pattern
    core_dtype: str

    def __str__(self) -> str:
        return self.core_dtype if self.pattern.is_dense else str(self.pattern)


def family(core_dtype: str) -> list[str]:
    """The types of cores that differ from this one only in their bits, fewest first; empty if it has none."""
    parts = re.fullmatch(r"([a-z]+)\d+([a-z]*)", core_dtype)
    if parts is None or core_dtype not in QUANTIZERS.names():
        return []
    alike = re.compile(rf"{parts[1]}(\d+){parts[2]}")
    found = {int(match[1]): name for name in QUANTIZERS.names() if (match := alike.fullmatch(name))}
    return [found[bits] for bits in sorted(found)]


def bits_of(core_dtype: str, group: int) -> float:
    """Bits per weight of an unpruned core, scales included."""
    return 8 * WeightSpec(1, COLUMNS, DENSE, core_dtype, group=group).nbytes / COLUMNS


def average(pattern: Pattern, core_dtype: str, group: int) -> float:
    """The share that a recipe keeps: of the weights if it prunes, else of the bits of a weight."""
    return bits_of(core_dtype, group) / WHOLE if pattern.is_dense else pattern.n / pattern.m


def formats_of(
    shares: Sequence[float], sizes: Sequence[int], pattern: Pattern, core_dtype: str, group: int
) -> list[Format]:
    """The format of each layer, close to its share; together they are at most as large as in the format of the recipe.

    shares: with the mean `average`. sizes: weights of each layer.
    """
    if not pattern.is_dense:
        return [Format(Pattern(n, pattern.m), core_dtype) for n in kept_of_groups(shares, sizes, pattern)]
    types = family(core_dtype)
    steps = [bits_of(name, group) for name in types]
    wanted = [share * WHOLE for share in shares]
    chosen = nearest_steps(wanted, sizes, steps, bits_of(core_dtype, group))
    return [Format(pattern, types[number]) for number in chosen]
