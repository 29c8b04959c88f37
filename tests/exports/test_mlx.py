"""Folders for MLX: they hold the values of the checkpoint, and mlx-lm, where it is installed, computes its logits."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import halfplate
from conftest import build_model
from halfplate.cli import main
from halfplate.errors import HalfplateError, HalfplateWarning
from halfplate.exports import export
from halfplate.models.sources import load_dense, open_source
from halfplate.storage.tensor_file import read_header, read_tensors

IDS = torch.tensor([[1, 5, 7, 11, 30, 99, 200, 300]])
ALL_CODES = {"embedding_dtype": "auto", "head_dtype": "auto"}


def loops(tensors: dict[str, Tensor], bits: int, columns: int) -> Tensor:
    """The values of a matrix, code by code."""
    words, rows = tensors["weight"].view(torch.int32).tolist(), len(tensors["scales"])
    scales, biases = tensors["scales"].float(), tensors["biases"].float()
    width = columns // scales.shape[1]
    values = torch.empty(rows, columns)
    for row in range(rows):
        stream = sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(words[row]))
        for column in range(columns):
            code = stream >> bits * column & (1 << bits) - 1
            values[row, column] = code * scales[row, column // width] + biases[row, column // width]
    return values


@pytest.mark.parametrize(
    ("core_dtype", "bits"),
    [
        ("affine4", 4),
        ("affine4k", 4),
        ("affine2", 2),
        ("affine5", 5),
        ("int3", 3),
        ("int4", 4),
        ("int6", 6),
        ("int6k", 6),
        ("nl4", 8),
        ("int8", 8),
    ],
)
def test_a_folder_holds_the_codes(core_dtype: str, bits: int, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    out = checkpoint(core_dtype=core_dtype, group_size=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HalfplateWarning)
        said = export(out, tmp_path / "mlx", "mlx")
    assert f"linears of {core_dtype} in {bits} bits and groups of" in said
    assert "14 of 14 equal the checkpoint value for value" in said
    tensors = dict(read_tensors(read_header(tmp_path / "mlx" / "model.safetensors")))
    name = "model.layers.1.self_attn.k_proj"
    parts = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(name)}
    assert (parts["weight"].dtype, parts["scales"].dtype) == (torch.uint32, torch.float32)
    plain = halfplate.load(out, kernels=False)
    assert torch.equal(loops(parts, bits, 64), plain.get_submodule(name).matrix.dense())  # type: ignore[operator, union-attr]
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["quantization"]["bits"], config["quantization"]["mode"]) == (bits, "affine")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_codes_and_the_folder_is_a_model_again(tied: bool, tiny_tokenizer: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "tie_word_embeddings": tied}
    build_model("llama", vocab_size=len(tiny_tokenizer), **sizes).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    fields = {"method": "rtn", "pattern": "dense", "block_size": 0, "core_dtype": "affine3", "group_size": 32}
    halfplate.compress(str(tmp_path / "model"), tmp_path / "out", benchmark=False, threads=1, **fields | ALL_CODES)
    said = export(tmp_path / "out", tmp_path / "mlx", "mlx")
    assert f"{15 if tied else 16} of {15 if tied else 16} equal" in said
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert config["quantization"]["model.embed_tokens"] == {"bits": 8, "group_size": 32}
    source = open_source(str(tmp_path / "mlx"))
    assert (source.quantised, source.config.tie_word_embeddings) == ("mlx", tied)
    with pytest.warns(UserWarning, match="codes of mlx"):
        again = load_dense(source).model
    with torch.no_grad():
        theirs, ours = again(IDS).logits, halfplate.load(tmp_path / "out", kernels=False)(IDS).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    (tmp_path / "mlx" / "config.json").write_text(
        json.dumps(config | {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}})
    )
    with pytest.raises(HalfplateError, match="its mode is 'mxfp4', expected affine"):
        open_source(str(tmp_path / "mlx"))


@pytest.mark.parametrize(
    ("architecture", "more", "fields"),
    [
        ("llama", {}, {"core_dtype": "affine4"}),
        ("llama", {"tie_word_embeddings": True}, {"core_dtype": "int3"} | ALL_CODES),
        ("qwen3", {}, {"core_dtype": "affine5"} | ALL_CODES),
        ("qwen2", {"sliding_window": None, "use_sliding_window": False, "layer_types": None}, {"core_dtype": "int6"}),
        ("gemma3_text", {}, {"core_dtype": "affine2"}),
    ],
)
def test_mlx_computes_the_logits_of_the_checkpoint(
    architecture: str, more: dict[str, Any], fields: dict[str, Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    loading = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": len(tiny_tokenizer)}
    build_model(architecture, **sizes | more).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    plain = {"method": "rtn", "pattern": "dense", "block_size": 0, "group_size": 32}
    halfplate.compress(str(tmp_path / "model"), tmp_path / "out", benchmark=False, threads=1, **plain | fields)
    export(tmp_path / "out", tmp_path / "mlx", "mlx")
    model, _ = loading.load_model(tmp_path / "mlx")
    found = torch.tensor(model(mx.array(IDS.tolist())).astype(mx.float32).tolist())
    with torch.no_grad():
        expected = halfplate.load(tmp_path / "out", kernels=False)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_what_a_folder_cannot_hold(
    checkpoint: Callable[..., Path], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = checkpoint(method="magnitude", pattern="2:4", core_dtype="int4", group_size=128)
    with pytest.raises(HalfplateError, match=r"no matrix that format='mlx' holds: they are 2:4 sparse; .*mlx-w4"):
        export(sparse, tmp_path / "mlx", "mlx")
    with pytest.raises(HalfplateError, match="they have groups of 16 columns"):
        export(checkpoint(core_dtype="int6", group_size=16), tmp_path / "mlx", "mlx")
    with pytest.raises(
        HalfplateError, match=r"is not a Halfplate checkpoint, and format='mlx' holds only codes; run .*mlx-w4"
    ):
        export(tiny_folder, tmp_path / "mlx", "mlx")
    assert main(["export", str(sparse), "--format", "mlx", "-o", str(tmp_path / "mlx"), "--embedding-type", "f16"]) == 2
    assert "is not an option of format='mlx'" in capsys.readouterr().err
    assert not (tmp_path / "mlx").exists()


def test_what_mlx_computes_otherwise_is_said(tiny_tokenizer: Any, tmp_path: Path) -> None:
    for architecture, words in (
        ("mistral", "without their window of 5 tokens"),
        ("olmo", "was not tried with a olmo model"),
    ):
        folder = tmp_path / architecture
        sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": len(tiny_tokenizer)}
        build_model(architecture, **sizes).save_pretrained(folder / "model")
        tiny_tokenizer.save_pretrained(folder / "model")
        plain = {"method": "rtn", "pattern": "dense", "block_size": 0, "core_dtype": "affine4", "group_size": 32}
        halfplate.compress(str(folder / "model"), folder / "out", benchmark=False, threads=1, **plain)
        with pytest.warns(HalfplateWarning, match=words):
            export(folder / "out", folder / "mlx", "mlx")


def test_a_gpt2_is_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    build_model("gpt2", n_embd=64, n_head=2, n_layer=2, vocab_size=len(tiny_tokenizer)).save_pretrained(
        tmp_path / "model"
    )
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    plain = {"method": "rtn", "pattern": "dense", "block_size": 0, "core_dtype": "int4", "group_size": 32}
    halfplate.compress(str(tmp_path / "model"), tmp_path / "out", benchmark=False, threads=1, **plain)
    for format in ("mlx", "gptq", "compressed-tensors"):
        with pytest.raises(HalfplateError, match="is a gpt2 model, whose weights are transposed"):
            export(tmp_path / "out", tmp_path / format, format)
        assert not (tmp_path / format).exists()
