"""Time and memory of the solver under the true output error, by size of the matrix.

    python benchmarks/gram_growth.py

Square matrices of random weights, block size 32, inputs correlated at random; each size in a process of its own. The time of
an iteration is the difference of two runs, so that start and storing do not count; memory is the peak of the process over what
it held before the solve. About two minutes on two quiet cores.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from common import machine, table, write_section

from halfplate.evaluation.speed import PeakMemory, memory
from halfplate.formats import WeightSpec
from halfplate.methods import create
from halfplate.statistics import InputStatistics

SIZES = (576, 1024, 2048, 4096)
ITERATIONS = (1, 4)


def measure(size: int) -> dict[str, float]:
    """Seconds of an iteration, and the peak of bytes above the weight and its Gram matrix."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator)
    x = torch.randn(2 * size, size, generator=generator) @ torch.randn(size, size, generator=generator)
    gram = x.T @ x / len(x)
    statistics = InputStatistics(len(x), gram.diagonal(), gram)
    del x
    spec = WeightSpec(size, size, out_block=32, in_block=32)
    create("armor", iterations=1).compress(weight[:64], statistics, WeightSpec(64, size, out_block=32, in_block=32))
    peak = PeakMemory()
    peak.start()
    held = memory("VmRSS") or 0
    seconds = []
    for iterations in ITERATIONS:
        start = time.perf_counter()
        create("armor", iterations=iterations).compress(weight, statistics, spec)
        seconds.append(time.perf_counter() - start)
    each = (seconds[1] - seconds[0]) / (ITERATIONS[1] - ITERATIONS[0])
    return {"size": size, "seconds": each, "bytes": (memory("VmHWM") or 0) - held}


def report(found: list[dict[str, float]]) -> str:
    """The section of RESULTS.md."""
    rows = []
    for one in found:
        weights = one["size"] ** 2
        rows.append(
            [
                f"{one['size']:g}²",
                f"{one['seconds']:.2f}",
                f"{one['seconds'] / weights * 1e9:.0f}",
                f"{one['seconds'] / weights / one['size'] * 1e12:.0f}",
                f"{one['bytes'] / 1e6:.0f}",
                f"{one['bytes'] / weights / 4:.1f}",
            ]
        )
    header = [
        "size",
        "s an iteration",
        "ns a weight",
        "ps a weight and input",
        "memory, MB",
        "in fp32 matrices of this size",
    ]
    return f"`python benchmarks/gram_growth.py` · {machine()}\n\n{table(header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, help="measure one size and print it as JSON")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.size:
        print(json.dumps(measure(options.size)))
        return
    found = []
    for size in SIZES:
        command = [sys.executable, __file__, "--size", str(size), "--threads", str(options.threads)]
        found.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        print(found[-1], flush=True)
    write_section("gram_growth", report(found))


if __name__ == "__main__":
    main()
