"""Checking what a recipe asks of a budget."""

from __future__ import annotations

from typing import Protocol

from halfplate.allocation.candidates import CHOICES, CHOSEN, fields_of
from halfplate.allocation.targets import TARGETS
from halfplate.errors import HalfplateError
from halfplate.formats.quantizers import core_dtypes
from halfplate.formats.quantizers.rounding import GROUPS
from halfplate.pattern import Pattern
from halfplate.registry import unknown

CONTEXT = 4096  # default tokens of a cache
SHARES = ("budget", "time_budget")
LIMITS = (*SHARES, "fit", "fit_ram")


class Asked(Protocol):
    """The fields of a recipe that a budget concerns."""

    @property
    def pattern(self) -> str: ...
    @property
    def block_size(self) -> object: ...
    @property
    def core_dtype(self) -> str: ...
    @property
    def group_size(self) -> int: ...
    @property
    def embedding_dtype(self) -> str: ...
    @property
    def head_dtype(self) -> str: ...
    @property
    def context(self) -> int: ...
    @property
    def target(self) -> str: ...
    @property
    def search(self) -> str: ...
    @property
    def choose(self) -> tuple[str, ...]: ...
    @property
    def budgeted(self) -> bool: ...


def check_budget(asked: Asked) -> None:
    """Raise HalfplateError for limits that exclude each other or mean nothing, and for formats that the target does not hold."""
    given = {name: value for name in LIMITS if (value := getattr(asked, name)) is not None}
    if len(given) > 1:
        raise HalfplateError(
            f"{' and '.join(f'{name}={value}' for name, value in given.items())} exclude each other; leave one out"
        )
    for name in SHARES:
        if name in given and not 0 < given[name] <= 1:
            raise HalfplateError(
                f"{name}={given[name]} must be a fraction of the original model, above 0 and up to 1; try 0.6"
            )
    for name in ("fit", "fit_ram"):
        if name in given and not 0 < given[name] < 2**63:
            raise HalfplateError(f"{name}={given[name]} must be a number of bytes above 0; try {name}=600MB")
    if asked.context != CONTEXT and "fit_ram" not in given:
        raise HalfplateError(f"context={asked.context} is for a size in memory; give --fit-ram 4GB, or leave it out")
    if asked.search == "evolution" and not asked.budgeted:
        raise HalfplateError("search='evolution' looks for the best candidates within a budget; give --budget 0.6")
    if asked.choose != CHOSEN and not asked.budgeted:
        raise HalfplateError(f"choose={','.join(asked.choose)} needs a budget; give --budget 0.6, or leave it out")
    for field, values in fields_of(asked.choose).items():
        if field not in CHOICES:
            raise HalfplateError(f"choose={field!r} is not one of {', '.join(CHOICES)}")
        for value in values:
            _check_value(field, value)
    _check_target(asked, "time_budget" in given)


def _check_value(field: str, value: str) -> None:
    """Raise HalfplateError if `value` is none that `field` can have."""
    if field == "pattern":
        Pattern.parse(value)
    elif field == "core_dtype" and value not in core_dtypes():
        raise unknown("choose=core_dtype", value, list(core_dtypes()))
    elif field == "group_size" and value not in map(str, GROUPS):
        raise unknown("choose=group_size", value, list(map(str, GROUPS)))
    elif field == "block_size" and not value.isdecimal():
        raise HalfplateError(f"choose=block_size={value!r} is not a block size; try choose=block_size=0+16")


def _check_target(asked: Asked, timed: bool) -> None:
    if asked.target not in TARGETS:
        raise unknown("target", asked.target, list(TARGETS))
    target = TARGETS[asked.target]
    if timed and not target.sparse:
        raise HalfplateError(
            f"target={target.name!r}: a time budget measures the kernels of Halfplate; use fit, or target halfplate"
        )
    target.check_core(asked.core_dtype, asked.group_size, asked.pattern, asked.block_size)
    for name in ("embedding_dtype", "head_dtype"):
        if (value := getattr(asked, name)) != "keep" and not target.sparse:
            target.check_table(name, value, asked.group_size)
