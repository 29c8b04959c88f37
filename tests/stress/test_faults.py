"""The benchmark of kills and faults, in short, on a model made for it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def section(name):
    return f"<!-- {name}: begin -->\n<!-- {name}: end -->\n"


def test_kills_and_faults_in_short(tmp_path):
    results = tmp_path / "results.md"
    results.write_text(section("kills_local") + section("faults"))
    faults = ["bit flipped in an artifact", "another seed", "read-only folder"]
    command = [
        sys.executable,
        ROOT / "tests" / "stress" / "faults.py",
        "--kills",
        "3",
        "--workers",
        "1",
        "--results",
        results,
    ]
    environment = os.environ | {"HALFPLATE_SHARED": str(tmp_path / "nothing")}
    run = subprocess.run([*command, "--faults", *faults], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in results.read_text().splitlines()]
    (kills,) = [row for row in rows if row[0] == "local, 1 worker"]
    assert kills[1] == "3"
    assert kills[3:6] == ["0", "0", "0"]
    found = {row[0]: row[1:] for row in rows if row[0] in faults}
    assert found.keys() == set(faults)
    assert "kept 10 matrices, solved 25; the same bytes" in found["bit flipped in an artifact"][1]
    assert "seed was 0" in found["another seed"][0]
    assert "Permission denied" in found["read-only folder"][0]
