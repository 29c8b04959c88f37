"""K types of GGUF files: blocks of 256 values against loops and the gguf package, whole files, embeddings, and stacked experts."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf_cases as cases
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from gguf_cores import core_of, difficult
from torch import nn

from halfplate.formats import Chain, CompressedLinear, WeightSpec
from halfplate.formats.quantizers.table import NON_LINEAR
from halfplate.models import gguf
from halfplate.models.experts import linear_experts
from halfplate.models.gguf_blocks import block_type
from halfplate.models.gguf_comparison import compare
from halfplate.models.gguf_header import check_header
from halfplate.models.gguf_writer import write_gguf
from halfplate.pattern import DENSE

# Those that differ where 256 divides the columns.
SUPER_TYPES = {
    "int6k": "Q6_K",
    "affine5k": "Q5_K",
    "affine4k": "Q4_K",
    "affine3k": "Q4_K",
    "int3k": "Q3_K",
    "affine2k": "Q2_K",
    "nl4s": "IQ4_XS",
}


def naive_super(kind: str, row: bytes, columns: int) -> list[float]:
    """The values of a row of a K type, value by value, as the comments of ggml's structures word them."""
    values: list[float] = []
    size = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "IQ4_XS": 136}[kind]
    for start in range(0, columns // 256 * size, size):
        block = row[start : start + size]
        for k in range(256):
            if kind in ("Q4_K", "Q5_K"):
                d, dmin = struct.unpack_from("<2e", block)
                g, packed = k // 32, block[4:16]
                if g < 4:
                    scale, minimum = packed[g] & 63, packed[g + 4] & 63
                else:
                    scale = packed[g + 4] & 15 | packed[g - 4] >> 6 << 4
                    minimum = packed[g + 4] >> 4 | packed[g] >> 6 << 4
                code = block[size - 128 + k // 64 * 32 + k % 32] >> (4 if k % 64 >= 32 else 0) & 15
                if kind == "Q5_K":
                    code |= (block[16 + k % 32] >> g & 1) << 4
                values.append(d * scale * code - dmin * minimum)
                continue
            if kind == "IQ4_XS":
                d, high = struct.unpack_from("<eH", block)
                g = k // 32
                scale = block[4 + g // 2] >> (4 if g % 2 else 0) & 15 | (high >> 2 * g & 3) << 4
                code = block[8 + 16 * g + k % 16] >> (4 if k % 32 >= 16 else 0) & 15
                values.append(d * (scale - 32) * NON_LINEAR[code])
                continue
            pair = k // 128 * 32 + k % 32, k % 128 // 32 * 2  # byte and shift of two bits
            if kind == "Q2_K":
                d, dmin = struct.unpack_from("<2e", block, 80)
                code = block[16 + pair[0]] >> pair[1] & 3
                values.append(d * (block[k // 16] & 15) * code - dmin * (block[k // 16] >> 4))
            elif kind == "Q3_K":
                (d,) = struct.unpack_from("<e", block, 108)
                code = (block[32 + pair[0]] >> pair[1] & 3) - (0 if block[k % 32] >> k // 32 & 1 else 4)
                g, packed = k // 16, block[96:108]
                scale = packed[g % 8] >> (4 if g >= 8 else 0) & 15 | (packed[8 + g % 4] >> 2 * (g // 4) & 3) << 4
                values.append(d * (scale - 32) * code)
            else:
                (d,) = struct.unpack_from("<e", block, 208)
                low = block[k // 128 * 64 + k % 64] >> (4 if k % 128 >= 64 else 0) & 15
                code = low | (block[128 + pair[0]] >> pair[1] & 3) << 4
                (scale,) = struct.unpack_from("<b", block, 192 + k // 16)
                values.append(d * scale * (code - 32))
    return values


@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("core_dtype", SUPER_TYPES)
def test_super_blocks_hold_the_values_of_the_core(core_dtype: str, group: int) -> None:
    kind = block_type(WeightSpec(5, 768, pattern=DENSE, core_dtype=core_dtype, group=group))
    if group == 16 and SUPER_TYPES[core_dtype] in ("Q4_K", "Q5_K", "IQ4_XS"):  # whose groups have 32 values
        assert kind is None
        return
    assert kind is not None
    assert kind.name == SUPER_TYPES[core_dtype]
    core = core_of(difficult(5, 768, group), core_dtype, group)
    rows = kind.encode(core)
    assert rows.shape[1] * 8 == kind.bits * 768
    wanted = core.dense()
    assert [naive_super(kind.name, row.tobytes(), 768) for row in rows] == wanted.tolist()
    read = dequantize(rows, GGMLQuantizationType[kind.name])
    assert np.array_equal(read, wanted.numpy())


WIDE = cases.Case("wide", "llama", {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
WIDE_EXPERTS = cases.Case(
    "wide experts",
    "qwen3_moe",
    {
        "hidden_size": 256,
        "head_dim": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
    },
)


def replaced(model: Any, turns: list[tuple[str, int]]) -> Any:
    """The model with its linears as codes of these types and groups, in turn; experts of one kind have one type."""
    for turn, (name, linear) in enumerate([*model.named_modules()]):
        if type(linear) is not nn.Linear or name == "lm_head":
            continue
        number = ord(name.rpartition(".")[2][0]) if ".experts." in name else turn
        core_dtype, group = turns[number % len(turns)]
        spec = WeightSpec(*linear.weight.shape, pattern=DENSE, core_dtype=core_dtype, group=group)
        core = core_of(linear.weight, core_dtype, group)
        model.set_submodule(name, CompressedLinear.from_weight(Chain.of(spec, core), spec, linear.bias))
    return model


def read_equals(model: Any, path: Path, embedding_type: str | None, half: bool = True) -> tuple[dict[str, Any], Any]:
    tensors = write_gguf(model, None, path, half, embedding_type)
    compared = compare(path, model.config, tensors)
    assert set(compared.rounded) <= {"model.embed_tokens.weight", "lm_head.weight"}
    return tensors, check_header(path)


@pytest.mark.parametrize("embedding", ["Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS", "Q4_1", "Q5_1"])
def test_a_file_of_k_types(embedding: str, tmp_path: Path) -> None:
    turns = [("affine4k", 32), ("int6k", 16), ("affine5k", 32), ("int3k", 16), ("affine2k", 16), ("int8", 32)]
    model = replaced(cases.build(WIDE), turns)
    tensors, contents = read_equals(model, tmp_path / "model.gguf", embedding)
    kinds = {key: stored.kind for key, stored in tensors.items()}
    assert {"Q4_K", "Q6_K", "Q5_K", "Q3_K", "Q2_K", "Q8_0"} <= set(kinds.values())
    assert kinds["model.embed_tokens.weight"] == kinds["lm_head.weight"] == embedding
    assert contents.metadata["general.file_type"] in (10, 12, 15, 17, 18, 7)


@pytest.mark.parametrize(
    ("core_dtype", "number"), [("affine4k", 14), ("affine5k", 16), ("int3k", 11), ("int6k", 18), ("nl4s", 30)]
)
def test_the_file_type_of_one_k_type(core_dtype: str, number: int, tmp_path: Path) -> None:
    model = replaced(cases.build(WIDE), [(core_dtype, 32)])
    _, contents = read_equals(model, tmp_path / "model.gguf", None)
    assert contents.metadata["general.file_type"] == number


def test_the_rounding_of_an_embedding_is_near(tmp_path: Path) -> None:
    model, path = cases.build(WIDE), tmp_path / "model.gguf"
    plain = model.model.embed_tokens.weight.detach()
    errors = []
    for kind in ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"):
        tensors = write_gguf(model, None, path, embedding_type=kind)
        compare(path, model.config, tensors)
        read = torch.from_numpy(tensors["model.embed_tokens.weight"].decoded())
        errors.append(float((read - plain).square().mean() / plain.square().mean()))
    assert errors == sorted(errors)
    assert errors[0] < 1e-3
    assert errors[-1] < 0.1


def test_experts_are_stacked_in_their_type(tmp_path: Path) -> None:
    model = replaced(linear_experts(cases.build(WIDE_EXPERTS)), [("affine4k", 32), ("int6k", 16)])
    tensors, contents = read_equals(model, tmp_path / "model.gguf", None, half=False)
    gate, up, down = (contents.entries[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
    assert {GGMLQuantizationType(entry.kind).name for entry in (gate, up, down)} == {"Q4_K", "Q6_K"}
    assert gate.shape == (4, 256, 256)
    again, report = gguf.load_model(tmp_path / "model.gguf", "m", gguf.read_config(tmp_path / "model.gguf", "m"))
    assert not report["missing_keys"]
    expert = model.model.layers[1].mlp.experts.expert(2)
    joined = again.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[2]
    assert torch.equal(joined, torch.cat([expert.gate_proj.matrix.dense(), expert.up_proj.matrix.dense()]))
    np.testing.assert_allclose(cases.logits(again), cases.logits(model), rtol=1e-3, atol=1e-3)
    assert all(stored.obstacle is None for stored in tensors.values())


def test_experts_of_different_types_are_multiplied_out(tmp_path: Path) -> None:
    model = replaced(linear_experts(cases.build(WIDE_EXPERTS)), [("affine4k", 32)])
    name = "model.layers.0.mlp.experts.1.up_proj"
    weight = model.get_submodule(name).matrix.dense()
    spec = WeightSpec(*weight.shape, pattern=DENSE, core_dtype="int4", group=32)
    chain = Chain.of(spec, core_of(weight, "int4", 32))
    model.set_submodule(name, CompressedLinear.from_weight(chain, spec, None))
    tensors = write_gguf(model, None, tmp_path / "model.gguf")
    assert compare(tmp_path / "model.gguf", model.config, tensors).rounded
    stored = tensors["model.layers.0.mlp.experts.up_proj.weight"]
    assert (stored.kind, stored.obstacle) == ("F16", "are of experts that have no type in common")
