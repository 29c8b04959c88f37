"""The benchmark of assisted decoding: what it counts, and that a draft changes the speed alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import halfplate

ROOT = Path(__file__).resolve().parents[2]


def run(*words):
    command = [sys.executable, ROOT / "benchmarks" / "assisted.py", *map(str, words), "--new-tokens", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_draft_that_is_the_model_itself_is_always_kept(tiny_folder):
    (found,) = json.loads(run(tiny_folder, tiny_folder, "--draft-tokens", "2", "--json"))
    assert found["acceptance"] == 1
    assert found["same_text"] == len(found["prompts"])
    # Twelve tokens in turns of two drafted and one of the model's own.
    assert {row["drafted"] for row in found["prompts"]} <= {7, 8}


def test_a_compressed_draft(tiny_folder, tmp_path):
    out = tmp_path / "out"
    halfplate.compress(str(tiny_folder), out, method="magnitude")
    found = json.loads(run(tiny_folder, out, "--draft-tokens", "2", "3", "--json"))
    assert [part["draft_tokens"] for part in found] == [2, 3]
    for part in found:
        assert 0 <= part["acceptance"] < 1
        assert part["same_text"] == len(part["prompts"])  # in fp32 the dense model decides alone
        assert part["acceptance"] == pytest.approx(
            sum(row["acceptance"] * row["drafted"] for row in part["prompts"])
            / sum(row["drafted"] for row in part["prompts"])
        )
    results = tmp_path / "results.md"
    results.write_text("<!-- assisted: begin -->\n<!-- assisted: end -->\n")
    run(tiny_folder, out, "--draft-tokens", "2", "--results", results)
    assert "kept of the drafted" in results.read_text()
