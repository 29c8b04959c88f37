"""Measuring the time of each phase of a run."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Wall time of each phase in seconds."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - start

    @property
    def seconds(self) -> dict[str, float]:
        phases = {phase: round(seconds, 3) for phase, seconds in self._seconds.items()}
        return phases | {"total": round(sum(self._seconds.values()), 3)}
