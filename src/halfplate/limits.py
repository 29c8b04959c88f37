"""The number of threads and worker processes that this machine allows; this module imports nothing heavy."""

import os
from collections.abc import MutableMapping
from typing import Any

from halfplate.errors import HalfplateError

# A resumed run keeps its number of threads, which affects the result; with more threads per core than this, the process could fail.
MOST_PER_CORE = 8
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # read when torch is imported


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(threads: int | None) -> None:
    """Raise HalfplateError for more threads than cores; None (torch's own choice) is allowed."""
    _check("threads", threads, "leave it out for torch's own choice")


def check_workers(workers: int | None) -> None:
    """Raise HalfplateError for more worker processes than cores; the plan checks whether their memory suffices."""
    _check("workers", workers, "leave it out for one process")


def use_threads(threads: int | None) -> None:
    """Set the number of threads of torch and the kernels; None keeps torch's own choice, limited to the cores.

    Raises HalfplateError for more threads than cores.
    """
    import torch

    check_threads(threads)
    wanted = threads or min(torch.get_num_threads(), cores())
    if wanted != torch.get_num_threads():
        torch.set_num_threads(wanted)


def check_resumed_threads(threads: int) -> None:
    """Raise HalfplateError if a run was begun with so many threads that this machine cannot continue it."""
    if threads > MOST_PER_CORE * cores():
        raise HalfplateError(
            f"--resume: the run was begun with threads={threads}, and this machine has {cores()} cores; resume it on a machine with more "
            "cores, or pass --overwrite instead of --resume to start over"
        )


def bound_environment(environment: MutableMapping[str, str]) -> list[str]:
    """Lower OpenMP environment variables that ask for more threads than cores; returns one sentence for each."""
    told = []
    for name in VARIABLES:
        asked, most = environment.get(name, ""), cores()
        # A list has one number per nesting level.
        first = asked.partition(",")[0].strip()
        if first.isdigit() and int(first) > most:
            environment[name] = str(most)
            told.append(f"{name}={asked} is more than the {most} cores that this process may use; {most} are used")
    return told


def _check(argument: str, value: Any, otherwise: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise HalfplateError(f"{argument}={value!r} must be a whole number of at least 1; {otherwise}")
    if value > cores():
        raise HalfplateError(
            f"{argument}={value} is more than the {cores()} cores that this process may use; give at most {cores()}, or {otherwise}"
        )
