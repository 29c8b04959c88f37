"""`halfplate sweep`: what it prints, its exit status, and a sweep that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml


@pytest.fixture
def sweep_file(tiny_folder, text_file, tmp_path):
    """A sweep file of the original and two rows."""
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"model: {tiny_folder}\n"
        f"eval: {{text: {text_file}, seq_len: 32, windows: 2}}\n"
        f"base: {{method: wanda, samples: 2, seq_len: 16, calibration: {text_file}}}\n"
        "rows:\n  - original\n  - name: wanda\n  - {name: int4, method: rtn, core_dtype: int4}\n"
    )
    return path


@pytest.mark.slow
def test_plan_table_and_files(halfplate, sweep_file, tmp_path):
    out = tmp_path / "swept"
    planned = halfplate("sweep", sweep_file, "-o", out, "--dry-run")
    assert planned.status == 0
    assert "3 of 3 rows to measure" in planned.out
    assert planned.out.count("not measured yet") == 3
    done = halfplate("sweep", sweep_file, "-o", out)
    assert done.status == 0
    for part in ("perplexity", "of original", "wanda", "int4", f"{out / 'table.md'}", f"{out / 'picture.svg'}"):
        assert part in done.out
    assert "row 2 of 3, wanda: begins (not measured yet)" in done.err
    assert "row 3 of 3, int4: done, " in done.err
    again = halfplate("sweep", sweep_file, "-o", out)
    assert "row 2 of 3, wanda: done before, " in again.err
    assert "begins" not in again.err
    assert "0 of 3 rows to measure" in halfplate("sweep", sweep_file, "-o", out, "--dry-run").out
    found = halfplate("sweep", sweep_file, "-o", out, "--json", "--quiet")
    assert found.err == ""
    assert found.json() == json.loads((out / "results.json").read_text())
    assert not (out / "checkpoints").exists()


@pytest.mark.slow
def test_only_keep_and_a_row_that_fails(halfplate, sweep_file, tmp_path):
    out = tmp_path / "swept"
    sweep_file.write_text(sweep_file.read_text() + "  - {name: broken, calibration: nowhere.txt}\n")
    one = halfplate("sweep", sweep_file, "-o", out, "--only", "int4", "--keep", "--quiet")
    assert one.status == 0
    assert "3 of 4 rows are not measured yet" in one.out
    assert (
        halfplate(
            "eval",
            out / "checkpoints" / "int4",
            "--windows",
            "1",
            "--seq-len",
            "16",
            "--against",
            yaml.safe_load(sweep_file.read_text())["model"],
        ).status
        == 0
    )
    failed = halfplate("sweep", sweep_file, "-o", out, "--only", "int4", "broken")
    assert failed.status == 1
    assert "broken: failed, calibration='nowhere.txt' does not exist" in failed.out
    assert "row 2 of 2, broken: failed, calibration=" in failed.err
    assert "cannot run: calibration='nowhere.txt'" in " ".join(
        halfplate("sweep", sweep_file, "-o", out, "--dry-run").out.split()
    )


def test_bad_input_is_one_line(halfplate, sweep_file, tmp_path):
    halfplate("sweep", tmp_path / "none.yaml", "-o", tmp_path / "out").refused("none.yaml", "cannot be read")
    halfplate("sweep", sweep_file, "-o", tmp_path / "out", "--only", "wnda").refused(
        "only='wnda'", "did you mean 'wanda'"
    )
    halfplate("sweep", sweep_file).refused("-o/--out")
    sweep_file.write_text("model: x\nrow: []\n")
    halfplate("sweep", sweep_file, "-o", tmp_path / "out").refused("key 'row' is unknown; did you mean 'rows'")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_sweep_goes_on_with_the_rows_that_are_missing(halfplate, sweep_file, tmp_path, end):
    out = tmp_path / "swept"
    command = [sys.executable, "-m", "halfplate", "sweep", str(sweep_file), "-o", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    give_up = time.monotonic() + 120
    for line in process.stderr:
        assert time.monotonic() < give_up
        if line.startswith("row 2 of 3, wanda: begins"):
            process.send_signal(end)
            break
    rest = process.stderr.read()
    assert process.wait() == (1 if end == signal.SIGTERM else -signal.SIGKILL)
    if end == signal.SIGTERM:
        assert "interrupted; finished work is kept, run the same command to continue" in rest
    record = out / "rows" / "original.json"
    first = record.stat().st_mtime_ns
    done = halfplate("sweep", sweep_file, "-o", out)
    assert done.status == 0
    assert "row 1 of 3, original: done before" in done.err
    assert "row 2 of 3, wanda: begins" in done.err
    assert record.stat().st_mtime_ns == first
