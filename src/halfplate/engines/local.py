"""The engine `local`: tasks in this process, or in several processes on this machine."""

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

TRIES = 3  # attempts for a task whose process died


class Serial:
    """Runs one task after the other, in this process."""

    elsewhere, workers = False, 1

    def __init__(self, kept: Any) -> None:
        self._kept = kept

    def run(self, tasks: Sequence[Task]) -> Iterator[Any]:
        return (task.run(self._kept) for task in tasks)

    def close(self) -> None:
        self._kept.close()


class Processes:
    """Several processes on this machine. If one dies, it is replaced and its task runs again."""

    elsewhere = True

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        # A forked process would inherit torch's threads in an undefined state.
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
                    # All running tasks of a broken pool fail; earlier results are kept.
                    pool = self._pool_after(pool)
                    running |= {n: self._submit(tasks[n]) for n in running if _broke(running[n])}
                yield running.pop(number).result()
        finally:
            for future in running.values():
                future.cancel()

    def _pool_after(self, broken: ProcessPoolExecutor) -> ProcessPoolExecutor:
        if self._pool is broken:  # another call of `run` may have replaced it
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = self._new_pool()
        return self._pool

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _broke(future: Future[Any]) -> bool:
    """Whether the process of a finished task died."""
    return isinstance(future.exception(), BrokenProcessPool)


def _begin_process() -> None:
    """Let a pool process end when its parent dies or on Ctrl-C, silently; otherwise it would wait for tasks forever."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=wait, daemon=True).start()


@cache
def _kept_by_this_process(kind: type) -> Any:
    """The objects that a pool process keeps from task to task, which only a global can hold."""
    return kind()


def run_task(task: Task) -> object:
    """Run a task in a pool process."""
    return task.run(_kept_by_this_process(task.keeps))  # type: ignore[arg-type]  # classes are hashable


def open_local(choice: EngineChoice, kept: Any, threads: int, folder: Path) -> Engine:
    """Open the engine `local`, with one or several processes."""
    workers = choice.workers or 1
    return Serial(kept) if workers == 1 else Processes(workers)
