"""Linears of one shape, ours and those of other libraries, side by side in one process.

    python benchmarks/linears.py            all tables, about 20 minutes on two quiet cores
    python benchmarks/linears.py --quick    a smoke run of one small shape, nothing is written

Every contender has weights of more than 128 MB, one after the other, so that no cache holds the next one; contenders take
turns, each round starts with another, and ratios are medians of ratios within a round. Peers that are not installed are
left out: onnxruntime, onnx, torchao, llama-cpp-python (for ggml). What was measured is kept in benchmarks/cache;
`--fresh` measures it again.
"""

import os

os.environ.setdefault(
    "GOMP_SPINCOUNT", "10000"
)  # read when torch is imported; the command line of halfplate does the same


import argparse
import ctypes
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import kernel_tables
import peers
import torch
from common import CACHE, machine, write_section
from peers import Graph, loop
from random_weights import random_tensors
from torch import Tensor

from halfplate.evaluation.speed import alternate, read_probe
from halfplate.formats import WeightSpec
from halfplate.kernels import linear, native
from halfplate.pattern import DENSE, Pattern

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (576, 1536), (1536, 576))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 512)
THREADS = (1, 2)
# Weights that a contender goes through at a small batch, and at a large one, which reads each weight more slowly.
ROTATED, ROTATED_LARGE = 128 * 2**20, 40 * 2**20
LARGE_BATCH = 16
CORES = ("fp32", "bf16", "fp16", "int8", "int4", "w8a8", "w4a8")
DENSE_CORES = ("fp32", "bf16", "int8", "int4", "w8a8", "w4a8")
ARMOR_CORES = ("bf16", "w8a8", "w4a8")
BLOCKS = (128, 32, 16)


@dataclass(frozen=True)
class Contender:
    """nbytes: of one weight. make: `copies` -> their products. peer: has threads of its own, which may still spin."""

    nbytes: float
    make: Callable[[int], Graph]
    peer: bool = False


def torch_contender(dtype: torch.dtype, d_out: int, d_in: int) -> Contender:
    def make(copies: int) -> Graph:
        weights = [torch.randn(d_out, d_in).to(dtype) for _ in range(copies)]
        return loop(torch.nn.functional.linear, weights, d_in, dtype)

    return Contender(d_out * d_in * dtype.itemsize, make)


def our_contender(
    core: str, d_out: int, d_in: int, sparse: bool = True, block: int = 0, wrapper: str = "bf16"
) -> Contender:
    """core: a stored type, or w8a8 and w4a8 for int8 activations."""
    activations = "int8" if core.endswith("a8") else "float"
    stored = {"w8a8": "int8", "w4a8": "int4"}.get(core, core)
    spec = WeightSpec(d_out, d_in, Pattern(2, 4) if sparse else DENSE, stored, block, block, wrapper)
    first = linear.pack(spec, random_tensors(spec), activations)

    def make(copies: int) -> Graph:
        packed = [first] + [_copy(first) for _ in range(copies - 1)]
        return _native_loop(packed, spec, activations)

    return Contender(first.numel(), make)


def _copy(packed: Tensor) -> Tensor:
    copied = linear._aligned(packed.numel())
    copied.copy_(packed)
    return copied


def _native_loop(packed: list[Tensor], spec: WeightSpec, activations: str) -> Graph:
    through_torch = loop(lambda x, weight: linear.multiply(x, weight, spec.d_out), packed, spec.d_in, torch.float32)
    run_linear = native.library().halfplate_linear
    addresses = [ctypes.c_void_p(one.data_ptr()) for one in packed]

    def for_batch(batch: int, calls: int) -> Callable[[], int]:
        if batch >= linear.expand_from(str(spec.pattern) != "dense") and activations == "float":
            return through_torch(batch, calls)
        # Inputs and outputs stand ready, as in the native decoder: Python's own share is in no figure of the peers either.
        x, y = torch.randn(batch, spec.d_in), torch.empty(batch, spec.d_out)
        threads, nbytes = torch.get_num_threads(), packed[0].numel()

        def multiply(_: Tensor, address: ctypes.c_void_p) -> None:
            run_linear(address, nbytes, x.data_ptr(), x.nbytes, spec.d_in, y.data_ptr(), y.nbytes, batch, threads)

        return loop(multiply, addresses, spec.d_in, torch.float32)(batch, calls)

    return for_batch


def contenders(d_out: int, d_in: int, threads: int, batch_one: bool) -> Iterator[tuple[str, Contender]]:
    """Every contender of one shape; compiled ones only for a batch of one token, because each batch compiles anew."""
    weights = d_out * d_in
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        yield f"torch {name}", torch_contender(dtype, d_out, d_in)
    for core in CORES:
        yield f"2:4 {core}", our_contender(core, d_out, d_in)
    for core in DENSE_CORES:
        yield f"dense {core}", our_contender(core, d_out, d_in, sparse=False)
    shape = (d_out, d_in)
    for kind, nbytes in (("fp32", 4.0), ("int8", 1.0), ("nbits8", 1.03), ("nbits4", 0.53)):
        make = lambda copies, kind=kind: peers.onnxruntime_graph(kind, *shape, copies, threads)  # noqa: E731
        yield f"ONNX Runtime {kind}", Contender(nbytes * weights, make, peer=True)
    for kind in ("f16", "bf16", "q8_0", "q4_0", "q4_0 repacked"):
        width, size = peers.GGML_BLOCK[kind.partition(" ")[0]]
        make = lambda copies, kind=kind: peers.ggml_graph(kind, *shape, copies, threads)  # noqa: E731
        yield f"ggml {kind}", Contender(weights * size / width, make, peer=True)
    for kind, nbytes in (("int8", 1.0), ("int4", 0.53)):
        make = lambda copies, kind=kind: peers.aten_graph(kind, *shape, copies)  # noqa: E731
        yield f"torch's {kind} operator", Contender(nbytes * weights, make)
    if batch_one:
        yield "torch.compile bf16", Contender(2.0 * weights, lambda copies: peers.compiled_graph(*shape, copies))
        yield "torchao int8, compiled", Contender(1.0 * weights, lambda copies: peers.torchao_graph(*shape, copies))


