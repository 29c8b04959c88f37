"""Engines: what runs tasks, in this process or in several of this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

from halfplate.errors import HalfplateError
from halfplate.execution.tasks import OpenBlocks, Task

ENGINES = ("local",)
TRIES = 3  # of a task whose process died


class Engine(Protocol):
    """Runs tasks; their results are the same whichever engine runs them.

    workers: how many tasks may run side by side at the start. elsewhere: whether tasks run in other processes than the
    caller's, so that statistics must go through files.
    """

    workers: int
    elsewhere: bool

    def run(self, tasks: Sequence[Task]) -> Iterator[Any]:
        """Results in the order of `tasks`; raises what a task raised."""

    def close(self) -> None:
        """Give all processes back."""


class Serial:
    """One task after the other, in this process."""

    workers, elsewhere = 1, False

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
        return ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("spawn"))

    def run(self, tasks: Sequence[Task]) -> Iterator[Any]:
        results: dict[int, Any] = {}
        order = sorted(range(len(tasks)), key=lambda number: -tasks[number].cost)
        left, tries = order, 0
        while left:
            running: dict[int, Future[Any]] = {}
            try:
                for number in left:
                    running[number] = self._pool.submit(run_task, tasks[number])
                for number in left:
                    results[number] = running[number].result()
            except BrokenProcessPool:
                # All that runs in a broken pool fails with it; what was done before is kept.
                results |= {n: f.result() for n, f in running.items() if f.done() and f.exception() is None}
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = self._new_pool()
                tries += 1
                if tries == TRIES:
                    raise HalfplateError(
                        f"workers={self.workers}: a worker process died {TRIES} times, mostly for lack of memory; use fewer workers, "
                        "and go on with --resume"
                    ) from None
            except BaseException:
                for future in running.values():
                    future.cancel()
                raise
            left = [number for number in left if number not in results]
        return iter([results[number] for number in range(len(tasks))])

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


@cache
def _blocks_of_this_process() -> OpenBlocks:
    """A process of a pool keeps its block from task to task; there is no other place for it."""
    return OpenBlocks()


def run_task(task: Task) -> object:
    """Run a task in a process of a pool."""
    return task.run(_blocks_of_this_process())


@contextmanager
def open_engine(name: str, workers: int, blocks: OpenBlocks) -> Iterator[Engine]:
    """The engine of a name; raises HalfplateError for what cannot be.

    blocks: what the caller itself has open, for tasks that run in its process.
    """
    check_engine(name, workers)
    engine: Engine = Serial(blocks) if workers == 1 else Processes(workers)
    try:
        yield engine
    finally:
        engine.close()


def check_engine(name: str, workers: int) -> None:
    """Raise HalfplateError unless an engine can be asked for like this."""
    if name not in ENGINES:
        raise HalfplateError(f"engine={name!r} is not available; available: {', '.join(ENGINES)}")
    if workers < 1:
        raise HalfplateError(f"workers={workers} must be at least 1")
