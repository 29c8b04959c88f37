"""Checkpoints that methods solve for llama.cpp's K types, exported: no tensor differs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize

import halfplate
from halfplate.compression.compress import compress
from halfplate.errors import HalfplateWarning
from halfplate.exports import export
from halfplate.exports.llama_logits import _rounded
from halfplate.recipe import Recipe

SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1}
EXPERTS = {
    "head_dim": 16,
    "norm_topk_prob": True,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[..., Path]:
    from conftest import build_model

    made = tmp_path_factory.mktemp("k_exports")

    def make(name: str, architecture: str, **sizes: Any) -> Path:
        if not (made / name).exists():
            build_model(architecture, vocab_size=len(tiny_tokenizer), **sizes).save_pretrained(made / name)
            tiny_tokenizer.save_pretrained(made / name)
        return made / name

    return make


def exported(folder: Path, tmp_path: Path, **fields: Any) -> str:
    """What an export without warnings says."""
    plain = {"pattern": "dense", "block_size": 0, "samples": 4, "seq_len": 32, "threads": 1}
    compress(str(folder), tmp_path / "out", Recipe(**plain | fields), check=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HalfplateWarning)
        return export(tmp_path / "out", tmp_path / "model.gguf", "gguf", embedding_type="q8_0")


@pytest.mark.parametrize(
    ("method", "core_dtype", "group", "kind"),
    [
        ("gptq", "affine4k", 32, "Q4_K"),
        ("gptq", "int3k", 16, "Q3_K"),
        ("rtn", "affine4", 32, "Q4_1"),
        ("rtn", "affine5", 32, "Q5_1"),
        ("rtn", "affine5k", 32, "Q5_K"),
        ("rtn", "int6k", 16, "Q6_K"),
        ("rtn", "affine2k", 16, "Q2_K"),
        ("rtn", "nl4s", 32, "IQ4_XS"),
        pytest.param("armor", "int3k", 16, "Q3_K", marks=pytest.mark.slow),
        pytest.param("armor", "int6k", 16, "Q6_K", marks=pytest.mark.slow),
        pytest.param("armor", "affine2k", 16, "Q2_K", marks=pytest.mark.slow),
        pytest.param("armor", "affine4k", 32, "Q4_K", marks=pytest.mark.slow),
        pytest.param("armor", "nl4s", 32, "IQ4_XS", marks=pytest.mark.slow),
    ],
)
def test_no_tensor_differs(
    method: str, core_dtype: str, group: int, kind: str, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    options = {"iterations": 2} if method == "armor" else {}
    said = exported(
        folder_of("wide", "llama", **SIZES),
        tmp_path,
        method=method,
        core_dtype=core_dtype,
        group_size=group,
        method_options=options,
    )
    assert f"7 tensors in {kind}" in said
    assert "10 of 12 equal the model value for value, 2 are it rounded to Q8_0" in said
    # By the reader of the gguf package alone.
    matrix = halfplate.load(tmp_path / "out", kernels=False).get_submodule("model.layers.0.mlp.down_proj").matrix  # type: ignore[union-attr]
    (found,) = (one for one in GGUFReader(tmp_path / "model.gguf").tensors if one.name == "blk.0.ffn_down.weight")
    assert found.tensor_type.name == kind
    assert np.array_equal(dequantize(found.data, found.tensor_type), matrix.dense().detach().numpy())


def test_types_with_their_own_groups_are_held_exactly(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    types = ["*.v_proj=affine5k:32", "*.o_proj=affine4k:32", "*.down_proj=int8:64"]
    fields = {
        "method": "rtn",
        "core_dtype": "int3k",
        "group_size": 16,
        "types": types,
        "embedding_dtype": "int6k",
    }  # the head, Q8_0, is not tied
    said = exported(folder_of("wide", "llama", **SIZES), tmp_path, **fields)
    for part in (
        "4 tensors in Q3_K",
        "1 tensors in Q5_K",
        "1 tensors in Q4_K",
        "2 tensors in Q8_0",
        "1 tensors in Q6_K",
    ):
        assert part in said
    specs = {
        name: module.spec
        for name, module in halfplate.load(tmp_path / "out", kernels=False).named_modules()
        if hasattr(module, "spec")
    }
    assert [
        specs[f"model.layers.0.{name}"].group for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    ] == [16, 32, 64]


def test_experts_keep_their_codes(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = folder_of("experts", "qwen3_moe", hidden_size=64, num_hidden_layers=1, **EXPERTS)
    said = exported(folder, tmp_path, method="rtn", core_dtype="nl4", group_size=32)
    assert "7 tensors in IQ4_NL" in said
    (found,) = (one for one in GGUFReader(tmp_path / "model.gguf").tensors if one.name == "blk.0.ffn_up_exps.weight")
    model: Any = halfplate.load(tmp_path / "out", kernels=False)
    experts = [model.get_submodule(f"model.layers.0.mlp.experts.{k}.up_proj").matrix.dense() for k in range(3)]
    assert np.array_equal(dequantize(found.data, found.tensor_type), torch.stack(experts).detach().numpy())


def test_a_matrix_that_no_block_divides_is_said(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = folder_of("narrow", "llama", hidden_size=64, intermediate_size=96, head_dim=16, num_hidden_layers=1)
    recipe = Recipe(method="rtn", core_dtype="int6k", group_size=16, samples=4, seq_len=32, threads=1)
    compress(str(folder), tmp_path / "out", recipe, check=False)
    with pytest.warns(HalfplateWarning, match=r"6 matrices .* in groups of 16 and 64 columns, which K types want"):
        export(tmp_path / "out", tmp_path / "model.gguf", "gguf")


def test_inputs_of_k_types_are_rounded_as_ggml_does() -> None:
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(3))
    found = _rounded(x, "Q4_K")
    for row in range(2):
        for start in (0, 256):
            block = x[row, start : start + 256].tolist()
            largest = max(block, key=abs)
            d = torch.tensor(largest) / -127
            wanted = [float(min(torch.round(torch.tensor(value) / d), torch.tensor(127.0)) * d) for value in block]
            assert found[row, start : start + 256].tolist() == wanted
