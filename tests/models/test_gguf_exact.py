"""Codes of compressed matrices in GGUF files: each type against loops over the specification, each family read back and by llama.cpp."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_cases as cases
import numpy as np
import pytest
import torch
from gguf_cores import core_of, difficult
from torch import nn

from halfplate.errors import HalfplateError
from halfplate.formats import Chain, CompressedLinear, WeightSpec, stand_in
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.quantizers.table import NON_LINEAR
from halfplate.models import gguf
from halfplate.models.gguf_blocks import BLOCK_TYPES, block_type, common_type, obstacle
from halfplate.models.gguf_comparison import compare
from halfplate.models.gguf_header import check_header
from halfplate.models.gguf_writer import write_gguf
from halfplate.pattern import DENSE

TYPES = {
    "int2": "Q4_0",
    "int3": "Q4_0",
    "int4": "Q4_0",
    "nl4": "IQ4_NL",
    "int5": "Q5_0",
    "int6": "Q8_0",
    "int8": "Q8_0",
    "nl3": "Q8_0",
    "nl5": "Q8_0",
    "int3k": "Q4_0",
    "nl4k": "IQ4_NL",
    "nl4s": "IQ4_NL",
    "int6k": "Q8_0",
    "nl3k": "Q8_0",
    "nl5k": "Q8_0",
    "affine5": "Q5_1",
    "affine5k": "Q5_1",
    "affine4": "Q4_1",
    "affine4k": "Q4_1",
    "affine3": "Q4_1",
    "affine3k": "Q4_1",
    "affine2": "Q4_1",
    "affine2k": "Q4_1",
}
CASES = {case.name: case for case in cases.CASES}


def naive(kind: str, row: bytes, columns: int) -> list[float]:
    """The values of a row, block by block, as ggml's specification words them."""
    values: list[float] = []
    sizes = {"Q4_0": 18, "IQ4_NL": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}
    for start in range(0, columns // 32 * sizes[kind], sizes[kind]):
        (d,) = struct.unpack_from("<e", row, start)
        if kind == "Q8_0":
            values += [d * q for q in struct.unpack_from("<32b", row, start + 2)]
            continue
        (m,) = struct.unpack_from("<e", row, start + 2) if kind in ("Q4_1", "Q5_1") else (0.0,)
        places = {"Q5_0": 2, "Q5_1": 4}
        fifth = struct.unpack_from("<I", row, start + places[kind])[0] if kind in places else 0
        nibbles = row[start + sizes[kind] - 16 : start + sizes[kind]]
        for place in range(32):
            code = nibbles[place] & 15 if place < 16 else nibbles[place - 16] >> 4
            code += 16 * (fifth >> place & 1)
            number = {"Q4_0": code - 8, "Q5_0": code - 16}.get(kind, code)
            number = NON_LINEAR[code] if kind == "IQ4_NL" else number
            values.append(d * number + m)
    return values


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("core_dtype", TYPES)
def test_blocks_hold_the_values_of_the_core(core_dtype: str, group: int) -> None:
    core = core_of(difficult(5, 160, group), core_dtype, group)
    kind = block_type(WeightSpec(5, 160, pattern=DENSE, core_dtype=core_dtype, group=group))
    assert kind is not None
    assert kind.name == TYPES[core_dtype]
    rows = kind.encode(core)
    assert rows.shape[1] * 8 == kind.bits * 160
    assert [naive(kind.name, row.tobytes(), 160) for row in rows] == core.dense().tolist()


def test_the_smallest_type_comes_first() -> None:
    bits = [kind.bits for kind in BLOCK_TYPES]
    assert bits == sorted(bits)


def test_every_quantizer_has_a_type() -> None:
    assert set(TYPES) == set(QUANTIZERS.own)
    assert "in groups of 16 and 64 columns" in str(
        obstacle(WeightSpec(8, 64, pattern=DENSE, core_dtype="int6k", group=16))
    )


def test_matrices_in_one_tensor_need_a_common_type() -> None:
    def kind_of(*cores: tuple[str, int]) -> str | None:
        kind = common_type([WeightSpec(8, 256, pattern=DENSE, core_dtype=core, group=group) for core, group in cores])
        return None if kind is None else kind.name

    assert kind_of(("int4", 32), ("int3k", 64)) == "Q4_0"
    assert kind_of(("int4", 32), ("int8", 128)) == "Q8_0"
    assert kind_of(("affine4k", 32), ("affine2k", 32)) == "Q4_K"
    assert kind_of(("affine4", 32), ("affine4k", 32)) == "Q4_1"
    assert kind_of(("affine4", 32), ("int4", 32)) is None


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (WeightSpec(8, 64, core_dtype="int4"), "2:4 sparse"),
        (WeightSpec(8, 64, pattern=DENSE, core_dtype="int4", in_block=4), "have wrappers"),
        (WeightSpec(8, 64, pattern=DENSE, core_dtype="nl4", permuted=True), "have wrappers or other parts"),
        (WeightSpec(8, 72, pattern=DENSE, core_dtype="nl4"), "have 72 columns, which is not a multiple of 32"),
    ],
)
def test_what_no_type_holds(spec: WeightSpec, words: str) -> None:
    assert words in str(obstacle(spec))
    assert obstacle(WeightSpec(8, 72, pattern=DENSE, core_dtype="bf16")) is None


