"""What stops scaling: a simulation of 8B, 70B and 405B on 1, 8 and 64 machines of 8 GPUs, and the model behind it against this machine.

    python benchmarks/scaling.py            # the simulation, into docs/cluster.md; seconds, measures nothing
    python benchmarks/scaling.py --check    # rates of this machine, and SmolLM2-135M predicted and run; into docs/cluster.md

The check wants two quiet cores and takes about twenty minutes; `--quick` makes it short and only prints.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import ROOT, TEXT, machine, smollm2_gguf, table, write_section
from scaling_model import GPU_NODES, LLAMA, Machines, Model, Outcome, Work, on, simulate
from torch import Tensor

from halfplate.execution.needs import memory_to_solve
from halfplate.formats import WeightSpec
from halfplate.methods import create
from halfplate.models.sources import open_source
from halfplate.precision import products
from halfplate.statistics import InputStatistics

PAGE = ROOT / "docs" / "cluster.md"
NODES = (1, 8, 64)
PHASES = ("starting", "statistics", "reduction", "solving", "writing")
ENGINES = {
    "one process": [],
    "2 processes": ["--workers", "2"],
    "Ray, 2 workers": ["--engine", "ray", "--workers", "2"],
}


def simulation() -> str:
    """The section `scaling` of the page."""
    rows = []
    for inputs in ("compressed", "dense"):
        for model in LLAMA:
            one = simulate(model, Work(inputs=inputs), on(GPU_NODES, 1)).seconds
            for nodes in NODES:
                found = simulate(model, Work(inputs=inputs), on(GPU_NODES, nodes))
                rows.append([f"{model.name}, {inputs}, {nodes}", *_shown(found), f"{one / found.seconds:.1f}×"])
    header = ["model, inputs, machines", "hours", *(f"{phase}, %" for phase in PHASES[1:]), "workers busy, %", "gain"]
    largest = ", ".join(f"{model.name} {_largest_task(model) / 1e9:.0f} GB" for model in LLAMA)
    return (
        f"`python benchmarks/scaling.py` · 64 samples of 512 tokens, 60 iterations, block size 128\n\n{table(header, rows)}\n\n"
        f"The largest task, solving down_proj under its Gram matrix, takes by the rough count that Ray is told: {largest}."
    )


def _shown(found: Outcome) -> list[str]:
    shares = [f"{found.phases.get(phase, 0.0) / found.seconds:.0%}".rstrip("%") for phase in PHASES[1:]]
    return [f"{found.seconds / 3600:.2f}", *shares, f"{found.busy:.0%}".rstrip("%")]


def _largest_task(model: Model) -> int:
    specs = [WeightSpec(matrix.d_out, matrix.d_in, out_block=128, in_block=128) for matrix in model.matrices]
    return max(memory_to_solve(create("armor"), [spec]) for spec in specs)


# Rates of this machine, one thread.


def seconds_of(work: Callable[[], object], least: float = 0.5) -> float:
    """The fastest of several calls that take `least` seconds together."""
    work()
    found, begun = [], time.perf_counter()
    while len(found) < 3 or time.perf_counter() - begun < least:
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def rates(iterations: int) -> dict[str, Any]:
    """What `Machines` asks for, for one thread of this machine."""
    torch.set_num_threads(1)
    x, weight = torch.randn(4096, 1536), torch.randn(576, 1536)

    def text() -> Tensor:
        with products("auto", "cpu"):
            return torch.nn.functional.linear(x, weight)

    total, more = torch.zeros(4_000_000, dtype=torch.float64), torch.ones(4_000_000)
    data = bytes(64_000_000)
    with tempfile.NamedTemporaryFile() as file:

        def through_file() -> None:
            Path(file.name).write_bytes(data)
            Path(file.name).read_bytes()

        through = seconds_of(through_file)
    return {
        "products": 2 * 4096 * 1536 * 576 / seconds_of(text),
        "gram": 2 * 4096 * 1536**2 / seconds_of(lambda: x.T @ x),
        "solve": solve_rate([(576, 576), (1536, 576), (576, 1536)], iterations),
        "node_bytes": 2 * len(data) / through,
        "storage_bytes": 2 * len(data) / through,
        "add_bytes": 12 * len(total) / seconds_of(lambda: total.add_(more)),
        "hash_bytes": len(data) / seconds_of(lambda: hashlib.sha256(data)),
    }


def solve_rate(shapes: Sequence[tuple[int, int]], iterations: int) -> tuple[float, float, float]:
    """Seconds an iteration for each d_out · d_in² and each d_out · d_in, by least squares; none for columns on a processor."""
    seconds = [solve_seconds(d_out, d_in, iterations) for d_out, d_in in shapes]
    terms = torch.tensor([[d_out * d_in * d_in, d_out * d_in] for d_out, d_in in shapes], dtype=torch.float64)
    scale = terms.amax(0)
    cubic, square = (
        torch.linalg.lstsq(terms / scale, torch.tensor(seconds).double()[:, None]).solution[:, 0] / scale
    ).tolist()
    if min(cubic, square) >= 0:
        return cubic, square, 0.0
    # Noise has outgrown the smaller term.
    return 0.0, float((torch.tensor(seconds).double() / terms[:, 1]).mean()), 0.0


def solve_seconds(d_out: int, d_in: int, iterations: int) -> float:
    """Of one iteration of ARMOR at block 16, the mean over a whole solve."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(d_out, d_in, generator=generator)
    x = torch.randn(2 * d_in, d_in, generator=generator) @ torch.randn(d_in, d_in, generator=generator)
    gram = (x.T @ x / len(x)).double()
    statistics = InputStatistics(len(x), gram.diagonal().float(), gram)
    spec = WeightSpec(d_out, d_in, out_block=16, in_block=16)
    start = time.perf_counter()
    create("armor", iterations=iterations).compress(weight, statistics, spec)
    return (time.perf_counter() - start) / iterations


