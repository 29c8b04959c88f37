"""How an executor tells what it is doing to whoever listens: a terminal, the log, a tracker of experiments."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

NO_FACTS: Mapping[str, Any] = MappingProxyType({})


class Report(Protocol):
    """Called with the phase, the steps done and the steps in all; the same phase is reported from its first step to its total."""

    def __call__(
        self,
        phase: str,
        done: int,
        total: int,
        note: str = "",
        share: float | None = None,
        facts: Mapping[str, Any] = NO_FACTS,
    ) -> None:
        """note: what else is worth a word beside the numbers, e.g. the loss.

        share: how much of the phase's work is done, between 0 and 1, if its steps are unequal. facts: what a log or a
        tracker keeps of this step, plain JSON under an `event` that says which kind it is: `plan`, `matrix`, `end`, ... (docs/logging.md).
        """


@dataclass(frozen=True)
class Step:
    """What a report is told of one step."""

    phase: str
    done: int
    total: int
    note: str
    share: float | None
    facts: Mapping[str, Any]


class Listener(ABC):
    """A report that takes each step as one object."""

    def __call__(
        self,
        phase: str,
        done: int,
        total: int,
        note: str = "",
        share: float | None = None,
        facts: Mapping[str, Any] = NO_FACTS,
    ) -> None:
        self.take(Step(phase, done, total, note, share, facts))

    @abstractmethod
    def take(self, step: Step) -> None:
        """Do with the step whatever this listener is for."""


class _Together(Listener):
    def __init__(self, reports: tuple[Report, ...]) -> None:
        self._reports = reports

    def take(self, step: Step) -> None:
        for report in self._reports:
            report(step.phase, step.done, step.total, step.note, step.share, step.facts)


def together(*reports: Report) -> Report:
    """One report that tells all of `reports`, in their order."""
    return _Together(reports)


def silent(*_: Any, **__: Any) -> None:
    """The report that tells nothing."""


class TimeLeft:
    """Seconds until the end of the present phase, from the share of its work that was done since it was first reported.

    A phase that goes on from what an earlier run finished counts only what it does itself.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase = ""
        self._start = self._from = self._share = 0.0

    def __call__(self, phase: str, done: int, total: int, share: float | None = None) -> float | None:
        """The seconds left after this step; None if nothing tells them yet."""
        if share is None:
            share = done / total if total else 1.0
        if phase != self._phase or share < self._share:
            self._phase, self._start, self._from = phase, self._clock(), share
        self._share = share
        if share <= self._from:
            return None
        return self.spent * max(1 - share, 0) / (share - self._from)

    @property
    def spent(self) -> float:
        """Seconds since the present phase was first reported."""
        return self._clock() - self._start
