"""What the C library keeps of freed memory, given back to the system."""

import ctypes
from collections.abc import Callable
from functools import cache


def trim() -> None:
    """Give freed memory back; nothing happens where the C library is not glibc.

    glibc keeps the pieces that tensors of many sizes leave between others, and a run over many layers would grow by them.
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
