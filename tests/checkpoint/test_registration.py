"""`import halfplate` is light, registers in either order, and without it loading fails loudly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import halfplate

SOURCE = Path(halfplate.__file__).parents[1]
LOAD = """
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    logits = model(torch.load(sys.argv[2])["ids"]).logits
torch.testing.assert_close(logits, torch.load(sys.argv[2])["logits"], rtol=1e-4, atol=1e-5)
"""


def run(code: str, *arguments: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def expected(written: Any, tmp_path: Path) -> tuple[Path, Path]:
    one = written()
    ids = torch.tensor([[1, 5, 7]])  # from four on, inputs may be rounded
    with torch.no_grad():
        torch.save({"ids": ids, "logits": one.model(ids).logits}, tmp_path / "expected.pt")
    return one.folder, tmp_path / "expected.pt"


@pytest.mark.slow
def test_halfplate_first(expected: tuple[Path, Path]) -> None:
    code = """
import sys, importlib
import halfplate
heavy = {"torch", "numpy", "transformers", "safetensors", "yaml", "rich"} & sys.modules.keys()
assert not heavy, heavy
importlib.reload(halfplate)
assert halfplate.HalfplateError.exit_status == 2
import torch, transformers
from transformers import AutoConfig
importlib.reload(halfplate)
"""
    run(code + LOAD + "\nimportlib.reload(halfplate)\n" + LOAD, *expected)


@pytest.mark.slow
def test_transformers_first(expected: tuple[Path, Path]) -> None:
    run("import sys, torch, transformers\nimport transformers.modeling_utils\nimport halfplate\n" + LOAD, *expected)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["integrations.quantizer", "checkpoint.quantization"])
def test_our_modules_first(expected: tuple[Path, Path], module: str) -> None:
    run(f"import sys, torch\nimport halfplate.{module}\nimport transformers\n" + LOAD, *expected)


@pytest.mark.slow
def test_without_the_import_loading_fails_loudly(expected: tuple[Path, Path]) -> None:
    code = """
import json, sys, pathlib
import torch, transformers

folder = pathlib.Path(sys.argv[1])
def raises(expected, sentence, **options):
    for loader in (transformers.AutoModelForCausalLM, transformers.AutoModel, transformers.LlamaForCausalLM):
        try:
            loader.from_pretrained(folder, **options)
        except expected as error:
            assert sentence in str(error), error
        else:
            raise AssertionError(f"{loader} returned a model")

raises(ValueError, "`import halfplate` before from_pretrained")
raises(ValueError, "`import halfplate` before from_pretrained", ignore_mismatched_sizes=True)

config = json.loads((folder / "config.json").read_text())
quantization = config.pop("quantization_config")
(folder / "config.json").write_text(json.dumps(config))
raises(ValueError, "`import halfplate` before from_pretrained")

del config["transformers_weights"]
(folder / "config.json").write_text(json.dumps(config))
raises(RuntimeError, "")
(folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
raises(RuntimeError, "")

model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
from safetensors.torch import load_file
try:
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
except RuntimeError as error:
    assert "size mismatch" in str(error)
else:
    raise AssertionError("load_state_dict accepted the compressed values")
assert "halfplate" not in sys.modules
"""
    run(code, *expected)


def test_the_verbs_are_attributes() -> None:
    assert callable(halfplate.load)
    assert callable(halfplate.export)
    assert {"plan", "compress", "load", "evaluate", "export", "HalfplateError"} <= set(dir(halfplate))
    assert isinstance(halfplate.__version__, str)
    with pytest.raises(AttributeError, match="no attribute 'squeeze'"):
        halfplate.squeeze  # noqa: B018
