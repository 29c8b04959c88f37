"""docs/format.md: its reader, which knows only safetensors and numpy, reads what we write; its examples are right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from halfplate.checkpoint.config import quantization_config, read_specs
from halfplate.checkpoint.read import load
from halfplate.formats import NMSparse, WeightSpec
from halfplate.pattern import DENSE, Pattern
from halfplate.recipe import Recipe

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


# Each has a matrix of 176 inputs or outputs, so that rows have more than one scale and the last covers 48 columns.
WIDE: list[dict[str, Any]] = [
    {"core_dtype": "int8", "out_block": 64, "in_block": 64},
    {"core_dtype": "int4", "out_block": 48, "in_block": 32, "wrapper_dtype": "int8"},
    {"pattern": DENSE, "core_dtype": "int8"},
    {"pattern": DENSE, "core_dtype": "int4", "out_block": 1, "in_block": 1, "wrapper_dtype": "int8"},
    {"pattern": Pattern(5, 11), "core_dtype": "int4"},
    {"core_dtype": "int3", "out_block": 8, "in_block": 8},
    {"pattern": DENSE, "core_dtype": "int2"},
    {"pattern": DENSE, "core_dtype": "int5", "group": 32},
    {"core_dtype": "int6", "in_block": 8},
    {"core_dtype": "nl4", "group": 32},
    {"pattern": DENSE, "core_dtype": "nl5", "group": 64},
    {"core_dtype": "nl3", "in_block": 8},
    {"pattern": DENSE, "core_dtype": "nl4k", "group": 32},
    {"pattern": DENSE, "core_dtype": "affine4", "group": 64},
    {"core_dtype": "affine2k", "group": 32},
    {"pattern": DENSE, "core_dtype": "int6k", "group": 16},
    {"pattern": DENSE, "core_dtype": "affine2k", "group": 16},
    {"pattern": Pattern(5, 11), "core_dtype": "int3"},
    {"pattern": DENSE, "core_dtype": "bf16", "in_block": 7},
    {"pattern": DENSE, "core_dtype": "int4", "group": 64, "permuted": True},
    {"core_dtype": "int3", "group": 32, "in_block": 8, "permuted": True},
    {"pattern": Pattern(5, 11), "core_dtype": "int4", "group": 64},
]


@pytest.mark.parametrize("max_shard_nbytes", [10**9, 20_000])
def test_the_reader_of_the_document_reads_a_checkpoint(written: Any, tmp_path: Path, max_shard_nbytes: int) -> None:
    # The hand-made model holds 2:4, 4:8, 1:8 and 3:16, tails, blocks wider than the matrix, matrices without wrappers,
    # every core and wrapper type, and dense cores.
    reads(written("qwen2", max_shard_nbytes=max_shard_nbytes), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("options", WIDE, ids=str)
def test_the_reader_of_the_document_finds_the_scale_of_every_column(
    written: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    size = {"hidden_size": 176, "intermediate_size": 176, "num_hidden_layers": 1, "head_dim": 44}
    reads(written("qwen3", variety=[options], **size), tmp_path)


def reads(one: Any, tmp_path: Path) -> None:
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
        expected = one.model.get_submodule(name).matrix.dense(torch.float64).detach().numpy()
        np.testing.assert_allclose(read[name], expected, rtol=1e-12, atol=1e-12)


def test_the_variety_covers_the_document(written: Any) -> None:
    parts = {part for spec in written().specs.values() for part in spec.layout()}
    assert {f"`NAME.{part}`" in DOCUMENT for part in parts} == {True}
    assert parts == set(re.findall(r"^\| `NAME\.(weight\w*)`", DOCUMENT.partition("### Other parts")[0], re.MULTILINE))


# Options with which every matrix of the tiny model has the parts.
FACTORS: dict[str, dict[str, Any]] = {
    "svd": {},
    "bitstack": {},
    "rocket": {},
    "monarch": {},
    "gqsa": {"kept": 0.5, "width": 10},
}


@pytest.mark.parametrize("method", FACTORS)
def test_the_reader_of_the_document_reads_factors(
    compressed_once: Callable[[Recipe], Path], tmp_path: Path, method: str
) -> None:
    folder = compressed_once(Recipe(method=method, method_options=FACTORS[method], samples=4, seq_len=32, threads=1))
    reads(SimpleNamespace(folder=folder, model=load(folder, kernels=False), specs=read_specs(folder)), tmp_path)
    for spec in read_specs(folder).values():
        for part in spec.layout():
            assert f"`NAME.{re.sub('_[0-9]+$', '_l', part)}`" in DOCUMENT


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
    sparse = NMSparse.from_dense(dense, dense != 0, Pattern(2, 4), "fp32")
    assert sparse.values.int().tolist() == [[int(value) for value in lines["values"]]]
    assert (sparse.columns() % 4).tolist() == [[int(position) for position in lines["positions"]]]
    assert sparse.index.tolist() == [[int(lines["index"][0], 16)]]
    assert sparse.index.tolist() == [[int("".join(lines["byte"][:4]), 2)]]


def test_the_example_of_a_tail() -> None:
    layout = WeightSpec(8, 172, in_block=16).layout()
    assert (layout["weight_in_blocks"][0], layout["weight_in_tail"][0]) == ((10, 16, 16), (12, 12))


def test_the_example_of_int4() -> None:
    core = NMSparse.from_tensors(
        WeightSpec(1, 3, DENSE, "int4"),
        {"weight": torch.tensor([[[0x0B, 0x08]]], dtype=torch.uint8), "weight_scales": torch.tensor([[0.5]]).half()},
    )
    assert "`0x0B 0x08`" in DOCUMENT
    assert core.integers().tolist() == [[3, -8, 0]]
    assert core.dense().tolist() == [[1.5, -4, 0]]
