"""The main job as a user runs it: time of each phase, peak memory and bytes of `halfplate compress` on SmolLM2-135M.

    python benchmarks/compress.py

ARMOR at block 16 with 64 samples of 512 tokens that the model samples itself, once with 20 iterations and once with the
default of 60; each run is a fresh process. About ten minutes on two quiet cores.
"""

import json
import subprocess
import sys
import tempfile
from typing import Any

from common import machine, smollm2_gguf, table, write_section

ITERATIONS = (20, 60)


def compress(iterations: int) -> dict[str, Any]:
    """The summary of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "halfplate", "compress", str(smollm2_gguf()), "-o", f"{folder}/out", "--json"]
        command += ["--block-size", "16", "--iterations", str(iterations)]
        run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    summary: dict[str, Any] = json.loads(run.stdout)
    return summary


def main() -> None:
    where = machine()
    rows = []
    for iterations in ITERATIONS:
        summary = compress(iterations)
        seconds = summary["seconds"]
        phases = ("reading", "calibration text", "statistics", "solving", "writing", "total")
        rows.append(
            [str(iterations)]
            + [f"{seconds[phase]:.0f}" for phase in phases]
            + [f"{summary['peak_rss_bytes'] / 1e9:.2f} GB", f"{summary['nbytes'] / 1e6:.1f} MB"]
            + [f"{summary['dense_nbytes'] / 1e6:.1f} MB", f"{summary['other_nbytes'] / 1e6:.1f} MB"]
        )
    header = [
        "iterations",
        "reading, s",
        "calibration text, s",
        "statistics, s",
        "solving, s",
        "writing, s",
        "in all, s",
    ]
    header += ["peak memory", "linears", "linears dense, bf16", "everything else"]
    write_section(
        "compress",
        f"`python benchmarks/compress.py` · {where}\n\n{table(header, rows)}\n\n"
        f"The source is a Q4_1 GGUF file of {smollm2_gguf().stat().st_size / 1e6:.1f} MB. Seconds are those of this machine and no figure to "
        "compare; memory is the largest resident size of the process; the whole model is held, it is not bounded yet.",
    )


if __name__ == "__main__":
    main()
