"""A description of the machine of a measurement."""

import os

import torch

from halfplate.limits import cores
from halfplate.processor import processor_name


def load_average() -> float | None:
    """The load average of the last minute, None if the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def machine() -> str:
    """Processor, instruction set, cores, threads, torch and load, as one line."""
    load = load_average()
    busy = "unknown" if load is None else f"{load:.1f}"
    return (
        f"{processor_name()} ({torch.backends.cpu.get_cpu_capability()}), {cores()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, load {busy}"
    )
