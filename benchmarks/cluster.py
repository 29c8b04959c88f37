"""What Ray costs: SmolLM2-135M by 2 workers of Ray against 2 processes without it, and 10,000 tasks that do nothing.

    python benchmarks/cluster.py

Rounds alternate between the engines, each run in a process of its own, 1 thread a worker; medians. A phase is what
`compress` itself reports, starts of workers included. Samples are fewer than the default. Some forty minutes on two quiet cores
with three rounds; `--quick` only shows that it works.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import TEXT, machine, smollm2_gguf, table, write_section

from halfplate.engines.needs import Needs

ENGINES = {"local": ["--workers", "2"], "ray": ["--engine", "ray", "--workers", "2"]}
SHORT = ["--samples", "8"]
PHASES = ("statistics", "solving", "writing", "total")


@dataclass(frozen=True)
class Nothing:
    """A task that gives its number back."""

    number: int
    cost: float = 1.0
    needs: Needs = Needs()  # noqa: RUF009 (frozen)

    def run(self, blocks: object) -> int:
        return self.number


def dispatch(count: int) -> float:
    """Milliseconds for each of so many tasks that do nothing, by 2 workers that have started."""
    from halfplate.engines.ray import RayCluster

    with tempfile.TemporaryDirectory() as folder:
        engine = RayCluster(None, 2, 1, Path(folder))
        try:
            list(engine.run([Nothing(number) for number in range(4)]))
            start = time.perf_counter()
            assert list(engine.run([Nothing(number) for number in range(count)])) == list(range(count))
            return (time.perf_counter() - start) / count * 1e3
        finally:
            engine.close()


def compress(model: str, engine: str, options: list[str]) -> dict[str, Any]:
    """The summary of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "halfplate", "compress", model, "-o", f"{folder}/out", "--json", "--quiet"]
        run = subprocess.run(
            [*command, "--threads", "1", *ENGINES[engine], *options], stdout=subprocess.PIPE, check=True, text=True
        )
        files = sorted(Path(folder, "out").glob("*.safetensors"))
        sha256 = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    summary: dict[str, Any] = json.loads(run.stdout)
    return summary | {"sha256": sha256}


def report(found: dict[str, list[dict[str, Any]]], each: float, count: int) -> str:
    """The section of RESULTS.md."""
    medians = {
        engine: {phase: statistics.median(run["seconds"].get(phase, 0.0) for run in runs) for phase in PHASES}
        for engine, runs in found.items()
    }
    rows = [[engine, *(f"{medians[engine][phase]:.1f}" for phase in PHASES)] for engine in ENGINES]
    more = {phase: medians["ray"][phase] - medians["local"][phase] for phase in PHASES}
    solving = medians["local"]["solving"]
    lines = [
        f"`python benchmarks/cluster.py` · {machine()}",
        table(["2 workers", *(f"{phase}, s" for phase in PHASES)], rows),
        f"Overhead of Ray relative to the solving time of local: solving {more['solving'] / solving:+.1%}, statistics and solving "
        f"{(more['statistics'] + more['solving']) / solving:+.1%}. Scheduling of {count} empty tasks: {each:.2f} ms each. "
        f"Medians of {len(found['ray'])} round{'s' * (len(found['ray']) > 1)} with `{' '.join(SHORT)}`; both engines wrote the same weights.",
    ]
    return "\n\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="another one than SmolLM2-135M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="one round, 4 short samples, 100 tasks; writes nothing")
    options = parser.parse_args()
    short = ["--samples", "4", "--seq-len", "32", "--iterations", "2"] if options.quick else SHORT
    if TEXT.is_file():
        short = [*short, "--calibration", str(TEXT)]
    rounds, count = (1, 100) if options.quick else (options.rounds, options.tasks)
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for _ in range(rounds):
        for engine in ENGINES:
            found[engine].append(compress(options.model or str(smollm2_gguf()), engine, short))
            print(engine, found[engine][-1]["seconds"], flush=True)
    written = {tuple(summary["sha256"]) for runs in found.values() for summary in runs}
    if len(written) > 1:
        raise SystemExit(f"the engines wrote different weights: {sorted(written)}")
    text = report(found, dispatch(count), count)
    if options.quick:
        print(text)
    else:
        write_section("cluster", text)


if __name__ == "__main__":
    main()
