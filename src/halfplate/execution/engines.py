"""Engines: what runs tasks, in this process, in several of this machine, or on a cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from halfplate.errors import HalfplateError
from halfplate.execution.tasks import OpenBlocks, Task
from halfplate.registry import Registry

TRIES = 3  # of a task whose process died


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
                f"address={self.address!r} is that of a Ray cluster, and engine={self.name!r} uses none; add --engine ray, or leave it out"
            )
        if self.address is not None and self.workers is not None:
            raise HalfplateError(
                f"workers={self.workers} with address={self.address!r}: the CPUs of the cluster say how many tasks run side by side; "
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


class Serial:
    """One task after the other, in this process."""

    elsewhere, workers = False, 1

    def __init__(self, blocks: OpenBlocks) -> None:
        self._blocks = blocks

    def run(self, tasks: Sequence[Task]) -> Iterator[Any]:
        return (task.run(self._blocks) for task in tasks)

    def close(self) -> None:
        self._blocks.close()


class Processes:
    """A number of processes on this machine; one that dies is replaced and its task tried again."""

    elsewhere = True

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        # A forked process would inherit the threads of torch in whatever state they are.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.workers, mp_context=context, initializer=_begin_process)

    def run(self, tasks: Sequence[Task]) -> Iterator[Any]:
        order = sorted(range(len(tasks)), key=lambda number: -tasks[number].cost)
        pool, running = self._pool, {number: self._submit(tasks[number]) for number in order}
        return self._results(tasks, pool, running)

    def _submit(self, task: Task) -> Future[Any]:
        try:
            return self._pool.submit(run_task, task)
        except BrokenProcessPool as error:
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed

    def _results(
        self, tasks: Sequence[Task], pool: ProcessPoolExecutor, running: dict[int, Future[Any]]
    ) -> Iterator[Any]:
        tries = 0
        try:
            for number in range(len(tasks)):
                while _broke(running[number]):
                    tries += 1
                    if tries == TRIES:
                        raise HalfplateError(
                            f"workers={self.workers}: a worker process died {TRIES} times, mostly for lack of memory; use fewer workers, "
                            "and go on with --resume"
                        )
                    # All that runs in a broken pool fails with it; what was done before is kept.
                    pool = self._pool_after(pool)
                    running |= {n: self._submit(tasks[n]) for n in running if _broke(running[n])}
                yield running.pop(number).result()
        finally:
            for future in running.values():
                future.cancel()

    def _pool_after(self, broken: ProcessPoolExecutor) -> ProcessPoolExecutor:
        if self._pool is broken:  # another run may have replaced it
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = self._new_pool()
        return self._pool

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _broke(future: Future[Any]) -> bool:
    """Whether the process of a task died, once the task is over."""
    return isinstance(future.exception(), BrokenProcessPool)


def _begin_process() -> None:
    """A process of a pool waits for tasks for ever where its parent was killed; this one ends then, and with Ctrl-C without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=wait, daemon=True).start()


@cache
def _blocks_of_this_process() -> OpenBlocks:
    """A process of a pool keeps its block from task to task; there is no other place for it."""
    return OpenBlocks()


def run_task(task: Task) -> object:
    """Run a task in a process of a pool."""
    return task.run(_blocks_of_this_process())


def open_local(choice: EngineChoice, blocks: OpenBlocks, threads: int, folder: Path) -> Engine:
    """Tasks in this process, or in several of this machine."""
    workers = choice.workers or 1
    return Serial(blocks) if workers == 1 else Processes(workers)


class OpenEngine(Protocol):
    """Makes the engine of a choice; the arguments are those of `open_engine`."""

    def __call__(self, choice: EngineChoice, blocks: OpenBlocks, threads: int, folder: Path) -> Engine: ...


# To add an engine: write its file with a function of the type `OpenEngine`, and add a line here.
ENGINES: Registry[OpenEngine] = Registry(
    "engine",
    "halfplate.engines",
    {"local": "halfplate.execution.engines:open_local", "ray": "halfplate.execution.cluster:open_ray"},
)


@contextmanager
def open_engine(choice: EngineChoice, blocks: OpenBlocks, threads: int, folder: Path) -> Iterator[Engine]:
    """The engine that was chosen; raises HalfplateError where it cannot be had.

    blocks: what the caller itself has open, for tasks that run in its process. threads: of each task. folder: what tasks
    write to and every machine must see.
    """
    engine = ENGINES.get(choice.name)(choice, blocks, threads, folder)
    try:
        yield engine
    finally:
        engine.close()
