"""Checkpoints in the formats of other tools, read back and, where they are installed, computed by them."""

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
from halfplate.cli import main
from halfplate.errors import HalfplateError, HalfplateWarning
from halfplate.exports import export
from halfplate.models.gguf_header import check_header
from halfplate.models.packed_words import pack_words, read_awq, read_compressed_tensors, read_gptq, unpack_words
from halfplate.storage.tensor_file import read_header, read_tensors

IDS = torch.tensor([[1, 5, 7, 11, 30, 99, 200, 300]])


def test_a_checkpoint_of_codes_keeps_every_value(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = checkpoint(embedding_dtype="int8", head_dtype="int8"), tmp_path / "model.gguf"
    with warnings.catch_warnings():
        warnings.simplefilter("error", HalfplateWarning)
        assert main(["export", str(out), "--format", "gguf", "-o", str(file)]) == 0
    said = capsys.readouterr().err
    assert "14 tensors in IQ4_NL" in said
    assert "21 of 21 equal the model value for value" in said
    assert "rounded" not in said
    assert check_header(file).metadata["general.file_type"] == 25


def test_what_loses_its_form_is_said(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    out = checkpoint(method="magnitude", pattern="2:4", core_dtype="int4", group_size=128)
    with pytest.warns(HalfplateWarning, match=r"14 matrices \(model.layers.0.*2:4 sparse.*--recipe gguf-q4") as caught:
        said = export(out, tmp_path / "model.gguf", "gguf", embedding_type="q8_0")
    assert len([one for one in caught if issubclass(one.category, HalfplateWarning)]) == 1
    assert "14 tensors in F16" in said
    assert "rounded to F16 and Q8_0" in said


@pytest.mark.parametrize(
    ("format", "options", "words"),
    [
        ("gguf", {"embedding_type": "q9"}, "embedding_type='q9' is not one of f32, f16"),
        ("dense", {"embedding_type": "f16"}, "embedding_type='f16' is not an option of format='dense', which has none"),
        (
            "gguf",
            {"scale": "1"},
            "scale='1' is not an option of format='gguf', which has embedding_type, verify_logits",
        ),
    ],
)
def test_wrong_options(format: str, options: dict[str, str], words: str, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(HalfplateError, match=words):
        export(tiny_folder, tmp_path / "model.gguf", format, **options)
    assert not (tmp_path / "model.gguf").exists()


def test_verifying_logits_says_what_to_install(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfplate.exports.llama_logits.find_spec", lambda name: None)
    with pytest.raises(HalfplateError, match="pip install llama-cpp-python"):
        export(tiny_folder, tmp_path / "model.gguf", "gguf", verify_logits="A small bird")


def naive_codes(words: Tensor, count: int, bits: int) -> list[list[int]]:
    """Codes of each row, bit by bit."""
    found = []
    for row in words.tolist():
        stream = sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(row))
        found.append([stream >> bits * place & (1 << bits) - 1 for place in range(count)])
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_bit_streams(bits: int) -> None:
    codes = torch.randint(1 << bits, (3, 64), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (3, 2 * bits)
    assert naive_codes(words, 64, bits) == codes.tolist()
    assert torch.equal(unpack_words(words, 64, bits), codes)


@pytest.mark.parametrize(("bits", "less"), [(4, False), (4, True), (3, False)])
def test_gptq_matrices_are_what_loops_say(bits: int, less: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(1 << bits, (32, 64), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(1, 1 << bits, (2, 32), generator=generator, dtype=torch.uint8)
    scales, group = torch.rand(2, 32, generator=generator).half(), torch.randint(2, (64,), generator=generator)
    tensors = {
        "qweight": pack_words(codes, bits).T,
        "qzeros": pack_words(zeros - int(less), bits),
        "scales": scales,
        "g_idx": group,
    }
    found = read_gptq(tensors, bits, less)
    for row in range(32):
        for column in range(64):
            g = int(group[column])
            wanted = (int(codes[row, column]) - int(zeros[g, row])) * float(scales[g, row])
            assert float(found[row, column]) == wanted


def test_awq_matrices_are_what_loops_say() -> None:
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(16, (64, 32), generator=generator)
    zeros, scales = torch.randint(16, (2, 32), generator=generator), torch.rand(2, 32, generator=generator).half()

    def words(numbers: Tensor) -> Tensor:
        packed = torch.zeros(len(numbers), 4, dtype=torch.int64)
        for row, column in ((row, column) for row in range(len(numbers)) for column in range(4)):
            for place, value in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                packed[row, column] |= int(numbers[row, 8 * column + value]) << 4 * place
        return packed.to(torch.int32)

    found = read_awq({"qweight": words(codes), "qzeros": words(zeros), "scales": scales})
    for row in range(32):
        for column in range(64):
            g = column // 32
            assert float(found[row, column]) == (int(codes[column, row]) - int(zeros[g, row])) * float(scales[g, row])


def test_asymmetric_compressed_tensors_are_what_loops_say() -> None:
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(16, (32, 64), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(16, (32, 2), generator=generator, dtype=torch.uint8)
    scales = torch.rand(32, 2, generator=generator).half()
    tensors = {
        "weight_packed": pack_words(codes, 4),
        "weight_scale": scales,
        "weight_zero_point": pack_words(zeros.T, 4).T,
        "weight_shape": torch.tensor([32, 64]),
    }
    found = read_compressed_tensors(tensors, 4)
    for row in range(32):
        for column in range(64):
            wanted = (int(codes[row, column]) - int(zeros[row, column // 32])) * float(scales[row, column // 32])
            assert float(found[row, column]) == wanted


@pytest.mark.parametrize(
    ("format", "core_dtype", "bits"),
    [
        ("compressed-tensors", "int4", 4),
        ("compressed-tensors", "int3", 4),
        ("compressed-tensors", "nl4", 8),
        ("gptq", "int2", 2),
        ("gptq", "int3", 3),
        ("gptq", "int4", 4),
        ("gptq", "int6", 8),
    ],
)
def test_a_folder_holds_the_codes(
    format: str, core_dtype: str, bits: int, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The readers of the formats, which loops check above, find the values of the checkpoint in the words of the file."""
    out = checkpoint(core_dtype=core_dtype, group_size=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HalfplateWarning)
        said = export(out, tmp_path / "folder", format)
    assert f"linears of {core_dtype} in {bits} bits and groups of" in said
    assert "14 of 14 equal the checkpoint" in said
    tensors = dict(read_tensors(read_header(tmp_path / "folder" / "model.safetensors")))
    model = halfplate.load(out, kernels=False)
    name = "model.layers.1.self_attn.k_proj"
    parts = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(name)}
    read = read_gptq(parts, bits, False) if format == "gptq" else read_compressed_tensors(parts, bits)
    assert torch.equal(read, model.get_submodule(name).matrix.dense())  # type: ignore[operator, union-attr]
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == format
    assert config["dtype"] == ("float16" if format == "gptq" else "float32")


@pytest.mark.parametrize("core_dtype", ["int4", "int8"])
def test_transformers_computes_with_compressed_tensors(
    core_dtype: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    out = checkpoint(core_dtype=core_dtype, group_size=64)
    export(out, tmp_path / "folder", "compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, halfplate.load(out, kernels=False)(IDS).logits)


@pytest.mark.parametrize(
    "fields",
    [
        {"core_dtype": "int3"},
        {"core_dtype": "int8"},
        {"core_dtype": "int4", "budget": 0.4, "target": "gptq", "choose": ["core_dtype"]},
    ],
)
def test_gptqmodel_computes_with_the_folder(
    fields: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Modules of one format, and of several, which `dynamic` names. Its kernel for CPUs multiplies in fp16."""
    theirs = pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    out = checkpoint(**{"group_size": 64} | fields)
    export(out, tmp_path / "folder", "gptq")
    loaded = theirs.GPTQModel.load(
        str(tmp_path / "folder"), backend=theirs.BACKEND.TORCH, device="cpu", dtype=torch.float16
    ).model
    model = halfplate.load(out, kernels=False)
    for name, linear in loaded.named_modules():
        if name.endswith("_proj"):
            matrix = model.get_submodule(name).matrix.dense()  # type: ignore[operator, union-attr]
            assert torch.equal(linear.dequantize_weight().T.half(), matrix.half()), name
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits.float(), model(IDS).logits, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_what_a_folder_cannot_hold(
    format: str, checkpoint: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    sparse = checkpoint(method="magnitude", pattern="2:4", core_dtype="int4", group_size=128)
    with pytest.raises(HalfplateError, match=f"no matrix that format='{format}' holds: they are 2:4 sparse; .*vllm-w4"):
        export(sparse, tmp_path / "folder", format)
    with pytest.raises(HalfplateError, match=r"is not a Halfplate checkpoint, and format='.*' holds only codes; run"):
        export(tiny_folder, tmp_path / "folder", format)
    assert not (tmp_path / "folder").exists()


def test_a_matrix_that_does_not_fit_is_multiplied_out(compressed_once: Callable[..., Path], tmp_path: Path) -> None:
    from halfplate.recipe import Recipe

    out = compressed_once(Recipe(method="rtn", pattern="dense", block_size=0, core_dtype="int4", group_size=32))
    with pytest.warns(
        HalfplateWarning,
        match=r"2 matrices \(model.layers.0.mlp.down_proj, ...\) have 48 columns, which is not a multiple of 32",
    ):
        said = export(out, tmp_path / "folder", "compressed-tensors")
    assert "12 of 12 equal" in said
    config = json.loads((tmp_path / "folder" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.mlp.down_proj" in config["ignore"]


def test_a_folder_that_differs_is_refused(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfplate.exports import packed_folder

    def turned(*args: Any) -> packed_folder.Codes:
        found = plain(*args)
        found.codes[3, 5] ^= 1
        return found

    plain = packed_folder._codes
    monkeypatch.setattr(packed_folder, "_codes", turned)
    with pytest.raises(
        HalfplateError, match=r"read back, model\.layers\.0\.self_attn\.q_proj differs from the checkpoint"
    ):
        export(checkpoint(core_dtype="int4", group_size=64), tmp_path / "folder", "gptq")
    assert not (tmp_path / "folder").exists()
