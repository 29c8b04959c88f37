"""docs/format.md: its reader, which knows only safetensors and numpy, reads what we write; its examples are right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfplate.checkpoint.config import quantization_config
from halfplate.formats import NMSparse, WeightSpec
from halfplate.pattern import Pattern

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text(encoding="utf-8")

MAIN = """
import sys
matrices = read_matrices(sys.argv[1])
np.savez(sys.argv[2], **matrices)
assert not {"halfplate", "torch", "transformers"} & sys.modules.keys()
"""


def code(language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("max_shard_nbytes", [10**9, 20_000])
def test_the_reader_of_the_document_reads_a_checkpoint(written: Any, tmp_path: Path, max_shard_nbytes: int) -> None:
    # The hand-made model holds 2:4, 4:8, 1:8 and 3:16, tails, blocks wider than the matrix, and matrices without wrappers.
    one = written("qwen2", max_shard_nbytes=max_shard_nbytes)
    done = subprocess.run(
        [sys.executable, "-I", "-c", code("python") + MAIN, str(one.folder), str(tmp_path / "read.npz")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read = np.load(tmp_path / "read.npz")
    assert set(read) == set(one.specs)
    for name in one.specs:
        expected = one.model.get_submodule(name).matrix.dense(torch.float64).numpy()
        np.testing.assert_allclose(read[name], expected, rtol=1e-12, atol=1e-12)


def test_the_variety_covers_the_document(written: Any) -> None:
    parts = {part for spec in written().specs.values() for part in spec.layout()}
    assert {f"`NAME.{part}`" in DOCUMENT for part in parts} == {True}
    assert parts == set(re.findall(r"^\| `NAME\.(weight\w*)`", DOCUMENT, re.MULTILINE))


def test_the_example_of_the_configuration() -> None:
    example = json.loads(code("json"))["quantization_config"]
    spec = WeightSpec(64, 64, out_block=16, in_block=16)
    assert example == quantization_config({"model.layers.0.self_attn.q_proj": spec})


def test_the_example_of_2_4() -> None:
    lines = {
        line.split()[0]: line.split()[1:] for line in DOCUMENT.split("S row", 1)[1].split("```")[0].splitlines()[1:]
    }
    row = [int(number) for number in DOCUMENT.split("S row", 1)[1].splitlines()[0].replace("|", " ").split()]
    dense = torch.tensor([row], dtype=torch.float32)
    sparse = NMSparse.from_dense(dense, dense != 0, Pattern(2, 4), torch.float32)
    assert sparse.values.int().tolist() == [[int(value) for value in lines["values"]]]
    assert (sparse.columns() % 4).tolist() == [[int(position) for position in lines["positions"]]]
    assert sparse.index.tolist() == [[int(lines["index"][0], 16)]]
    assert sparse.index.tolist() == [[int("".join(lines["byte"][:4]), 2)]]


def test_the_example_of_a_tail() -> None:
    layout = WeightSpec(8, 172, in_block=16).layout()
    assert (layout["weight_in_blocks"][0], layout["weight_in_tail"][0]) == ((10, 16, 16), (12, 12))
