"""Folders of models that other tools quantised (GPTQ, AWQ, compressed-tensors, FP8 in blocks): their matrices in floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfplate.dtypes import STORED
from halfplate.errors import HalfplateError
from halfplate.models.configuration import QUANTISED_PARTS, quantisation_of, read_entries
from halfplate.models.packed_words import WORD, read_awq, read_compressed_tensors, read_gptq
from halfplate.models.weight_files import weight_paths
from halfplate.storage.tensor_file import DamagedFile, StoredTensor, pieces, read_header, read_tensor

FP8 = "F8_E4M3"
# The tensor that shows a matrix of codes, and those that may stand beside it.
PARTS = {
    "gptq": ("qweight", ("qzeros", "scales", "g_idx")),
    "awq": ("qweight", ("qzeros", "scales")),
    "compressed-tensors": ("weight_packed", ("weight_scale", "weight_shape", "weight_zero_point")),
    "fp8": ("weight", ("weight_scale_inv",)),
}
METHODS = tuple(PARTS)


@dataclass(frozen=True)
class QuantisedMatrix:
    """A matrix of codes: its tensors by their name below the module, and what they mean.

    read: turns the tensors into values, fp32 of `shape`.
    """

    parts: Mapping[str, StoredTensor]
    shape: tuple[int, int]
    read: Callable[[Mapping[str, Tensor]], Tensor]

    def values(self) -> Tensor:
        """The matrix in fp32."""
        return self.read({name: _read(stored) for name, stored in self.parts.items()})


@dataclass(frozen=True)
class QuantisedFolder:
    """A quantised model: its `config.json`, its matrices of codes and its other tensors, by their name in a plain model.

    dtype: that the configuration names, fp16 if it names none.
    """

    method: str
    entries: dict[str, Any]
    dtype: torch.dtype
    matrices: dict[str, QuantisedMatrix]
    others: dict[str, StoredTensor]


def open_quantised(name: str) -> QuantisedFolder | None:
    """The model in the folder `name`; None if it is not a folder, or if its files do not hold codes of one of `METHODS`.

    Raises HalfplateError for variants of these formats that are not read, and for damaged files.
    """
    path = Path(name)
    if not (path / "config.json").is_file():
        return None
    entries = read_entries(name, path)
    method = quantisation_of(entries)
    if method not in PARTS:
        return None
    settings = entries.get("quantization_config") or entries["compression_config"]
    found: dict[str, StoredTensor] = {}
    for file in weight_paths(name, path):
        try:
            found |= read_header(file)
        except DamagedFile as damage:
            raise HalfplateError(f"model={name!r}: {damage}") from None
    matrices, others = _sorted(name, method, settings, found)
    stated = entries.get("dtype") or entries.get("torch_dtype")
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in STORED.values()}
    return (
        QuantisedFolder(method, entries, dtypes.get(str(stated), torch.float16), matrices, others) if matrices else None
    )


def _sorted(
    name: str, method: str, settings: dict[str, Any], found: Mapping[str, StoredTensor]
) -> tuple[dict[str, QuantisedMatrix], dict[str, StoredTensor]]:
    """The matrices of codes and the other tensors."""
    mark, beside = PARTS[method]
    matrices, others = {}, dict(found)
    for full in found:
        module, _, leaf = full.rpartition(".")
        if leaf != mark or (method == "fp8" and found[full].kind != FP8):
            continue
        parts = {part: others.pop(f"{module}.{part}") for part in (mark, *beside) if f"{module}.{part}" in found}
        try:
            matrices[f"{module}.weight"] = MAKERS[method](parts, settings)
        except (KeyError, ValueError, TypeError, IndexError, ZeroDivisionError) as error:
            raise HalfplateError(
                f"model={name!r}: {module} cannot be read as {method} ({error!r}); pass the fp32, bf16 or fp16 model it was made from"
            ) from None
    for full, stored in others.items():
        if QUANTISED_PARTS.search(full) or stored.kind.startswith("F8"):
            raise HalfplateError(
                f"model={name!r}: {full} has no known meaning in {method}; pass the fp32, bf16 or fp16 model it was made from"
            )
    return matrices, others


def _gptq(parts: Mapping[str, StoredTensor], settings: dict[str, Any]) -> QuantisedMatrix:
    version = settings.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format is {version!r}, expected gptq or gptq_v2")
    words, rows = parts["qweight"].shape
    # Modules may differ in bits; the order of the inputs has an entry for each of them.
    columns = parts["g_idx"].shape[0] if "g_idx" in parts else words * WORD // int(settings["bits"])
    bits = words * WORD // columns
    return QuantisedMatrix(parts, (rows, columns), partial(read_gptq, bits=bits, zeros_less_one=version == "gptq"))


def _awq(parts: Mapping[str, StoredTensor], settings: dict[str, Any]) -> QuantisedMatrix:
    version, bits = str(settings.get("version", "gemm")).lower(), settings.get("bits", 4)
    if version != "gemm" or bits != 4:
        raise ValueError(f"version is {version!r} of {bits} bits, expected gemm of 4")
    columns, words = parts["qweight"].shape
    return QuantisedMatrix(parts, (words * WORD // 4, columns), read_awq)


def _compressed_tensors(parts: Mapping[str, StoredTensor], settings: dict[str, Any]) -> QuantisedMatrix:
    rows, columns = (int(side) for side in read_tensor(parts["weight_shape"]))
    bits = parts["weight_packed"].shape[1] * WORD // columns
    return QuantisedMatrix(parts, (rows, columns), partial(read_compressed_tensors, bits=bits))


def _fp8(parts: Mapping[str, StoredTensor], settings: dict[str, Any]) -> QuantisedMatrix:
    rows, columns = parts["weight"].shape
    height, width = (int(side) for side in settings.get("weight_block_size") or (128, 128))
    if parts["weight_scale_inv"].shape != (-(-rows // height), -(-columns // width)):
        raise ValueError(
            f"weight_scale_inv has the shape {parts['weight_scale_inv'].shape}, blocks are {height} × {width}"
        )

    def read(tensors: Mapping[str, Tensor]) -> Tensor:
        scales = tensors["weight_scale_inv"].float().repeat_interleave(height, 0)[:rows]
        return tensors["weight"].float() * scales.repeat_interleave(width, 1)[:, :columns]

    return QuantisedMatrix(parts, (rows, columns), read)


MAKERS: dict[str, Callable[[Mapping[str, StoredTensor], dict[str, Any]], QuantisedMatrix]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
}


def _read(stored: StoredTensor) -> Tensor:
    if stored.kind != FP8:
        return read_tensor(stored)
    content = bytearray().join(pieces(stored))
    return torch.frombuffer(content, dtype=torch.float8_e4m3fn).reshape(stored.shape)
