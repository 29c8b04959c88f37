"""What a task takes of a machine; engines that know of machines place it by this."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """cpus: threads. memory: bytes of the machine's."""

    cpus: int = 1
    gpus: int = 0
    memory: int = 0

    def __or__(self, other: Needs) -> Needs:
        """What either of two tasks would find enough."""
        return Needs(max(self.cpus, other.cpus), max(self.gpus, other.gpus), max(self.memory, other.memory))

    def __str__(self) -> str:
        cpus = f"{self.cpus} {'CPU' if self.cpus == 1 else 'CPUs'}"
        gpus = f", {self.gpus} {'GPU' if self.gpus == 1 else 'GPUs'}" if self.gpus else ""
        return f"{cpus}{gpus} and {self.memory / 1e9:.1f} GB of memory"
