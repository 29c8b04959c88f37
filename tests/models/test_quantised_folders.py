"""Models that other tools quantised are read as the values that their codes stand for, layer by layer."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import halfplate
from causal_models import ARCHITECTURES, MLA, MOE
from conftest import build_model
from halfplate.checkpoint.weights import read_headers
from halfplate.errors import HalfplateError
from halfplate.models import packed_words
from halfplate.models.float_codes import read_scaled
from halfplate.models.sources import load_dense, open_source
from halfplate.models.streamed import StreamedModel
from halfplate.storage.tensor_file import read_tensors
from quantised_models import CT, FP8, VARIANTS, mxfp4, quantised, scaled, write

RECIPE: dict[str, Any] = {
    "method": "rtn",
    "pattern": "dense",
    "block_size": 0,
    "core_dtype": "int4",
    "group_size": 16,
    "threads": 1,
}


@pytest.fixture(scope="module")
def plain_folder(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose matrices have multiples of 32 rows and columns, as GPTQ needs them."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    save("llama", tiny_tokenizer, folder, intermediate_size=64, head_dim=16)
    return folder


def compressed(model: Path, out: Path, **fields: Any) -> dict[str, Tensor]:
    halfplate.compress(str(model), out, benchmark=False, **RECIPE | fields)
    return dict(read_tensors(read_headers(out)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_quantised_folder_is_the_model_of_its_values(
    variant: str, plain_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_words, "AT_ONCE", 512)  # several parts of every matrix
    settings, change = VARIANTS[variant]
    values = quantised(plain_folder, tmp_path / "codes", settings, change)
    write(plain_folder, tmp_path / "plain", values, None)
    source = open_source(str(tmp_path / "codes"))
    assert any(
        f"its weights are codes of {settings['quant_method']}: 14 matrices are decoded" in note for note in source.notes
    )
    streamed = StreamedModel(pickle.loads(pickle.dumps(source)))
    for name in streamed.stored:
        assert torch.equal(streamed.read(name), values[name]), name
    with pytest.warns(UserWarning, match="14 matrices are decoded"):
        whole = load_dense(source).model
    assert all(torch.equal(whole.state_dict()[name], values[name]) for name in values)
    assert (
        whole.generation_config.eos_token_id == load_dense(str(tmp_path / "plain")).model.generation_config.eos_token_id
    )
    ours, plain = (
        compressed(tmp_path / "codes", tmp_path / "ours"),
        compressed(tmp_path / "plain", tmp_path / "expected"),
    )
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in ours)
    record = json.loads((tmp_path / "ours" / "halfplate.json").read_text())
    assert "14 matrices are decoded to floats when they are read" in " ".join(record["notes"])


def save(architecture: str, tokenizer: Any, folder: Path, **options: Any) -> None:
    build_model(architecture, vocab_size=len(tokenizer), **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def gpt_oss(tokenizer: Any, folder: Path) -> dict[str, Tensor]:
    """A tiny gpt-oss in the form of the published ones; returns its values."""
    save("gpt_oss", tokenizer, folder / "plain", **ARCHITECTURES["gpt_oss"][0] | {"intermediate_size": 64})
    values = load_file(folder / "plain" / "model.safetensors")
    tensors = dict(values)
    for name in [name for name in values if name.endswith(("gate_up_proj", "down_proj"))]:
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"], values[name] = mxfp4(tensors.pop(name))
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    write(folder / "plain", folder / "codes", tensors, settings)
    write(folder / "plain", folder / "plain", values, None)
    return values


def deepseek(tokenizer: Any, folder: Path) -> None:
    """A tiny DeepSeek-V3 whose experts are FP8 in blocks, with a layer for further tokens."""
    save("deepseek_v3", tokenizer, folder / "plain", **MOE | MLA)
    file = folder / "plain" / "model.safetensors"
    tensors = load_file(file)
    further = {
        name.replace("layers.1.", "layers.2."): one.clone() for name, one in tensors.items() if ".layers.1.mlp" in name
    }
    save_file(tensors | further, file, metadata={"format": "pt"})
    config = folder / "plain" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_nextn_predict_layers": 1}))
    values = quantised(
        folder / "plain", folder / "codes", FP8, scaled("blocks"), lambda name: ".experts." in name or "shared" in name
    )
    write(folder / "plain", folder / "plain", values, None)


@pytest.mark.parametrize("make", [gpt_oss, deepseek])
def test_experts_of_codes_are_read_one_by_one(make: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    make(tiny_tokenizer, tmp_path)
    codes, plain = (StreamedModel(open_source(str(tmp_path / name))) for name in ("codes", "plain"))
    assert codes.stored.keys() == plain.stored.keys()
    assert all(torch.equal(codes.read(name), plain.read(name)) for name in codes.stored)
    encoded = [name for name, stored in codes.stored.items() if stored.encoded is not None]
    assert any(name.endswith("experts.3.gate_proj.weight") for name in encoded)
    ours, expected = (compressed(tmp_path / name, tmp_path / f"{name}-out") for name in ("codes", "plain"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    ids = torch.arange(3, 20)[None]
    both = [load_dense(str(tmp_path / name)).model(ids).logits for name in ("codes", "plain")]
    assert torch.equal(*both)


def test_the_decoder_of_transformers_agrees_on_mxfp4() -> None:
    """Theirs is another implementation of the same format."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales, values = mxfp4(torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32), values)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_package_compressed_tensors_agrees(bits: int, symmetric: bool) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    generator, half = torch.Generator().manual_seed(bits), 1 << bits - 1
    state = {
        "weight": torch.randn(64, 96, generator=generator),
        "weight_scale": torch.rand(64, 3, generator=generator) + 0.01,
        "weight_zero_point": torch.randint(-half, half, (64, 3), generator=generator).to(torch.int8) * (not symmetric),
    }
    kind = compressors.PackedQuantizationCompressor
    stored = kind.compress(state, scheme)
    assert torch.equal(packed_words.read_compressed_tensors(stored, bits), kind.decompress(stored, scheme)["weight"])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_itself_agrees(bits: int) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(bits))
    parts = mx.quantize(mx.array(weight.tolist()), group_size=64, bits=bits)
    expected = torch.tensor(mx.dequantize(*parts, group_size=64, bits=bits).tolist())
    words, scales, biases = (torch.tensor(part.tolist()) for part in parts)
    tensors = {"weight": words.to(torch.uint32), "scales": scales, "biases": biases}
    torch.testing.assert_close(packed_words.read_mlx(tensors, bits), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_the_decoder_of_transformers_agrees_on_fp8(form: str) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    dtype = torch.float8_e4m3fn if form == "e4m3" else torch.float8_e5m2
    codes = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    scales = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) + 0.5
    found = read_scaled({"codes": codes, "scales": scales}, 16, 32)
    assert torch.equal(found, Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32))


