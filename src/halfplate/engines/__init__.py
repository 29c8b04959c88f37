"""Engines, one file each, which run tasks in this process, in several processes, or on a cluster.

To add one: write its file with a function of the type `OpenEngine`, and add a line to `ENGINES`. Other packages add theirs through
an entry point of the group `halfplate.engines` (docs/extending.md). An engine does not depend on what its tasks do.
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
    """Where to run the tasks.

    workers: number of parallel processes on this machine; the default is 1 with local, and as many as the cores allow with ray.
    address: of a running Ray cluster, `HOST:PORT`, or `auto` for the one that this machine is part of; then its CPUs determine the
        number of parallel tasks.
    Raises HalfplateError for invalid combinations.
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
    """Runs tasks. The results do not depend on the engine.

    elsewhere: whether tasks run in other processes than the caller, so that statistics must be passed in files, and several calls of
        `run` may be active at once.
    """

    elsewhere: bool

    @property
    def workers(self) -> int:
        """Number of tasks that currently run in parallel."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Any]:
        """Start `tasks`; yields their results in order, waiting for each when it is requested; raises the exception of a task."""

    def close(self) -> None:
        """Release all processes."""


class OpenEngine(Protocol):
    """Creates the engine of a choice; the arguments are those of `open_engine`."""

    def __call__(self, choice: EngineChoice, kept: Any, threads: int, folder: Path) -> Engine: ...


ENGINES: Registry[OpenEngine] = Registry(
    "engine",
    "halfplate.engines",
    {"local": "halfplate.engines.local:open_local", "ray": "halfplate.engines.ray:open_ray"},
)


@contextmanager
def open_engine(choice: EngineChoice, kept: Any, threads: int, folder: Path) -> Iterator[Engine]:
    """The chosen engine; raises HalfplateError if it is not available.

    kept: passed to tasks that run in the process of the caller (see `Task.run`).
    threads: of each task.
    folder: where tasks write, and which every machine must share.
    """
    engine = ENGINES.get(choice.name)(choice, kept, threads, folder)
    try:
        yield engine
    finally:
        engine.close()
