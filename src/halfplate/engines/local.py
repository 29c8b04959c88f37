"""The engine `local`: tasks in this process, or in several of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

from halfplate.engines import Engine, EngineChoice
from halfplate.engines.task import Task
from halfplate.errors import HalfplateError

TRIES = 3  # of a task whose process died


class Serial:
    """One task after the other, in this process."""

    elsewhere, workers = False, 1

    def __init__(self, kept: Any) -> None:
        self._kept = kept

    def run(self, tasks: Sequence[Task]) -> Iterator[Any]:
        return (task.run(self._kept) for task in tasks)

    def close(self) -> None:
        self._kept.close()


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
                            f"workers={self.workers}: a worker process died {TRIES} times, probably for lack of memory; use fewer workers, "
                            "and continue with --resume"
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
def _kept_by_this_process(kind: type) -> Any:
    """A process of a pool keeps what its tasks leave open from task to task; there is no other place for it."""
    return kind()


def run_task(task: Task) -> object:
    """Run a task in a process of a pool."""
    return task.run(_kept_by_this_process(task.keeps))  # type: ignore[arg-type]  # classes are hashable


def open_local(choice: EngineChoice, kept: Any, threads: int, folder: Path) -> Engine:
    """Tasks in this process, or in several of this machine."""
    workers = choice.workers or 1
    return Serial(kept) if workers == 1 else Processes(workers)
