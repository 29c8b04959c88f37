"""Models that other tools quantised, written in floats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import halfplate
from halfplate.cli import main
from halfplate.errors import HalfplateError
from halfplate.exports import export
from halfplate.models.packed_words import pack_words
from halfplate.models.sources import load_dense, open_source


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_our_own_exports_come_back(format: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    out = checkpoint(core_dtype="int4", group_size=64)
    export(out, tmp_path / "codes", format)
    with pytest.raises(
        HalfplateError, match=r"is already quantised .*or write it in floats with `halfplate export .* -o FLOATS`"
    ):
        open_source(str(tmp_path / "codes"))
    assert main(["export", str(tmp_path / "codes"), "-o", str(tmp_path / "floats")]) == 0
    read, model = load_dense(str(tmp_path / "floats")).model.state_dict(), halfplate.load(out, kernels=False)
    dtype = torch.float16 if format == "gptq" else torch.float32
    for name, tensor in model.dequantize().state_dict().items():
        assert torch.equal(read[name], tensor.to(dtype).float()), name


def quantised(
    folder: Path, target: Path, settings: dict[str, Any], change: Callable[[Tensor], dict[str, Tensor]]
) -> Path:
    """A copy of the model in `folder` whose linears hold what `change` makes of them."""
    target.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors |= {name.removesuffix("weight") + leaf: part.contiguous() for leaf, part in change(tensor).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (target / "config.json").write_text(json.dumps(config))
    for file in folder.glob("tokenizer*"):
        (target / file.name).write_bytes(file.read_bytes())
    return target


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 32]}


def fp8(weight: Tensor) -> dict[str, Tensor]:
    scales = (
        torch.rand(-(-weight.shape[0] // 16), -(-weight.shape[1] // 32), generator=torch.Generator().manual_seed(1))
        + 0.5
    )
    return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": scales}


def test_fp8_in_blocks(tiny_folder: Path, tmp_path: Path) -> None:
    folder = quantised(tiny_folder, tmp_path / "fp8", FP8, fp8)
    said = export(folder, tmp_path / "floats")
    assert "14 matrices of fp8 dequantised and rounded to float32" in said
    name = "model.layers.1.mlp.up_proj.weight"  # 48 rows, 32 columns
    stored, found = load_file(folder / "model.safetensors"), load_file(tmp_path / "floats" / "model.safetensors")
    for row in (0, 15, 16, 47):
        for column in (0, 31):
            scale = float(stored[f"{name}_scale_inv"][row // 16, column // 32])
            assert float(found[name][row, column]) == pytest.approx(
                float(stored[name][row, column].float()) * scale, rel=1e-6
            )
    assert load_dense(str(tmp_path / "floats")).model.config.model_type == "llama"


def test_gptq_of_version_1_and_awq(tiny_folder: Path, tmp_path: Path) -> None:
    """The same codes 8, zero 8: all weights are zero, or minus a scale where the zero is read as it is not meant."""

    def gptq(weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        codes, zeros = torch.full((rows, columns), 8, dtype=torch.uint8), torch.full((1, rows), 7, dtype=torch.uint8)
        scales = torch.ones(1, rows, dtype=torch.float16)
        return {"qweight": pack_words(codes, 4).T, "qzeros": pack_words(zeros, 4), "scales": scales}

    def awq(weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        words = torch.full((columns, rows // 8), 0x08888888 - 0x80000000, dtype=torch.int32)
        return {"qweight": words, "qzeros": words[:1].clone(), "scales": torch.ones(1, rows, dtype=torch.float16)}

    for method, change in (("gptq", gptq), ("awq", awq)):
        folder = quantised(
            tiny_folder, tmp_path / method, {"quant_method": method, "bits": 4, "group_size": -1}, change
        )
        export(folder, tmp_path / f"{method}-floats")
        found = load_file(tmp_path / f"{method}-floats" / "model.safetensors")
        assert not found["model.layers.0.self_attn.q_proj.weight"].any()
        assert found["model.layers.0.mlp.down_proj.weight"].shape == (32, 48)


@pytest.mark.parametrize(
    ("settings", "more", "words"),
    [
        (
            {"weight_block_size": [8, 8]},
            {},
            r"cannot be read as fp8 .*weight_scale_inv has the shape .*, blocks are 8 × 8",
        ),
        ({}, {"model.layers.0.self_attn.k_scale": torch.ones(1)}, "self_attn.k_scale has no known meaning in fp8"),
    ],
)
def test_what_is_not_known_is_refused(
    settings: dict[str, Any], more: dict[str, Tensor], words: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = quantised(tiny_folder, tmp_path / "fp8", FP8 | settings, fp8)
    file = folder / "model.safetensors"
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    with pytest.raises(HalfplateError, match=words):
        export(folder, tmp_path / "floats")
    assert not (tmp_path / "floats").exists()
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(HalfplateError, match=r"is cut short|is damaged"):
        export(folder, tmp_path / "floats")
