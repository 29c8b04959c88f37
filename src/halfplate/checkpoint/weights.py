"""The safetensors files of a checkpoint: finding, checking, writing and hashing them."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from halfplate.checkpoint.config import read_json
from halfplate.errors import HalfplateError
from halfplate.formats.parts.core import INDEX
from halfplate.formats.spec import WeightSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_NBYTES = 5 * 10**9

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored and what its file's header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, from the headers of its files; no data is read.

    Raises HalfplateError on files that are missing, cut short or damaged, and on an index that does not agree with them.
    """
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file() or not index.is_file():
        return headers_of([folder / SINGLE_FILE])
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HalfplateError(f"{str(index)!r} has no weight_map; copy or write the checkpoint again")
    for name in weight_map.values():
        # Path would drop what escapes the folder on one system but not on another; so only plain names pass.
        if not isinstance(name, str) or not name.endswith(".safetensors") or any(sign in name for sign in "/\\:\0"):
            raise HalfplateError(
                f"weight_map in {str(index)!r} names the file {name!r}, expected a .safetensors file of the same folder"
            )
    found = headers_of([folder / name for name in sorted(set(weight_map.values()))])
    for tensor in sorted(found.keys() | weight_map.keys()):
        if tensor not in found:
            raise HalfplateError(
                f"{tensor} is missing from {weight_map[tensor]}, where {str(index)!r} puts it; copy or write the checkpoint again"
            )
        if weight_map.get(tensor) != found[tensor].file.name:
            raise HalfplateError(
                f"{tensor} is in {found[tensor].file.name}, which {str(index)!r} does not say; copy or write the checkpoint again"
            )
    return found


def headers_of(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of some safetensors files by name; raises HalfplateError naming a file that is damaged."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            if not file.is_file():
                raise HalfplateError(
                    f"the weight file {str(file)!r} does not exist; copy or write the checkpoint again"
                )
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - the handle is not a mapping
                    piece = tensors.get_slice(name)
                    if name in found:
                        raise HalfplateError(
                            f"{name} is both in {found[name].file.name} and in {file.name}; write the checkpoint again"
                        )
                    if piece.get_dtype() not in _DTYPES:
                        raise HalfplateError(
                            f"{name} in {str(file)!r} has the element type {piece.get_dtype()}, expected one of {', '.join(_DTYPES)}"
                        )
                    found[name] = StoredTensor(file, tuple(piece.get_shape()), _DTYPES[piece.get_dtype()])
        except (SafetensorError, OSError, ValueError) as error:
            raise HalfplateError(
                f"the weight file {str(file)!r} is damaged or cut short: {error}; copy or write the checkpoint again"
            ) from None
    return found


def check_layout(found: Mapping[str, StoredTensor], specs: Mapping[str, WeightSpec]) -> None:
    """Raise HalfplateError unless every compressed module has exactly the tensors, shapes and types of its layout.

    A bias is allowed; whether it has to be there is known only from the model.
    """
    below: dict[str, dict[str, StoredTensor]] = {name: {} for name in specs}
    for full, tensor in found.items():
        module, _, name = full.rpartition(".")
        if module in below:
            below[module][name] = tensor
        elif name == INDEX:
            raise HalfplateError(
                f"{full} belongs to a compressed matrix that quantization_config.modules does not name; copy or write the checkpoint again"
            )
    for module, spec in specs.items():
        layout, stored = spec.layout(), below[module]
        for name, (shape, dtype) in layout.items():
            if name not in stored:
                raise HalfplateError(
                    f"{module}.{name} is missing, expected {_words(shape, dtype)}; copy or write the checkpoint again"
                )
            if (stored[name].shape, stored[name].dtype) != (shape, dtype):
                raise HalfplateError(
                    f"{module}.{name} in {stored[name].file.name} is {_words(stored[name].shape, stored[name].dtype)}, expected {_words(shape, dtype)} "
                    "from config.json; copy or write the checkpoint again"
                )
        if "bias" in stored and stored["bias"].shape != (spec.d_out,):
            raise HalfplateError(
                f"{module}.bias has the shape {stored['bias'].shape}, expected ({spec.d_out},); copy or write the checkpoint again"
            )
        for name in stored.keys() - layout.keys() - {"bias"}:
            raise HalfplateError(
                f"{module}.{name} in {stored[name].file.name} does not belong to a {spec.format} matrix; write the checkpoint again"
            )


def _words(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {shape}"


def read_tensors(found: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its name, one at a time."""
    for file in sorted({tensor.file for tensor in found.values()}):
        with safe_open(file, framework="pt") as tensors:
            # The file may hold others, which the caller has no memory for.
            for name in sorted(name for name, tensor in found.items() if tensor.file == file):
                yield name, tensors.get_tensor(name)


def sha256(tensor: Tensor) -> str:
    """Hexadecimal SHA-256 of the bytes of a tensor, in the order in which safetensors stores them."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def write_tensors(
    tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], folder: Path, max_shard_nbytes: int
) -> dict[str, str]:
    """Write tensors, each cast to its type in `dtypes`, to one safetensors file, or to several with an index.

    Returns the SHA-256 of each. A file exceeds `max_shard_nbytes` only where a single tensor does. Raises
    HalfplateError on a value that is not finite.
    """
    shards: list[list[str]] = [[]]
    nbytes, total = 0, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * dtypes[name].itemsize
        if shards[-1] and nbytes + size > max_shard_nbytes:
            shards.append([])
            nbytes = 0
        shards[-1].append(name)
        nbytes, total = nbytes + size, total + size

    checksums, weight_map = {}, {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        stored = {name: tensors[name].detach().to("cpu", dtypes[name]).contiguous() for name in names}
        for name, tensor in stored.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise HalfplateError(
                    f"{name} holds values that are not finite in {dtypes[name]}; choose a wider type or another method"
                )
            checksums[name] = sha256(tensor)
            weight_map[name] = file
        # One metadata entry only: safetensors writes several in no fixed order.
        save_file(stored, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return checksums
