"""The benchmark of memory on a model so small that it takes seconds."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_peak_stays_under_the_bound_and_is_drawn(tmp_path):
    results = tmp_path / "results.md"
    results.write_text("<!-- memory_tiny: begin -->\n<!-- memory_tiny: end -->\n")
    command = [sys.executable, ROOT / "tests" / "stress" / "memory.py", "--size", "tiny", "--folder", tmp_path]
    run = subprocess.run(
        [*command, "--results", results, "--picture", tmp_path / "memory.svg"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (row,) = [
        line.strip("| ").split(" | ") for line in results.read_text().splitlines() if line.startswith("| 64 / 96")
    ]
    peak, bound = float(row[5]), float(row[6])
    assert 0.1 < peak < bound
    assert "bound: 2 layers" in (tmp_path / "memory.svg").read_text()
