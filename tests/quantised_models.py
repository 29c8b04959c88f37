"""Tiny models as other tools quantise them, made by loops over single values, with the values that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# The tensors of a module by their last names, and the values that they stand for, fp32.
Made = tuple[dict[str, Tensor], Tensor]
GROUP = 16
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def numbers(weight: Tensor, most: int, *shape: int) -> Tensor:
    """Some numbers below `most`, the same for equal weights."""
    seed = int(weight.double().sum().abs() * 1e6)
    return torch.randint(0, most, shape, generator=torch.Generator().manual_seed(seed))


def signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def words(rows: list[list[int]], bits: int) -> Tensor:
    """Each row of codes as int32 words, the first code in the lowest bits; 32 / bits codes a word, or a stream that crosses words."""
    found = []
    for row in rows:
        stream = sum(code << bits * place for place, code in enumerate(row))
        found.append([signed(stream >> 32 * word & 0xFFFFFFFF) for word in range(-(-len(row) * bits // 32))])
    return torch.tensor(found, dtype=torch.int32)


def valued(rows: int, columns: int, value: Callable[[int, int], float]) -> Tensor:
    return torch.tensor([[value(row, column) for column in range(columns)] for row in range(rows)])


def gptq(bits: int = 4, version: int = 1, ordered: bool = False) -> Callable[[Tensor], Made]:
    def change(weight: Tensor) -> Made:
        rows, columns = weight.shape
        codes, zeros = (
            numbers(weight, 1 << bits, rows, columns),
            1 + numbers(weight, (1 << bits) - 1, columns // GROUP, rows),
        )
        scales = (torch.arange(1, 1 + zeros.numel()).reshape(zeros.shape) / 4096).half()
        group = torch.arange(columns) // GROUP
        if ordered:
            group = group[torch.randperm(columns, generator=torch.Generator().manual_seed(3))]
        of, own, zero, q = group.tolist(), scales.tolist(), zeros.tolist(), codes.tolist()
        values = valued(
            rows, columns, lambda row, column: own[of[column]][row] * (q[row][column] - zero[of[column]][row])
        )
        parts = {
            "qweight": words(codes.tolist(), bits).T,
            "qzeros": words((zeros - int(version == 1)).tolist(), bits),
            "scales": scales,
        }
        return parts | ({"g_idx": group.int()} if ordered else {}), values

    return change


def awq(weight: Tensor) -> Made:
    rows, columns = weight.shape
    codes, zeros = numbers(weight, 16, columns, rows), numbers(weight, 16, columns // GROUP, rows)
    scales = (torch.arange(1, 1 + zeros.numel()).reshape(zeros.shape) / 4096).half()

    def packed(table: Tensor) -> Tensor:
        found = torch.empty(len(table), rows // 8, dtype=torch.int32)
        for line, row in enumerate(table.tolist()):
            for word in range(rows // 8):
                eight = row[8 * word : 8 * word + 8]
                places = (0, 4, 1, 5, 2, 6, 3, 7)  # of the values 0, 1, 2, …
                found[line, word] = signed(sum(code << 4 * place for code, place in zip(eight, places, strict=True)))
        return found

    own, zero, q = scales.tolist(), zeros.tolist(), codes.tolist()
    values = valued(
        rows, columns, lambda row, column: own[column // GROUP][row] * (q[column][row] - zero[column // GROUP][row])
    )
    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}, values


def packed_int(bits: int = 4, zeroed: bool = False, whole: bool = False) -> Callable[[Tensor], Made]:
    """pack-quantized of compressed-tensors. whole: one scale for the matrix."""

    def change(weight: Tensor) -> Made:
        rows, columns = weight.shape
        groups = 1 if whole else columns // GROUP
        codes, half = numbers(weight, 1 << bits, rows, columns), 1 << bits - 1
        zeros = numbers(weight, 1 << bits, rows, groups) if zeroed else torch.full((rows, groups), half)
        scales = torch.full((1,), 0.01) if whole else torch.arange(1, 1 + rows * groups).reshape(rows, groups) / 4096
        own, zero, q = scales.expand(rows, groups).tolist(), zeros.tolist(), codes.tolist()
        width = columns // groups
        values = valued(
            rows, columns, lambda row, column: own[row][column // width] * (q[row][column] - zero[row][column // width])
        )
        parts = {
            "weight_packed": words(codes.tolist(), bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([rows, columns]),
        }
        return parts | ({"weight_zero_point": words(zeros.T.tolist(), bits).T} if zeroed else {}), values

    return change


def scaled(
    form: str, name: str = "weight_scale_inv", codes: torch.dtype = torch.float8_e4m3fn
) -> Callable[[Tensor], Made]:
    """FP8, or int8, with scales of `blocks` of 16 × 32, of `rows`, or of the whole `matrix`."""

    def change(weight: Tensor) -> Made:
        rows, columns = weight.shape
        height, width = {"blocks": (16, 32), "rows": (1, columns), "matrix": (rows, columns)}[form]
        shape = {"matrix": ()}.get(form, (-(-rows // height), -(-columns // width)))
        scales = torch.rand(shape, generator=torch.Generator().manual_seed(rows)) + 0.5
        stored = (weight * (1 if codes.is_floating_point else 500)).to(codes)
        own, q = scales.reshape(-(-rows // height), -(-columns // width)).tolist(), stored.float().tolist()
        values = valued(rows, columns, lambda row, column: q[row][column] * own[row // height][column // width])
        beside = {"input_scale": torch.ones(1)} if form == "matrix" else {}
        return {"weight": stored, name: scales} | beside, values

    return change


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks (experts, d_out, groups, 16), scales and values (experts, d_in, d_out) of a tensor of this shape."""
    experts, columns, rows = weight.shape
    codes, scales = numbers(weight, 16, experts, rows, columns), 118 + numbers(weight, 8, experts, rows, columns // 32)
    blocks, values = torch.empty(experts, rows, columns // 32, 16, dtype=torch.uint8), torch.empty(weight.shape)
    for expert in range(experts):
        for row in range(rows):
            for column in range(0, columns, 2):
                low, high = int(codes[expert, row, column]), int(codes[expert, row, column + 1])
                blocks[expert, row, column // 32, column % 32 // 2] = low + 16 * high
                power = 2.0 ** (int(scales[expert, row, column // 32]) - 127)
                for place, code in ((column, low), (column + 1, high)):
                    values[expert, place, row] = (-1) ** (code >> 3) * FP4[code & 7] * power
    return blocks, scales.to(torch.uint8), values


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 32]}
CT: dict[str, Any] = {"quant_method": "compressed-tensors"}
CT_BLOCKS = CT | {"config_groups": {"group_0": {"weights": {"block_structure": [16, 32]}}}}
# What config.json says, and what becomes of a matrix.
VARIANTS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Made]]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, gptq()),
    "gptq 2 bits, version 2": ({"quant_method": "gptq", "bits": 2, "checkpoint_format": "gptq_v2"}, gptq(2, 2)),
    "gptq 3 bits, act-order": ({"quant_method": "gptq", "bits": 3}, gptq(3, 1, True)),
    "gptq 8 bits": ({"quant_method": "gptq", "bits": 8}, gptq(8)),
    "awq": ({"quant_method": "awq", "bits": 4}, awq),
    "compressed-tensors": (CT, packed_int()),
    "compressed-tensors 8 bits, zeros": (CT, packed_int(8, zeroed=True)),
    "compressed-tensors, one scale": (CT, packed_int(whole=True)),
    "compressed-tensors fp8": (CT, scaled("rows", "weight_scale")),
    "compressed-tensors fp8 in blocks": (CT_BLOCKS, scaled("blocks", "weight_scale")),
    "compressed-tensors int8": (CT, scaled("rows", "weight_scale", torch.int8)),
    "fp8 in blocks": (FP8, scaled("blocks")),
    "fp8 per tensor": ({"quant_method": "fp8"}, scaled("matrix", "weight_scale")),
    "fp8 per row": ({"quant_method": "fbgemm_fp8"}, scaled("rows", "weight_scale")),
    "fp8 of five exponent bits": (FP8, scaled("blocks", codes=torch.float8_e5m2)),
}


def quantised(
    folder: Path,
    target: Path,
    settings: dict[str, Any],
    change: Callable[[Tensor], Made],
    of: Callable[[str], bool] = lambda name: name.endswith("_proj.weight"),
) -> dict[str, Tensor]:
    """Write a copy of the model in `folder` whose matrices `of` are what `change` makes of them; returns the values of all its tensors."""
    target.mkdir()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        values[name], tensors[name] = tensor, tensor
        if of(name):
            del tensors[name]
            parts, values[name] = change(tensor.float())
            tensors |= {name.removesuffix("weight") + leaf: part.contiguous() for leaf, part in parts.items()}
    write(folder, target, tensors, settings)
    return values


def write(folder: Path, target: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None) -> None:
    """Write `tensors` to `target` beside a copy of the other files of `folder`. settings: the `quantization_config`."""
    target.mkdir(exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | ({"quantization_config": settings} if settings else {})))
    for file in [*folder.glob("tokenizer*"), *folder.glob("generation_config.json")]:
        (target / file.name).write_bytes(file.read_bytes())
