"""Engines, one file each: what runs tasks, in this process, in several of this machine, or on a cluster.

To add one: write its file with a function of the type `OpenEngine`, and add a line to `ENGINES`. Other packages add theirs by an entry
point of the group `halfplate.engines` (docs/extending.md). An engine knows nothing of what its tasks do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from halfplate.engines.needs import Needs
from halfplate.engines.task import Task
from halfplate.errors import HalfplateError
from halfplate.registry import Registry

__all__ = ["ENGINES", "Engine", "EngineChoice", "Needs", "OpenEngine", "Task", "open_engine"]


@dataclass(frozen=True)
class EngineChoice:
    """Who is to do the work.

    workers: processes side by side on this machine; by default 1 with local, and with ray as many as its cores serve. address:
    of a running Ray cluster, `HOST:PORT` or `auto` for the one that this machine is part of; its CPUs say how many tasks run.
    Raises HalfplateError for what cannot be.
    """

    name: str = "local"
    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        ENGINES.check(self.name)
        if self.workers is not None and self.workers < 1:
            raise HalfplateError(f"workers={self.workers} must be at least 1")
        if self.address is not None and self.name == "local":
            raise HalfplateError(
                f"address={self.address!r} is for Ray clusters, but engine={self.name!r} does not use one; add --engine ray, or leave it out"
            )
        if self.address is not None and self.workers is not None:
            raise HalfplateError(
                f"workers={self.workers} with address={self.address!r}: the CPUs of the cluster determine how many tasks run in parallel; "
                "leave one of the two out"
            )
        if self.name == "ray" and find_spec("ray") is None:
            raise HalfplateError(
                "engine='ray' needs the package ray, which is not installed; pip install 'halfplate[ray]'"
            )


class Engine(Protocol):
    """Runs tasks; their results are the same whichever engine runs them.

    elsewhere: whether tasks run in other processes than the caller's, so that statistics must go through files and several runs
    may be under way at once.
    """

    elsewhere: bool

    @property
    def workers(self) -> int:
        """How many tasks run side by side at present."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Any]:
        """Begin `tasks`; their results in order, each waited for when it is asked for; raises what a task raised."""

    def close(self) -> None:
        """Give all processes back."""


class OpenEngine(Protocol):
    """Makes the engine of a choice; the arguments are those of `open_engine`."""

    def __call__(self, choice: EngineChoice, kept: Any, threads: int, folder: Path) -> Engine: ...


ENGINES: Registry[OpenEngine] = Registry(
    "engine",
    "halfplate.engines",
    {"local": "halfplate.engines.local:open_local", "ray": "halfplate.engines.ray:open_ray"},
)


@contextmanager
def open_engine(choice: EngineChoice, kept: Any, threads: int, folder: Path) -> Iterator[Engine]:
    """The engine that was chosen; raises HalfplateError if it cannot be had.

    kept: what tasks that run in the process of the caller are given (see `Task.run`). threads: of each task. folder: what tasks
    write to and every machine must see.
    """
    engine = ENGINES.get(choice.name)(choice, kept, threads, folder)
    try:
        yield engine
    finally:
        engine.close()
