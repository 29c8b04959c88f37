"""Measuring speed on a machine that is also used by others: alternating rounds, medians, paired ratios, bytes and bandwidth."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor, nn

from halfplate.headroom import memory
from halfplate.models.linears import find_blocks

Result = TypeVar("Result")
Clock = Callable[[], float]
# Continues ids (1, L) greedily by a number of tokens, without stopping, and calls the function once, as soon as the
# first of them is known.
Contender = Callable[[Tensor, int, Callable[[], None]], None]

# Larger than any last-level cache, so that it is read from memory.
PROBE_BYTES = 256 * 2**20
PROBE_PASSES = 3


@dataclass(frozen=True)
class Speed:
    """Tokens per second of prefill and decoding."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class WeightBytes:
    """Resident bytes of the weights of a model.

    total: every parameter and buffer once.
    linears: those of the decoder layers, without norms.
    a_token: bytes read per decoded token: all except an embedding table that is not also the head.
    """

    total: int
    linears: int
    a_token: int


def time_generation(contender: Contender, ids: Tensor, new_tokens: int, clock: Clock = time.perf_counter) -> Speed:
    """Time one continuation of ids (1, L) by `new_tokens`, at least 2.

    The first new token belongs to the prefill, which reads L tokens; decoding writes the others.
    """
    known: list[float] = []
    start = clock()
    contender(ids, new_tokens, lambda: known.append(clock()))
    end = clock()
    (first,) = known
    return Speed(ids.shape[1] / (first - start), (new_tokens - 1) / (end - first))


def alternate(
    tasks: Mapping[str, Callable[[], Result]],
    rounds: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Result]]:
    """Run every task once per round, so that all are affected equally by the machine; each round starts with another task.

    Returns the results of each task by round. progress: called with the runs done and all runs.
    """
    names = list(tasks)
    results: dict[str, list[Result]] = {name: [] for name in names}
    done = 0
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            results[name].append(tasks[name]())
            done += 1
            if progress is not None:
                progress(done, rounds * len(names))
    return results


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round, so that a disturbance of a whole round cancels."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def random_prompt(vocabulary: int, tokens: int, seed: int = 0) -> Tensor:
    """Random token ids int64 (1, tokens); the speed does not depend on them."""
    return torch.randint(
        vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.int64, device="cpu"
    )


def weight_bytes(model: nn.Module) -> WeightBytes:
    """Bytes in memory of the weights of `model`, a decoder-only transformers model."""
    _, blocks = find_blocks(model)
    norms = {
        id(tensor) for module in blocks.modules() if "Norm" in type(module).__name__ for tensor in _tensors(module)
    }
    linears = _storages([tensor for tensor in _tensors(blocks) if id(tensor) not in norms])
    everything = _storages(_tensors(model))
    embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
    elsewhere = _storages([t for module in _leaves(model) if module is not embedding for t in _tensors(module)])
    # A separate embedding table is read one row per token; a tied one is also the head, which is read completely.
    row = embedding.weight.shape[-1] * embedding.weight.element_size()
    idle = {place: size for place, size in _storages(_tensors(embedding)).items() if place not in elsewhere}
    a_token = sum(everything.values()) - sum(idle.values()) + (row if idle else 0)
    return WeightBytes(sum(everything.values()), sum(linears.values()), a_token)


def _leaves(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if not list(module.children())]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _storages(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Bytes by address, each storage counted once, because tied and sliced tensors share storage."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def read_probe(threads: int) -> Callable[[], float]:
    """A function that measures the current memory read bandwidth: bytes per second, median of a few passes.

    It holds `PROBE_BYTES`. It uses the native kernels if available, otherwise the sum of torch.
    """
    from halfplate.kernels import native

    data = torch.zeros(PROBE_BYTES // 4, dtype=torch.float32, device="cpu")
    library = native.library() if native.available() else None

    def read() -> None:
        if library is None:
            data.sum()
        else:
            library.halfplate_read(data.data_ptr(), data.nbytes, threads)

    def measure() -> float:
        seconds = []
        for _ in range(PROBE_PASSES):
            start = time.perf_counter()
            read()
            seconds.append(time.perf_counter() - start)
        return PROBE_BYTES / median(seconds)

    return measure


class PeakMemory:
    """The peak resident size of the process while something is loaded and run, minus what others hold.

    Linux only; elsewhere `take` returns None.
    """

    def __init__(self) -> None:
        self._baseline = self._before = memory("VmRSS")

    def start(self) -> None:
        """Reset the peak; everything that is resident now counts as held by others."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._baseline = None
        self._before = memory("VmRSS")

    def take(self) -> int | None:
        """Peak bytes since `start`, plus what the process held when this object was created."""
        peak = memory("VmHWM")
        if peak is None or self._baseline is None or self._before is None:
            return None
        return peak - self._before + self._baseline