def begin_seconds() -> float:
    """Until a process has what tasks import."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import halfplate.execution.tasks"], check=True)
    return time.perf_counter() - start


def run(model: str, options: list[str]) -> dict[str, float]:
    """Seconds of the phases as `compress` reports them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "halfplate", "compress", model, "-o", f"{folder}/out", "--json", "--quiet"]
        done = subprocess.run([*command, "--threads", "1", *options], stdout=subprocess.PIPE, check=True, text=True)
    seconds: dict[str, float] = json.loads(done.stdout)["seconds"]
    return seconds


def shape_of(model: str) -> Model:
    """The shape of a model of Llama's kind, from its configuration."""
    config = open_source(model).config
    kv = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return Model(model, config.num_hidden_layers, config.hidden_size, kv, config.intermediate_size)


def check(model: str, samples: int, length: int, iterations: int) -> str:
    """The section `scaling_check` of the page."""
    one, begin, shape = rates(iterations), begin_seconds(), shape_of(model)
    rows = []
    for inputs in ("compressed", "dense"):
        work = Work(samples, length, iterations, inputs)
        asked = [
            "--samples",
            str(samples),
            "--seq-len",
            str(length),
            "--iterations",
            str(iterations),
            "--inputs",
            inputs,
        ]
        asked += ["--block-size", "16", *(["--calibration", str(TEXT)] if TEXT.is_file() else [])]
        for name, options in ENGINES.items():
            workers = 2 if options else 1
            machines = Machines(1, workers, **one, begin=begin if options else 0.0)
            predicted, measured = simulate(shape, work, machines), run(model, [*asked, *options])
            phases = predicted.phases
            # What `compress` counts as statistics.
            pairs = [
                (phases["starting"] + phases["statistics"] + phases.get("reduction", 0.0), measured["statistics"]),
                (phases["solving"], measured["solving"]),
                (phases["writing"], measured["writing"]),
            ]
            pairs.append((sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)))
            rows.append([f"{name}, {inputs}", *(f"{said:.1f} / {found:.1f}" for said, found in pairs)])
            print(rows[-1], flush=True)
    header = ["predicted / measured, s", "statistics", "solving", "writing", "together"]
    found = ", ".join(f"{name} {value:.3g}" for name, value in one.items() if isinstance(value, float))
    solve = ", ".join(f"{value:.3g}" for value in one["solve"])
    return (
        f"`python benchmarks/scaling.py --check` · {machine()}\n\n{table(header, rows)}\n\n"
        f"{shape.blocks} blocks, hidden {shape.hidden}; {samples} samples of {length} tokens, {iterations} iterations. Rates of one thread: {found}, solve {solve}; "
        f"a process starts in {begin:.1f} s."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure this machine and compare")
    parser.add_argument("--model", help="another one of Llama's kind than SmolLM2-135M")
    parser.add_argument("--quick", action="store_true", help="few short samples and iterations; writes nothing")
    parser.add_argument("--print", action="store_true", help="write nothing")
    options = parser.parse_args()
    if not options.check:
        text = simulation()
    else:
        text = check(options.model or str(smollm2_gguf()), *((4, 32, 2) if options.quick else (16, 512, 8)))
    if options.quick or options.print:
        print(text)
    else:
        write_section("scaling_check" if options.check else "scaling", text, PAGE)


if __name__ == "__main__":
    main()
