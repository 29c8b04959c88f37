"""A description of the machine of a measurement."""

import os
import platform
from pathlib import Path

import torch

from halfplate.limits import cores


def load_average() -> float | None:
    """The load average of the last minute, None if the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def machine() -> str:
    """Processor, instruction set, cores, threads, torch and load, as one line."""
    info = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in info.read_text(errors="replace").splitlines()] if info.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    name = fields.get("model name", platform.processor() or platform.machine())
    load = load_average()
    busy = "unknown" if load is None else f"{load:.1f}"
    return (
        f"{name} ({torch.backends.cpu.get_cpu_capability()}), {cores()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, load {busy}"
    )
