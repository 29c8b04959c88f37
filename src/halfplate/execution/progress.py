"""How an executor tells what it is doing."""

from typing import Protocol


class Report(Protocol):
    """Called with the phase, the steps done and the steps in all; the same phase is reported from 0 to its total."""

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        """note: what else is worth a word beside the numbers, e.g. the loss."""


def silent(phase: str, done: int, total: int, note: str = "") -> None:
    """The report that tells nothing."""
