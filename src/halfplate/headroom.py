"""The memory that this process can use, and the check that refuses arguments that need more."""

import resource
from pathlib import Path

from halfplate.errors import HalfplateError


def check_memory(what: str, nbytes: int, argument: str, value: int) -> None:
    """Raise HalfplateError if this process cannot use `nbytes` more memory, naming the `value` of `argument` that would fit.

    what: what needs the memory, such as `samples=9 windows of seq_len=9`.
    nbytes: proportional to `value`.
    """
    available = available_memory()
    if available is None:
        return
    free = max(0, available - (memory("VmRSS") or 0))
    if nbytes <= free:
        return
    most = value * free // nbytes
    cure = f"try {argument}={most} or less" if most else "use a machine with more memory"
    raise HalfplateError(
        f"{what} need {spoken(nbytes)} of memory, but this process can use only {spoken(free)} more; {cure}"
    )


def memory(field: str) -> int | None:
    """Bytes that the kernel reports for this process under `field` (VmRSS, VmHWM, ...); None if it does not."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = (line.split() for line in status.read_text().splitlines())
    return next((int(words[1]) * 1024 for words in lines if words and words[0] == f"{field}:"), None)


def available_memory() -> int | None:
    """Bytes that this process may still use: free memory and swap, within the limits of its control group and its own; None if unknown."""
    own = memory("VmRSS") or 0
    limits = []
    machine = _fields(Path("/proc/meminfo"))
    if "MemAvailable" in machine:
        limits.append(own + 1024 * (machine["MemAvailable"] + machine.get("SwapFree", 0)))
    if (group := _group_limit()) is not None:
        limits.append(own + group)
    for kind, taken in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft = resource.getrlimit(kind)[0]
        if soft != resource.RLIM_INFINITY:
            limits.append(own + max(0, soft - (memory(taken) or 0)))
    return min(limits, default=None)


def _group_limit() -> int | None:
    """Bytes left in the control group (version 2) of this process."""
    try:
        place = Path("/proc/self/cgroup").read_text().strip().splitlines()[-1].rpartition("::")[2].lstrip("/")
        folder = Path("/sys/fs/cgroup") / place
        most = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        cached = _fields(folder / "memory.stat").get("inactive_file", 0)
    except (OSError, ValueError, IndexError):
        return None
    return None if most == "max" else max(0, int(most) - used + cached)


def _fields(path: Path) -> dict[str, int]:
    """Lines of the form `name number`, as the kernel writes them."""
    if not path.is_file():
        return {}
    words = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {each[0]: int(each[1]) for each in words if len(each) > 1 and each[1].isdigit()}


def spoken(nbytes: int) -> str:
    """Bytes as text."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def spoken_above(nbytes: int) -> str:
    """Bytes as text that names no less."""
    step = 10**7 if nbytes >= 1e9 else 10**5
    return spoken(-(-nbytes // step) * step)
