"""Returning freed memory from the C library to the system."""

import ctypes
from collections.abc import Callable
from functools import cache


def trim() -> None:
    """Return freed memory to the system; does nothing if the C library is not glibc.

    glibc keeps the gaps between tensors of many sizes, so the memory of a run over many layers would grow.
    """
    call = _malloc_trim()
    if call is not None:
        call(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return found
