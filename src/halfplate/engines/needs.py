"""The resources that a task needs; engines with several machines place it accordingly."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """cpus: number of threads.
    memory: bytes of CPU memory.
    """

    cpus: int = 1
    gpus: int = 0
    memory: int = 0

    def __or__(self, other: Needs) -> Needs:
        """The larger of the needs of two tasks."""
        return Needs(max(self.cpus, other.cpus), max(self.gpus, other.gpus), max(self.memory, other.memory))

    def __str__(self) -> str:
        cpus = f"{self.cpus} {'CPU' if self.cpus == 1 else 'CPUs'}"
        gpus = f", {self.gpus} {'GPU' if self.gpus == 1 else 'GPUs'}" if self.gpus else ""
        return f"{cpus}{gpus} and {self.memory / 1e9:.1f} GB of memory"