def compressed(case: cases.Case, embedding: str | None = "int8") -> Any:
    """The model of a case with every plain linear, its embedding and its head as codes, a type for each in turn."""
    model = cases.build(case)
    turns = list(TYPES)
    linears = [(name, part) for name, part in model.named_modules() if type(part) is nn.Linear]
    head: Any = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    for turn, (name, linear) in enumerate(linears):
        if (linear is head and tied) or name.endswith("mlp.gate"):
            continue
        core_dtype, group = turns[turn % len(turns)], (32, 64)[turn % 2]
        spec = WeightSpec(*linear.weight.shape, pattern=DENSE, core_dtype=core_dtype, group=group)
        core = core_of(linear.weight, core_dtype, group)
        model.set_submodule(name, CompressedLinear.from_weight(Chain.of(spec, core), spec, linear.bias))
    table: Any = model.get_input_embeddings()
    if embedding is not None and not tied:
        spec = WeightSpec(*table.weight.shape, pattern=DENSE, core_dtype=embedding, group=64)
        module = stand_in(table, spec, "model.embed_tokens")
        module.load_state_dict(core_of(table.weight, embedding, 64).tensors(), assign=True)
        model.set_submodule("model.embed_tokens", module.requires_grad_(False))
    return model


def multiplied_out(model: Any) -> dict[str, torch.Tensor]:
    state = {key: tensor for key, tensor in model.state_dict().items() if ".weight_" not in key}
    for name, part in model.named_modules():
        if hasattr(part, "matrix"):
            state[f"{name}.weight"] = part.matrix.dense()
    return state


@pytest.mark.parametrize("name", [case.name for case in cases.CASES if "," not in case.name or "tied" in case.name])
def test_every_family_holds_the_codes(name: str, tmp_path: Path) -> None:
    model, path = compressed(CASES[name]), tmp_path / "model.gguf"
    tensors = write_gguf(model, None, path, half=False)
    compared = compare(path, model.config, tensors)
    assert not compared.rounded
    assert compared.tensors == len(check_header(path).entries)
    kinds = {stored.kind for stored in tensors.values()}
    assert {"F32", "Q4_0", "Q8_0"} <= kinds
    again, report = gguf.load_model(path, path.name, gguf.read_config(path, path.name))
    assert not report["missing_keys"]
    ours = multiplied_out(model)
    for key, tensor in again.state_dict().items():
        if key in ours:  # not a tied head, which has no tensor
            torch.testing.assert_close(tensor, ours[key], rtol=0, atol=1e-6 if key.endswith("norm.weight") else 0)
    np.testing.assert_allclose(cases.logits(again), cases.logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "smollm3", "qwen3moe"])
def test_llama_cpp_computes_what_the_model_does(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from halfplate.exports.llama_logits import llama_logits, rounded_inputs

    model, path = compressed(CASES[name]), tmp_path / "model.gguf"
    tensors = write_gguf(model, None, path, half=False)
    theirs, plain = llama_logits(path, cases.text()), cases.logits(model)
    with rounded_inputs(model, {key: stored.kind for key, stored in tensors.items()}):
        alike = cases.logits(model)
    scale = np.abs(plain).max()
    # An input on the edge between two codes falls to either side; GELU, which llama.cpp reads from a table, puts many there.
    far = np.abs(theirs - alike) / scale
    assert np.median(far) < (0.02 if name == "gemma3" else 2e-6)
    assert far.max() < 0.05
    assert np.abs(theirs - plain).max() < 0.1 * scale


def test_the_file_says_its_types(tmp_path: Path) -> None:
    model = compressed(CASES["llama"])
    write_gguf(model, None, tmp_path / "model.gguf")
    contents = check_header(tmp_path / "model.gguf")
    assert contents.metadata["general.file_type"] in (2, 3, 7, 8, 9, 25)
    assert contents.metadata["general.quantization_version"] == 2


@pytest.mark.parametrize(("kind", "number"), [("q8_0", 8), ("F32", 0), ("bf16", 30), ("q4_0", 2)])
def test_the_type_of_a_dense_embedding(kind: str, number: int, tmp_path: Path) -> None:
    model = compressed(CASES["llama"], embedding=None)
    tensors = write_gguf(model, None, tmp_path / "model.gguf", embedding_type=kind.upper())
    assert check_header(tmp_path / "model.gguf").entries["token_embd.weight"].kind == number
    rounded = compare(tmp_path / "model.gguf", model.config, tensors).rounded
    assert rounded == (() if kind == "F32" else ("model.embed_tokens.weight",))


@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_file_that_differs_is_found(place: int, tmp_path: Path) -> None:
    model, path = compressed(CASES["llama"]), tmp_path / "model.gguf"
    tensors = write_gguf(model, None, path)
    entries = list(check_header(path).entries.items())
    name, entry = entries[place]
    content = bytearray(path.read_bytes())
    content[entry.start + 3] ^= 64
    path.write_bytes(content)
    with pytest.raises(HalfplateError, match=f"the tensor {name} differs from"):
        compare(path, model.config, tensors)


def test_a_tensor_that_the_file_lacks_is_found(tmp_path: Path) -> None:
    model, path = compressed(CASES["llama"]), tmp_path / "model.gguf"
    tensors = write_gguf(model, None, path)
    more = {"model.layers.9.self_attn.q_proj.weight": tensors["model.layers.0.self_attn.q_proj.weight"]}
    with pytest.raises(HalfplateError, match=r"the tensor blk\.9\.attn_q\.weight is missing or has another shape"):
        compare(path, model.config, tensors | more)


def test_rows_that_a_type_does_not_divide(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=48, head_dim=12)
    for kind, multiple in (("Q8_0", 32), ("Q6_K", 256)):
        words = f"embedding_type='{kind.lower()}' needs rows of a multiple of {multiple} values"
        with pytest.raises(HalfplateError, match=words):
            write_gguf(model, None, tmp_path / "model.gguf", embedding_type=kind)
