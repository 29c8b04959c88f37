"""The engine `ray`: tasks run on any machine of a Ray cluster, also if machines fail or join during the run."""

from __future__ import annotations

import logging
import os
import platform
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Any

from halfplate.engines import EngineChoice
from halfplate.engines.local import TRIES, run_task
from halfplate.engines.needs import Needs
from halfplate.engines.task import Task
from halfplate.errors import HalfplateError
from halfplate.limits import cores

PATIENCE = 600.0  # seconds without a suitable machine for a task, after which the run fails
PROBE = 5.0  # timeout in seconds for an answer
# The first message of a gRPC client, and the answer of a server: preface and settings of HTTP/2 (RFC 9113, 3.4 and 6.5).
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS
OBJECT_STORE_NBYTES = 2**28  # object store of a cluster that we start; large data is passed in files


def open_ray(choice: EngineChoice, kept: Any, threads: int, folder: Path) -> RayCluster:
    """Connect to the cluster at the address of the choice, or start one on this machine."""
    return RayCluster(choice.address, choice.workers, threads, folder)


class RayCluster:
    """Tasks on a running cluster, or on a cluster on this machine that is stopped with the engine.

    The tasks of one call wait in one queue, the most expensive first. If the process or machine of a task dies, it runs again elsewhere,
    up to TRIES times in total.

    address: `HOST:PORT` or `auto`; None starts a cluster for `workers` parallel tasks with `threads` each.
    folder: a folder that all machines must share.
    Raises HalfplateError if the cluster cannot be reached.
    """

    elsewhere = True

    def __init__(self, address: str | None, workers: int | None, threads: int, folder: Path) -> None:
        import ray

        if ray.is_initialized():
            raise HalfplateError("engine='ray': this process is connected to Ray already; call ray.shutdown() first")
        self._ray = ray
        self._address = address
        if address is None:
            _start(workers, threads)
        else:
            _connect(address)
        self._site, self._needs = Site.here(folder), Needs(threads)
        # Exceptions of tasks are not retried. Ray's count of retries does not include the first attempt.
        self._run = ray.remote(max_retries=TRIES - 1)(run_on_site)

    @property
    def workers(self) -> int:
        """Number of parallel tasks like those of the last call."""
        wanted = {name: value for name, value in _resources(self._needs).items() if value}
        return sum(
            min(int(machine.get(name, 0) // value) for name, value in wanted.items()) for machine in self._machines()
        )

    def run(self, tasks: Sequence[Task]) -> Iterator[Any]:
        if not tasks:
            return iter(())
        # All request the resources of the largest, because Ray has one queue per set of resources.
        self._needs = needs = reduce(or_, (task.needs for task in tasks))
        if not self._fits(needs):
            raise HalfplateError(self._too_small(needs))
        remote = self._run.options(num_cpus=needs.cpus, num_gpus=needs.gpus, memory=needs.memory)
        order = sorted(range(len(tasks)), key=lambda number: -tasks[number].cost)
        running = {number: remote.remote(self._site, tasks[number]) for number in order}
        return (self._result(running[number], needs) for number in range(len(tasks)))

    def _result(self, reference: Any, needs: Needs) -> Any:
        try:
            while not self._ray.wait([reference], timeout=PATIENCE)[0]:
                if not self._fits(needs):
                    raise HalfplateError(f"{self._too_small(needs)}; continue with --resume")
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            # The exception of the task; a HalfplateError without the traceback of the other machine.
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            raise HalfplateError(
                f"engine='ray': a task was lost {TRIES} times with its process or machine, probably for lack of memory ({_first_line(error)}); "
                "use machines with more memory, and continue with --resume"
            ) from None

    def _machines(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _fits(self, needs: Needs) -> bool:
        wanted = _resources(needs).items()
        return any(all(machine.get(name, 0) >= value for name, value in wanted) for machine in self._machines())

    def _too_small(self, needs: Needs) -> str:
        found = [
            Needs(int(machine.get("CPU", 0)), int(machine.get("GPU", 0)), int(machine.get("memory", 0)))
            for machine in self._machines()
        ]
        largest = max(found, key=lambda machine: (machine.gpus, machine.cpus, machine.memory), default=Needs(0))
        return (
            f"engine='ray': a task needs {needs} on one machine, and the largest of the cluster has {largest}; add a larger one, or use "
            "fewer --threads"
        )

    def close(self) -> None:
        self._ray.shutdown()


def _resources(needs: Needs) -> dict[str, int]:
    """Required resources of a machine, in Ray's units."""
    return {"CPU": needs.cpus, "GPU": needs.gpus, "memory": needs.memory}


@dataclass(frozen=True)
class Site:
    """Everything that must be equal on all machines so that results do not depend on the machine: versions, instruction set, the folder."""

    halfplate: str
    torch: str
    processor: str
    folder: Path

    @classmethod
    def here(cls, folder: Path) -> Site:
        """The site of this machine."""
        import torch

        from halfplate.kernels import native
        from halfplate.version import package_version

        native_isa = native.isa() if native.available() else "no kernels"
        processor = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {native_isa}"
        return cls(package_version(), torch.__version__, processor, folder)


def run_on_site(site: Site, task: Task) -> object:
    """Run a task in a Ray worker process, on a machine that matches `site`."""
    _check_site(site)
    return run_task(task)


@cache
def _check_site(site: Site) -> None:
    mine, machine = Site.here(site.folder), socket.gethostname()
    for field in fields(Site):
        expected, found = getattr(site, field.name), getattr(mine, field.name)
        if expected != found:
            raise HalfplateError(
                f"engine='ray': {field.name} is {found!r} on machine {machine!r} and {expected!r} where the command runs, so results would depend "
                "on the machine; use equal machines"
            )
    if not site.folder.is_dir():
        raise HalfplateError(
            f"engine='ray': machine {machine!r} cannot read {str(site.folder)!r}; put OUT and the model on storage that every machine can read"
        )


def _start(workers: int | None, threads: int) -> None:
    """Start a cluster on this machine."""
    import ray

    # No usage statistics, unless the user enables them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    workers = workers or max(cores() // threads, 1)
    ray.init(
        address="local",
        num_cpus=workers * threads,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_NBYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # By default, Ray's workers have low priority, and retry tasks forever that run out of memory.
        _system_config={"worker_niceness": 0, "task_oom_retries": TRIES - 1},
    )


def _connect(address: str) -> None:
    import ray

    if address != "auto":
        _probe(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise HalfplateError(
            f"address={address!r}: no Ray cluster that this machine is part of answers there ({_first_line(error)}); "
            "run `ray start` on every machine, also on this one, and give the HOST:PORT that the first one printed"
        ) from None


def _probe(address: str) -> None:
    """Raise HalfplateError unless something listens at HOST:PORT; Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16 or "/" in host:
        raise HalfplateError(
            f"address={address!r} is not of the form HOST:PORT, nor auto; try the one that `ray start --head` printed"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE) as connection:
            connection.sendall(GREETING)
            answer = connection.recv(len(SETTINGS))
    except OSError as error:
        raise HalfplateError(
            f"address={address!r} cannot be reached ({error.strerror or error}); give the HOST:PORT that `ray start --head` printed"
        ) from None
    if answer[3:4] != SETTINGS[3:4]:
        raise HalfplateError(
            f"address={address!r} is not the address of a Ray cluster; give the HOST:PORT that `ray start --head` printed"
        )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
