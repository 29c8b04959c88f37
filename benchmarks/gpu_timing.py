"""Timing on one device: CUDA graphs over weights that no cache holds, medians of replays; wall time on the CPU."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

CACHED = 256 * 2**20  # bytes of weights that one replay goes through: four times the L2 of an H200
WARM_UP, LEAST_REPLAYS = 3, 5
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Timing:
    """seconds: of one call, the median. graph: whether it ran in a CUDA graph; why_not: what kept it from that."""

    seconds: float
    graph: bool
    why_not: str = ""


def copies_of(nbytes: float, device: torch.device) -> int:
    """How many weights of `nbytes` a measurement goes through in turn."""
    return max(1, -(-CACHED // int(nbytes))) if device.type == "cuda" else 1


def timed(calls: Sequence[Callable[[], object]], device: torch.device, seconds: float = 0.3) -> Timing:
    """Time one of `calls`, which do the same on weights of their own, for about so many seconds."""
    if device.type != "cuda":
        return Timing(_wall(calls), False, "on the CPU")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    # A library that allocates or synchronises in its product cannot be captured, each with an error of its own.
    except Exception as error:
        torch.cuda.synchronize()
        why = " ".join(str(error).split())[:160]
        return Timing(_events(lambda: [call() for call in calls], seconds) / len(calls), False, why)
    return Timing(_events(graph.replay, seconds) / len(calls), True)


def _events(run: Callable[[], object], seconds: float) -> float:
    """Median seconds of `run` on the device."""
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    found: list[float] = []
    end = time.monotonic() + seconds
    while len(found) < LEAST_REPLAYS or time.monotonic() < end:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / 1e3)
    return median(found)


def _wall(calls: Sequence[Callable[[], object]]) -> float:
    """Median seconds of one call on the CPU, where the script is only tried."""
    return median(once(call, CPU) for _ in range(LEAST_REPLAYS) for call in calls)


def once(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def random_rows(tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Inputs of a linear: random, because products of zeros run faster."""
    return torch.randn(tokens, width, device=device, dtype=dtype)
