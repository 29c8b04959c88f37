"""Reporting progress to a terminal, the log or an experiment tracker."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

NO_FACTS: Mapping[str, Any] = MappingProxyType({})


class Report(Protocol):
    """A callback with the phase, the steps done and all steps; a phase is reported from its first step to its last."""

    def __call__(
        self,
        phase: str,
        done: int,
        total: int,
        note: str = "",
        share: float | None = None,
        facts: Mapping[str, Any] = NO_FACTS,
    ) -> None:
        """Report one step.

        note: additional text, e.g. the loss.
        share: how much of the phase's work is done, in 0..1, if its steps are unequal.
        facts: plain JSON about this step for logs and trackers, with its kind under `event`: `plan`, `matrix`, `end`, ...
            (docs/logging.md).
        """


@dataclass(frozen=True)
class Step:
    """The arguments of one call of a report."""

    phase: str
    done: int
    total: int
    note: str
    share: float | None
    facts: Mapping[str, Any]


class Listener(ABC):
    """A report that receives each step as one object."""

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
        """Handle one step."""


class _Together(Listener):
    def __init__(self, reports: tuple[Report, ...]) -> None:
        self._reports = reports

    def take(self, step: Step) -> None:
        for report in self._reports:
            report(step.phase, step.done, step.total, step.note, step.share, step.facts)


def together(*reports: Report) -> Report:
    """One report that calls all of `reports` in order."""
    return _Together(reports)


def silent(*_: Any, **__: Any) -> None:
    """A report that does nothing."""


class TimeLeft:
    """Estimates the seconds until the end of the current phase, from the share of its work done since its first report.

    If a phase resumes earlier work, only its own work counts.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase = ""
        self._start = self._from = self._share = 0.0

    def __call__(self, phase: str, done: int, total: int, share: float | None = None) -> float | None:
        """The seconds left after this step; None if they cannot be estimated yet."""
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
        """Seconds since the first report of the current phase."""
        return self._clock() - self._start
