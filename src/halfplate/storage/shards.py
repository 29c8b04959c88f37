"""The weight files of a model folder: `model.safetensors`, or several with an index."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from halfplate.storage.tensor_file import TensorFileWriter

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_NBYTES = 5 * 10**9
Entry = tuple[torch.dtype, tuple[int, ...]]


def weight_map_of(index: Any) -> dict[str, str]:
    """The file of each tensor, from the content of an index; raises ValueError if it is invalid or leads out of its folder."""
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found:
        raise ValueError("it has no weight_map")
    for name in found.values():
        # Path parses separators differently on each system, so only plain names are allowed.
        if not isinstance(name, str) or not name.endswith(".safetensors") or any(sign in name for sign in "/\\:\0"):
            raise ValueError(f"its weight_map names the file {name!r}, expected a .safetensors file of the same folder")
    return found


def write_shards(
    entries: Mapping[str, Entry],
    folder: Path,
    max_shard_nbytes: int,
    write: Callable[[TensorFileWriter, str], str],
    in_order: bool = False,
) -> dict[str, str]:
    """Write tensors, in order, to one file or to several with an index; returns the SHA-256 of each.

    A file exceeds `max_shard_nbytes` only if a single tensor does.

    entries: element type and shape by name.
    write: writes the tensor with that name, and returns the SHA-256 of its bytes.
    in_order: as in TensorFileWriter.
    """
    shards, total = _cut(entries, max_shard_nbytes)
    sha256: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with TensorFileWriter(folder / file, {name: entries[name] for name in names}, in_order=in_order) as writer:
            for name in names:
                sha256[name], weight_map[name] = write(writer, name), file
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sha256


def _cut(entries: Mapping[str, Entry], max_shard_nbytes: int) -> tuple[list[list[str]], int]:
    """The names in each file, and the bytes of all tensors."""
    shards: list[list[str]] = [[]]
    nbytes = total = 0
    for name, (dtype, shape) in entries.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and nbytes + size > max_shard_nbytes:
            shards.append([])
            nbytes = 0
        shards[-1].append(name)
        nbytes, total = nbytes + size, total + size
    return shards, total
