"""The sections of `gpu.py` in the order of their worth: with little time left, the last ones are skipped."""

import platform
import subprocess
from typing import Any

import torch
from gpu_checks import check_formats, check_semi_structured, check_solver
from gpu_decode import decode_models
from gpu_linears import ceilings, decode_linears, prefill_linears
from gpu_model_checks import check_model
from gpu_session import Section, Session, versions
from gpu_solver import compress_whole, solve_times

from halfplate.telemetry.machine import machine

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "peft",
    "gguf",
    "scipy",
    "rich",
)
SMI = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def sections() -> list[Section]:
    """All of them; the seconds are those of a Hopper GPU."""
    return [
        Section("device", device_facts, 2, 20),
        Section("ceilings", ceilings, 3, 20),
        Section("formats", check_formats, 5, 40),
        Section("semi_structured", check_semi_structured, 5, 60),
        Section("solver", check_solver, 10, 90),
        Section("model", check_model, 10, 90),
        Section("decode_linears", decode_linears, 10, 60),
        Section("prefill_linears", prefill_linears, 5, 30),
        Section("decode_models", decode_models, 20, 90),
        Section("solve_times", solve_times, 30, 120),
        Section("compress", compress_whole, 40, 240),
    ]


def device_facts(session: Session) -> None:
    """What the figures were measured on."""
    facts: dict[str, Any] = {"cpu": machine(), "python": platform.python_version(), "packages": versions(PACKAGES)}
    if session.cuda:
        properties = torch.cuda.get_device_properties(session.device)
        facts |= {
            "gpu": properties.name,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(session.device))),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cusparselt": torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None,
            "smi": _smi(),
        }
    session.record.write("device", f"{facts.get('gpu', 'CPU')} | {facts}", **facts)


def _smi() -> str:
    """What nvidia-smi says of names, clocks and power; it is only asked, nothing is set."""
    try:
        command = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi cannot be asked: {error}"
