"""What a compression costs on many machines: flops, bytes and rates in, the time of every phase out. Pure Python.

The workers and the process that runs the command are played through as `halfplate.execution` works: the tasks of a call go to
whichever worker is free, the costliest first, and the command adds sums, writes statistics and writes blocks by itself. With compressed
inputs each stage of a block waits for the one before; with dense inputs the next blocks begin while matrices are being solved.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

BATCH, CHUNKS = 8, 16  # of halfplate.calibration and halfplate.execution.hidden
AHEAD = (
    2  # with dense inputs blocks begin until so many matrices for each worker wait, as in halfplate.execution.blocks
)
CONTEXT_FLOPS = 4  # of attention: a token, a token that it sees and a hidden channel


@dataclass(frozen=True)
class Matrix:
    """stage: matrices of one stage share an input; stages run in order."""

    d_out: int
    d_in: int
    stage: int

    @property
    def weights(self) -> int:
        return self.d_out * self.d_in


@dataclass(frozen=True)
class Model:
    """A Llama shape: gated feed-forward, grouped queries; heads: all query heads together are as wide as the hidden state."""

    name: str
    blocks: int
    hidden: int
    kv: int
    ffn: int

    @property
    def matrices(self) -> list[Matrix]:
        h, kv, f = self.hidden, self.kv, self.ffn
        return [
            *(Matrix(d_out, h, 0) for d_out in (h, kv, kv)),
            Matrix(h, h, 1),
            *(Matrix(f, h, 2) for _ in range(2)),
            Matrix(h, f, 3),
        ]

    @property
    def weights(self) -> int:
        """Of one block."""
        return sum(matrix.weights for matrix in self.matrices)


LLAMA = (
    Model("8B", 32, 4096, 1024, 14336),
    Model("70B", 80, 8192, 1024, 28672),
    Model("405B", 126, 16384, 1024, 53248),
)


@dataclass(frozen=True)
class Work:
    """What is asked for. iterations: of the solver. inputs: dense, or compressed with the correction towards the dense outputs."""

    samples: int = 64
    length: int = 512
    iterations: int = 60
    inputs: str = "compressed"

    @property
    def chunks(self) -> list[int]:
        """Tokens of each chunk of batches."""
        batches = [min(BATCH, self.samples - start) for start in range(0, self.samples, BATCH)]
        count = min(CHUNKS, len(batches))
        ends = [len(batches) * chunk // count for chunk in range(count + 1)]
        return [self.length * sum(batches[a:b]) for a, b in pairwise(ends)]

    @property
    def single(self) -> bool:
        """Whether each chunk is one batch, whose sums are fp32."""
        return self.samples <= BATCH * CHUNKS

    @property
    def streams(self) -> int:
        return 2 if self.inputs == "compressed" else 1


@dataclass(frozen=True)
class Machines:
    """Rates, of one worker unless it says otherwise; a worker is a GPU, or some threads of a processor.

    products: flops/s of text through a block. gram: flops/s of XᵀX in fp32. solve: seconds an iteration for each d_out · d_in², for each
    d_out · d_in and for each column d_in, which the sweep visits one after the other. node_bytes: bytes/s between a machine and the storage. storage_bytes: of the storage to all of them. add_bytes: sums that the command
    adds, bytes/s. hash_bytes: of checksums. start: seconds before a task works (a process of its own where it has a GPU). begin: seconds
    until there are workers, once. dispatch: seconds of
    the scheduler for each task. stays: whether processes keep their block from task to task.
    """

    nodes: int
    workers_per_node: int
    products: float
    gram: float
    solve: tuple[float, float, float]
    node_bytes: float
    storage_bytes: float
    add_bytes: float
    hash_bytes: float
    start: float = 0.0
    begin: float = 0.0
    dispatch: float = 0.002
    stays: bool = True

    @property
    def workers(self) -> int:
        return self.nodes * self.workers_per_node

    @property
    def alone(self) -> bool:
        """One process does all, and nothing goes through files."""
        return self.workers == 1

    def shared_bytes(self, readers: int) -> float:
        """Bytes/s of each of so many workers that use the storage at once."""
        nodes = min(self.nodes, max(readers, 1))
        return min(self.node_bytes * nodes, self.storage_bytes) / max(readers, 1)


# Assumed, not measured: no GPU was at hand. Machines of 8 GPUs of the H200's kind: text in bf16 at 40 % of peak; Gram matrices and the
# solver in fp32 at half of peak (67 Tflop/s without tensor cores), four products with the Gram matrix an iteration; 25 µs for each
# column of the sweep, which is many small kernels; a new process for each task, as Ray has it for GPUs; shared storage.
GPU_NODES = Machines(
    nodes=1,
    workers_per_node=8,
    products=4e14,
    gram=3e13,
    solve=(8 / 3e13, 100 / 2e12, 25e-6),
    node_bytes=5e9,
    storage_bytes=4e10,
    add_bytes=5e9,
    hash_bytes=1.5e9,
    start=15.0,
    stays=False,
)


@dataclass
class Outcome:
    """phases: seconds of the command's clock, what it did or waited for. busy: share of the workers' time in which they worked."""

    phases: dict[str, float]
    busy: float

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


class _Workers:
    """Whoever is free next takes the next task."""

    def __init__(self, machines: Machines) -> None:
        self._free = [0.0] * machines.workers
        self.worked = 0.0

    def run(self, durations: Iterable[float], now: float) -> float:
        """When the last of some tasks ends that are handed over at `now`."""
        last = now
        for duration in sorted(durations, reverse=True):
            end = max(heapq.heappop(self._free), now) + duration
            heapq.heappush(self._free, end)
            self.worked += duration
            last = max(last, end)
        return last


class _Play:
    """One compression, on the clock of the command."""

    def __init__(self, model: Model, work: Work, machines: Machines) -> None:
        self.model, self.work, self.machines = model, work, machines
        self.workers = _Workers(machines)
        self.now = 0.0
        self.phases: dict[str, float] = defaultdict(float)

    def spend(self, phase: str, until: float) -> None:
        self.phases[phase] += max(until - self.now, 0.0)
        self.now = max(until, self.now)

    # Seconds of tasks.

    def _chunk_tasks(self, flops_a_token: float, context: int, nbytes: float, first: bool) -> list[float]:
        """Of tasks that take each chunk through something; nbytes: what one writes. first: the block is not open yet."""
        chunks, machines = self.work.chunks, self.machines
        if machines.alone:
            chunks, nbytes = [sum(chunks)], 0.0
        together = min(len(chunks), machines.workers)
        weights = 2.0 * self.model.weights if first or not machines.stays else 0.0
        hidden = 4.0 * self.model.hidden * self.work.streams
        return [
            machines.start
            + machines.dispatch
            + tokens
            * (flops_a_token + CONTEXT_FLOPS * context * self.work.length * self.model.hidden)
            / machines.products
            + (weights + tokens * hidden + nbytes) / machines.shared_bytes(together)
            for tokens in chunks
        ]

    def statistics(self, inputs: list[int], reached: float, context: int, first: bool) -> None:
        """Sums of inputs of these widths; reached: weights of the block that text runs through before; context: attentions."""
        machines, work = self.machines, self.work
        moments = sum(width**2 for width in inputs) * (2 if work.inputs == "compressed" else 1)
        chunk_bytes = (4 if work.single else 8) * moments
        tokens = sum(work.chunks)
        tasks = self._chunk_tasks(2 * reached * work.streams, context * work.streams, chunk_bytes, first)
        # The products are of fp32, at a rate of their own.
        share = 1 if machines.alone else len(work.chunks)
        tasks = [task + 2 * moments * tokens / share / machines.gram for task in tasks]
        self.spend("statistics", self.workers.run(tasks, self.now))
        if not machines.alone:
            read = len(work.chunks) * chunk_bytes
            adding = read / machines.node_bytes + read / machines.add_bytes
            written = 8 * moments * (1 / machines.node_bytes + 1 / machines.hash_bytes)
            self.spend("reduction", self.now + adding + written)

    def solving(self, matrices: list[Matrix]) -> list[float]:
        """Seconds of the tasks that solve these."""
        machines = self.machines
        cubic, square, column = machines.solve
        tasks = []
        for matrix in matrices:
            iteration = matrix.weights * (cubic * matrix.d_in + square) + column * matrix.d_in
            moments = 0 if machines.alone else 8 * matrix.d_in**2 * (2 if self.work.inputs == "compressed" else 1)
            moved = 3.2 * matrix.weights + moments
            rate = machines.shared_bytes(min(len(matrices), machines.workers))
            tasks.append(machines.start + machines.dispatch + self.work.iterations * iteration + moved / rate)
        return tasks

    def advance(self) -> None:
        """Hidden states from the inputs of the block to its outputs."""
        nbytes = 4.0 * self.model.hidden * self.work.streams * max(self.work.chunks)
        tasks = self._chunk_tasks(2 * self.model.weights * self.work.streams, self.work.streams, nbytes, False)
        self.spend("statistics", self.workers.run(tasks, self.now))

    def write(self) -> None:
        """The command reads the block and its parts, and writes it as a whole."""
        nbytes = self.model.weights * (2 + 2 * 1.2)
        self.spend("writing", self.now + nbytes / self.machines.node_bytes + nbytes / self.machines.hash_bytes)

    # The two orders of work.

    def compressed(self) -> None:
        for _ in range(self.model.blocks):
            before, context, first = 0.0, 0, True
            for stage in range(4):
                matrices = [matrix for matrix in self.model.matrices if matrix.stage == stage]
                self.statistics([matrices[0].d_in], before, context, first)
                self.spend("solving", self.workers.run(self.solving(matrices), self.now))
                before, context, first = before + sum(matrix.weights for matrix in matrices), 1, False
            self.write()
            self.advance()

    def dense(self) -> None:
        waiting: deque[tuple[float, int]] = deque()
        inputs = [next(m.d_in for m in self.model.matrices if m.stage == stage) for stage in range(4)]
        limit = AHEAD * self.machines.workers
        for _ in range(self.model.blocks):
            self.statistics(inputs, self.model.weights, 1, True)
            ends = self.workers.run(self.solving(self.model.matrices), self.now)
            waiting.append((ends, len(self.model.matrices)))
            if self.machines.alone:
                self._finish(waiting)
            self.advance()
            while sum(count for _, count in waiting) > limit:
                self._finish(waiting)
        while waiting:
            self._finish(waiting)

    def _finish(self, waiting: deque[tuple[float, int]]) -> None:
        self.spend("solving", waiting.popleft()[0])
        self.write()


def simulate(model: Model, work: Work, machines: Machines) -> Outcome:
    """How long compressing the blocks of `model` takes, and where the time goes."""
    play = _Play(model, work, machines)
    play.spend("starting", machines.begin)
    if work.inputs == "dense":
        play.dense()
    else:
        play.compressed()
    busy = play.workers.worked / (machines.workers * play.now)
    return Outcome(dict(play.phases), busy)


def on(machines: Machines, nodes: int) -> Machines:
    """So many machines of one kind."""
    return replace(machines, nodes=nodes)