Q = "model.layers.0.self_attn.q_proj"
BAD: dict[str, tuple[str, dict[str, Any], dict[str, Tensor | None], str]] = {
    "block size": (
        "fp8 in blocks",
        {"weight_block_size": [8, 8]},
        {},
        r"scales have the shape \(2, 2\), expected \(4, 8\) for blocks of 8 × 8",
    ),
    "no block size": ("fp8 in blocks", {"weight_block_size": None}, {}, "config.json names no blocks"),
    "no scale": (
        "fp8 in blocks",
        {},
        {f"{Q}.weight_scale_inv": None},
        f"{Q}.weight cannot be read as fp8 .there is no {Q}.weight_scale_inv",
    ),
    "unknown": ("gptq", {}, {f"{Q}.SCB": torch.ones(1)}, r"q_proj.SCB \(F32\) has no known meaning in gptq"),
    "marlin": ("gptq", {"checkpoint_format": "marlin"}, {}, "checkpoint_format is 'marlin', expected gptq or gptq_v2"),
    "zeros": ("gptq", {}, {f"{Q}.qzeros": torch.ones(1, 1, dtype=torch.int32)}, r"qzeros have the shape \(1, 1\)"),
    "floats for words": (
        "gptq",
        {},
        {f"{Q}.qzeros": torch.ones(2, 8)},
        "qzeros is F32, expected I32",
    ),
    "integers for scales": (
        "fp8 in blocks",
        {},
        {f"{Q}.weight_scale_inv": torch.ones(4, 1, dtype=torch.uint8)},
        "scales is U8, expected",
    ),
    "no scales": ("gptq", {}, {f"{Q}.scales": None}, "it lacks 'scales'"),
    "gemv": ("awq", {"version": "gemv"}, {}, "version is 'gemv' of 4 bits, expected gemm of 4"),
    "order": (
        "gptq 3 bits, act-order",
        {},
        {f"{Q}.g_idx": torch.full((32,), 9, dtype=torch.int32)},
        "a column is in a group beyond 2",
    ),
    "shape": ("compressed-tensors", {}, {f"{Q}.weight_shape": torch.tensor([5, 5])}, "expected 2 to 8"),
    "method": (
        "gptq",
        {"quant_method": "aqlm"},
        {},
        r"already quantised \(quant_method 'aqlm'.*qweight.*reads plain weights and those of GPTQ",
    ),
    "no method": ("fp8 in blocks", {"quant_method": "what"}, {f"{Q}.weight_scale_inv": None}, "is already quantised"),
    "not finite": (
        "compressed-tensors, one scale",
        {},
        {f"{Q}.weight_scale": torch.full((1,), torch.inf)},
        "expected finite weights",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_refused_in_one_line(case: str, plain_folder: Path, tmp_path: Path) -> None:
    variant, settings, more, words = BAD[case]
    own, change = VARIANTS[variant]
    quantised(plain_folder, tmp_path / "codes", own | settings, change)
    file = tmp_path / "codes" / "model.safetensors"
    tensors = {name: one for name, one in (load_file(file) | more).items() if one is not None}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(HalfplateError, match=words) as error:
        compressed(tmp_path / "codes", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_damaged_files_and_transposed_matrices_are_refused(
    tiny_tokenizer: Any, plain_folder: Path, tmp_path: Path
) -> None:
    quantised(plain_folder, tmp_path / "cut", *VARIANTS["awq"])
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(HalfplateError, match=r"is cut short|is damaged"):
        open_source(str(tmp_path / "cut"))
    build_model("gpt2", n_embd=32, n_head=2, n_layer=2, vocab_size=len(tiny_tokenizer)).save_pretrained(
        tmp_path / "gpt2"
    )
    quantised(
        tmp_path / "gpt2",
        tmp_path / "codes",
        CT,
        VARIANTS["compressed-tensors"][1],
        lambda name: "mlp.c_" in name and name.endswith("weight"),
    )
    with pytest.raises(HalfplateError, match=r"transposed weights \(transformer.h.0.* is not read"):
        open_source(str(tmp_path / "codes"))