def armor_contenders(d_out: int, d_in: int) -> Iterator[tuple[str, Contender]]:
    """Whole ARMOR linears beside their cores."""
    yield "torch fp32", torch_contender(torch.float32, d_out, d_in)
    yield "torch bf16", torch_contender(torch.bfloat16, d_out, d_in)
    for core in ARMOR_CORES:
        yield f"2:4 {core}", our_contender(core, d_out, d_in)
        for block in BLOCKS:
            for wrapper in ("bf16", "int8"):
                yield (
                    f"ARMOR {block} {core}, {wrapper} wrappers",
                    our_contender(core, d_out, d_in, True, block, wrapper),
                )


def rounds_for(batch: int, quick: bool) -> int:
    return 2 if quick else 15 if batch <= 4 else 7 if batch <= 64 else 5


class Measured:
    """Seconds of one product by round, of each contender in each situation, kept in a file."""

    def __init__(self, fresh: bool, keep: bool) -> None:
        self._file = CACHE / "kernels.json" if keep else None
        self.results: dict[str, Any] = {}
        if self._file is not None and self._file.exists() and not fresh:
            self.results = json.loads(self._file.read_text())

    def measure(self, kind: str, shape: tuple[int, int], threads: int, batches: tuple[int, ...], quick: bool) -> None:
        missing = [batch for batch in batches if kernel_tables.key(kind, shape, threads, batch) not in self.results]
        if not missing:
            return
        torch.set_num_threads(threads)
        found = armor_contenders(*shape) if kind == "armor" else contenders(*shape, threads, 1 in missing)
        graphs, absent = {}, []
        for name, contender in found:
            try:
                copies = max(2, -(-ROTATED // int(contender.nbytes)))
                graphs[name] = (contender, copies, contender.make(copies))
            except (ImportError, AttributeError) as error:
                absent.append(name)
                print(f"{name}: not installed ({error})", flush=True)
        for batch in missing:
            self.results[kernel_tables.key(kind, shape, threads, batch)] = {
                **_time(graphs, batch, threads, rounds_for(batch, quick)),
                "nbytes": {name: contender.nbytes for name, (contender, _, _) in graphs.items()},
                "absent": absent,
                "where": machine(),
            }
            if self._file is not None:
                self._file.write_text(json.dumps(self.results))
            print(f"{kind} {shape} batch {batch}, {threads} threads: done", flush=True)
        graphs.clear()
        gc.collect()


def _time(graphs: dict[str, tuple[Contender, int, Graph]], batch: int, threads: int, rounds: int) -> dict[str, Any]:
    tasks: dict[str, Callable[[], float]] = {"read": read_probe(threads)}
    for name, (contender, copies, graph) in graphs.items():
        if batch > 1 and "compile" in name:
            continue
        calls = copies if batch < LARGE_BATCH else max(2, min(copies, -(-ROTATED_LARGE // int(contender.nbytes))))
        run = graph(batch, calls)
        run()  # allocates, compiles, warms up
        tasks[name] = lambda run=run, peer=contender.peer: _seconds(run, peer)  # type: ignore[misc]
    timed = alternate(tasks, rounds)
    return {"read": timed.pop("read"), "seconds": timed}


def _seconds(run: Callable[[], int], peer: bool) -> float:
    start = time.perf_counter()
    count = run()
    seconds = (time.perf_counter() - start) / count
    if peer:
        time.sleep(0.005)  # until its threads no longer spin, which would slow the next contender
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache holds")
    parser.add_argument("--dry", action="store_true", help="print the section instead of writing RESULTS.md")
    parser.add_argument("--quick", action="store_true", help="one small shape, two rounds, nothing is kept or written")
    parser.add_argument("--shapes", type=int, metavar="N", default=len(SHAPES), help="only the first N shapes")
    options = parser.parse_args()
    CACHE.mkdir(exist_ok=True)
    measured = Measured(options.fresh, keep=not options.quick)
    with torch.inference_mode():
        if options.quick:
            shape = (512, 512)
            measured.measure("plain", shape, 1, (1, 8), True)
            measured.measure("armor", shape, 1, (1, 64), True)
            print(kernel_tables.one_shape(measured.results, shape, 1))
            print(kernel_tables.armor(measured.results, shape, 1, (1, 64)))
            return
        for threads in THREADS:
            measured.measure("plain", SHAPES[0], threads, BATCHES, False)
            measured.measure("armor", SHAPES[0], threads, (1, 512), False)
            for shape in SHAPES[1 : options.shapes]:
                measured.measure("plain", shape, threads, (1,), False)
    section = kernel_tables.report(measured.results, SHAPES[: options.shapes], BATCHES, THREADS)
    print(section) if options.dry else write_section("kernels", section)


if __name__ == "__main__":
    main()
