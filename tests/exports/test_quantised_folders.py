"""Models that other tools quantised, written in floats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfplate
from halfplate.cli import main
from halfplate.errors import HalfplateError
from halfplate.exports import export
from halfplate.models.sources import load_dense
from quantised_models import VARIANTS, quantised


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_our_own_exports_come_back(format: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    out = checkpoint(core_dtype="int4", group_size=64)
    export(out, tmp_path / "codes", format)
    assert main(["export", str(tmp_path / "codes"), "-o", str(tmp_path / "floats")]) == 0
    read, model = load_dense(str(tmp_path / "floats")).model.state_dict(), halfplate.load(out, kernels=False)
    dtype = torch.float16 if format == "gptq" else torch.float32
    for name, tensor in model.dequantize().state_dict().items():
        assert torch.equal(read[name], tensor.to(dtype).float()), name


def test_what_is_written_is_rounded_to_the_type_of_the_model(tiny_folder: Path, tmp_path: Path) -> None:
    halved = {name: tensor.half() for name, tensor in load_file(tiny_folder / "model.safetensors").items()}
    save_file(halved, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    values = quantised(tiny_folder, tmp_path / "fp8", *VARIANTS["fp8 in blocks"])
    said = export(tmp_path / "fp8", tmp_path / "floats")
    assert "14 matrices of fp8 decoded and rounded to float16" in said
    found = load_file(tmp_path / "floats" / "model.safetensors")
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], values[name].half()) for name in values)
    assert "quantization_config" not in (tmp_path / "floats" / "config.json").read_text()
    assert load_dense(str(tmp_path / "floats")).model.config.model_type == "llama"


def test_nothing_is_left_of_what_cannot_be_written(tiny_folder: Path, tmp_path: Path) -> None:
    quantised(tiny_folder, tmp_path / "fp8", *VARIANTS["fp8 in blocks"])
    file = tmp_path / "fp8" / "model.safetensors"
    scale = "model.layers.1.mlp.up_proj.weight_scale_inv"
    save_file(load_file(file) | {scale: torch.full((3, 1), torch.inf)}, file, metadata={"format": "pt"})
    with pytest.raises(HalfplateError, match="holds values that are not finite"):
        export(tmp_path / "fp8", tmp_path / "floats")
    assert not (tmp_path / "floats").exists()
