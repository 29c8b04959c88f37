"""What Linux says about the processor of this machine."""

import platform
from pathlib import Path


def processor_facts() -> dict[str, str]:
    """The fields of /proc/cpuinfo, of the first core; empty on other systems."""
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def processor_name() -> str:
    """The name of the processor, or at least of its architecture."""
    return processor_facts().get("model name", platform.processor() or platform.machine())
