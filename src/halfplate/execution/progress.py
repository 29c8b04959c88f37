"""How an executor tells what it is doing."""

from collections.abc import Callable

# Called with the phase, the steps done and the steps in all; the same phase is reported from 0 to its total.
Report = Callable[[str, int, int], None]


def silent(phase: str, done: int, total: int) -> None:
    """The report that tells nothing."""
